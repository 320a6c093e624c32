"""The folder of a run: its path, its lock, and the log files of loggers in it."""

import dataclasses
import fcntl
import inspect
import logging
import os
import weakref
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import lightning as L
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from lrm_pl.errors import InputError
from lrm_pl.locks import NO_LOCKS
from lrm_pl.training.csv_log import AppendingCSVWriter

logger = logging.getLogger(__name__)

LOCK_NAME = ".lock"


class RunLock:
    """An exclusive lock of a run's folder, released when the object is deleted or the process ends.

    It is a POSIX lock instead of ``flock``. Child processes do not inherit it, so data workers that outlive a killed
    process do not block the next one, and it works across nodes on a network file system.

    Raises:
        InputError: Another process holds the lock.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder / LOCK_NAME, os.O_RDWR | os.O_CREAT, 0o644)
        weakref.finalize(self, os.close, descriptor)
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:  # POSIX allows both
            raise InputError(
                f"Another run is using {folder}",
                remedy="wait until it ends, or use another folder (--run.folder, or folder of CheckpointAndResume)",
            ) from error
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            logger.warning(
                "The file system of %s has no locks (%s). Do not start a second run there", folder, error
            )


@dataclasses.dataclass
class RunConfig:
    """Folder and resumption of a run.

    Attributes:
        folder: Folder of the run. A run that is started again with the same folder is resumed. Null creates a new
            folder, runs/lrm/version_N.
        resume: "auto" resumes from the newest valid checkpoint in the folder, if any. "never" starts from the first
            step and rejects a folder with checkpoints. A path of a checkpoint or of another run (its newest
            checkpoint) is where a new run starts; once the run has its own checkpoints, it resumes from these.
        profile: Number of steps to trace into ``profile/`` in the folder, after five warm-up steps; 0 disables this.
    """

    folder: str | None = None
    resume: str = "auto"
    profile: int = 0


def run_path(folder: str) -> Path:
    """Return the run's folder as an absolute path.

    Raises:
        InputError: The folder is empty, or a URL; object stores do not support appending to logs.
    """
    if not folder:
        raise InputError(
            expected="a path for --run.folder",
            found="an empty string",
            remedy="check that the shell variable is set",
        )
    if "://" in folder:
        raise InputError(
            expected="a local path for --run.folder",
            found=folder,
            remedy=(
                "to store only checkpoints there, use --trainer.callbacks with init_args of CheckpointAndResume "
                f"{{folder: {folder}}}"
            ),
        )
    return Path(folder).expanduser().absolute()


def set_logger_folders(loggers: Any, folder: str | None) -> None:  # noqa: ANN401 - an unvalidated config
    """Make all loggers in a trainer's config write to the run's folder, if one is given.

    Raises:
        InputError: ``loggers`` is null or true, so that Lightning would choose the logger and its folder.
    """
    path = None if folder is None else run_path(folder)
    for logger_config in _listed(loggers):
        if logger_config is None or logger_config is True:
            if path is None:
                continue
            raise InputError(
                expected="trainer.logger as a logger or false",
                found=f"{logger_config}, with which Lightning would not write to the run's folder",
                remedy="omit the option for TensorBoard",
            )
        if logger_config.get("init_args") is None:
            logger_config["init_args"] = {}
        if path is None:
            continue
        logger_class = resolve_name(logger_config["class_path"])
        if issubclass(logger_class, TensorBoardLogger | CSVLogger):  # they write to save_dir/name/version
            values = {"save_dir": str(path.parent), "name": "", "version": path.name}
        else:
            values = {"save_dir": str(path), "name": path.name}
        for name in values.keys() & inspect.signature(logger_class).parameters.keys():
            logger_config["init_args"][name] = values[name]


def new_run_folder(loggers: Any, root: str | None) -> str | None:  # noqa: ANN401 - a config
    """Return a new folder for a run, or None if its first logger creates one.

    Args:
        loggers: ``trainer.logger`` of the config.
        root: ``trainer.default_root_dir`` of the config.
    """
    listed = _listed(loggers)
    if listed and (
        listed[0] in (None, True)
        or issubclass(resolve_name(listed[0]["class_path"]), TensorBoardLogger | CSVLogger)
    ):
        return None
    parent = Path(root or "runs") / "lrm"
    versions = [path.name.removeprefix("version_") for path in parent.glob("version_*")]
    return str(
        parent / f"version_{max([int(name) for name in versions if name.isdecimal()], default=-1) + 1}"
    )


def _listed(loggers: Any) -> list[Any]:  # noqa: ANN401 - a config
    """Return the loggers of a config as a list, empty for false."""
    return [one for one in (loggers if isinstance(loggers, list) else [loggers]) if one is not False]


def trainer_folder(trainer: L.Trainer) -> Path:
    """Return the run's folder on this rank. Unlike ``trainer.log_dir``, it does not broadcast."""
    first = trainer.loggers[0] if trainer.loggers else None
    folder = first.log_dir if isinstance(first, TensorBoardLogger | CSVLogger) else first and first.save_dir
    return Path(folder or trainer.default_root_dir)


def create_run_folder(trainer: L.Trainer) -> Path:
    """Create the folder of a run without ``--run.folder``, the next version; safe if several runs start at once."""
    first = trainer.loggers[0] if trainer.loggers else None
    # The version is None until it is read, unless the config sets it.
    automatic = isinstance(first, TensorBoardLogger | CSVLogger) and first._version is None
    while True:
        folder = trainer_folder(trainer)
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            if first is None or not automatic:
                return folder
            first._version = None  # type: ignore[attr-defined]  # makes the logger choose the next version again
        else:
            return folder


def find_run_folder(path: str) -> Path | None:
    """Return the local run folder of a path: a run, its checkpoint folder or a checkpoint. Return None for others."""
    if "://" in path:
        return None
    folder = Path(path).expanduser().absolute()
    return next((f for f in (folder, *folder.parents[:2]) if (f / "config.yaml").is_file()), None)


def drop_logs_after(loggers: list[Any], step: int) -> None:
    """Make loggers drop values after ``step``, which the run logged after the checkpoint that it resumes from."""
    for log in loggers:
        if isinstance(log, TensorBoardLogger):
            log._kwargs["purge_step"] = step + 1
        elif isinstance(log, CSVLogger):
            log._experiment = AppendingCSVWriter(log.log_dir, step)
