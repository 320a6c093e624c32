"""The network of a checkpoint: its weights by name, and loading them where nothing is sharded."""

from torch import Tensor, nn

from lrm_pl.checkpoints.index import Checkpoint, CheckpointError
from lrm_pl.checkpoints.tensors import read_tensors, tensor_names
from lrm_pl.models.encoder import ImageEncoder


def network_tensors(lrm: nn.Module) -> dict[str, Tensor]:
    """Name the weights; the tensors are the network's own."""
    return {f"network.{name}": tensor for name, tensor in lrm.state_dict().items()}


def require_network(checkpoint: Checkpoint, lrm: nn.Module) -> None:
    """Refuse a checkpoint of another model, before anything starts.

    Raises:
        CheckpointError: With the first differences.
    """
    found = {name: shape for name, shape in tensor_names(checkpoint).items() if name.startswith("network.")}
    expected = {name: tensor.shape for name, tensor in network_tensors(lrm).items()}
    wrong = [name for name, shape in expected.items() if found.get(name) != shape]
    strange = [name for name in found if name not in expected]
    if wrong or strange:
        raise CheckpointError(
            f"{checkpoint.path}: expected the weights of this model; missing or of another shape: {wrong[:3]} "
            f"({len(wrong)} in all), not of this model: {strange[:3]} ({len(strange)} in all); "
            "pass the config.yaml of the run that wrote it: -c RUN/config.yaml"
        )


def load_network(checkpoint: Checkpoint, lrm: nn.Module, *, average: bool = False) -> None:
    """Load weights into a network that is not sharded; with ``average``, the moving average of those that have one.

    Raises:
        CheckpointError: The checkpoint is of another model, or has no average.
    """
    require_network(checkpoint, lrm)
    read_tensors(checkpoint, network_tensors(lrm))
    for part in lrm.modules():
        if isinstance(part, ImageEncoder):
            part.has_weights = True
    if average:
        weights = lrm.state_dict()
        read_tensors(checkpoint, {f"average.{name}": weights[name] for name in averaged_names(checkpoint)})


def averaged_names(checkpoint: Checkpoint) -> list[str]:
    """List the weights that a checkpoint holds a moving average of.

    Raises:
        CheckpointError: There are none.
    """
    names = [
        name.removeprefix("average.") for name in tensor_names(checkpoint) if name.startswith("average.")
    ]
    if not names:
        raise CheckpointError(
            subject=checkpoint.path,
            expected="a moving average",
            found="none: the run kept none (its config names no lrm_pl.training.ema.WeightAverage)",
            remedy="leave --average out; in a config, WeightAverage's `validate`",
        )
    return names
