"""Preparation of a run: data checks, initial weights, the run's folder and the checkpoint to resume from."""

import logging
import warnings
from pathlib import Path
from typing import TypeVar

import lightning as L

from lrm_pl.checkpoints.files import require_writable
from lrm_pl.checkpoints.index import remove_partial_checkpoints
from lrm_pl.checkpoints.network import require_network
from lrm_pl.checkpoints.owner import Owner, require_ownership
from lrm_pl.cli.weights import WeightsConfig, load_encoder
from lrm_pl.data.datamodule import ShardDataModule
from lrm_pl.errors import InputError
from lrm_pl.inference.model_folder import load_weights
from lrm_pl.losses.perceptual import PerceptualLoss, require_measurable
from lrm_pl.models.lrm import LRM
from lrm_pl.storage import is_local
from lrm_pl.training.checkpointing import CheckpointAndResume
from lrm_pl.training.image_metrics import ImageMetricsLogger
from lrm_pl.training.module import LRMModule
from lrm_pl.training.run_folder import RunConfig, RunLock, create_run_folder, drop_logs_after, run_path
from lrm_pl.weights.encoders import pretrained_perceptual_loss

logger = logging.getLogger(__name__)

C = TypeVar("C", bound=L.Callback)


def callbacks_of(trainer: L.Trainer, cls: type[C]) -> list[C]:
    """Return the trainer's callbacks that are instances of ``cls``."""
    return [callback for callback in trainer.callbacks if isinstance(callback, cls)]  # type: ignore[attr-defined]


def checkpointing_of(trainer: L.Trainer) -> CheckpointAndResume | None:
    """Return the trainer's ``CheckpointAndResume`` callback, or None if there is no such callback."""
    return next(iter(callbacks_of(trainer, CheckpointAndResume)), None)


def prepare(
    trainer: L.Trainer, module: LRMModule, data: ShardDataModule, weights: WeightsConfig, *, training: bool
) -> PerceptualLoss:
    """Set up and check the data, load the LPIPS networks, and load the initial weights if ``training`` is True.

    Returns:
        The network of the LPIPS metric.

    Raises:
        InputError: The data are invalid, or are incompatible with the model or the number of processes.
    """
    data.inputs = module.lrm.input_views
    data.setup("fit")
    data.trainer = trainer
    if training:
        data.train_dataloader()  # checks the data and the partition of batches into processes
    data.mixture.require_usable(module.renderer.bounds)
    if training and weights.network is not None:
        load_weights(module.lrm, Path(weights.network).expanduser())
    elif training and weights.pretrained:
        module.lrm.encoder.load_pretrained(load_encoder(module.lrm.encoder.name, weights))
    device = trainer.strategy.root_device
    if module.objective.lpips:
        require_measurable(min(crop.size for crop in data.augmentation.crops))
        vgg = pretrained_perceptual_loss("vgg", source=weights.source, **vars(weights.lpips_vgg))
        module.objective.perceptual = vgg.to(device)
    # The authors of LPIPS recommend measuring with a different network than the one used for training. AlexNet is also
    # 20 times faster than VGG16.
    metric = pretrained_perceptual_loss("alex", source=weights.source, **vars(weights.lpips_alex)).to(device)
    for callback in callbacks_of(trainer, ImageMetricsLogger):
        callback.perceptual = metric
    return metric


def enter_run_folder(trainer: L.Trainer, lrm: LRM, run: RunConfig) -> list[RunLock]:
    """Lock the run's folder and choose the checkpoint to resume from. Call this function on rank 0 only.

    Returns:
        The locks, which are released when they are garbage-collected.

    Raises:
        InputError: The folder is in use, belongs to a different run, or contains a checkpoint of a different network.
    """
    checkpointing = checkpointing_of(trainer)
    folder = run_path(run.folder) if run.folder is not None else create_run_folder(trainer).absolute()
    locks = [RunLock(folder)]
    if checkpointing is None:
        if run.resume not in ("auto", "never"):
            raise InputError(
                expected="a CheckpointAndResume callback in trainer.callbacks for --run.resume", found="none"
            )
        return locks
    if run.folder is not None and checkpointing.folder is None:
        checkpointing.folder = f"{folder}/checkpoints"
    if checkpointing.folder is not None:
        require_writable(checkpointing.folder)
        if is_local(checkpointing.folder):
            locks.append(RunLock(Path(checkpointing.folder)))
        # A folder inside the run has no ownership record because a run may be moved together with its contents.
        if Path(checkpointing.folder).absolute().parent != folder:
            require_ownership(checkpointing.folder, str(folder))
            checkpointing.owner = Owner(checkpointing.folder, str(folder))
        remove_partial_checkpoints(checkpointing.folder, logger.warning)
    checkpoint = checkpointing.choose(run.resume)
    if checkpoint is not None:
        require_network(checkpoint, lrm)
        _require_steps_left(trainer.max_steps, checkpoint.step, folder)
    if run.folder is not None:
        drop_logs_after(trainer.loggers, 0 if checkpoint is None else checkpoint.step)
    return locks


def _require_steps_left(max_steps: int, done: int, folder: Path) -> None:
    """Check that a run has not exceeded ``max_steps``, and print a message if it is complete.

    Raises:
        InputError: The run has completed more than ``max_steps`` steps.
    """
    if done > max_steps:
        raise InputError(
            expected=f"trainer.max_steps of at least {done}, the number of completed steps in {folder}",
            found=max_steps,
            remedy="increase trainer.max_steps, or start another run with --run.folder",
        )
    if done == max_steps:
        print(
            f"The run in {folder} is complete ({max_steps} steps). To continue the run, increase --trainer.max_steps."
        )
        warnings.filterwarnings("ignore", "Total length of `.*` across ranks is zero")
