"""Resumable file downloads with retries and verification.

Data is written to ``PATH.partial``, which is renamed to ``PATH`` when the file is complete. If a download is
interrupted, the next call resumes it. The size and the first bytes (see ``file_types``) of a file are verified, as well
as the sha256 if it is known. Two processes must not download to the same path at the same time.
"""

import contextlib
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
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


def download(url: str, path: Path, sha256: str = "") -> str:
    """Download a file or the missing part of a file. If the file exists and is valid, it is not downloaded.

    Args:
        url: Source URL with any protocol that fsspec supports.
        path: Destination path. The suffix determines the expected file type.
        sha256: Expected hash in lower-case hexadecimal. If "", the hash is not verified.

    Returns:
        The sha256 of the file.

    Raises:
        InputError: All attempts failed, or the file does not have the expected type, size or hash.
    """
    if path.is_file():
        with contextlib.suppress(FileTypeError):  # an outdated file is downloaded again
            return _verify(path, path.suffix, str(path), sha256)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    size = retry(lambda: _remote_size(url), ATTEMPTS)
    if size is not None and size > MAX_BYTES:
        raise FileTypeError(subject=url, expected=f"at most {MAX_BYTES} bytes", found=size)
    resumed = _download_missing(url, partial, size, path.suffix)
    try:
        digest = _verify(partial, path.suffix, url, sha256)
    except FileTypeError:
        partial.unlink()
        if resumed:  # the partial file may belong to an older version
            return download(url, path, sha256)
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
        futures = {threads.submit(download, each.url, each.path): each for each in downloads}
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
        FileTypeError: The file is larger than ``limit``.
    """
    return retry(lambda: b"".join(_stream(url, limit)), ATTEMPTS)


def _download_missing(url: str, partial: Path, size: int | None, suffix: str) -> bool:
    """Download the missing part of a file, and return whether the download was resumed."""
    if size is None:  # the download of a dynamic page cannot be resumed
        retry(lambda: _write_stream(partial, url), ATTEMPTS)
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


def _write_stream(path: Path, url: str) -> None:
    with open(path, "wb") as file:
        file.writelines(_stream(url, MAX_BYTES))


def _stream(url: str, limit: int) -> Iterator[bytes]:
    fs, inner = open_store(url)
    total = 0
    with store_errors(url), fs.open(inner, "rb", block_size=0) as file:
        while part := file.read(1 << 20):
            total += len(part)
            if total > limit:
                raise FileTypeError(subject=url, expected=f"at most {limit} bytes", found="more")
            yield part


def _remote_size(url: str) -> int | None:
    fs, inner = open_store(url)
    with store_errors(url):
        try:
            return fs.info(inner)["size"]
        except FileNotFoundError as error:
            if is_server_fault(error):
                raise
            found = "none, or access is denied"
            raise MissingError(subject=url, expected="a file", found=found, remedy="check the URL") from error


def _verify(path: Path, suffix: str, where: str, sha256: str) -> str:
    """Verify the type and hash of a complete file, and return the sha256 of the file."""
    check_file_type(path, suffix, where)
    digest = hash_file(path)
    if sha256 not in ("", digest):
        remedy = "the file at the URL has changed"
        raise FileTypeError(subject=where, expected=f"sha256 {sha256}", found=digest, remedy=remedy)
    return digest
