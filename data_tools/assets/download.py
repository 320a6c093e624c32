"""Download files with resume, retries and verification.

Data are written to ``PATH.partial``, which the next call resumes, and renamed when the file is complete. A file is
verified by its size, its first bytes (``file_types``) and, if given, its sha256. Only one process at a time may
download to a path.
"""

import contextlib
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import NamedTuple

from data_tools.assets.asset_list import hash_file
from data_tools.assets.file_types import HEAD_BYTES, FileTypeError, check_file_type, check_head
from lrm_pl.errors import InputError
from lrm_pl.storage import MissingError, is_server_fault, open_store, read_ranges, retry, store_errors

#: Bytes per request. Larger files need a server that supports range requests.
CHUNK = 8 << 20

#: Maximum attempts per request; the last one starts after half a minute.
ATTEMPTS = 7

#: Concurrent downloads.
JOBS = 16

#: Maximum file size.
MAX_BYTES = 16 << 30


class DownloadError(InputError):
    """A downloaded file differs from the expected one."""


class Download(NamedTuple):
    """A file to download.

    Attributes:
        id: Id for the caller.
        url: Source.
        path: Destination.
    """

    id: str
    url: str
    path: Path


def download(url: str, path: Path, *, size: int | None = None, sha256: str | None = None) -> str:
    """Download a file, or the missing part of it. An existing file is only verified.

    Args:
        url: Source, on any file system of fsspec.
        path: Destination; its suffix defines the expected file type.
        size: Expected size in bytes, if known.
        sha256: Expected hash in lower-case hex, if known.

    Returns:
        Its sha256.

    Raises:
        InputError: The server failed after all attempts, or the file is not the expected one.
    """
    if path.is_file():
        with contextlib.suppress(DownloadError, FileTypeError):  # an outdated file is downloaded again
            return _verify(path, path.suffix, str(path), size, sha256)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    remote = retry(lambda: _remote_size(url), ATTEMPTS)
    if size is not None and remote is not None and remote != size:
        head = read_ranges(url, [(0, min(remote, HEAD_BYTES))], ATTEMPTS)[0] if remote else b""
        check_head(path.suffix, head, url)
        raise DownloadError(
            subject=url, expected=f"{size} bytes", found=remote, remedy="the file at the URL has changed"
        )
    if max(size or 0, remote or 0) > MAX_BYTES:
        raise DownloadError(subject=url, expected=f"at most {MAX_BYTES} bytes", found=remote)
    resumed = _download_missing(url, partial, remote, path.suffix)
    try:
        digest = _verify(partial, path.suffix, url, size, sha256)
    except (DownloadError, FileTypeError):
        partial.unlink()
        if resumed:  # the partial file may be of an older version: start over
            return download(url, path, size=size, sha256=sha256)
        raise
    os.replace(partial, path)
    return digest


def download_all(downloads: Sequence[Download]) -> Iterator[tuple[Download, str, str]]:
    """Download files concurrently; yields each with its sha256 and error, one of which is "", on completion."""
    with ThreadPoolExecutor(JOBS) as threads:
        futures: dict[Future[str], Download] = {
            threads.submit(download, each.url, each.path): each for each in downloads
        }
        try:
            for future in as_completed(futures):
                try:
                    yield futures[future], future.result(), ""
                except InputError as error:
                    yield futures[future], "", f"not downloaded: {error}"
        finally:
            threads.shutdown(wait=False, cancel_futures=True)


def read_url(url: str, limit: int) -> bytes:
    """Read a whole remote file into memory.

    Raises:
        StoreError: The store failed after all attempts. A missing file (``MissingError``) is not retried.
        DownloadError: The file has more than ``limit`` bytes.
    """

    def read() -> bytes:
        content = b""
        for part in _stream(url):
            content += part
            if len(content) > limit:
                raise DownloadError(
                    subject=url,
                    expected=f"at most {limit} bytes",
                    found="more",
                    remedy="check the URL",
                )
        return content

    return retry(read, ATTEMPTS)


def _download_missing(url: str, partial: Path, size: int | None, suffix: str) -> bool:
    """Append the missing part of a file; return whether the download was resumed."""
    if size is None:  # a dynamic page, which cannot be resumed
        retry(lambda: _write(partial, _stream(url)), ATTEMPTS)
        return False
    have = partial.stat().st_size if partial.is_file() else 0
    if have > size:
        have = 0
    with open(partial, "ab" if have else "wb") as file:
        for at in range(have, size, CHUNK):
            part = read_ranges(url, [(at, min(CHUNK, size - at))], ATTEMPTS)[0]
            if at == 0:  # fail before downloading gigabytes of another file type
                check_head(suffix, part[:HEAD_BYTES], url)
            file.write(part)
        file.flush()
        os.fsync(file.fileno())
    return have > 0


def _write(partial: Path, parts: Iterator[bytes]) -> None:
    written = 0
    with open(partial, "wb") as file:
        for part in parts:
            written += file.write(part)
            if written > MAX_BYTES:
                raise DownloadError(expected=f"at most {MAX_BYTES} bytes", found="more")


def _stream(url: str) -> Iterator[bytes]:
    fs, inner = open_store(url)
    with _store_errors(url), fs.open(inner, "rb", block_size=0) as file:
        while part := file.read(1 << 20):
            yield part


def _remote_size(url: str) -> int | None:
    fs, inner = open_store(url)
    with _store_errors(url):
        size = fs.info(inner)["size"]
    return None if size is None else int(size)


def _verify(path: Path, suffix: str, where: str, size: int | None, sha256: str | None) -> str:
    """Verify a complete file and return its sha256."""
    found = path.stat().st_size
    if size is not None and found != size:
        raise DownloadError(subject=where, expected=f"{size} bytes", found=found, remedy="download it again")
    check_file_type(path, where, suffix)
    digest = hash_file(path)
    if sha256 is not None and digest != sha256:
        raise DownloadError(
            subject=where, expected=f"sha256 {sha256}", found=digest, remedy="the file at the URL has changed"
        )
    return digest


@contextlib.contextmanager
def _store_errors(url: str) -> Iterator[None]:
    """Convert errors like ``store_errors``, including those of missing local files."""
    with store_errors(url):
        try:
            yield
        except FileNotFoundError as error:
            if is_server_fault(error):
                raise
            raise MissingError(
                subject=url, expected="a file", found="none, or access is denied", remedy="check the URL"
            ) from error
