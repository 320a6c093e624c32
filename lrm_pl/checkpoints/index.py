"""The index of a checkpoint, and functions that list, verify and delete checkpoints. Call the functions on one rank."""

import dataclasses
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from lrm_pl.checkpoints.files import FileRecords, hashed_file, sync_folder
from lrm_pl.errors import InputError, counted
from lrm_pl.storage import is_local, open_store, store_errors

FORMAT_VERSION = 1
INDEX_NAME = "index.json"

#: Metadata file of ``torch.distributed.checkpoint``.
METADATA_NAME = ".metadata"

_NAME = re.compile(r"step-(\d{8,})")

#: Number of files to hash concurrently.
_HASHING_THREADS = 4


class CheckpointError(InputError):
    """Raised if a checkpoint is missing, incomplete, damaged, unsafe to load, or belongs to a different model."""


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint.

    Attributes:
        path: Path or URL of the folder of the checkpoint.
        step: Number of completed optimizer steps.
        run: State of the run except for tensors, as JSON values.
        files: Mapping from file name to size in bytes and SHA-256.
    """

    path: str
    step: int
    run: Mapping[str, Any]
    files: FileRecords


def checkpoint_path(folder: str, step: int) -> str:
    """Return the path of the checkpoint for a step."""
    return f"{folder.rstrip('/')}/step-{step:08d}"


def checkpoint_step(path: str) -> int:
    """Return the step number in the path of a checkpoint."""
    return int(path.rsplit("step-", 1)[1])


def partial_path(path: str) -> str:
    """Return the folder to which a checkpoint is written before it is complete."""
    return f"{path}.partial" if is_local(path) else path


def create_partial(folder: str) -> None:
    """Create an empty folder for the files of an incomplete checkpoint."""
    if is_local(folder):
        inner = open_store(folder)[1]
        shutil.rmtree(inner, ignore_errors=True)
        os.makedirs(inner)  # only for local folders, because fsspec would create a missing bucket
    else:
        remove_checkpoint(folder)


def finalize_checkpoint(path: str, step: int, run: Mapping[str, Any], files: FileRecords) -> Checkpoint:
    """Write the index of a checkpoint and move the checkpoint to its final path.

    Call this on one rank after all ranks have written their files.

    Args:
        path: Path or URL of the folder of the checkpoint.
        step: Number of completed optimizer steps.
        run: State of the run except for tensors, as JSON values.
        files: The return value of ``write_tensors``.

    Raises:
        OSError: The index cannot be written, or a file written by a different rank is missing.
    """
    folder = partial_path(path)
    fs, inner = open_store(folder)
    with store_errors(folder):
        for name, (size, _) in files.items():
            found = f"{fs.size(f'{inner}/{name}')} bytes" if fs.isfile(f"{inner}/{name}") else "no file"
            if found != f"{size} bytes":
                raise OSError(
                    f"{folder}/{name}: expected a file of {size} bytes, but found {found}. "
                    "Make sure that all nodes share this folder"
                )
    record: dict[str, Any] = {"version": FORMAT_VERSION, "step": step, "run": run, "files": files}
    record["sha256"] = _digest(record)
    with hashed_file(f"{folder}/{INDEX_NAME}") as file:
        file.write(json.dumps(record, indent=1).encode())
    if folder != path:
        target = open_store(path)[1]
        sync_folder(inner)
        # An existing checkpoint of this step is damaged, or the run was resumed from an earlier step.
        if os.path.lexists(target):
            remove_checkpoint(path)
        os.rename(inner, target)
        sync_folder(os.path.dirname(target))
    return Checkpoint(path, step, run, files)


def list_checkpoints(folder: str) -> list[str]:
    """Return the paths of the checkpoints in a folder, newest first, without verifying the checkpoints.

    If the folder does not exist, the list is empty.
    """
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
    """Delete a checkpoint. The index is deleted first, so that a partially deleted checkpoint is not valid."""
    fs, inner = open_store(path)
    with store_errors(path):
        if fs.exists(f"{inner}/{INDEX_NAME}"):
            fs.rm_file(f"{inner}/{INDEX_NAME}")
        if fs.exists(inner):
            fs.rm(inner, recursive=True)


def remove_partial_checkpoints(folder: str, log: Callable[[str], None]) -> None:
    """Delete incomplete checkpoints of an interrupted run from a local folder.

    No other run may use the folder. In an object store, this does nothing, because incomplete checkpoints are
    stored at their final path and are overwritten or deleted later.

    Args:
        folder: Folder of the checkpoints.
        log: Function that is called with a message for each deleted checkpoint.
    """
    if not is_local(folder):
        return
    inner = open_store(folder)[1]
    for name in sorted(os.listdir(inner)) if os.path.isdir(inner) else []:
        if _NAME.fullmatch(name.removesuffix(".partial")) and name.endswith(".partial"):
            log(f"Deleting the incomplete checkpoint {inner}/{name} of an interrupted run")
            shutil.rmtree(f"{inner}/{name}")


def read_index(path: str) -> Checkpoint:
    """Read the index of a checkpoint without verifying the other files.

    Raises:
        CheckpointError: The index is missing or invalid.
    """
    fs, inner = open_store(path)
    with store_errors(path):
        try:
            content = fs.cat_file(f"{inner}/{INDEX_NAME}")
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
            raise CheckpointError(
                expected=f"a checkpoint at {path}",
                found=f"no {INDEX_NAME}: the checkpoint is missing or incomplete",
                remedy="pass the path of a checkpoint, RUN/checkpoints/step-...",
            ) from error
    return _parse_index(path, content)


def _digest(record: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def _parse_index(path: str, content: bytes) -> Checkpoint:
    subject = f"{path}/{INDEX_NAME}"
    try:
        record = json.loads(content)
        if record["version"] != FORMAT_VERSION:
            raise CheckpointError(
                subject=path,
                expected=f"checkpoint version {FORMAT_VERSION}",
                found=f"{record['version']!r}",
                remedy="use the version of lrm_pl that wrote the checkpoint",
            )
        name = _NAME.fullmatch(path.rstrip("/").rsplit("/", 1)[-1])
        if record.pop("sha256") != _digest(record) or (name and int(name[1]) != record["step"]):
            raise CheckpointError(
                subject=subject,
                expected="the step in the folder's name and a matching SHA-256",
                found="a different step or content: the index is damaged",
            )
        files = {name: (int(size), str(digest)) for name, (size, digest) in record["files"].items()}
        unsafe = [name for name in files if not re.fullmatch(r"[\w.]+", name) or name in (".", "..")]
        if METADATA_NAME not in files or unsafe:
            raise CheckpointError(
                subject=subject,
                expected=f"{METADATA_NAME} and only names of files in the same folder",
                found=f"{unsafe[:3] or list(files)[:3]}",
                remedy="do not trust this checkpoint",
            )
        return Checkpoint(path, int(record["step"]), dict(record["run"]), files)
    except CheckpointError:
        raise
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise CheckpointError(
            subject=subject, expected="a valid checkpoint index", found=f"{error!r}"
        ) from error


def read_checkpoint(path: str) -> Checkpoint:
    """Read the index of a checkpoint and verify the sizes and hashes of all files.

    Raises:
        CheckpointError: The index is missing or invalid, or a file is damaged.
    """
    checkpoint = read_index(path)
    fs, inner = open_store(path)

    def check(name: str) -> CheckpointError | None:
        size, digest = checkpoint.files[name]
        found = f"{fs.size(f'{inner}/{name}')} bytes" if fs.isfile(f"{inner}/{name}") else "no file"
        if found == f"{size} bytes":
            with fs.open(f"{inner}/{name}", "rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() == digest:
                    return None
            found = "a different hash"
        return CheckpointError(
            subject=f"{path}/{name}",
            expected=f"{size} bytes with SHA-256 {digest}",
            found=f"{found}: the checkpoint is damaged",
        )

    with store_errors(path), ThreadPoolExecutor(_HASHING_THREADS) as pool:
        for error in pool.map(check, checkpoint.files):
            if error is not None:
                raise error
    return checkpoint


def newest_checkpoint(folder: str, warn: Callable[[str], None]) -> Checkpoint | None:
    """Return the newest valid checkpoint in a folder.

    Args:
        folder: Folder of the checkpoints.
        warn: Function that is called with a message for each damaged checkpoint.

    Returns:
        The checkpoint, or None if the folder has no checkpoints. In an object store, the result is also None if no
        checkpoint has an index, which means that the run ended before the first checkpoint was complete.

    Raises:
        CheckpointError: The folder has checkpoints, but no checkpoint is valid.
    """
    paths = list_checkpoints(folder)
    for path in paths:
        try:
            return read_checkpoint(path)
        except CheckpointError as error:
            warn(f"Skipping a damaged checkpoint. {error}")
    if paths and not is_local(folder) and not any(map(has_index, paths)):
        warn(f"{folder}: no checkpoint was completed; starting from the first step")
        return None
    if paths:
        raise CheckpointError(
            expected=f"a valid checkpoint in {folder}",
            found=counted(len(paths), "invalid checkpoint"),
            remedy="pass another checkpoint with --run.resume PATH, or a new folder with --run.folder",
        )
    return None


def has_index(path: str) -> bool:
    """Return whether a checkpoint has an index, which is written last and deleted first."""
    fs, inner = open_store(path)
    with store_errors(path):
        return bool(fs.isfile(f"{inner}/{INDEX_NAME}"))
