"""How the numbers of a run are reached under a strategy: weights, AdamW's moments, the gradient of a step.

The one here is of networks that PyTorch holds, whole or as DTensors; a strategy that holds them otherwise makes its
own (``MakesHolder``).
"""

from typing import Protocol, runtime_checkable

import lightning as L
import torch
from torch import Tensor, nn

from lrm_pl.checkpoints import network_tensors
from lrm_pl.training.gradient_guard import clip, gradient_norm
from lrm_pl.training.parallelize import Part
from lrm_pl.training.state import Held, optimizer_tensors


class Holder:
    """Weights, moments and gradients of a network and its optimizer.

    Args:
        lrm: The network.
        optimizer: The strategy's optimizer.
    """

    def __init__(self, lrm: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.lrm, self.optimizer = lrm, optimizer

    def network(self) -> dict[str, Held]:
        """Name the weights, ``network.*``, float32."""
        return dict(network_tensors(self.lrm))

    def trained(self) -> dict[str, Held]:
        """Name the weights that the optimizer moves, by the network's own names."""
        return {name: p.detach() for name, p in self.lrm.named_parameters() if p.requires_grad}

    def moments(self) -> dict[str, Held]:
        """Name AdamW's state, ``adam.*``, made where it has made none yet."""
        return dict(optimizer_tensors(self.lrm, self.optimizer))

    def changed(self) -> None:
        """Say that what was returned here has been written into; all ranks call this together."""

    def gradient_norm(self) -> Tensor:
        """Measure the 2-norm of the whole gradient, the same on every rank."""
        return gradient_norm(self._parameters())

    def clip_or_skip(self, norm: Tensor, limit: float | None, skip: Tensor) -> None:
        """Clip the gradient, or make the optimizer leave weights and moments as they are, without a look at ``skip``.

        Args:
            norm: () norm of the gradient.
            limit: Norm to clip to; None: not clipped.
            skip: () 1 if this step is to be skipped, else 0.
        """
        if limit:
            clip(self._parameters(), norm, limit)
        if self.optimizer.defaults["fused"]:
            self.optimizer.found_inf = skip  # type: ignore[attr-defined]  # as torch.amp.GradScaler sets it
        elif (
            skip.item()
        ):  # a GradScaler, which waits for the device anyway, see LRMModule.configure_optimizers
            for parameter in self._parameters():
                parameter.grad = None

    def _parameters(self) -> list[nn.Parameter]:
        return [p for p in self.lrm.parameters() if p.requires_grad]


@runtime_checkable
class MakesHolder(Protocol):
    """A strategy that holds the numbers of a run in a way of its own."""

    def make_holder(self, lrm: nn.Module) -> Holder:
        """Say how they are reached."""


def holder_of(trainer: L.Trainer, lrm: nn.Module) -> Holder:
    """Say how the numbers of a run are reached under its strategy."""
    if isinstance(trainer.strategy, MakesHolder):
        return trainer.strategy.make_holder(lrm)
    return Holder(lrm, trainer.optimizers[0])


def local(held: Held) -> Tensor:
    """Return what this rank holds, to be read or written."""
    if isinstance(held, Part):
        return held.local
    return held.to_local() if isinstance(held, torch.distributed.tensor.DTensor) else held
