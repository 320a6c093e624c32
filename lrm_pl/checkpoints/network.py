"""Loading of network weights from a checkpoint."""

from torch import Tensor, nn

from lrm_pl.checkpoints.index import Checkpoint, CheckpointError
from lrm_pl.checkpoints.tensors import read_tensors, require_tensors, tensor_names
from lrm_pl.models.encoder import ImageEncoder

_NETWORK, _AVERAGE = "network.", "average."


def network_tensors(lrm: nn.Module) -> dict[str, Tensor]:
    """Return a mapping from names in checkpoints (``network.*``) to the weights and buffers of a network."""
    return {f"{_NETWORK}{name}": tensor for name, tensor in lrm.state_dict().items()}


def require_network(checkpoint: Checkpoint, lrm: nn.Module) -> None:
    """Check that the weights in a checkpoint have the same names and shapes as the weights of a network.

    Raises:
        CheckpointError: Weights are missing, are unexpected or have a different shape.
    """
    require_tensors(checkpoint, network_tensors(lrm), _NETWORK)


def load_network(checkpoint: Checkpoint, lrm: nn.Module, *, average: bool = False) -> None:
    """Load weights into a network that is not sharded.

    Args:
        checkpoint: The checkpoint to read.
        lrm: The network.
        average: Whether to load the moving average of each weight that has one in the checkpoint.

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
    """Replace weights with their moving averages. All ranks must call this together if the network is sharded.

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
