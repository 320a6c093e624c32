"""Which checkpoint a run goes on from."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from lrm_pl.checkpoints.index import (
    INDEX_NAME,
    Checkpoint,
    CheckpointError,
    is_there,
    list_checkpoints,
    newest_checkpoint,
    read_checkpoint,
)
from lrm_pl.errors import InputError
from lrm_pl.storage import is_local

logger = logging.getLogger(__name__)

T = TypeVar("T")


def choose_checkpoint(resume: str, folder: str | None) -> Checkpoint | None:
    """Find what a run goes on from, checked; None to start.

    Args:
        resume: "auto", "never" or a path; see ``RunConfig``.
        folder: Folder of the run's checkpoints; None where the run is new.

    Raises:
        InputError: There is nothing where something was asked for, or something where nothing was expected.
    """
    own = [] if folder is None else list_checkpoints(folder)
    if resume == "never":
        if own:
            raise InputError(
                expected=f"no checkpoints in {folder}",
                found=len(own),
                remedy="go on from them (--run.resume auto) or start in another folder (--run.folder)",
            )
        return None
    if folder is None or (resume != "auto" and not own):
        return None if resume == "auto" else find_checkpoint(resume)
    if resume != "auto":
        _require_new(resume, own[0])
        logger.warning(
            "the run has checkpoints of its own and goes on from these: not from %s, where it began", resume
        )
    return newest_checkpoint(folder, logger.warning)


def _require_new(resume: str, newest: str) -> None:
    """Refuse to go back within a run: its later checkpoints would be mixed with the new ones."""
    if Path(resume).expanduser().absolute().parent == Path(newest).expanduser().absolute().parent:
        raise InputError(
            expected=f"--run.resume {resume} to be of another run",
            found=f"it in this run's own folder, up to {newest}",
            remedy=(
                "leave --run.resume out to go on from the newest; to go back, take another --run.folder, "
                "or delete the later checkpoints first"
            ),
        )


def find_checkpoint(path: str) -> Checkpoint:
    """Find a checkpoint by its own path, or by its run's folder, whose newest whole one is meant.

    Raises:
        CheckpointError: There is none.
    """
    path = path.rstrip("/") if "://" in path else str(Path(path).expanduser())
    if is_local(path):
        _require_folder(Path(path))
    for folder in (f"{path}/checkpoints", path):
        found = newest_checkpoint(folder, logger.warning)
        if found is not None:
            return found
    return read_checkpoint(path)


def _require_folder(path: Path) -> None:
    """Say what is wrong with a local path that is no folder of a checkpoint, as far as that shows.

    Raises:
        CheckpointError: It is not there, a file, an exported network, or a run without checkpoints.
    """
    if not path.exists():
        raise CheckpointError(
            expected=f"a checkpoint or a run at {path}",
            found="nothing",
            remedy="correct the path, or name another: a run keeps its own in RUN/checkpoints/step-...",
        )
    if not path.is_dir():
        folder = path.parent
        known = (folder / INDEX_NAME).is_file() or (folder / "checkpoints").is_dir()
        remedy = (
            f"name its folder: {folder}" if known else "`lrm convert` reads weights that others published"
        )
        raise CheckpointError(
            expected="the folder of a checkpoint or of a run", found=f"the file {path}", remedy=remedy
        )
    if (
        (path / INDEX_NAME).is_file()
        or list_checkpoints(str(path))
        or list_checkpoints(f"{path}/checkpoints")
    ):
        return
    if (path / "model.safetensors").is_file():
        raise CheckpointError(
            expected=f"a checkpoint or a run at {path}",
            found="an exported network",
            remedy=f"`lrm fit --weights.network {path}` starts from it",
        )
    if (path / "config.yaml").is_file():
        raise CheckpointError(
            expected=f"a checkpoint of the run {path}",
            found="none",
            remedy="wait until it has saved its first, or name another",
        )


def read_newest(path: str, read: Callable[[Checkpoint], T]) -> T:
    """Read a checkpoint by its own path, or the newest whole one of a run, which may train on and delete it meanwhile.

    Args:
        path: As ``find_checkpoint`` takes it.
        read: Reads what is wanted of it; called again with a newer one where that one has gone.

    Raises:
        CheckpointError: There is none.
    """
    gone = ""
    while True:
        checkpoint = find_checkpoint(path)
        try:
            return read(checkpoint)
        except (FileNotFoundError, CheckpointError):
            if is_there(checkpoint.path) or checkpoint.path == gone:
                raise
            gone = checkpoint.path
            logger.warning("%s was deleted while it was read: taking a newer one", gone)
