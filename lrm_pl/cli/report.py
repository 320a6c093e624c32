"""What ``lrm fit`` ends with: metrics beside simple baselines, an image grid, and what to type next."""

import dataclasses
import json
import shlex
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import lightning as L
import torch
from jaxtyping import Float
from lightning.pytorch.loggers import TensorBoardLogger
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor
from torch.nn import functional as F

from lrm_pl.callbacks.view_logger import view_row, write_png
from lrm_pl.data.batch import Batch, PackedBatch
from lrm_pl.data.datamodule import EVALUATION_SETS, ShardDataModule
from lrm_pl.data.manifest import write_atomically
from lrm_pl.errors import counted
from lrm_pl.losses.perceptual import PerceptualLoss
from lrm_pl.metrics import ImageMetrics, ImageScores
from lrm_pl.training.module import LRMModule

#: Objects of a set that are measured at most, evenly spread over it.
MEASURED = 256

#: Objects that the image shows.
SHOWN = 8

TITLES = {"unseen": "unseen views of the training objects", "heldout": "held-out objects"}

#: What loggers are given of the model's results, in these names; the baselines stand in report.json.
REPORT_METRICS = tuple(
    f"report/{name}/{metric}"
    for name in EVALUATION_SETS
    for metric in ("psnr", "psnr_pooled", "ssim", "lpips")
)


@dataclasses.dataclass(frozen=True)
class Report:
    """Metrics of the model and of the baselines on one evaluation set.

    Attributes:
        rows: Name of what was measured -> its metrics; "model" and the baselines.
        views: Target views an object.
        grid: (3, H, W) image: input | target | render | opacity | depth, a row an object; of this rank's objects.
    """

    rows: dict[str, ImageScores]
    views: int
    grid: Float[Tensor, "3 H W"]


class ReportStopped(Exception):
    """The process was told to stop while it measured."""


def print_report(
    trainer: L.Trainer,
    module: LRMModule,
    data: ShardDataModule,
    perceptual: PerceptualLoss,
    checkpoint: str,
    stopped: Callable[[], bool],
    weights: str = "model",
) -> dict[str, Report]:
    """Measure the trained model on both evaluation sets, and print the results and what to do with them.

    All ranks measure their share; rank 0 prints, and names the trained model's row ``weights``.

    Raises:
        ReportStopped: ``stopped`` said so, between two batches.
    """
    reports = {}
    module.to(trainer.strategy.root_device)  # Lightning moves it to the CPU when a fit ends
    console = Console(quiet=not trainer.is_global_zero)
    folder = Path(trainer.log_dir or trainer.default_root_dir)
    console.print(f"Checkpoint: {checkpoint}", soft_wrap=True)
    training = data.training_views_loader(MEASURED)
    mean_image = average(
        _until(stopped, track(training, "Averaging the training images", len(training), console=console)),
        trainer,
    )
    for name in EVALUATION_SETS:
        loader = data.evaluation_loader(name, MEASURED)
        if not len(loader):
            console.print(f"No {TITLES[name]} in {data.mixture.name}: nothing to measure there.")
            continue
        with trainer.precision_plugin.forward_context():
            batches = _until(stopped, track(loader, f"Measuring {name}", console=console))
            report = measure(module, batches, perceptual, mean_image, SHOWN)
        if report is None:  # on all ranks alike
            console.print(
                f"No readable sample among the {TITLES[name]} of {data.mixture.name}: nothing to measure there."
            )
            continue
        reports[name] = report
        images = report.rows["model"].images
        objects = report.rows["model"].images // report.views
        console.print(
            f"{TITLES[name]}: {counted(images, 'image')} of {counted(objects, 'object')}", soft_wrap=True
        )
        table = Table()
        for column in ("", "PSNR", "PSNR pooled", "SSIM", "LPIPS"):
            table.add_column(column, justify="left" if not column else "right")
        for row, result in report.rows.items():
            numbers = [
                f"{result.psnr:.2f}",
                f"{result.psnr_pooled:.2f}",
                f"{result.ssim:.3f}",
                f"{result.lpips:.3f}",
            ]
            table.add_row(weights if row == "model" else row, *numbers)
        console.print(table)
        path = folder / f"{name}.png"
        if trainer.is_global_zero:
            write_png(path, report.grid)
        console.print(f"Images (input | target | render | opacity | depth): {path}", soft_wrap=True)
    if reports and trainer.is_global_zero:
        record = {"step": trainer.global_step, "weights": weights, "data": data.folder} | {
            name: {row: s._asdict() for row, s in report.rows.items()} for name, report in reports.items()
        }
        path, content = folder / "report.json", json.dumps(record, indent=2).encode()
        if not path.is_file() or path.read_bytes() != content:  # else a finished run that was started again
            _log(trainer, reports)
        write_atomically(path, content)
    console.print(f"Use it: make infer IMAGE=photo.png CKPT={shlex.quote(str(folder))}", soft_wrap=True)
    if any(isinstance(log, TensorBoardLogger) for log in trainer.loggers):
        there = Path("runs").absolute() in folder.absolute().parents  # where make tensorboard looks
        command = f"tensorboard --logdir {folder.parent}"
        shown = f"make tensorboard   ({command})" if there else command
        console.print(f"Watch the run: {shown}", soft_wrap=True)
    return reports


def _log(trainer: L.Trainer, reports: Mapping[str, Report]) -> None:
    """Give the loggers what the model reached, at the run's last step."""
    found = {
        f"report/{name}/{metric}": value
        for name, report in reports.items()
        for metric, value in report.rows["model"]._asdict().items()
    }
    for log in trainer.loggers:
        log.log_metrics({tag: found[tag] for tag in REPORT_METRICS if tag in found}, trainer.global_step)
        log.save()


def _until(stopped: Callable[[], bool], batches: Iterable[PackedBatch]) -> Iterator[PackedBatch]:
    for batch in batches:
        if stopped():
            raise ReportStopped
        yield batch


def average(batches: Iterable[PackedBatch], trainer: L.Trainer | None = None) -> Float[Tensor, "3 H W"]:
    """Average all target views, in the size of the first: the best answer of someone who has not seen the object.

    Args:
        batches: This process's share.
        trainer: Where given, the average is over all its processes.
    """
    total, count = torch.zeros(()), torch.zeros(())
    for packed in batches:
        batch = packed.to("cpu")
        images = batch.target.images[batch.weight > 0].flatten(0, 1)
        if total.ndim:
            images = _resized(images, total)
        total, count = total + images.sum(dim=0), count + len(images)
    if trainer is not None and trainer.world_size > 1:
        device = trainer.strategy.root_device
        total, count = (trainer.strategy.reduce(x.to(device), reduce_op="sum").cpu() for x in (total, count))
    return total / count.clamp_min(1)


def _resized(images: Float[Tensor, "*n 3 H W"], like: Float[Tensor, "*m 3 h w"]) -> Float[Tensor, "*n 3 h w"]:
    if images.shape[-2:] == like.shape[-2:]:
        return images
    flat = F.interpolate(
        images.view(-1, *images.shape[-3:]), like.shape[-2:], mode="bilinear", antialias=True
    )
    return flat.view(*images.shape[:-2], *like.shape[-2:])


@torch.inference_mode()
def measure(
    module: LRMModule,
    batches: Iterable[PackedBatch],
    perceptual: PerceptualLoss,
    mean_image: Float[Tensor, "3 H W"],
    objects: int,
) -> Report | None:
    """Render an evaluation set and measure it, with the baselines beside it; None if it has no readable sample."""
    module.eval()
    baselines: dict[str, Callable[[Batch], Tensor]] = {
        "white image": lambda batch: torch.ones_like(batch.target.images),
        "mean training image": lambda batch: _resized(
            mean_image.to(batch.target.images), batch.target.images
        ).expand_as(batch.target.images),
        "input view repeated": lambda batch: batch.input.images[:, :1].expand_as(batch.target.images),
    }
    metrics = {name: ImageMetrics(perceptual).to(module.device) for name in ("model", *baselines)}
    rows: list[Tensor] = []
    views = 0
    for packed in batches:
        batch = packed.to(module.device)
        views = batch.target.images.shape[1]
        prediction = module.validation_step(batch, 0)
        if not batch.weight.all():
            continue  # it only stands in
        images = {"model": prediction.images, **{name: make(batch) for name, make in baselines.items()}}
        for name, image in images.items():
            metrics[name].update(image.flatten(0, 1), batch.target.images.flatten(0, 1))
        if len(rows) < objects:
            rows.append(view_row(prediction, batch, 0).cpu())
    if not views:
        return None
    grid = torch.cat(rows, dim=1) if rows else torch.zeros(3, 0, 0)
    return Report({name: metric.compute() for name, metric in metrics.items()}, views, grid)
