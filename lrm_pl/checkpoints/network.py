"""Loading of network weights from a checkpoint."""

from torch import Tensor, nn

from lrm_pl.checkpoints.index import Checkpoint, CheckpointError
from lrm_pl.checkpoints.tensors import read_tensors, require_tensors, tensor_names
from lrm_pl.models.encoder import ImageEncoder

_NETWORK, _AVERAGE = "network.", "average."


def network_tensors(lrm: nn.Module) -> dict[str, Tensor]:
    """Return the weights and buffers of a network by checkpoint name (``network.*``), without copying them."""
    return {f"{_NETWORK}{name}": tensor for name, tensor in lrm.state_dict().items()}


def require_network(checkpoint: Checkpoint, lrm: nn.Module) -> None:
    """Check that the names and shapes of the weights in a checkpoint and in a network are equal.

    Raises:
        CheckpointError: Weights are missing, are unexpected or have a different shape.
    """
    require_tensors(checkpoint, network_tensors(lrm), _NETWORK)


def load_network(checkpoint: Checkpoint, lrm: nn.Module, *, average: bool = False) -> None:
    """Load weights into a network that is not sharded.

    Args:
        checkpoint: The checkpoint to read.
        lrm: The network.
        average: Whether to load the moving average of the weights, for weights that have an average.

    Raises:
        CheckpointError: The checkpoint belongs to a different model or has no moving average.
    """
    require_network(checkpoint, lrm)
    read_tensors(checkpoint, network_tensors(lrm))
    for module in lrm.modules():
        if isinstance(module, ImageEncoder):
            module.has_weights = True
    if average:
        load_average(checkpoint, lrm)


def load_average(checkpoint: Checkpoint, lrm: nn.Module) -> None:
    """Replace weights with their moving average. All ranks of a sharded network must call this together.

    Raises:
        CheckpointError: The checkpoint has no moving average.
    """
    weights = lrm.state_dict()
    read_tensors(checkpoint, {f"{_AVERAGE}{name}": weights[name] for name in averaged_names(checkpoint)})


def averaged_names(checkpoint: Checkpoint) -> list[str]:
    """Return the names of the parameters whose moving average a checkpoint contains.

    Raises:
        CheckpointError: The checkpoint has no moving average.
    """
    names = [name.removeprefix(_AVERAGE) for name in tensor_names(checkpoint) if name.startswith(_AVERAGE)]
    if not names:
        raise CheckpointError(
            subject=checkpoint.path,
            expected="a moving average of the weights",
            found="none, because the run did not use lrm_pl.training.ema.WeightAverage",
            remedy="omit --average, or set `validate` of WeightAverage to false in the config",
        )
    return names
