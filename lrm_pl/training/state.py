"""The state of a run as named tensors, the same names under every strategy, so that any of them reads any checkpoint.

network.<parameter or buffer>            weights, float32
adam.<parameter>.{step,exp_avg,exp_avg_sq}   AdamW's state
average.<parameter>                      moving average of the weights, where one is kept
"""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from lrm_pl.checkpoints import Checkpoint, Format, averaged_names, read_tensors
from lrm_pl.kernels.device import CopyStream, host_buffer, on_cpu
from lrm_pl.training.parallelize import Part, whole

#: A tensor as a strategy holds it: whole, a DTensor, or a part.
Held = Tensor | Part

#: What AdamW keeps of each parameter.
MOMENTS = ("exp_avg", "exp_avg_sq")


def optimizer_tensors(lrm: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Name AdamW's state; the tensors are the optimizer's own, made where it has made none yet."""
    tensors: dict[str, Tensor] = {}
    for name, parameter in _optimized(lrm, optimizer):
        state = optimizer.state[parameter]
        if not state:
            device = parameter.device if optimizer.defaults["fused"] else None  # where each keeps it
            state["step"] = torch.zeros((), dtype=torch.float32, device=device)
            for moment in MOMENTS:
                state[moment] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
        tensors |= {f"adam.{name}.{key}": state[key] for key in ("step", *MOMENTS)}
    return tensors


def average_tensors(average: Mapping[str, Held]) -> dict[str, Held]:
    """Name the moving average."""
    return {f"average.{name}": held for name, held in average.items()}


class Snapshots:
    """Copies of a state on the CPU, so that training goes on while one is written.

    From an accelerator, tensors are copied on a stream of their own into pinned buffers, which the next copy reuses.

    Args:
        device: The device that the process trains on.
    """

    def __init__(self, device: torch.device) -> None:
        self.stream = CopyStream(device)
        self._buffers: dict[str, Tensor] = {}

    def take(self, state: Mapping[str, Held], layout: Format, *, writes: bool) -> dict[str, Tensor]:
        """Copy a state; all ranks call this together.

        The copies are complete after ``stream.synchronize()``. Whoever changes the state calls
        ``stream.hold_back_current()`` first. Until both are done, no other copy is taken.

        Args:
            state: What is copied, one tensor after the other: no second state fits beside the first on a GPU.
            layout: How it will lie: "sharded" keeps the shards of DTensors, "single" is whole tensors.
            writes: Whether this rank writes a layout "single"; the others get nothing.
        """
        copy = {}
        with self.stream.after_current():  # whole tensors are made there too, so each makes room for the next
            for name, held in state.items():
                tensor = whole(held) if layout == "single" or isinstance(held, Part) else held
                if layout == "sharded" or writes:
                    copy[name] = self._copied(name, tensor.detach())
        return copy

    def _copied(self, name: str, tensor: Tensor) -> Tensor:
        if on_cpu(tensor):
            return tensor.to("cpu", copy=True)
        if name not in self._buffers:
            self._buffers[name] = host_buffer(tensor)
        self.stream.copy(self._buffers[name], tensor)
        return self._buffers[name]


def read_state(checkpoint: Checkpoint, state: Mapping[str, Held]) -> None:
    """Fill a state in place from a checkpoint; all ranks call this together.

    Where a rank holds parts, it reads the whole tensors into its memory first.

    Raises:
        CheckpointError: A name is missing, or its shape is another.
    """
    parts = {name: held for name, held in state.items() if isinstance(held, Part)}
    into = {name: held for name, held in state.items() if not isinstance(held, Part)}
    wholes = {name: torch.empty(part.shape, dtype=part.local.dtype) for name, part in parts.items()}
    read_tensors(checkpoint, into | wholes)
    for name, part in parts.items():
        part.fill(wholes[name])


def load_average(checkpoint: Checkpoint, lrm: nn.Module) -> None:
    """Load the moving average of the weights that have one; all ranks of a sharded network call this together.

    Raises:
        CheckpointError: The checkpoint has no average.
    """
    weights = lrm.state_dict()
    read_state(checkpoint, average_tensors({name: weights[name] for name in averaged_names(checkpoint)}))


def _optimized(lrm: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, nn.Parameter]]:
    owned = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    return ((name, p) for name, p in lrm.named_parameters() if id(p) in owned)
