"""One file from a URL to a path: resumed, retried, and checked before it has its name.

What has arrived lies in ``PATH.partial``; the next call asks only for what is missing. A file is taken for whole when
its size is that of the server (and the one that the caller knows), its first bytes are those of its kind, and its hash
is the one that the caller knows. One process at a time may download to a path.
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

#: Bytes asked for at once. A web server that does not know requests for parts (Range) can serve smaller files only.
CHUNK = 8 << 20

#: How often a request is made at most; half a minute goes by before the last one.
ATTEMPTS = 7

#: Files downloaded at the same time.
JOBS = 16

#: A larger file is no mesh that can be rendered.
MAX_BYTES = 16 << 30


class DownloadError(InputError):
    """What is at a URL is not what was expected; the message says what it is."""


class Download(NamedTuple):
    """One of many downloads.

    Attributes:
        id: What the caller calls it.
        url: Where it is.
        path: Where it goes.
    """

    id: str
    url: str
    path: Path


def download(url: str, path: Path, *, size: int | None = None, sha256: str | None = None) -> str:
    """Bring a file, or what is missing of it; one that is there already is only checked.

    Args:
        url: Where it is, for any file system of fsspec.
        path: Where it goes; its suffix says what kind of file is expected.
        size: Its size in bytes, if that is known.
        sha256: Its hash, lower-case hex, if that is known.

    Returns:
        Its sha256.

    Raises:
        InputError: The server failed after all attempts, or has something else; the message says what.
    """
    if path.is_file():
        with contextlib.suppress(DownloadError, FileTypeError):  # it is not what is wanted now: bring that
            return _checked(path, path.suffix, str(path), size, sha256)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    found = retry(lambda: _remote_size(url), ATTEMPTS)
    if size is not None and found is not None and found != size:
        head = read_ranges(url, [(0, min(found, HEAD_BYTES))], ATTEMPTS)[0] if found else b""
        check_head(path.suffix, head, url)
        raise DownloadError(
            subject=url, expected=f"{size} bytes", found=found, remedy="it is another file by now"
        )
    if max(size or 0, found or 0) > MAX_BYTES:
        raise DownloadError(
            subject=url, expected=f"at most {MAX_BYTES} bytes", found=found, remedy="it is no mesh"
        )
    resumed = _bring(url, partial, found, path.suffix)
    try:
        digest = _checked(partial, path.suffix, url, size, sha256)
    except (DownloadError, FileTypeError):
        partial.unlink()
        if resumed:  # its beginning may be that of another file: once more, from the beginning
            return download(url, path, size=size, sha256=sha256)
        raise
    os.replace(partial, path)
    return digest


def download_all(downloads: Sequence[Download]) -> Iterator[tuple[Download, str, str]]:
    """Download many files at once; yields each with its sha256 and why it failed (one of them ""), as it happens."""
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
        StoreError: The store failed after all attempts; at once (``MissingError``) where there is no such file.
        DownloadError: It has more than ``limit`` bytes.
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
                    remedy="look at what is there",
                )
        return content

    return retry(read, ATTEMPTS)


def _bring(url: str, partial: Path, size: int | None, suffix: str) -> bool:
    """Write what is missing of a file; says whether its beginning was there already."""
    if size is None:  # a page that a program makes while it is asked: in one go, or not at all
        retry(lambda: _write(partial, _stream(url)), ATTEMPTS)
        return False
    have = partial.stat().st_size if partial.is_file() else 0
    if have > size:
        have = 0
    with open(partial, "ab" if have else "wb") as file:
        for at in range(have, size, CHUNK):
            part = read_ranges(url, [(at, min(CHUNK, size - at))], ATTEMPTS)[0]
            if at == 0:  # before gigabytes of something else
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
                raise DownloadError(
                    expected=f"at most {MAX_BYTES} bytes", found="more", remedy="it is no mesh"
                )


def _stream(url: str) -> Iterator[bytes]:
    fs, inner = open_store(url)
    with _asking(url), fs.open(inner, "rb", block_size=0) as file:
        while part := file.read(1 << 20):
            yield part


def _remote_size(url: str) -> int | None:
    fs, inner = open_store(url)
    with _asking(url):
        size = fs.info(inner)["size"]
    return None if size is None else int(size)


def _checked(path: Path, suffix: str, where: str, size: int | None, sha256: str | None) -> str:
    """Check a whole file; returns its sha256."""
    found = path.stat().st_size
    if size is not None and found != size:
        raise DownloadError(subject=where, expected=f"{size} bytes", found=found, remedy="get it again")
    check_file_type(path, where, suffix)
    digest = hash_file(path)
    if sha256 is not None and digest != sha256:
        raise DownloadError(
            subject=where, expected=f"sha256 {sha256}", found=digest, remedy="it is another file by now"
        )
    return digest


@contextlib.contextmanager
def _asking(url: str) -> Iterator[None]:
    """Like ``store_errors``; but a local file may be missing too."""
    with store_errors(url):
        try:
            yield
        except FileNotFoundError as error:
            if is_server_fault(error):
                raise
            raise MissingError(
                subject=url, expected="a file", found="none, or none for us", remedy="look at the URL"
            ) from error
