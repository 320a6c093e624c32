"""A moving average of the weights, in float32, under every strategy: each rank averages what it holds of them."""

import logging
from pathlib import Path
from typing import Any, final

import lightning as L
import torch
import yaml

from lrm_pl.data.batch import Batch
from lrm_pl.errors import InputError
from lrm_pl.training.module import LRMModule
from lrm_pl.training.parallelize import Part
from lrm_pl.training.sharded_state import holder_of, local
from lrm_pl.training.state import Held

logger = logging.getLogger(__name__)


@final
class WeightAverage(L.Callback):
    """Keep average <- decay average + (1 - decay) weights after every step that was taken (Polyak averaging).

    Args:
        decay: Fraction of the old average that stays.
        validate: Whether validation measures the average instead of the weights.
    """

    def __init__(self, decay: float = 0.9999, *, validate: bool = False) -> None:
        if not 0 <= decay < 1:
            raise InputError(expected="a decay in [0, 1)", found=decay)
        self.decay, self.validate = decay, validate
        self.average: dict[str, Held] = {}
        self._loaded: dict[str, torch.Tensor] = {}  # of Lightning's checkpoint, whole

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Reject a second average.

        Raises:
            InputError: Several callbacks average the weights.
        """
        count = sum(isinstance(callback, WeightAverage) for callback in trainer.callbacks)  # type: ignore[attr-defined]
        if count > 1:
            raise InputError(
                expected="one WeightAverage among trainer.callbacks",
                found=f"{count}: checkpoints hold one average",
                remedy="leave the others out",
            )

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Begin at the weights, unless a resumed run has read its average already."""
        assert isinstance(pl_module, LRMModule)
        if not self.average:
            self.begin(pl_module)
        for name, tensor in self._loaded.items():
            local(self.average[name]).copy_(tensor)
        self._loaded = {}

    def on_save_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Add the average to Lightning's checkpoint; those of a CheckpointAndResume have it without this."""
        if all(type(held) is torch.Tensor for held in self.average.values()):  # no shards
            checkpoint["average"] = dict(self.average)

    def on_load_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Restore the average from Lightning's checkpoint."""
        self._loaded = checkpoint.get("average", {})
        if not self._loaded:
            logger.warning("the checkpoint holds no moving average: it starts at the weights")

    def begin(self, module: LRMModule) -> None:
        """Make the average equal to the weights."""
        trained = holder_of(module.trainer, module.lrm).trained()
        self.average = {name: _copy(held) for name, held in trained.items()}

    @torch.no_grad()
    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,  # noqa: ANN401 - Lightning's signature
        batch: Batch,
        batch_idx: int,
    ) -> None:
        """Move the average toward the weights, unless the step was skipped."""
        assert isinstance(pl_module, LRMModule)
        if (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        weights = holder_of(trainer, pl_module.lrm).trained()
        ours = [local(held) for held in self.average.values()]
        theirs = [local(weights[name]) for name in self.average]
        weight = (1 - pl_module.guard.skip) * (1 - self.decay)  # 0 in a skipped step, without a look at it
        torch._foreach_lerp_(ours, theirs, [weight] * len(ours))

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Put the average into the network."""
        if self.validate and self.average:
            self._swap(pl_module)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Put the weights back."""
        if self.validate and self.average:
            self._swap(pl_module)

    @torch.no_grad()
    def _swap(self, module: L.LightningModule) -> None:
        assert isinstance(module, LRMModule)
        holder = holder_of(module.trainer, module.lrm)
        weights = holder.trained()
        for name, average in self.average.items():
            ours, theirs = local(average), local(weights[name])
            kept = theirs.clone()
            theirs.copy_(ours)
            ours.copy_(kept)
        holder.changed()


def _copy(held: Held) -> Held:
    if isinstance(held, Part):
        return Part(held.local.float().clone(), held.start, held.shape)
    return held.float().clone()


def validates_average(config: Path) -> bool:
    """Return whether a run validates with the moving average of its weights."""
    callbacks = (yaml.safe_load(config.read_text()).get("trainer") or {}).get("callbacks") or []
    name = f"{WeightAverage.__module__}.{WeightAverage.__qualname__}"
    return any(one["init_args"]["validate"] for one in callbacks if one["class_path"] == name)
