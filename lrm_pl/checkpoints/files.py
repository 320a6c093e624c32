"""Writing and hashing of checkpoint files in a local folder or an object store.

Files are hashed while they are written. Therefore, they do not have to be read again, and corruption during an upload
is detected.
"""

import hashlib
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lrm_pl.paths import require_out
from lrm_pl.storage import is_local, open_store, store_errors

#: File name -> (size in bytes, SHA-256).
FileRecords = Mapping[str, tuple[int, str]]


class HashingWriter:
    """A write-only file that hashes its content.

    Attributes:
        size: Number of bytes written.
        error: Exception of the first failed write, or None. PyTorch replaces this exception with a different one.
    """

    def __init__(self, file: Any) -> None:  # noqa: ANN401 - fsspec's files have no common type
        self._file, self._digest = file, hashlib.sha256()
        self.size, self.error = 0, None  # type: int, Exception | None

    def write(self, data: Any) -> int:  # noqa: ANN401 - any buffer
        """Write and hash a buffer, and return its size in bytes."""
        try:
            self._file.write(data)
        except Exception as error:
            self.error = self.error or error
            raise
        self._digest.update(data)
        self.size += memoryview(data).nbytes
        return memoryview(data).nbytes

    def tell(self) -> int:
        """Return the number of bytes written."""
        return self.size

    def flush(self) -> None:
        """Do nothing, because ``hashed_file`` flushes the file."""

    def close(self) -> None:
        """Do nothing, because ``hashed_file`` closes the file."""

    @property
    def record(self) -> tuple[int, str]:
        """Size in bytes and SHA-256."""
        return self.size, self._digest.hexdigest()


@contextmanager
def hashed_file(path: str) -> Iterator[HashingWriter]:
    """Open a file for writing.

    When the context exits, the file has been flushed to disk or uploaded completely. An upload is discarded if an error
    occurs.

    Raises:
        OSError: The file cannot be written, for example because the disk is full or permission is denied.
        StoreError: A request to the object store failed.
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
            else:  # closing would upload an incomplete object
                file.discard()
                file.closed = True
            if writer.error is not None:
                raise writer.error from None
            raise
        file.close()


def sync_folder(folder: str) -> None:
    """Write the directory entries of a local folder to disk, so that they survive a power failure."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def require_writable(folder: str) -> None:
    """Check that files can be written to a folder. A local folder is created if it does not exist.

    Raises:
        InputError: The folder is not writable.
    """
    fs, inner = open_store(folder)
    if is_local(folder):
        require_out(Path(inner))
        return
    probe = f"{folder.rstrip('/')}/.writable"
    with hashed_file(probe) as file:
        file.write(b"yes\n")
    with store_errors(probe):
        fs.rm_file(f"{inner.rstrip('/')}/.writable")
