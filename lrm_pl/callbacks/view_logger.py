"""Image grids of validation views with the columns input, target, rendering, opacity and depth."""

from pathlib import Path

import lightning as L
import torch
from jaxtyping import Float
from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger
from PIL import Image
from torch import Tensor

from lrm_pl.data.batch import Batch
from lrm_pl.data.datamodule import EVALUATION_SETS
from lrm_pl.training.module import Prediction
from lrm_pl.training.run_folder import trainer_folder


class ViewLogger(L.Callback):
    """Callback that logs an image grid of each validation set to a PNG file, TensorBoard and Weights & Biases.

    Args:
        objects: Number of objects per set. Each object has one row.
    """

    def __init__(self, objects: int = 4) -> None:
        self.objects = objects
        self._rows: dict[str, list[Tensor]] = {}

    def on_validation_epoch_start(self, *_: object) -> None:
        """Clear the rows of the previous validation."""
        self._rows = {name: [] for name in EVALUATION_SETS}

    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: object,
        batch: Batch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Collect the rows of the first objects of each validation set."""
        assert isinstance(outputs, Prediction)
        rows = self._rows[EVALUATION_SETS[dataloader_idx]]
        if len(rows) < self.objects:
            real = batch.weight.nonzero().squeeze(-1).tolist()
            rows += [view_row(outputs, batch, index) for index in real[: self.objects - len(rows)]]

    def on_validation_epoch_end(self, trainer: L.Trainer, *_: object) -> None:
        """Write and log the image grids on rank 0."""
        if not trainer.is_global_zero:
            return
        folder = trainer_folder(trainer) / "views"
        for name, rows in self._rows.items():
            if not rows:
                continue
            grid = torch.cat(rows, dim=1).cpu()
            folder.mkdir(parents=True, exist_ok=True)
            path = folder / f"{name}-step{trainer.global_step:06d}.png"
            write_png(path, grid)
            for log in trainer.loggers:
                if isinstance(log, TensorBoardLogger):
                    log.experiment.add_image(f"views/{name}", grid, trainer.global_step)
                elif isinstance(log, WandbLogger):
                    log.log_image(f"views/{name}", [str(path)], trainer.global_step)


def view_row(prediction: Prediction, batch: Batch, index: int) -> Float[Tensor, "3 H W"]:
    """Return a row with the input image, and the target, rendering, opacity and depth of the first target view.

    In the depth image, the nearest point of the unit sphere is white. The farthest point and empty pixels are black.
    """
    rendering = prediction.rendering
    source, target = batch.input.images[index, 0], batch.target.images[index, 0]
    opacity = rendering.opacity[index, 0]
    distance = batch.target.c2w[index, 0, :3, 3].norm()
    nearness = ((distance + 1 - rendering.depth[index, 0]) / 2).clamp(0, 1) * opacity
    height = target.shape[-2]
    if source.shape[-2] != height:
        source = torch.nn.functional.interpolate(
            source[None], (height, height), mode="bilinear", antialias=True
        )[0]
    gray = [channel.expand(3, -1, -1) for channel in (opacity, nearness)]
    cells = [source, target, prediction.images[index, 0], *gray]
    return torch.cat([cell.float() for cell in cells], dim=-1).clamp(0, 1)


def write_png(path: Path, image: Float[Tensor, "3 H W"]) -> None:
    """Write an image with values in [0, 1] to a PNG file."""
    Image.fromarray((image * 255).round().byte().permute(1, 2, 0).numpy()).save(path)
