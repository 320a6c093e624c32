"""Report at the end of ``lrm fit``, with metrics of the model and simple baselines, images and suggested commands."""

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

from lrm_pl.callbacks.view_logger import view_row, write_png
from lrm_pl.data.batch import Batch, PackedBatch
from lrm_pl.data.datamodule import EVALUATION_SETS, ShardDataModule
from lrm_pl.data.manifest import write_atomically
from lrm_pl.errors import counted
from lrm_pl.evaluation.baselines import sum_images
from lrm_pl.evaluation.objects import resize_images
from lrm_pl.losses.perceptual import PerceptualLoss
from lrm_pl.metrics import ImageMetrics, ImageScores
from lrm_pl.training.module import LRMModule

#: Maximum number of objects to measure per evaluation set. The objects are evenly spaced within the set.
MAX_OBJECTS = 256

#: Maximum number of objects in the image grid.
GRID_OBJECTS = 8

TITLES = {"unseen": "unseen views of the training objects", "heldout": "held-out objects"}

#: Metrics of the model that are logged. The metrics of the baselines are in report.json only.
METRICS = ("psnr", "psnr_pooled", "ssim", "lpips")

#: Names under which the metrics are logged.
REPORT_METRICS = tuple(f"report/{name}/{metric}" for name in EVALUATION_SETS for metric in METRICS)


@dataclasses.dataclass(frozen=True)
class Report:
    """Metrics of the model and of the baselines on one evaluation set.

    Attributes:
        rows: Mapping from row name, which is "model" or the name of a baseline, to metrics.
        views: Number of target views per object.
        grid: Image with one row for each of the first ``GRID_OBJECTS`` objects of this rank. The columns are input,
            target, render, opacity and depth.
    """

    rows: dict[str, ImageScores]
    views: int
    grid: Float[Tensor, "3 H W"]


def print_report(
    trainer: L.Trainer,
    module: LRMModule,
    data: ShardDataModule,
    perceptual: PerceptualLoss,
    checkpoint: str,
    check_stop: Callable[[], None],
    weights: str,
) -> dict[str, Report]:
    """Evaluate the trained model on all evaluation sets, and print the metrics and suggested commands.

    Each rank evaluates a subset of the objects, and rank 0 prints the results.

    Args:
        trainer: The trainer, after ``fit`` has returned.
        module: The trained model.
        data: The data module that the model was trained with.
        perceptual: Network of the LPIPS metric.
        checkpoint: Path of the checkpoint, which is printed.
        check_stop: Function that is called before each batch, and raises an error if a signal stopped the run.
        weights: Label of the model's row in the table, for example "model (average)" for averaged weights.
    """
    reports = {}
    module.to(trainer.strategy.root_device)  # Lightning moves the module to the CPU when fit ends
    console = Console(quiet=not trainer.is_global_zero)
    folder = Path(trainer.log_dir or trainer.default_root_dir)
    console.print(f"Checkpoint: {checkpoint}", soft_wrap=True)
    training = data.training_views_loader(MAX_OBJECTS)
    batches = _check_each(
        check_stop, track(training, "Averaging the training images", len(training), console=console)
    )
    mean_image = mean_target_view(batches, trainer)
    for name in EVALUATION_SETS:
        loader = data.evaluation_loader(name, MAX_OBJECTS)
        if not len(loader):
            console.print(f"{data.mixture.name} has no {TITLES[name]} to measure.")
            continue
        with trainer.precision_plugin.forward_context():
            batches = _check_each(check_stop, track(loader, f"Measuring {name}", console=console))
            report = measure(module, batches, perceptual, mean_image)
        if report is None:  # the same on all ranks
            console.print(f"{data.mixture.name} has no readable sample among the {TITLES[name]}.")
            continue
        reports[name] = report
        _print_metrics(console, TITLES[name], report, weights)
        path = folder / f"{name}.png"
        if trainer.is_global_zero:
            write_png(path, report.grid)
        console.print(f"Images (input | target | render | opacity | depth): {path}", soft_wrap=True)
    if reports and trainer.is_global_zero:
        record = {"step": trainer.global_step, "weights": weights, "data": data.folder} | {
            name: {row: s._asdict() for row, s in report.rows.items()} for name, report in reports.items()
        }
        path, content = folder / "report.json", json.dumps(record, indent=2).encode()
        if not path.is_file() or path.read_bytes() != content:  # equal if a complete run was started again
            _log_metrics(trainer, reports)
        write_atomically(path, content)
    console.print(
        f"To reconstruct a photo: make infer IMAGE=photo.png CKPT={shlex.quote(str(folder))}", soft_wrap=True
    )
    if any(isinstance(log, TensorBoardLogger) for log in trainer.loggers):
        console.print(f"To show the curves: tensorboard --logdir {folder.parent}", soft_wrap=True)
    return reports


def _print_metrics(console: Console, title: str, report: Report, weights: str) -> None:
    images = report.rows["model"].images
    objects = images // report.views
    console.print(f"{title}: {counted(images, 'image')} of {counted(objects, 'object')}", soft_wrap=True)
    table = Table()
    table.add_column("")
    for column in ("PSNR", "PSNR pooled", "SSIM", "LPIPS"):
        table.add_column(column, justify="right")
    for row, scores in report.rows.items():
        metrics = (scores.psnr, scores.psnr_pooled, scores.ssim, scores.lpips)
        cells = map(str.format, ("{:.2f}", "{:.2f}", "{:.3f}", "{:.3f}"), metrics)
        table.add_row(weights if row == "model" else row, *cells)
    console.print(table)


def _log_metrics(trainer: L.Trainer, reports: Mapping[str, Report]) -> None:
    """Log the model's metrics at the run's last step."""
    values = {
        f"report/{name}/{metric}": value
        for name, report in reports.items()
        for metric, value in report.rows["model"]._asdict().items()
        if metric in METRICS
    }
    for log in trainer.loggers:
        log.log_metrics(values, trainer.global_step)
        log.save()


def _check_each(check_stop: Callable[[], None], batches: Iterable[PackedBatch]) -> Iterator[PackedBatch]:
    for batch in batches:
        check_stop()
        yield batch


def mean_target_view(batches: Iterable[PackedBatch], trainer: L.Trainer) -> Float[Tensor, "3 H W"]:
    """Return the mean of the target views of all processes, resized to the size of the first target view.

    In terms of the mean squared error, the mean view is the best prediction that does not depend on the input image.

    Args:
        batches: Batches of this process.
        trainer: The trainer, whose strategy reduces the sums across processes.
    """
    unpacked = (packed.to("cpu") for packed in batches)
    total, images = sum_images(batch.target.images[batch.weight > 0].flatten(0, 1) for batch in unpacked)
    device = trainer.strategy.root_device
    sums = (total.to(device), torch.tensor(float(images), device=device))
    total, count = (trainer.strategy.reduce(x, reduce_op="sum").cpu() for x in sums)
    return total / count.clamp_min(1)


@torch.inference_mode()
def measure(
    module: LRMModule,
    batches: Iterable[PackedBatch],
    perceptual: PerceptualLoss,
    mean_image: Float[Tensor, "3 H W"],
) -> Report | None:
    """Evaluate the model and the baselines on an evaluation set.

    Args:
        module: The trained model.
        batches: Batches of the evaluation set.
        perceptual: Network of the LPIPS metric.
        mean_image: The mean training image, which is one of the baselines.

    Returns:
        The report, or None if the set has no readable sample.
    """
    module.eval()
    baselines: dict[str, Callable[[Batch], Tensor]] = {
        "white image": lambda batch: torch.ones_like(batch.target.images),
        "mean training image": lambda batch: resize_images(
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
            continue  # the batch repeats samples as padding
        images = {"model": prediction.images, **{name: make(batch) for name, make in baselines.items()}}
        for name, image in images.items():
            metrics[name].update(image.flatten(0, 1), batch.target.images.flatten(0, 1))
        if len(rows) < GRID_OBJECTS:
            rows.append(view_row(prediction, batch, 0).cpu())
    if not views:
        return None
    grid = torch.cat(rows, dim=1) if rows else torch.zeros(3, 0, 0)
    return Report({name: metric.compute() for name, metric in metrics.items()}, views, grid)
