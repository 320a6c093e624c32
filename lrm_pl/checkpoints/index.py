"""Checkpoints as wholes: their index, finding the newest one, retention. All but ``complete`` is for one rank."""

import dataclasses
import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

from lrm_pl.checkpoints.files import Files, sha256, sync_folder, writing
from lrm_pl.errors import InputError
from lrm_pl.storage import is_local, open_store, store_errors

#: How the tensors lie: a file a rank, or one file.
Format = Literal["sharded", "single"]

#: Whether the highest or the lowest value of a metric is the best.
Mode = Literal["max", "min"]

#: What a value is multiplied by, so that the highest is the best.
SIGNS: dict[Mode, float] = {"max": 1.0, "min": -1.0}

FORMAT_VERSION = 1
INDEX_NAME = "index.json"
SINGLE_NAME, METADATA_NAME = "tensors.pt", ".metadata"
#: The file that a checkpoint of each format has whatever wrote it.
_NEEDED: dict[str, str] = {"single": SINGLE_NAME, "sharded": METADATA_NAME}
_NAME = re.compile(r"step-(\d{8,})")

#: Files that are checked at a time.
_CHECKERS = 4


class CheckpointError(InputError):
    """A checkpoint is missing, half-written, damaged, of another model, or wants to run code."""


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that was written whole.

    Attributes:
        path: Its folder, a local path or a URL.
        format: How its tensors lie.
        step: Optimizer steps done.
        run: What a run needs besides tensors; JSON.
        files: File name -> (size, sha256).
    """

    path: str
    format: Format
    step: int
    run: Mapping[str, Any]
    files: Files


def checkpoint_path(folder: str, step: int) -> str:
    """Name the checkpoint of a step in a folder of checkpoints."""
    return f"{folder.rstrip('/')}/step-{step:08d}"


def step_of(path: str) -> int:
    """Read the step in the name of a checkpoint."""
    return int(path.rsplit("step-", 1)[1])


def partial_path(path: str) -> str:
    """Name the folder in which a checkpoint is written."""
    return f"{path}.partial" if is_local(path) else path


def begin(path: str) -> None:
    """Make the folder in which a checkpoint is written, empty."""
    folder = partial_path(path)
    if is_local(folder):
        inner = open_store(folder)[1]
        shutil.rmtree(inner, ignore_errors=True)
        os.makedirs(inner)  # an object store has no folders, and fsspec would make a misspelled bucket
    else:
        remove_checkpoint(folder)


def complete(path: str, layout: Format, step: int, run: Mapping[str, Any], files: Files) -> Checkpoint:
    """Make a checkpoint whole: write its index, then give the folder its name. One rank calls this, after all wrote.

    Args:
        path: Folder of the checkpoint.
        layout: How its tensors lie.
        step: Optimizer steps done.
        run: What a run needs besides tensors; JSON.
        files: What ``write_tensors`` returned.

    Raises:
        OSError: No space, no permission, or a rank's file is not to be seen here.
    """
    folder = partial_path(path)
    fs, inner = open_store(folder)
    with store_errors(folder):
        for name, (size, _) in files.items():
            found = fs.size(f"{inner}/{name}") if fs.isfile(f"{inner}/{name}") else "none"
            if found != size:
                raise OSError(
                    f"expected {folder}/{name} of {size} bytes, which a rank has written, but found {found}. Do all "
                    "nodes share this folder?"
                )
    record: dict[str, Any] = {
        "version": FORMAT_VERSION,
        "format": layout,
        "step": step,
        "run": run,
        "files": files,
    }
    record["sha256"] = _digest(record)
    with writing(f"{folder}/{INDEX_NAME}") as file:
        file.write(json.dumps(record, indent=1).encode())
    if folder != path:
        target = open_store(path)[1]
        sync_folder(inner)
        if os.path.lexists(
            target
        ):  # of the same step: a damaged one, or the run took another way from an older one
            remove_checkpoint(path)
        os.rename(inner, target)
        sync_folder(os.path.dirname(target))
    return Checkpoint(path, layout, step, run, files)


def list_checkpoints(folder: str) -> list[str]:
    """List the checkpoints of a folder, whole or not, newest first; none where there is no folder."""
    fs, inner = open_store(folder)
    with store_errors(folder):
        try:
            found = fs.ls(inner, detail=False)
        except (FileNotFoundError, NotADirectoryError):
            return []
    names = (name.rstrip("/").rsplit("/", 1)[-1] for name in found)
    steps = sorted((int(match[1]) for match in map(_NAME.fullmatch, names) if match), reverse=True)
    return [checkpoint_path(folder, step) for step in steps]


def remove_checkpoint(path: str) -> None:
    """Delete a checkpoint, its index first, so that what is left of an interrupted deletion is not taken for whole."""
    fs, inner = open_store(path)
    with store_errors(path):
        if fs.exists(f"{inner}/{INDEX_NAME}"):
            fs.rm_file(f"{inner}/{INDEX_NAME}")
        if fs.exists(inner):
            fs.rm(inner, recursive=True)


def remove_partial_files(folder: str, say: Callable[[str], None]) -> None:
    """Delete what an interrupted run left half-written in a local folder; no other run may be at work there."""
    if not is_local(folder):
        return  # in an object store it has its step's name, and is replaced or tidied up by the run that goes on
    inner = open_store(folder)[1]
    for name in sorted(os.listdir(inner)) if os.path.isdir(inner) else []:
        if _NAME.fullmatch(name.removesuffix(".partial")) and name.endswith(".partial"):
            say(f"deleting {inner}/{name}: a checkpoint that was not finished when the run ended")
            shutil.rmtree(f"{inner}/{name}")


def read_index(path: str) -> Checkpoint:
    """Read what a checkpoint's index says, without looking at its other files.

    Raises:
        CheckpointError: There is none, or it is no index.
    """
    fs, inner = open_store(path)
    with store_errors(path):
        try:
            content = fs.cat_file(f"{inner}/{INDEX_NAME}")
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
            raise CheckpointError(
                expected=f"a checkpoint at {path}",
                found=f"no {INDEX_NAME} there: it is missing or half-written",
                remedy="a run keeps its own in RUN/checkpoints/step-...",
            ) from error
    return _parsed(path, content)


def _digest(record: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def _parsed(path: str, content: bytes) -> Checkpoint:
    try:
        record = json.loads(content)
        if record["version"] != FORMAT_VERSION:
            raise CheckpointError(
                subject=path,
                expected=f"checkpoint version {FORMAT_VERSION}",
                found=f"{record['version']!r}",
                remedy="use the version of lrm_pl that wrote it",
            )
        name = _NAME.fullmatch(path.rstrip("/").rsplit("/", 1)[-1])
        if record.pop("sha256") != _digest(record) or (name and int(name[1]) != record["step"]):
            raise CheckpointError(
                subject=f"{path}/{INDEX_NAME}",
                expected="the step of the folder's name and the sha256 of what else it says",
                found="others: it is damaged",
            )
        layout, files = record["format"], record["files"]
        strange = [name for name in files if not re.fullmatch(r"[\w.]+", name) or name in (".", "..")]
        needed = _NEEDED.get(layout)
        if needed is None or needed not in files or strange:
            raise CheckpointError(
                subject=f"{path}/{INDEX_NAME}",
                expected=(
                    f"one of the formats {', '.join(_NEEDED)}, its {needed or 'files'}, and names of files in "
                    "the same folder"
                ),
                found=f"format {layout!r} and {strange[:3] or list(files)[:3]}: do not trust it",
            )
        files = {name: (int(size), str(digest)) for name, (size, digest) in files.items()}
        return Checkpoint(path, layout, int(record["step"]), dict(record["run"]), files)
    except CheckpointError:
        raise
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise CheckpointError(
            subject=f"{path}/{INDEX_NAME}", expected="the index of a checkpoint", found=f"{error!r}"
        ) from error


def read_checkpoint(path: str) -> Checkpoint:
    """Read and check a checkpoint: that its index is there, and that every file has its size and its hash.

    Raises:
        CheckpointError: With what was expected and what was found.
    """
    checkpoint = read_index(path)
    fs, inner = open_store(path)

    def problem(name: str) -> str | None:
        size, digest = checkpoint.files[name]
        found = fs.size(f"{inner}/{name}") if fs.isfile(f"{inner}/{name}") else "none"
        if found != size:
            return f"expected the file {name} of {size} bytes, but found {found}"
        return (
            None
            if sha256(f"{path}/{name}") == digest
            else f"expected {name} with sha256 {digest}, but found another"
        )

    with store_errors(path), ThreadPoolExecutor(_CHECKERS) as pool:
        problems = [found for found in pool.map(problem, checkpoint.files) if found]
    if problems:
        raise CheckpointError(f"{path}: {problems[0]}: it is damaged")
    return checkpoint


def newest_checkpoint(folder: str, say: Callable[[str], None]) -> Checkpoint | None:
    """Find the newest checkpoint that is whole; damaged ones are passed over, and said so.

    Raises:
        CheckpointError: There are checkpoints, and none is whole: starting over in silence would lose the run. In an
            object store, where the index comes last, those without one are of a run that ended before its first.
    """
    paths = list_checkpoints(folder)
    for path in paths:
        try:
            return read_checkpoint(path)
        except CheckpointError as error:
            say(f"passed over a checkpoint: {error}")
    if paths and not is_local(folder) and not any(map(is_there, paths)):
        say(f"{folder}: no checkpoint was ever finished there; starting from the beginning")
        return None
    if paths:
        raise CheckpointError(
            expected=f"a whole checkpoint among the {len(paths)} in {folder}",
            found="none",
            remedy=(
                "give one that is elsewhere (--run.resume PATH), or start over in another folder "
                "(--run.folder)"
            ),
        )
    return None


def is_there(path: str) -> bool:
    """Return whether a checkpoint has its index, which is written last and deleted first."""
    fs, inner = open_store(path)
    with store_errors(path):
        return bool(fs.isfile(f"{inner}/{INDEX_NAME}"))


def tidy(
    folder: str,
    *,
    keep: int,
    keep_every: int | None = None,
    apart: Collection[str] = (),
    monitor: str | None = None,
    mode: Mode = "max",
) -> None:
    """Delete the checkpoints of a folder that nothing keeps.

    Args:
        folder: Folder of the checkpoints.
        keep: So many of the newest stay.
        keep_every: Those of multiples of this step stay too.
        apart: Checkpoints that are neither counted nor deleted: newer ones that the run has passed over. Were they
            counted among the newest, they would push out the only whole ones.
        monitor: What the best is found by; see ``best_score``.
        mode: Whether the highest or the lowest is the best.
    """
    paths = [path for path in list_checkpoints(folder) if path not in apart]
    scores = _ranks(paths, monitor, mode)
    kept = {*paths[:keep], *sorted(scores, key=lambda path: scores[path])[-1:]}
    for path in reversed(paths):
        if path not in kept and not (keep_every and step_of(path) % keep_every == 0):
            remove_checkpoint(path)


def best_score(
    folder: str,
    say: Callable[[str], None],
    apart: Collection[str] = (),
    monitor: str | None = None,
    mode: Mode = "max",
) -> tuple[float | None, set[str]]:
    """Find the best score (``run["score"]``) of a folder's whole checkpoints, and the damaged ones with a better.

    Args:
        folder: Folder of the checkpoints.
        say: Told about each damaged one.
        apart: Checkpoints that are not looked at.
        monitor: Name of the metric; scores of others are left out. None takes all.
        mode: Whether the highest or the lowest is the best.

    Returns:
        The score, None where there is none; the damaged ones, which nothing should count as the best.
    """
    scores = _ranks([path for path in list_checkpoints(folder) if path not in apart], monitor, mode)
    damaged: set[str] = set()
    for path in sorted(scores, key=lambda path: scores[path], reverse=True):
        try:
            read_checkpoint(path)
        except CheckpointError as error:
            say(f"not the best checkpoint any more: {error}")
            damaged.add(path)
        else:
            return scores[path] * SIGNS[mode], damaged
    return None, damaged


def _ranks(paths: Collection[str], monitor: str | None, mode: Mode) -> dict[str, float]:
    """Return what is higher for a better checkpoint; without those that have no score in this metric."""
    ranks = {}
    for path in paths:
        try:
            run = read_index(path).run
        except CheckpointError:
            continue  # half-written or damaged: it has no score
        score = run.get("score")
        if (
            score is not None
            and not math.isnan(score)
            and (monitor is None or run.get("monitor", monitor) == monitor)
        ):
            ranks[path] = float(score) * SIGNS[mode]
    return ranks
