"""Files of checkpoints, in a local folder or an object store. Every file is hashed as it is written.

Hashing what passes by costs no second reading (from an object store: no second transfer), and a file that is cut or
changed on its way does not get a hash that agrees with the damage.
"""

import hashlib
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from lrm_pl.errors import InputError
from lrm_pl.storage import is_local, open_store, store_errors

#: File name -> (size, sha256).
Files = Mapping[str, tuple[int, str]]


class HashingWriter:
    """A file that is written once from start to end.

    Attributes:
        size: Bytes so far.
        error: The first write that failed: PyTorch, in whose code it happens, reports something else afterward.
    """

    def __init__(self, file: Any) -> None:  # noqa: ANN401 - fsspec's files have no type of their own
        self._file, self._digest = file, hashlib.sha256()
        self.size, self.error = 0, None  # type: int, Exception | None

    def write(self, data: Any) -> int:  # noqa: ANN401 - any buffer
        """Write and hash."""
        try:
            self._file.write(data)
        except Exception as error:
            self.error = self.error or error
            raise
        self._digest.update(data)
        self.size += memoryview(data).nbytes
        return memoryview(data).nbytes

    def tell(self) -> int:
        """Return the size so far."""
        return self.size

    def flush(self) -> None:
        """Do nothing: ``writing`` flushes at the end."""

    def close(self) -> None:
        """Do nothing: ``writing`` closes."""

    @property
    def record(self) -> tuple[int, str]:
        """The size and the sha256 of what was written."""
        return self.size, self._digest.hexdigest()


@contextmanager
def writing(path: str) -> Iterator[HashingWriter]:
    """Open a file for writing; at the end it is on disk, or in the store, whole. After an error it is not kept.

    Raises:
        OSError: No space, no permission.
        StoreError: The object store failed.
    """
    fs, inner = open_store(path)
    with store_errors(path):
        file = fs.open(inner, "wb")
        writer = HashingWriter(file)
        try:
            yield writer
            if is_local(path):
                file.flush()
                os.fsync(file.fileno())
        except BaseException:
            if is_local(path):
                file.close()
            else:  # closing would upload what there is of it
                file.discard()
                file.closed = True
            if writer.error is not None:
                raise writer.error from None
            raise
        file.close()


def sha256(path: str) -> str:
    """Hash a file; other threads run meanwhile."""
    digest = hashlib.sha256()
    fs, inner = open_store(path)
    with store_errors(path), fs.open(inner, "rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def sync_folder(folder: str) -> None:
    """Make the names in a local folder last, also through a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def require_writable(folder: str) -> None:
    """Refuse a folder that cannot be written, before a run has anything to lose.

    Raises:
        InputError: It cannot be.
    """
    fs, inner = open_store(folder)
    probe = f"{folder.rstrip('/')}/.writable"
    try:
        if is_local(folder):
            fs.makedirs(inner, exist_ok=True)
        with writing(probe) as file:
            file.write(b"yes\n")
        with store_errors(probe):
            fs.rm_file(f"{inner.rstrip('/')}/.writable")
    except OSError as error:
        if isinstance(error, InputError):
            raise
        raise InputError(
            expected=f"to write checkpoints into {folder}", found=error, remedy="choose another"
        ) from error
