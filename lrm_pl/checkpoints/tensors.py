"""Reading and writing of checkpoint tensors with ``torch.distributed.checkpoint`` (DCP) without executing pickles.

``.metadata`` is a pickle, which is read with an unpickler that allows only DCP's classes. Tensors are read with
``torch.load(weights_only=True)``.
"""

import os
import pickle
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemBase, FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.tensor import DTensor

from lrm_pl.checkpoints.files import FileRecords, hashed_file
from lrm_pl.checkpoints.index import METADATA_NAME, Checkpoint, CheckpointError, create_partial, partial_path
from lrm_pl.errors import InputError, counted
from lrm_pl.storage import open_store, store_errors


def write_tensors(path: str, tensors: Mapping[str, Tensor], group: ProcessGroup | None = None) -> FileRecords:
    """Write the tensor files of a checkpoint without the index.

    Args:
        path: Path or URL of the folder of the checkpoint.
        tensors: Mapping from name to tensor on the CPU. If ``group`` is not None, the tensors may be DTensors, and each
            rank writes its local shards.
        group: Process group whose ranks call this together. If None, only the calling process writes.

    Returns:
        Mapping from name to size and SHA-256 of the files of all ranks.

    Raises:
        OSError: A file cannot be written. The error is raised on all ranks of the group.
    """
    writer = _Writer(partial_path(path))
    _ignore_single_process_warning()
    with _unwrap_errors():
        save(dict(tensors), storage_writer=writer, process_group=group, no_dist=group is None)
    if group is None:
        return writer.files.written
    gathered: list[Any] = [None] * torch.distributed.get_world_size(group)
    torch.distributed.all_gather_object(gathered, writer.files.written, group=group)
    return {name: record for files in gathered for name, record in files.items()}


def tensor_specs(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """Return tensors on the meta device with the names, shapes and dtypes of the tensors in a checkpoint.

    Raises:
        CheckpointError: The metadata is damaged or unsafe to load, or describes objects that are not tensors.
    """
    metadata = _Reader(checkpoint).read_metadata()
    specs = {}
    for name, entry in metadata.state_dict_metadata.items():
        if not isinstance(entry, TensorStorageMetadata):
            raise CheckpointError(
                subject=checkpoint.path,
                expected="only tensors",
                found=f"a pickled object {name}",
                remedy="do not trust this checkpoint",
            )
        specs[name] = torch.empty(entry.size, dtype=entry.properties.dtype, device="meta")
    return specs


def tensor_names(checkpoint: Checkpoint) -> dict[str, torch.Size]:
    """Return a mapping from name to shape of the tensors in a checkpoint."""
    return {name: spec.shape for name, spec in tensor_specs(checkpoint).items()}


def require_tensors(
    checkpoint: Checkpoint, expected: Mapping[str, Tensor], prefix: str | None = None
) -> None:
    """Check the names and shapes of the tensors in a checkpoint.

    Args:
        checkpoint: The checkpoint to check.
        expected: Mapping from name to tensor.
        prefix: If not None, all tensors in the checkpoint whose names start with this prefix must be in ``expected``.

    Raises:
        CheckpointError: A tensor is missing, is unexpected or has a different shape.
    """
    found = tensor_names(checkpoint)
    wrong = [name for name, tensor in expected.items() if found.get(name) != tensor.shape]
    unexpected = [name for name in found if prefix and name.startswith(prefix) and name not in expected]
    if wrong or unexpected:
        problems = {"missing or mismatched tensor": wrong, "unexpected tensor": unexpected}
        raise CheckpointError(
            subject=checkpoint.path,
            expected="the tensors of this model",
            found=" and ".join(_example(noun, names) for noun, names in problems.items() if names),
            remedy="pass the config of the run that wrote the checkpoint with -c RUN/config.yaml",
        )


def _example(noun: str, names: list[str]) -> str:
    shown = names[:3] + (["..."] if len(names) > 3 else [])
    return f"{counted(len(names), noun)} ({', '.join(shown)})"


def read_tensors(checkpoint: Checkpoint, into: Mapping[str, Tensor]) -> None:
    """Fill tensors in place from a checkpoint.

    The checkpoint may have been written with a different strategy or number of processes.

    Args:
        checkpoint: The checkpoint to read.
        into: Mapping from name to tensor or DTensor on any device. If there are DTensors, all ranks must call this
            together.

    Raises:
        CheckpointError: A tensor is missing or has a different shape, or a file is unsafe to load.
    """
    require_tensors(checkpoint, into)
    sharded = any(isinstance(tensor, DTensor) for tensor in into.values())
    _ignore_single_process_warning()
    with _load_errors(checkpoint.path), _unwrap_errors():
        load(
            {name: tensor.detach() for name, tensor in into.items()},
            storage_reader=_Reader(checkpoint),
            no_dist=not sharded,
        )


class _Store(FileSystemBase):
    """File access through fsspec for ``torch.distributed.checkpoint``.

    Attributes:
        written: Mapping from name to size and SHA-256 of the files that this process has written.
    """

    def __init__(self) -> None:
        self.written: dict[str, tuple[int, str]] = {}

    @contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Iterator[Any]:
        path = os.fspath(path)
        if mode == "wb":
            with hashed_file(path) as file:
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
        """Do nothing, because ``_Writer.set_up_storage_writer`` creates the folder."""

    def exists(self, path: str | os.PathLike[str]) -> bool:
        """Return False, because a checkpoint is written to an empty folder."""
        return False

    def rm_file(self, path: str | os.PathLike[str]) -> None:
        """Do nothing, because no file is replaced."""

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return True


class _Writer(FileSystemWriter):
    def __init__(self, path: str) -> None:
        super().__init__(path, sync_files=False)  # ``hashed_file`` flushes files to disk
        self.fs = self.files = _Store()  # type: ignore[assignment]  # annotated as FileSystem, used as FileSystemBase
        self.path = path

    def set_up_storage_writer(self, is_coordinator: bool, *args: object, **kwargs: object) -> None:
        """Create the folder on rank 0. DCP calls this before any rank writes, and raises errors on all ranks."""
        if is_coordinator:
            create_partial(str(self.path))
        super().set_up_storage_writer(is_coordinator, *args, **kwargs)


class _Reader(FileSystemReader):
    """A reader that loads ``.metadata`` safely. PyTorch's reader would execute the pickle."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        super().__init__(checkpoint.path)
        self.fs = _Store()  # type: ignore[assignment]
        self.path, self.checkpoint = checkpoint.path, checkpoint

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:  # noqa: ANN401 - the overridden signature
        """Read ``.metadata`` and check that it refers only to files of this checkpoint."""
        path = f"{self.path}/{METADATA_NAME}"
        with self.fs.create_stream(path, "rb") as file, _load_errors(path):
            metadata = _MetadataUnpickler(file).load()
            if not isinstance(metadata, Metadata):
                raise pickle.UnpicklingError(f"expected Metadata, but found {type(metadata).__name__}")
            unknown = {entry.relative_path for entry in metadata.storage_data.values()} - {
                *self.checkpoint.files
            }
            if unknown:
                raise pickle.UnpicklingError(
                    f"references to files outside of the checkpoint: {sorted(unknown)[:3]}"
                )
        return metadata


class _MetadataUnpickler(pickle.Unpickler):
    """Unpickler for ``.metadata`` that allows only torch dtypes and the globals in ``ALLOWED``."""

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
        ("torch.serialization", "_get_layout"),  # a table lookup
    })  # fmt: skip

    def find_class(self, module: str, name: str) -> Any:  # noqa: ANN401 - pickle's own signature
        """Return a class if it is allowed, and raise an error otherwise."""
        if (module, name) in self.ALLOWED or (
            module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        ):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"GLOBAL {module}.{name} was not an allowed global")  # as in torch.load


@contextmanager
def _load_errors(path: str) -> Iterator[None]:
    """Convert errors raised during loading to ``CheckpointError``.

    The message names the function that an unsafe pickle would call.
    """
    try:
        yield
    except (
        pickle.UnpicklingError, RuntimeError, EOFError, AttributeError, TypeError, LookupError, ImportError, ValueError,
    ) as error:  # fmt: skip
        if isinstance(error, InputError):
            raise
        code = re.search(r"GLOBAL (\S+)", str(error))
        raise CheckpointError(
            subject=path,
            expected="a dict of tensors",
            found=f"a pickle that calls {code[1]}, which was not executed"
            if code
            else f"{type(error).__name__}: {error}",
            remedy="do not trust this checkpoint" if code else "",
        ) from error


@contextmanager
def _unwrap_errors() -> Iterator[None]:
    """Raise the original error instead of ``CheckpointException``, which is not a subclass of ``Exception``."""
    try:
        yield
    except CheckpointException as error:
        raise next(failure[0] for failure in error.failures.values()) from error


def _ignore_single_process_warning() -> None:
    """Ignore DCP's warning that a single process reads or writes.

    The filter is not removed, because checkpoints are written in a thread and ``warnings.catch_warnings`` is not
    thread-safe.
    """
    warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized")
