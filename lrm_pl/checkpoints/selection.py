"""Selection of the checkpoint to resume from or to load."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from lrm_pl.checkpoints.index import (
    INDEX_NAME,
    Checkpoint,
    CheckpointError,
    has_index,
    list_checkpoints,
    newest_checkpoint,
    read_checkpoint,
)
from lrm_pl.errors import InputError
from lrm_pl.storage import is_local

logger = logging.getLogger(__name__)

T = TypeVar("T")

#: What a path refers to instead of a checkpoint -> remedy.
_REMEDIES = {
    "nothing": "pass the folder of a run, or one of its checkpoints, RUN/checkpoints/step-...",
    "a file": "pass the folder of a checkpoint, or convert published weights with `lrm convert`",
    "an exported network": "start from it with `lrm fit --weights.network`",
    "a run without checkpoints": "wait until the run has saved its first checkpoint, or pass another run",
}


def choose_checkpoint(resume: str, folder: str | None) -> Checkpoint | None:
    """Return the verified checkpoint to resume from, or None to start from the first step.

    Args:
        resume: "auto", "never" or a path; see ``RunConfig``.
        folder: Folder of the checkpoints of the run. If None, the run is new.

    Raises:
        InputError: ``resume`` is "never" and the folder has checkpoints, or ``resume`` is a path without a valid
            checkpoint.
    """
    existing = [] if folder is None else list_checkpoints(folder)
    if resume == "never":
        if existing:
            raise InputError(
                expected=f"no checkpoints in {folder}",
                found=len(existing),
                remedy="resume the run with --run.resume auto, or use another folder with --run.folder",
            )
        return None
    if folder is None or (resume != "auto" and not existing):
        return None if resume == "auto" else find_checkpoint(resume)
    if resume != "auto":
        _require_other_run(resume, existing[0])
        logger.warning("Resuming from the checkpoints of this run. --run.resume %s is ignored", resume)
    return newest_checkpoint(folder, logger.warning)


def _require_other_run(resume: str, newest: str) -> None:
    """Reject a checkpoint in the folder of the run, because later checkpoints would be mixed with new checkpoints."""
    if Path(resume).expanduser().absolute().parent == Path(newest).expanduser().absolute().parent:
        raise InputError(
            expected="--run.resume with a checkpoint of another run",
            found=f"{resume} in the folder of this run, whose newest checkpoint is {newest}",
            remedy=(
                "omit --run.resume to resume from the newest checkpoint. To resume from an earlier checkpoint, use "
                "another --run.folder or delete the later checkpoints"
            ),
        )


def find_checkpoint(path: str) -> Checkpoint:
    """Return the checkpoint at a path, or the newest valid checkpoint of a run.

    Args:
        path: Path or URL of a checkpoint, of a run or of a folder of checkpoints.

    Raises:
        CheckpointError: No valid checkpoint was found.
    """
    path = path.rstrip("/") if "://" in path else str(Path(path).expanduser())
    if is_local(path):
        _require_checkpoint_folder(Path(path))
    for folder in (f"{path}/checkpoints", path):
        checkpoint = newest_checkpoint(folder, logger.warning)
        if checkpoint is not None:
            return checkpoint
    return read_checkpoint(path)


def _require_checkpoint_folder(path: Path) -> None:
    """Check that a local path is a checkpoint or a folder with checkpoints.

    Raises:
        CheckpointError: The path does not exist, or is a file, an exported network or a run without checkpoints.
    """
    if (
        (path / INDEX_NAME).is_file()
        or list_checkpoints(str(path))
        or list_checkpoints(f"{path}/checkpoints")
    ):
        return
    states = {
        "nothing": not path.exists(),
        "a file": path.is_file(),
        "an exported network": (path / "model.safetensors").is_file(),
        "a run without checkpoints": (path / "config.yaml").is_file(),
    }
    for state, holds in states.items():
        if holds:
            expected = f"a checkpoint or a run at {path}"
            raise CheckpointError(expected=expected, found=state, remedy=_REMEDIES[state])


def read_newest(path: str, read: Callable[[Checkpoint], T]) -> T:
    """Read the checkpoint at a path or the newest valid checkpoint of a run, which may be in progress.

    Args:
        path: Path or URL of a checkpoint, of a run or of a folder of checkpoints.
        read: Function that reads from the checkpoint. If the run deletes the checkpoint during the call, the function
            is called again with a newer checkpoint.

    Returns:
        The return value of ``read``.

    Raises:
        CheckpointError: No valid checkpoint was found.
    """
    deleted = ""
    while True:
        checkpoint = find_checkpoint(path)
        try:
            return read(checkpoint)
        except (FileNotFoundError, CheckpointError):
            if has_index(checkpoint.path) or checkpoint.path == deleted:
                raise
            deleted = checkpoint.path
            logger.warning("%s was deleted while it was read; reading a newer checkpoint", deleted)
