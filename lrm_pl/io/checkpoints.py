"""A training checkpoint as files: written whole or not at all, checked before it is used, read without running code.

    CHECKPOINTS/step-00000650/
        .metadata, __0_0.distcp, ...   tensors by name, in shards, one file a rank (torch.distributed.checkpoint); or
        tensors.pt                     the same tensors in one file
        index.json                     written last: format version, run state, every file's size and sha256

A local folder is written as ``step-....partial`` and renamed when its index is in it; in an object store, where there
is no renaming, the index is what makes it complete. CHECKPOINTS is a local folder or a URL (``s3://``, ``gs://``).
"""

import dataclasses
import hashlib
import io
import json
import pickle
import re
import warnings
from collections.abc import Callable, Mapping
from typing import Any, Literal

import fsspec
import torch
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.checkpoint._fsspec_filesystem import FsspecReader, FsspecWriter
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from lrm_pl.errors import InputError

#: How the tensors lie: a file a rank, or one file.
Format = Literal["sharded", "single"]

FORMAT_VERSION = 1
INDEX_NAME = "index.json"
SINGLE_NAME = "tensors.pt"
_NAME = re.compile(r"step-(\d{8,})")


class CheckpointError(InputError):
    """A checkpoint is missing, half-written, damaged, of another model, or wants to run code."""


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that was written whole.

    Attributes:
        path: Its folder, a local path or a URL.
        format: How its tensors lie.
        step: Optimiser steps done.
        run: What a run needs besides tensors; JSON.
        files: File name -> (size, sha256).
    """

    path: str
    format: Format
    step: int
    run: Mapping[str, Any]
    files: Mapping[str, tuple[int, str]]


def checkpoint_path(folder: str, step: int) -> str:
    """Name the checkpoint of a step in a folder of checkpoints."""
    return f"{folder.rstrip('/')}/step-{step:08d}"


def write_tensors(
    path: str, tensors: Mapping[str, Tensor], layout: Format, group: ProcessGroup | None, *, writes: bool
) -> None:
    """Write the tensor files of a checkpoint, not its index; all ranks of ``group`` call this together.

    Args:
        path: Folder of the checkpoint.
        tensors: Name -> tensor; in the layout "sharded" they may be DTensors, in "single" only rank 0's are used.
        layout: How they are to lie.
        group: Processes that write together; None where there is one.
        writes: Whether this is the rank that writes what is written once.

    Raises:
        OSError: No space, no permission.
    """
    folder = _partial(path)
    if writes:
        fs, inner = url_to_fs(folder)
        if fs.exists(inner):
            fs.rm(inner, recursive=True)
        fs.makedirs(inner, exist_ok=True)
    if group is not None:
        torch.distributed.barrier(group)
    if layout == "single":
        if writes:
            with fsspec.open(f"{folder}/{SINGLE_NAME}", "wb") as file:
                torch.save(dict(tensors), file)
        return
    writer = FsspecWriter(folder, sync_files=_is_local(folder))
    save(dict(tensors), storage_writer=writer, process_group=group, no_dist=group is None)


def complete(path: str, layout: Format, step: int, run: Mapping[str, Any]) -> Checkpoint:
    """Make a checkpoint whole: write its index, then give the folder its name. One rank calls this, after all wrote."""
    folder = _partial(path)
    fs, inner = url_to_fs(folder)
    files = {}
    for found in fs.find(inner):
        with fs.open(found, "rb") as file:
            files[found.removeprefix(inner.rstrip("/") + "/")] = (fs.size(found), _sha256(file))
    record = {"version": FORMAT_VERSION, "format": layout, "step": step, "run": run, "files": files}
    with fs.open(f"{inner}/{INDEX_NAME}", "wb") as file:
        file.write(json.dumps(record, indent=1).encode())
    if folder != path:
        fs.mv(inner, url_to_fs(path)[1], recursive=True)
    return Checkpoint(path, layout, step, run, files)


def list_checkpoints(folder: str) -> list[str]:
    """List the checkpoints of a folder, whole or not, newest first; none where there is no folder."""
    fs, inner = url_to_fs(folder)
    fs.invalidate_cache()
    if not fs.isdir(inner):
        return []
    names = (name.rstrip("/").rsplit("/", 1)[-1] for name in fs.ls(inner, detail=False))
    steps = sorted((int(match[1]) for match in map(_NAME.fullmatch, names) if match), reverse=True)
    return [checkpoint_path(folder, step) for step in steps]


def remove_checkpoint(path: str) -> None:
    """Delete a checkpoint, its index first, so that what is left of an interrupted deletion is not taken for whole."""
    fs, inner = url_to_fs(path)
    if fs.exists(f"{inner}/{INDEX_NAME}"):
        fs.rm_file(f"{inner}/{INDEX_NAME}")
    fs.rm(inner, recursive=True)


def read_index(path: str) -> Checkpoint:
    """Read what a checkpoint's index says, without looking at its other files.

    Raises:
        CheckpointError: There is none, or it is no index.
    """
    fs, inner = url_to_fs(path)
    index = f"{inner}/{INDEX_NAME}"
    if not fs.isfile(index):
        raise CheckpointError(
            f"expected a checkpoint at {path}, found no {INDEX_NAME} there: it is missing or half-written; a run keeps "
            "its own in RUN/checkpoints/step-..."
        )
    with fs.open(index, "rb") as file:
        content = file.read()
    try:
        record = json.loads(content)
        version = record["version"]
        files = {str(name): (int(size), str(digest)) for name, (size, digest) in record["files"].items()}
        checkpoint = Checkpoint(path, record["format"], int(record["step"]), dict(record["run"]), files)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(
            f"{path}/{INDEX_NAME}: expected the index of a checkpoint, found: {error!r}"
        ) from error
    if version != FORMAT_VERSION:
        raise CheckpointError(
            f"{path}: expected checkpoint version {FORMAT_VERSION}, found {version!r}; use the version of lrm_pl "
            "that wrote it"
        )
    return checkpoint


def read_checkpoint(path: str) -> Checkpoint:
    """Read and check a checkpoint: that its index is there, and that every file has its size and its hash.

    Raises:
        CheckpointError: With what was expected and what was found.
    """
    checkpoint = read_index(path)
    fs, inner = url_to_fs(path)
    for name, (size, digest) in checkpoint.files.items():
        file_path = f"{inner}/{name}"
        if not re.fullmatch(r"[\w.]+", name) or not fs.isfile(file_path) or fs.size(file_path) != size:
            found = fs.size(file_path) if fs.isfile(file_path) else "none"
            raise CheckpointError(
                f"{path}: expected the file {name} of {size} bytes, found {found}: it is damaged"
            )
        with fs.open(file_path, "rb") as file:
            if _sha256(file) != digest:
                raise CheckpointError(
                    f"{path}: expected {name} with sha256 {digest}, found another: it is damaged"
                )
    return checkpoint


def newest_checkpoint(folder: str, say: Callable[[str], None]) -> Checkpoint | None:
    """Find the newest checkpoint that is whole; damaged ones are passed over, and said so.

    Raises:
        CheckpointError: There are checkpoints, and none is whole: starting over in silence would lose the run.
    """
    paths = list_checkpoints(folder)
    for path in paths:
        try:
            return read_checkpoint(path)
        except CheckpointError as error:
            say(f"passed over a checkpoint: {error}")
    if paths:
        raise CheckpointError(
            f"expected a whole checkpoint among the {len(paths)} in {folder}, found none; give one that is elsewhere "
            "(--run.resume PATH), or start over in another folder (--run.folder)"
        )
    return None


def tensor_names(checkpoint: Checkpoint) -> dict[str, torch.Size]:
    """List the tensors of a checkpoint with their shapes, without reading them."""
    if checkpoint.format == "single":
        return {name: tensor.shape for name, tensor in _read_single(checkpoint).items()}
    entries = _SafeReader(checkpoint.path).read_metadata().state_dict_metadata
    strange = [name for name, entry in entries.items() if not isinstance(entry, TensorStorageMetadata)]
    if strange:
        raise CheckpointError(
            f"{checkpoint.path}: expected tensors only, found {strange[:3]}: pickles are not read here"
        )
    return {name: entry.size for name, entry in entries.items() if isinstance(entry, TensorStorageMetadata)}


def read_tensors(checkpoint: Checkpoint, into: Mapping[str, Tensor]) -> None:
    """Fill tensors in place, whatever world, sharding and format wrote them; all ranks call this together.

    Args:
        checkpoint: What is read.
        into: Name -> tensor or DTensor, on any device; each is overwritten.

    Raises:
        CheckpointError: A name is missing, or its shape is another.
    """
    found = tensor_names(checkpoint)
    wrong = [name for name, tensor in into.items() if found.get(name) != tensor.shape]
    if wrong:
        raise CheckpointError(
            f"{checkpoint.path}: expected the tensors of this model; missing or of another shape: {wrong[:3]} "
            f"({len(wrong)} in all); pass the config.yaml of the run that wrote it: -c RUN/config.yaml"
        )
    if checkpoint.format == "single":
        content = _read_single(checkpoint)
        for name, tensor in into.items():
            _fill(tensor, content[name])
        return
    alone = not torch.distributed.is_initialized()
    with warnings.catch_warnings():
        # Said of every read by one process, also where one is what is meant.
        warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized")
        load(
            {name: tensor.detach() for name, tensor in into.items()},
            storage_reader=_SafeReader(checkpoint.path),
            no_dist=alone,
        )


def _fill(tensor: Tensor, value: Tensor) -> None:
    with torch.no_grad():
        if isinstance(tensor, torch.distributed.tensor.DTensor):
            mesh, placements = tensor.device_mesh, tensor.placements
            value = torch.distributed.tensor.distribute_tensor(value.to(tensor.device), mesh, placements)
        tensor.copy_(value)


def _read_single(checkpoint: Checkpoint) -> dict[str, Tensor]:
    path = f"{checkpoint.path}/{SINGLE_NAME}"
    local = _is_local(path)
    try:
        with fsspec.open(path, "rb") as file:
            source: Any = path if local else io.BytesIO(file.read())
            content = torch.load(source, map_location="cpu", weights_only=True, mmap=local)
    except (RuntimeError, pickle.UnpicklingError, EOFError) as error:
        raise CheckpointError(f"{path}: expected tensors by name, found: {error}") from error
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise CheckpointError(f"{path}: expected tensors by name, found {type(content).__name__}")
    return content


class _MetadataUnpickler(pickle.Unpickler):
    """Read what ``torch.distributed.checkpoint`` pickles into ``.metadata``, and nothing that could run code."""

    _MODULE = "torch.distributed.checkpoint"
    ALLOWED = frozenset({
        (f"{_MODULE}.metadata", "Metadata"),
        (f"{_MODULE}.metadata", "MetadataIndex"),
        (f"{_MODULE}.metadata", "StorageMeta"),
        (f"{_MODULE}.metadata", "ChunkStorageMetadata"),
        (f"{_MODULE}.metadata", "TensorStorageMetadata"),
        (f"{_MODULE}.metadata", "TensorProperties"),
        (f"{_MODULE}.metadata", "_MEM_FORMAT_ENCODING"),
        (f"{_MODULE}.filesystem", "_StorageInfo"),
        ("torch", "Size"),
        ("torch.serialization", "_get_layout"),  # looks a name up in a table
        ("pathlib", "PosixPath"),
    })  # fmt: skip

    def find_class(self, module: str, name: str) -> Any:  # noqa: ANN401 - pickle's own signature
        """Return one of the allowed classes.

        Raises:
            CheckpointError: The file wants another one.
        """
        if (module, name) in self.ALLOWED or (
            module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        ):
            return super().find_class(module, name)
        raise CheckpointError(
            f"expected a description of tensors, found a file that wants to run {module}.{name}: do not trust it"
        )


class _SafeReader(FsspecReader):
    """PyTorch's reader, whose own ``read_metadata`` runs whatever the file asks for."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:  # noqa: ANN401 - the overridden signature
        """Read ``.metadata`` without running code."""
        with self.fs.create_stream(f"{self.path}/.metadata", "rb") as file:
            try:
                metadata = _MetadataUnpickler(file).load()
            except (pickle.UnpicklingError, EOFError, AttributeError, TypeError, ValueError) as error:
                if isinstance(error, CheckpointError):
                    raise CheckpointError(f"{self.path}/.metadata: {error}") from error
                raise CheckpointError(
                    f"{self.path}/.metadata: expected a description of tensors, found: {error!r}"
                ) from error
        if not isinstance(metadata, Metadata):
            raise CheckpointError(
                f"{self.path}/.metadata: expected a description of tensors, found {type(metadata)}"
            )
        return metadata


def _partial(path: str) -> str:
    return f"{path}.partial" if _is_local(path) else path


def _is_local(path: str) -> bool:
    return isinstance(url_to_fs(path)[0], LocalFileSystem)


def _sha256(file: Any) -> str:  # noqa: ANN401 - fsspec's files have no type of their own
    digest = hashlib.sha256()
    while block := file.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()
