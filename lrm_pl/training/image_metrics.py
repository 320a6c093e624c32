"""PSNR, SSIM and LPIPS of the validation sets, reduced over ranks with torchmetrics."""

import logging
import math
from typing import Any

import lightning as L

from lrm_pl.data.batch import Batch
from lrm_pl.data.datamodule import EVALUATION_SETS
from lrm_pl.losses.perceptual import PerceptualLoss
from lrm_pl.metrics import ImageMetrics, NotFiniteError
from lrm_pl.training.step_logging import log_global_step

logger = logging.getLogger(__name__)


class ImageMetricsLogger(L.Callback):
    """Log ``val/<set>/{psnr,psnr_pooled,ssim,lpips}`` for the sets "unseen" and "heldout".

    ``LRMModule`` adds this callback if the trainer does not have one.

    Attributes:
        perceptual: The LPIPS network, which the ``lrm`` command sets. If None, LPIPS is not computed.
    """

    def __init__(self) -> None:
        self.perceptual: PerceptualLoss | None = None
        self.metrics: dict[str, ImageMetrics] = {}
        self._logged = False

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Log a message if LPIPS is disabled."""
        if self.perceptual is None and not self._logged and trainer.is_global_zero:
            self._logged = True
            logger.info(
                "Validation measures PSNR and SSIM. For LPIPS, add an ImageMetricsLogger to the callbacks and set its "
                'attribute perceptual to pretrained_perceptual_loss("alex")'
            )

    def on_validation_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Reset the metrics."""
        if self.perceptual is not None:
            self.perceptual.to(pl_module.device)
        self.metrics = {name: ImageMetrics(self.perceptual).to(pl_module.device) for name in EVALUATION_SETS}

    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,  # noqa: ANN401 - Prediction, whose module imports this one
        batch: Batch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Update the metrics with the samples of a batch that have a nonzero weight."""
        # One device synchronization, instead of one per boolean mask.
        real = batch.weight.nonzero().squeeze(-1)
        if len(real):
            self.metrics[EVALUATION_SETS[dataloader_idx]].update(
                outputs.images[real].flatten(0, 1).float(), batch.target.images[real].flatten(0, 1).float()
            )

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Reduce the metrics over all ranks and log them."""
        log_global_step(pl_module, trainer.global_step)
        for name, metric in self.metrics.items():
            if not trainer.strategy.reduce(metric.images.float(), reduce_op="sum"):
                continue  # the set is empty, or no sample could be read
            result = None
            try:
                result = metric.compute()
            except NotFiniteError as error:  # the gradient guard stops the run if needed
                if trainer.is_global_zero:
                    logger.warning(
                        "The metrics of the %s set at step %d are NaN: %s", name, trainer.global_step, error
                    )
            for key in ("psnr", "psnr_pooled", "ssim", *(["lpips"] if self.perceptual is not None else [])):
                value = math.nan if result is None else getattr(result, key)
                pl_module.log(f"val/{name}/{key}", value, prog_bar=key == "psnr_pooled", sync_dist=False)

    on_test_epoch_start = on_validation_epoch_start
    on_test_batch_end = on_validation_batch_end
    on_test_epoch_end = on_validation_epoch_end
