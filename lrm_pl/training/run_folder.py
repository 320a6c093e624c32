"""The folder of a run: where it is, that one run at a time is in it, and what to go on from."""

import dataclasses
import inspect
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import lightning as L
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from lrm_pl.errors import InputError
from lrm_pl.training.csv_rows import AppendedRows


@dataclasses.dataclass
class RunConfig:
    """Where a run is kept, and whether it goes on.

    Attributes:
        folder: The run's folder. Started again with the same folder, a run goes on where it was. Null makes a new
            one, runs/lrm/version_N.
        resume: "auto" goes on from the newest whole checkpoint in the folder, and starts where there is none; "never"
            starts, and refuses a folder that has checkpoints; anything else is where a new run begins: the path of a
            checkpoint, or the folder of a run whose newest one is taken. Once the run has checkpoints of its own it
            goes on from these, so that it may be started again with the same command.
        profile: So many steps, after a warm-up of five, are traced into ``profile/`` in the folder; 0: none.
    """

    folder: str | None = None
    resume: str = "auto"
    profile: int = 0


def run_path(folder: str) -> Path:
    """Return the run's folder as an absolute path: what ``~`` and relative paths mean is settled once.

    Raises:
        InputError: It is a URL: logs are appended to, which object stores cannot do; or nothing, which would be the
            working folder.
    """
    if not folder:
        raise InputError(
            expected="a folder after --run.folder",
            found="nothing",
            remedy="is a variable of the shell empty?",
        )
    if "://" in folder:
        raise InputError(
            expected="a local folder for a run's logs",
            found=f"--run.folder {folder}",
            remedy=(
                "keep only checkpoints there: --trainer.callbacks with CheckpointAndResume's init_args {folder: "
                f"{folder}}}"
            ),
        )
    return Path(folder).expanduser().absolute()


def place_loggers(loggers: Any, folder: str | None) -> None:  # noqa: ANN401 - a config: what the user gave, not checked yet
    """Make every logger of a trainer's config write into the run's folder itself, where one is given.

    Raises:
        InputError: A logger that Lightning would choose and place elsewhere.
    """
    path = None if folder is None else run_path(folder)
    for logger_config in _listed(loggers):
        if logger_config is None or logger_config is True:
            if path is None:
                continue
            raise InputError(
                expected="trainer.logger to name a logger, or false",
                found=f"{logger_config}: Lightning's choice would not write into the run's folder",
                remedy="leave it out for TensorBoard",
            )
        if logger_config.get("init_args") is None:  # a class that was named without arguments
            logger_config["init_args"] = {}
        arguments, kind = logger_config["init_args"], resolve_name(logger_config["class_path"])
        if path is None:
            continue
        if issubclass(kind, TensorBoardLogger | CSVLogger):  # these would make a folder in it
            placed = {"save_dir": str(path.parent), "name": "", "version": path.name}
        else:
            placed = {"save_dir": str(path), "name": path.name}
        taken = inspect.signature(kind).parameters
        for name in placed.keys() & taken.keys():
            arguments[name] = placed[name]


def fresh_folder(loggers: Any, root: str | None) -> str | None:  # noqa: ANN401 - a config
    """Return a new folder for a run without one whose first logger makes none; None where it does.

    Args:
        loggers: ``trainer.logger`` of the config.
        root: ``trainer.default_root_dir``.
    """
    listed = _listed(loggers)
    makes_one = listed and (
        listed[0] in (None, True)
        or issubclass(resolve_name(listed[0]["class_path"]), TensorBoardLogger | CSVLogger)
    )
    return None if makes_one else _new_version(root)


def _new_version(root: str | None) -> str:
    place = Path(root or "runs") / "lrm"
    taken = [path.name.removeprefix("version_") for path in place.glob("version_*")]
    return str(place / f"version_{max([int(name) for name in taken if name.isdecimal()], default=-1) + 1}")


def _listed(loggers: Any) -> list[Any]:  # noqa: ANN401 - a config
    """Return the loggers of a config as a list; false is none."""
    return [one for one in (loggers if isinstance(loggers, list) else [loggers]) if one is not False]


def folder_of(trainer: L.Trainer) -> Path:
    """Return the run's folder as this process sees it; ``trainer.log_dir`` asks all ranks, this asks none."""
    first = trainer.loggers[0] if trainer.loggers else None
    made = first.log_dir if isinstance(first, TensorBoardLogger | CSVLogger) else first and first.save_dir
    return Path(made or trainer.default_root_dir)


def claim_new_folder(trainer: L.Trainer) -> Path:
    """Make the folder of a run without ``--run.folder``: the next version, also where others begin at the same time."""
    first = trainer.loggers[0] if trainer.loggers else None
    # None as long as nobody has looked; a number or a name that the config gives is kept.
    finds_one = isinstance(first, TensorBoardLogger | CSVLogger) and first._version is None
    while True:
        folder = folder_of(trainer)
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            if first is None or not finds_one:
                return folder
            first._version = None  # type: ignore[attr-defined]  # looks for the next one anew
        else:
            return folder


def run_of(path: str) -> Path | None:
    """Return the local folder of the run that PATH is, or in which PATH, one checkpoint or all, lies; else None."""
    if "://" in path:
        return None
    place = Path(path).expanduser().absolute()
    return next((f for f in (place, *place.parents[:2]) if (f / "config.yaml").is_file()), None)


def purge_after(loggers: list[Any], step: int) -> None:
    """Make loggers drop points after ``step``: a run logged them after the checkpoint it goes on from.

    With step 0 these are all: of a run that ended before its first checkpoint.
    """
    for log in loggers:
        if isinstance(log, TensorBoardLogger):
            log._kwargs["purge_step"] = step + 1
        elif isinstance(log, CSVLogger):
            log._experiment = AppendedRows(log.log_dir, step)
