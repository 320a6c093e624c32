"""The tensors of a checkpoint: written by all ranks together, read into any world, sharding and dtype.

What a file asks to be run is never run: ``.metadata`` goes through an unpickler that knows a dozen names, everything
else through ``torch.load(weights_only=True)``.
"""

import os
import pickle
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemBase, FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.tensor import DTensor, distribute_tensor

from lrm_pl.checkpoints.files import Files, writing
from lrm_pl.checkpoints.index import (
    METADATA_NAME,
    SINGLE_NAME,
    Checkpoint,
    CheckpointError,
    Format,
    begin,
    partial_path,
)
from lrm_pl.errors import InputError
from lrm_pl.storage import is_local, open_store, store_errors


def write_tensors(
    path: str, tensors: Mapping[str, Tensor], layout: Format, group: ProcessGroup | None, *, writes: bool
) -> Files:
    """Write the tensor files of a checkpoint, not its index; all ranks of ``group`` call this together.

    Args:
        path: Folder of the checkpoint.
        tensors: Name -> tensor; in the layout "sharded" they may be DTensors, in "single" only rank 0's are used.
        layout: How they are to lie.
        group: Processes that write together, rank 0 among them; None where there is one.
        writes: Whether this is rank 0, which writes what is written once.

    Returns:
        On rank 0 every rank's files, for ``complete``.

    Raises:
        OSError: No space, no permission; on all ranks where they write together.
    """
    _begin_together(path, group, writes=writes)
    if layout == "single":
        if not writes:
            return {}
        with writing(f"{partial_path(path)}/{SINGLE_NAME}") as file:
            torch.save(dict(tensors), cast(Any, file))  # it only writes
        return {SINGLE_NAME: file.record}
    writer = _Writer(partial_path(path))
    _meant_alone()
    with _causes():
        save(dict(tensors), storage_writer=writer, process_group=group, no_dist=group is None)
    if group is None:
        return writer.files.written
    gathered: list[Any] | None = [None] * torch.distributed.get_world_size(group) if writes else None
    torch.distributed.gather_object(writer.files.written, gathered, dst=0, group=group)
    return {name: record for files in gathered or [] for name, record in files.items()}


def _begin_together(path: str, group: ProcessGroup | None, *, writes: bool) -> None:
    """Make the folder on rank 0; where it cannot be made, no rank waits for it."""
    outcome: list[OSError | None] = [None]
    if writes:
        try:
            begin(path)
        except OSError as error:
            outcome = [error]
    if group is not None:
        torch.distributed.broadcast_object_list(outcome, src=0, group=group)
    if outcome[0] is not None:
        raise outcome[0]


def tensor_specs(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """List the tensors of a checkpoint as tensors on the device "meta": shape and dtype, nothing read.

    Raises:
        CheckpointError: It holds something else, or wants to run code.
    """
    if checkpoint.format == "single":
        return _load_single(checkpoint, "meta")
    metadata = _Reader(checkpoint).read_metadata()
    specs = {}
    for name, entry in metadata.state_dict_metadata.items():
        if not isinstance(entry, TensorStorageMetadata):
            raise CheckpointError(
                subject=checkpoint.path,
                expected="tensors only",
                found=f"a pickle for {name}: do not trust it",
            )
        specs[name] = torch.empty(entry.size, dtype=entry.properties.dtype, device="meta")
    return specs


def tensor_names(checkpoint: Checkpoint) -> dict[str, torch.Size]:
    """List the tensors of a checkpoint with their shapes, without reading them."""
    return {name: spec.shape for name, spec in tensor_specs(checkpoint).items()}


def read_tensors(checkpoint: Checkpoint, into: Mapping[str, Tensor]) -> None:
    """Fill tensors in place, whatever world, sharding and format wrote them; all ranks call this together.

    Args:
        checkpoint: What is read.
        into: Name -> tensor or DTensor, on any device; each is overwritten.

    Raises:
        CheckpointError: A name is missing, its shape is another, or a file wants to run code.
    """
    found = tensor_names(checkpoint)
    wrong = [name for name, tensor in into.items() if found.get(name) != tensor.shape]
    if wrong:
        raise CheckpointError(
            f"{checkpoint.path}: expected the tensors of this model; missing or of another shape: {wrong[:3]} "
            f"({len(wrong)} in all); pass the config.yaml of the run that wrote it: -c RUN/config.yaml"
        )
    if checkpoint.format == "single":
        content = _load_single(checkpoint, "cpu")
        for name, tensor in into.items():
            _fill(tensor, content[name])
        return
    alone = not torch.distributed.is_initialized()
    _meant_alone()
    with _refusals(checkpoint.path), _causes():
        load(
            {name: tensor.detach() for name, tensor in into.items()},
            storage_reader=_Reader(checkpoint),
            no_dist=alone,
        )


def _fill(tensor: Tensor, value: Tensor) -> None:
    with torch.no_grad():
        if isinstance(tensor, DTensor):
            value = distribute_tensor(value.to(tensor.device), tensor.device_mesh, tensor.placements)
        tensor.copy_(value)


def _load_single(checkpoint: Checkpoint, device: str) -> dict[str, Tensor]:
    path = f"{checkpoint.path}/{SINGLE_NAME}"
    fs, inner = open_store(path)
    mapped = is_local(path) and device != "meta"  # pages are read when they are used
    with store_errors(path), _refusals(path), fs.open(inner, "rb") as file:
        source = inner if mapped else file
        content = torch.load(source, map_location=device, weights_only=True, mmap=mapped)
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise CheckpointError(subject=path, expected="tensors by name", found=type(content).__name__)
    return content


class _Store(FileSystemBase):
    """The files of ``torch.distributed.checkpoint``, through ``store``.

    Attributes:
        written: File name -> (size, sha256) of what this process wrote.
    """

    def __init__(self) -> None:
        self.written: dict[str, tuple[int, str]] = {}

    @contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Iterator[Any]:
        path = os.fspath(path)
        if mode == "wb":
            with writing(path) as file:
                yield file
            self.written[os.path.basename(path)] = file.record
        else:
            fs, inner = open_store(path)
            with store_errors(path), fs.open(inner, mode) as file:
                yield file

    def concat_path(self, path: str | os.PathLike[str], suffix: str) -> str:
        return f"{os.fspath(path)}/{suffix}"

    def rename(self, path: str | os.PathLike[str], new_path: str | os.PathLike[str]) -> None:
        old, new = os.fspath(path), os.fspath(new_path)
        fs, inner = open_store(old)
        with store_errors(old):
            fs.mv(inner, open_store(new)[1])
        self.written[os.path.basename(new)] = self.written.pop(os.path.basename(old))

    def init_path(self, path: str | os.PathLike[str]) -> str:
        return os.fspath(path)

    def mkdir(self, path: str | os.PathLike[str]) -> None:
        """Do nothing: rank 0 has made the folder."""

    def exists(self, path: str | os.PathLike[str]) -> bool:
        fs, inner = open_store(os.fspath(path))
        with store_errors(os.fspath(path)):
            return bool(fs.exists(inner))

    def rm_file(self, path: str | os.PathLike[str]) -> None:
        fs, inner = open_store(os.fspath(path))
        with store_errors(os.fspath(path)):
            fs.rm_file(inner)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return True


class _Writer(FileSystemWriter):
    def __init__(self, path: str) -> None:
        super().__init__(path, sync_files=False)  # ``writing`` does
        self.fs = self.files = _Store()  # type: ignore[assignment]  # torch says FileSystem, and means its base
        self.path = path


class _Reader(FileSystemReader):
    """PyTorch's reader, whose own ``read_metadata`` runs whatever the file asks for."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        super().__init__(checkpoint.path)
        self.fs = _Store()  # type: ignore[assignment]
        self.path, self.checkpoint = checkpoint.path, checkpoint

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:  # noqa: ANN401 - the overridden signature
        """Read ``.metadata`` without running code, and check that it points to this checkpoint's files only."""
        path = f"{self.path}/{METADATA_NAME}"
        with self.fs.create_stream(path, "rb") as file, _refusals(path):
            metadata = _MetadataUnpickler(file).load()
            if not isinstance(metadata, Metadata):
                raise pickle.UnpicklingError(f"expected a description of tensors, but found {type(metadata)}")
            strange = {entry.relative_path for entry in metadata.storage_data.values()} - {
                *self.checkpoint.files
            }
            if strange:
                raise pickle.UnpicklingError(f"files that are not of this checkpoint: {sorted(strange)[:3]}")
        return metadata


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
    })  # fmt: skip

    def find_class(self, module: str, name: str) -> Any:  # noqa: ANN401 - pickle's own signature
        """Return one of the allowed classes."""
        if (module, name) in self.ALLOWED or (
            module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        ):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(
            f"GLOBAL {module}.{name} was not an allowed global"
        )  # as torch.load says it


@contextmanager
def _refusals(path: str) -> Iterator[None]:
    """Say what is wrong with a file that cannot be read as tensors, and above all where it wants to run code."""
    try:
        yield
    except (
        pickle.UnpicklingError, RuntimeError, EOFError, AttributeError, TypeError, LookupError, ImportError, ValueError,
    ) as error:  # fmt: skip
        if isinstance(error, InputError):
            raise
        wanted = re.search(r"GLOBAL (\S+)", str(error))
        found = (
            f"a file that wants to run {wanted[1]}, which was not done: do not trust it"
            if wanted
            else f"{type(error).__name__}: {error}"
        )
        raise CheckpointError(subject=path, expected="tensors by name", found=found) from error


@contextmanager
def _causes() -> Iterator[None]:
    """Raise what lies under the exception of ``torch.distributed.checkpoint``, which is no ``Exception``."""
    try:
        yield
    except CheckpointException as error:
        raise next(failure[0] for failure in error.failures.values()) from error


def _meant_alone() -> None:
    """Silence what torch says of every write and read by one process, also where one is what is meant.

    For good, as checkpoints are written in a thread, and what restores warnings is for one thread.
    """
    warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized")
