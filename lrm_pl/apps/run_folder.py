"""The folder of a run: where it is, that one run at a time is in it, and what to go on from."""

import dataclasses
import fcntl
import importlib.util
import logging
import os
import shutil
import weakref
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from lrm_pl.apps.csv_rows import KeptRows
from lrm_pl.errors import InputError
from lrm_pl.io.checkpoints import Checkpoint, newest_checkpoint, read_checkpoint

logger = logging.getLogger(__name__)

LOCK_NAME = ".lock"


@dataclasses.dataclass
class RunConfig:
    """Where a run is kept, and whether it goes on.

    Attributes:
        folder: The run's folder. Started again with the same folder, a run goes on where it was. Null makes a new
            one, runs/lrm/version_N.
        resume: "auto" goes on from the newest whole checkpoint in the folder, and starts where there is none; "never"
            starts, and refuses a folder that has checkpoints; anything else is the path of a checkpoint, or of the
            folder of a run whose newest one is taken.
        profile: So many steps, after a warm-up of five, are traced into ``profile/`` in the folder; 0: none.
    """

    folder: str | None = None
    resume: str = "auto"
    profile: int = 0


def place_loggers(loggers: Any, folder: str | None) -> None:  # noqa: ANN401 - a config: what the user gave, not checked yet
    """Make every logger of a trainer's config write into the run's folder itself, where one is given.

    Raises:
        InputError: A logger needs a package that is not installed.
    """
    for logger_config in loggers if isinstance(loggers, list) else [loggers]:
        if isinstance(logger_config, bool) or logger_config is None:
            continue
        arguments = logger_config["init_args"]
        is_wandb = "WandbLogger" in logger_config["class_path"]
        if is_wandb and importlib.util.find_spec("wandb") is None:
            raise InputError(
                "expected the package wandb for the WandbLogger, found none; pip install -e '.[wandb]', or leave "
                "configs/logger/wandb.yaml out"
            )
        if folder is None:
            continue
        path = Path(folder).absolute()
        if is_wandb:
            arguments["save_dir"], arguments["name"] = str(path), path.name
        else:
            arguments["save_dir"], arguments["name"], arguments["version"] = str(path.parent), "", path.name


def folder_of(trainer: L.Trainer) -> Path:
    """Return the run's folder as this process sees it; ``trainer.log_dir`` asks all ranks, this asks none."""
    if not trainer.loggers:
        return Path(trainer.default_root_dir)
    first = trainer.loggers[0]
    return Path(first.log_dir or first.save_dir or trainer.default_root_dir)


def choose_checkpoint(resume: str, folder: str | None) -> Checkpoint | None:
    """Find what a run goes on from, checked; None to start.

    Args:
        resume: ``RunConfig.resume``.
        folder: Folder of the run's checkpoints; None where the run is new.

    Raises:
        InputError: There is nothing where something was asked for, or something where nothing was expected.
    """
    if resume == "auto":
        return None if folder is None else newest_checkpoint(folder, logger.warning)
    if resume == "never":
        if folder is not None and newest_checkpoint(folder, logger.warning) is not None:
            raise InputError(
                f"expected no checkpoints in {folder}, found some; go on from them (--run.resume auto) or start in "
                "another folder (--run.folder)"
            )
        return None
    return find_checkpoint(resume)


def find_checkpoint(path: str) -> Checkpoint:
    """Find a checkpoint by its own path, or by its run's folder, whose newest whole one is meant.

    Raises:
        CheckpointError: There is none.
    """
    if "step-" not in path.rstrip("/").rsplit("/", 1)[-1]:
        found = newest_checkpoint(f"{path.rstrip('/')}/checkpoints", logger.warning)
        if found is not None:
            return found
    return read_checkpoint(path.rstrip("/"))


class RunLock:
    """Hold a run's folder for as long as this object lives; the lock goes with the process, however it ends."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder / LOCK_NAME, os.O_RDWR | os.O_CREAT, 0o644)
        weakref.finalize(self, os.close, descriptor)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InputError(
                f"expected no other run in {folder}, found one at work there; wait for it, or take another --run.folder"
            ) from error


def clear_leftovers(folder: Path) -> None:
    """Delete what an interrupted run left half-written; the lock must be held."""
    for path in sorted(folder.glob("*.partial")):
        logger.warning("deleting %s: a checkpoint that was not finished when the run ended", path)
        shutil.rmtree(path)


def purge_from(loggers: list[Any], step: int) -> None:
    """Make loggers drop points at or after ``step``: a run logged them after the checkpoint it goes on from.

    With step 0 these are all: of a run that ended before its first checkpoint.
    """
    for log in loggers:
        if isinstance(log, TensorBoardLogger):
            log._kwargs["purge_step"] = step
        elif isinstance(log, CSVLogger):
            log._experiment = KeptRows(log.log_dir, step)
