"""Downloads of files that can be resumed, with retries and verification.

Data is written to ``PATH.partial``, which is renamed to ``PATH`` when the file is complete. If a download is
interrupted, the next call resumes it. The size and the first bytes (see ``file_types``) of a file are verified, as well
as the sha256 if it is known. Two processes must not download to the same path at the same time.
"""

import contextlib
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import NamedTuple

from data_tools.assets.file_types import HEAD_BYTES, FileTypeError, check_file_type, check_head
from lrm_pl.errors import InputError
from lrm_pl.paths import hash_file
from lrm_pl.storage import MissingError, is_server_fault, open_store, read_ranges, retry, store_errors

#: Size of a request in bytes. For larger files, the server must support range requests.
CHUNK = 8 << 20

#: Maximum number of attempts per request. The last attempt starts after about 30 seconds.
ATTEMPTS = 7

#: Number of concurrent downloads.
JOBS = 16

#: Maximum size of a file in bytes.
MAX_BYTES = 16 << 30


class DownloadError(InputError):
    """Raised if a file does not have the expected size or hash."""


class Download(NamedTuple):
    """A file to download.

    Attributes:
        id: Id by which the caller identifies the download.
        url: Source URL.
        path: Destination path.
    """

    id: str
    url: str
    path: Path


def download(url: str, path: Path, *, size: int | None = None, sha256: str | None = None) -> str:
    """Download a file or the missing part of a file. If the file exists and is valid, it is not downloaded.

    Args:
        url: Source URL of any file system that fsspec supports.
        path: Destination path. The suffix determines the expected file type.
        size: Expected size in bytes. If None, the size is not verified.
        sha256: Expected hash in lower-case hexadecimal. If None, the hash is not verified.

    Returns:
        The sha256 of the file.

    Raises:
        InputError: All attempts failed, or the file does not have the expected type, size or hash.
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
        if resumed:  # the partial file may belong to an older version
            return download(url, path, size=size, sha256=sha256)
        raise
    os.replace(partial, path)
    return digest


def download_all(downloads: Sequence[Download]) -> Iterator[tuple[Download, str, str]]:
    """Download files concurrently.

    Args:
        downloads: Files to download.

    Yields:
        A tuple (download, sha256, error) when a download is complete or has failed. After a failure, the sha256 is "".
        Otherwise, the error is "".
    """
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
    """Read a remote file into memory.

    Args:
        url: URL of the file.
        limit: Maximum size of the file in bytes.

    Raises:
        MissingError: The file does not exist.
        StoreError: All attempts failed.
        DownloadError: The file is larger than ``limit``.
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
    """Download the missing part of a file, and return whether the download was resumed."""
    if size is None:  # the download of a dynamic page cannot be resumed
        retry(lambda: _write(partial, _stream(url)), ATTEMPTS)
        return False
    have = partial.stat().st_size if partial.is_file() else 0
    if have > size:
        have = 0
    with open(partial, "ab" if have else "wb") as file:
        for at in range(have, size, CHUNK):
            part = read_ranges(url, [(at, min(CHUNK, size - at))], ATTEMPTS)[0]
            if at == 0:  # reject a file of an unexpected type before it is downloaded
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
    """Verify a complete file and return the sha256 of the file."""
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
    """Convert errors as ``store_errors`` does, and convert the error of a missing local file to ``MissingError``."""
    with store_errors(url):
        try:
            yield
        except FileNotFoundError as error:
            if is_server_fault(error):
                raise
            raise MissingError(
                subject=url, expected="a file", found="none, or access is denied", remedy="check the URL"
            ) from error
