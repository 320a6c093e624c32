"""Functions and classes for the folder of a run, including its path, lock and log files."""

import argparse
import dataclasses
import inspect
import logging
import weakref
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import lightning as L
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from lrm_pl.errors import InputError
from lrm_pl.locks import lock
from lrm_pl.paths import user_path
from lrm_pl.training.csv_log import AppendingCSVWriter

logger = logging.getLogger(__name__)

LOCK_NAME = ".lock"


class RunLock:
    """Exclusive lock on the folder of a run, which is released when the object is deleted or the process ends.

    A POSIX lock is used instead of ``flock``. Child processes do not inherit POSIX locks, so data workers that
    outlive a killed process do not block the next run. POSIX locks also work across nodes on network file systems.

    Args:
        folder: The folder, which is created if it does not exist.

    Raises:
        InputError: A different process holds the lock.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / LOCK_NAME, "a")
        weakref.finalize(self, file.close)
        try:
            lock(file, wait=False, posix=True)
        except (BlockingIOError, PermissionError) as error:  # POSIX allows either error
            raise InputError(
                f"Another run is using {folder}",
                remedy="wait until it ends, or set another folder (--run.folder, or folder of CheckpointAndResume)",
            ) from error


@dataclasses.dataclass
class RunConfig:
    """Settings for the folder, resumption and profiling of a run.

    Attributes:
        folder: Folder of the run. A run that is started again with the same folder is resumed. If None, a new folder
            ``runs/lrm/version_N`` is created.
        resume: "auto", "never" or a path. With "auto", the run resumes from the newest valid checkpoint in the folder,
            or starts from the first step if there are no checkpoints. With "never", the run starts from the first step
            and a folder with checkpoints is rejected. With the path of a checkpoint or of a different run, a new run
            starts from that checkpoint or from the newest checkpoint of that run. A run that already has checkpoints
            resumes from its own checkpoints.
        profile: Number of steps to trace after five warm-up steps. Traces are written to ``profile`` in the folder. If
            0, profiling is disabled.
    """

    folder: str | None = None
    resume: str = "auto"
    profile: int = 0


def run_path(folder: str) -> Path:
    """Return the folder of a run as an absolute path.

    Raises:
        InputError: The folder is an empty string, or is a URL. Object stores do not support appending to logs.
    """
    try:
        return user_path(folder).absolute()
    except argparse.ArgumentTypeError as error:
        remedy = "to store checkpoints in an object store, set folder of CheckpointAndResume"
        raise InputError(error, remedy=remedy, subject="--run.folder") from error


def set_logger_folders(loggers: Any, folder: str | None) -> None:  # noqa: ANN401 - an unvalidated config
    """Set the folder of all loggers in the config of a trainer, in place.

    Args:
        loggers: ``trainer.logger`` of the config.
        folder: Folder of the run. If None, the folders of the loggers are not changed.

    Raises:
        InputError: A folder is given and a logger is None or True, for which Lightning chooses the folder.
    """
    path = None if folder is None else run_path(folder)
    for logger_config in _listed(loggers):
        if logger_config is None or logger_config is True:
            if path is None:
                continue
            raise InputError(
                expected="a logger or false for trainer.logger",
                found=f"{logger_config}, for which Lightning does not use the folder of the run",
                remedy="omit trainer.logger to use TensorBoard",
            )
        if logger_config.get("init_args") is None:
            logger_config["init_args"] = {}
        if path is None:
            continue
        logger_class = resolve_name(logger_config["class_path"])
        if issubclass(logger_class, TensorBoardLogger | CSVLogger):  # their folder is save_dir/name/version
            values = {"save_dir": str(path.parent), "name": "", "version": path.name}
        else:
            values = {"save_dir": str(path), "name": path.name}
        for name in values.keys() & inspect.signature(logger_class).parameters.keys():
            logger_config["init_args"][name] = values[name]


def new_run_folder(loggers: Any, root: str | None) -> str | None:  # noqa: ANN401 - a config
    """Return a new folder for a run, or None if the first logger chooses the folder.

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
    """Return the loggers of a config as a list, which is empty if logging is disabled."""
    return [one for one in (loggers if isinstance(loggers, list) else [loggers]) if one is not False]


def trainer_folder(trainer: L.Trainer) -> Path:
    """Return the folder of the run on this rank. Unlike ``trainer.log_dir``, this does not use a broadcast."""
    first = trainer.loggers[0] if trainer.loggers else None
    folder = first.log_dir if isinstance(first, TensorBoardLogger | CSVLogger) else first and first.save_dir
    return Path(folder or trainer.default_root_dir)


def create_run_folder(trainer: L.Trainer) -> Path:
    """Create the folder of a run for which ``--run.folder`` is not set, and return the folder.

    Runs that start at the same time create different folders.
    """
    first = trainer.loggers[0] if trainer.loggers else None
    # The private version is None until the property is read, unless the config sets the version.
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
    """Return the folder of the run to which a path belongs.

    Args:
        path: Path of a run, of the folder of its checkpoints, or of a checkpoint.

    Returns:
        The folder, or None if no folder with a ``config.yaml`` was found or if the path is a URL.
    """
    if "://" in path:
        return None
    folder = Path(path).expanduser().absolute()
    return next((f for f in (folder, *folder.parents[:2]) if (f / "config.yaml").is_file()), None)


def drop_logs_after(loggers: list[Any], step: int) -> None:
    """Remove logged values of steps after ``step``, the step of the checkpoint from which the run resumes."""
    for log in loggers:
        if isinstance(log, TensorBoardLogger):
            log._kwargs["purge_step"] = step + 1
        elif isinstance(log, CSVLogger):
            log._experiment = AppendingCSVWriter(log.log_dir, step)
