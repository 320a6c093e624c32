"""PSNR, SSIM and LPIPS over the validation sets, by torchmetrics, so that they add up over ranks."""

from typing import Any

import lightning as L

from lrm_pl.data.batch import Batch
from lrm_pl.data.datamodule import EVALUATION_SETS
from lrm_pl.losses.perceptual import PerceptualLoss
from lrm_pl.metrics import ImageMetrics
from lrm_pl.training.module import Prediction


class ImageMetricsLogger(L.Callback):
    """Log ``val/<set>/{psnr,psnr_pooled,ssim,lpips}`` for the sets "unseen" and "heldout"."""

    def __init__(self) -> None:
        self.perceptual: PerceptualLoss | None = None
        self.metrics: dict[str, ImageMetrics] = {}

    def on_validation_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start from nothing."""
        if self.perceptual is not None:
            self.perceptual.to(pl_module.device)
        self.metrics = {name: ImageMetrics(self.perceptual).to(pl_module.device) for name in EVALUATION_SETS}

    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,  # noqa: ANN401 - Lightning's signature
        batch: Batch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Take in one batch, without what only stands in."""
        prediction: Prediction = outputs
        real = batch.weight.nonzero().squeeze(-1)  # the one wait for a GPU: boolean masks would wait each
        if len(real):
            self.metrics[EVALUATION_SETS[dataloader_idx]].update(
                prediction.images[real].flatten(0, 1).float(), batch.target.images[real].flatten(0, 1).float()
            )

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Log the means over all ranks."""
        for name, metric in self.metrics.items():
            if not trainer.strategy.reduce(metric.images.float(), reduce_op="sum"):
                continue  # no held-out objects, or none that can be read
            result = metric.compute()
            for key in ("psnr", "psnr_pooled", "ssim", "lpips"):
                value = getattr(result, key)
                if value is not None:
                    pl_module.log(f"val/{name}/{key}", value, prog_bar=key == "psnr_pooled", sync_dist=False)

    # `lrm test` measures the same.
    on_test_epoch_start = on_validation_epoch_start
    on_test_batch_end = on_validation_batch_end
    on_test_epoch_end = on_validation_epoch_end
