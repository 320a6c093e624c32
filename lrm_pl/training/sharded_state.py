"""Strategy-independent access to weights, optimizer state and gradients, and copies of the state for checkpoints.

All strategies use the same tensor names, so a checkpoint written with one strategy can be read with any strategy.

    network.<parameter or buffer>                weights, float32
    adam.<parameter>.{step,exp_avg,exp_avg_sq}   state of AdamW
    average.<parameter>                          moving average of the weights, if enabled
"""

import dataclasses
from collections.abc import Mapping
from typing import Protocol, runtime_checkable

import lightning as L
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lrm_pl.checkpoints.index import Checkpoint
from lrm_pl.checkpoints.network import network_tensors
from lrm_pl.checkpoints.tensors import read_tensors
from lrm_pl.kernels.device import CopyStream, host_buffer, on_cpu

#: Names of AdamW's moment estimates in its state.
MOMENT_NAMES = ("exp_avg", "exp_avg_sq")


@dataclasses.dataclass(frozen=True)
class FlatShard:
    """A contiguous range of a flattened tensor that this rank stores, as partitioned by DeepSpeed ZeRO.

    Attributes:
        local: (N,) elements of the range, which may be empty.
        start: Index of the first local element in the flattened tensor.
        shape: Shape of the full tensor.
    """

    local: Tensor
    start: int
    shape: torch.Size

    def full_tensor(self) -> Tensor:
        """Gather the full tensor. All ranks must call this together."""
        flat = self.local.new_zeros(self.shape.numel())
        flat[self.start : self.start + len(self.local)] = self.local
        torch.distributed.all_reduce(flat)
        return flat.view(self.shape)

    def copy_(self, value: Tensor) -> None:
        """Copy the range of this rank from a full tensor."""
        self.local.copy_(value.flatten()[self.start : self.start + len(self.local)])


#: A tensor as stored by a strategy. It is replicated, a DTensor, or a flat shard.
StateTensor = Tensor | FlatShard


def full_tensor(tensor: StateTensor) -> Tensor:
    """Return the full tensor, which is gathered first if it is sharded. All ranks must call this together."""
    return tensor.full_tensor() if isinstance(tensor, FlatShard | DTensor) else tensor


def local_tensor(tensor: StateTensor) -> Tensor:
    """Return the elements stored on this rank, which share memory with the sharded tensor."""
    if isinstance(tensor, FlatShard):
        return tensor.local
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


class StateAccess:
    """Access to weights, optimizer state and gradients that are stored as replicated tensors or DTensors.

    The returned tensors share memory with the run. Call ``apply_changes`` after writing to them.

    Args:
        lrm: The network.
        optimizer: The optimizer of the strategy.
    """

    def __init__(self, lrm: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.lrm, self.optimizer = lrm, optimizer

    def network(self) -> dict[str, StateTensor]:
        """Return all weights and buffers in float32 by checkpoint name (``network.*``)."""
        return dict(network_tensors(self.lrm))

    def trainable(self) -> dict[str, StateTensor]:
        """Return the trainable weights by parameter name."""
        return {name: p.detach() for name, p in self.lrm.named_parameters() if p.requires_grad}

    def optimizer_state(self) -> dict[str, StateTensor]:
        """Return the state of AdamW by checkpoint name (``adam.*``). An empty state is initialized first."""
        tensors: dict[str, StateTensor] = {}
        for name, parameter in self.lrm.named_parameters():
            if parameter.requires_grad:
                state = adam_state(self.optimizer, parameter)
                tensors |= {f"adam.{name}.{key}": state[key] for key in ("step", *MOMENT_NAMES)}
        return tensors

    def apply_changes(self) -> None:
        """Update the network after in-place changes to the returned tensors. All ranks must call this together."""

    def gradient_norm(self) -> Tensor:
        """Return the 2-norm of the full gradient, a scalar that is equal on all ranks."""
        gradients = [p.grad for p in self._parameters() if p.grad is not None]
        return full_tensor(torch.nn.utils.get_total_norm(gradients))

    def clip_or_skip(self, norm: Tensor, limit: float | None, skip: Tensor) -> None:
        """Clip the gradient, or make the optimizer skip the step.

        This does not synchronize with the device if the optimizer is fused.

        Args:
            norm: Norm of the gradient as a scalar tensor.
            limit: Maximum norm. If None or 0, the gradient is not clipped.
            skip: Scalar tensor, which is 1 if the step must be skipped and 0 otherwise.
        """
        if limit:
            torch.nn.utils.clip_grads_with_norm_(self._parameters(), limit, norm)
        if self.optimizer.defaults["fused"]:
            self.optimizer.found_inf = skip  # type: ignore[attr-defined]  # the attribute that GradScaler sets
        elif skip.item():  # a GradScaler, which synchronizes too, is used; see LRMModule.configure_optimizers
            for parameter in self._parameters():
                parameter.grad = None

    def _parameters(self) -> list[nn.Parameter]:
        return [p for p in self.lrm.parameters() if p.requires_grad]


@runtime_checkable
class ProvidesStateAccess(Protocol):
    """Protocol for strategies that provide a subclass of ``StateAccess``."""

    def state_access(self, lrm: nn.Module) -> StateAccess:
        """Return the ``StateAccess`` of this strategy."""


def state_access(trainer: L.Trainer, lrm: nn.Module) -> StateAccess:
    """Return the ``StateAccess`` of the strategy of a trainer."""
    if isinstance(trainer.strategy, ProvidesStateAccess):
        return trainer.strategy.state_access(lrm)
    return StateAccess(lrm, trainer.optimizers[0])


def adam_state(optimizer: torch.optim.Optimizer, parameter: Tensor) -> dict[str, Tensor]:
    """Return the state of AdamW for a parameter. An empty state is initialized first."""
    state = optimizer.state[parameter]
    if not state:
        device = parameter.device if optimizer.defaults["fused"] else None  # same device as in AdamW
        state["step"] = torch.zeros((), dtype=torch.float32, device=device)
        for moment in MOMENT_NAMES:
            state[moment] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
    return state


class Snapshots:
    """Copy the state to the CPU, so that training can continue while a checkpoint is written.

    On an accelerator, tensors are copied on a separate stream into pinned buffers, which the next copy reuses.

    Args:
        device: The device on which this process trains.
    """

    def __init__(self, device: torch.device) -> None:
        self.stream = CopyStream(device)
        self._buffers: dict[str, Tensor] = {}

    def take(
        self, state: Mapping[str, StateTensor], *, sharded: bool, keep: bool = True
    ) -> dict[str, Tensor]:
        """Copy a state. All ranks must call this together.

        The copies are complete after ``stream.synchronize()`` returns. Call ``stream.block_current()`` before changing
        the state. Do not call this method again until the copies are complete and written.

        Args:
            state: Mapping from name to tensor. Tensors are gathered and copied one at a time to limit GPU memory usage.
            sharded: Whether to copy the local shards of DTensors instead of full tensors.
            keep: Whether this rank keeps the copies. Ranks that do not keep them still participate in gathering.
        """
        copies = {}
        with (
            self.stream.after_current()
        ):  # tensors are gathered on the same stream, so that full tensors are freed one by one
            for name, tensor in state.items():
                source = tensor if sharded and isinstance(tensor, Tensor) else full_tensor(tensor)
                if keep:
                    copies[name] = self._copied(name, source.detach())
        return copies

    def _copied(self, name: str, tensor: Tensor) -> Tensor:
        if on_cpu(tensor):
            return tensor.to("cpu", copy=True)
        if name not in self._buffers:
            self._buffers[name] = host_buffer(tensor)
        self.stream.copy(self._buffers[name], tensor)
        return self._buffers[name]


def read_state(checkpoint: Checkpoint, state: Mapping[str, StateTensor]) -> None:
    """Read a checkpoint into the existing tensors of a state. All ranks must call this together.

    For flat shards, each rank temporarily holds the full tensors on the CPU.

    Raises:
        CheckpointError: A tensor is missing from the checkpoint or has a different shape.
    """
    shards = {name: tensor for name, tensor in state.items() if isinstance(tensor, FlatShard)}
    into = {name: tensor for name, tensor in state.items() if not isinstance(tensor, FlatShard)}
    full = {name: torch.empty(shard.shape, dtype=shard.local.dtype) for name, shard in shards.items()}
    read_tensors(checkpoint, into | full)
    for name, shard in shards.items():
        shard.copy_(full[name])
