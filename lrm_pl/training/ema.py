"""Exponential moving average of the weights in float32. Each rank averages the shards that it stores."""

import logging
from pathlib import Path
from typing import Any, final

import lightning as L
import torch
import yaml

from lrm_pl.data.batch import Batch
from lrm_pl.errors import InputError
from lrm_pl.training.module import LRMModule
from lrm_pl.training.sharded_state import FlatShard, StateTensor, local_tensor, state_access

logger = logging.getLogger(__name__)


@final
class WeightAverage(L.Callback):
    """Maintain an exponential moving average of the weights.

    After every step that is not skipped, the update is ``average = decay * average + (1 - decay) * weights``.

    Args:
        decay: Weight of the previous average.
        validate: Whether validation uses the average instead of the weights.
    """

    def __init__(self, decay: float = 0.9999, *, validate: bool = False) -> None:
        if not 0 <= decay < 1:
            raise InputError(expected="a decay in [0, 1)", found=decay)
        self.decay, self.validate = decay, validate
        self.average: dict[str, StateTensor] = {}
        self._loaded: dict[str, torch.Tensor] = {}  # full tensors of a Lightning checkpoint

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Check that the trainer has at most one ``WeightAverage`` callback.

        Raises:
            InputError: The trainer has several ``WeightAverage`` callbacks.
        """
        count = sum(isinstance(callback, WeightAverage) for callback in trainer.callbacks)  # type: ignore[attr-defined]
        if count > 1:
            raise InputError(
                expected="one WeightAverage in trainer.callbacks, because a checkpoint stores one average",
                found=count,
                remedy="remove the other WeightAverage callbacks",
            )

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Set the average to the weights, unless the average was read from a checkpoint."""
        assert isinstance(pl_module, LRMModule)
        if not self.average:
            self.reset(pl_module)
        for name, tensor in self._loaded.items():
            local_tensor(self.average[name]).copy_(tensor)
        self._loaded = {}

    def on_save_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Add the average to a Lightning checkpoint, unless the average is sharded."""
        if all(type(tensor) is torch.Tensor for tensor in self.average.values()):
            checkpoint["average"] = dict(self.average)

    def on_load_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Restore the average from a Lightning checkpoint."""
        self._loaded = checkpoint.get("average", {})
        if not self._loaded:
            logger.warning("The checkpoint has no moving average, so the average starts from the weights")

    def reset(self, module: LRMModule) -> None:
        """Set the average to the weights."""
        weights = state_access(module.trainer, module.lrm).trainable()
        self.average = {name: _float_copy(tensor) for name, tensor in weights.items()}

    @torch.no_grad()
    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: object, batch: Batch, batch_idx: int
    ) -> None:
        """Update the average, unless the step was skipped."""
        assert isinstance(pl_module, LRMModule)
        if (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        weights = state_access(trainer, pl_module.lrm).trainable()
        averages = [local_tensor(average) for average in self.average.values()]
        values = [local_tensor(weights[name]) for name in self.average]
        # The weight is 0 in a skipped step, which avoids a device synchronization.
        weight = (1 - pl_module.guard.skip) * (1 - self.decay)
        torch._foreach_lerp_(averages, values, [weight] * len(averages))

    @torch.no_grad()
    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Swap the weights and the average if validation uses the average."""
        if not (self.validate and self.average):
            return
        assert isinstance(pl_module, LRMModule)
        access = state_access(trainer, pl_module.lrm)
        weights = access.trainable()
        for name, tensor in self.average.items():
            average, weight = local_tensor(tensor), local_tensor(weights[name])
            previous = weight.clone()
            weight.copy_(average)
            average.copy_(previous)
        access.apply_changes()

    on_validation_end = on_validation_start  # swaps them back


def _float_copy(tensor: StateTensor) -> StateTensor:
    if isinstance(tensor, FlatShard):
        return FlatShard(tensor.local.float().clone(), tensor.start, tensor.shape)
    return tensor.float().clone()


def validates_with_average(config: Path) -> bool:
    """Return whether validation uses the moving average of the weights in a run with this config file."""
    callbacks = (yaml.safe_load(config.read_text()).get("trainer") or {}).get("callbacks") or []
    name = f"{WeightAverage.__module__}.{WeightAverage.__qualname__}"
    return any(one["init_args"]["validate"] for one in callbacks if one["class_path"] == name)
