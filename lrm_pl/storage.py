"""File access through fsspec to local folders, object stores and web servers, with uniform errors and retries."""

import errno
import random
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem

from lrm_pl.errors import InputError

Result = TypeVar("Result")

#: Packages for access to object stores, whose exceptions are not subclasses of OSError.
_STORE_PACKAGES = (
    "botocore", "aiobotocore", "aiohttp", "gcsfs", "google", "huggingface_hub", "httpx", "httpx2", "httpcore",
    "httpcore2",
)  # fmt: skip

#: HTTP status codes that are not retried.
_REFUSALS = (401, 403, 404, 410)

#: Error numbers of failed connections.
_UNREACHED = (errno.ENETUNREACH, errno.EHOSTUNREACH, errno.ENETDOWN, errno.EHOSTDOWN, errno.ECONNREFUSED)

#: URL scheme -> remedy in error messages.
_REMEDIES = {
    "http": "Check the URL and its server",
    "https": "Check the URL and its server",
    "hf": "Check the name of the repository, and HF_TOKEN if it is private",
}

#: URL scheme -> extra of this package that installs its fsspec package.
_EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs", "http": "https", "https": "https"}

#: Required prefix of a network on the Hugging Face Hub, so that a mistyped local path does not refer to the Hub.
HUB = "hf://"

#: Timeouts of web servers in seconds, for connecting and between reads.
_CONNECT_S, _SILENCE_S = 10.0, 30.0

#: Maximum delay between two attempts in seconds.
_MAX_DELAY_S = 30.0


class StoreError(InputError, OSError):
    """Error raised if a request to an object store or web server fails."""


class MissingError(StoreError):
    """Error raised if an object is missing or access is denied. The request is not retried."""


class StoreDownError(InputError):
    """Error raised if several consecutive files of a store cannot be read."""


def open_store(path: str) -> tuple[Any, str]:
    """Return the fsspec file system of a path or URL, and the path in the file system.

    Raises:
        InputError: The URL scheme is unknown, or the fsspec package for the scheme is not installed.
    """
    scheme = path.split("://")[0]
    try:
        # Cached listings would miss files that other processes write.
        return url_to_fs(path, use_listings_cache=False, **_options(scheme))
    except ImportError as error:
        extra = _EXTRAS.get(scheme)
        remedy = (
            f"run pip install 'lrm_pl[{extra}]'"
            if extra
            else f"install the fsspec package for {scheme}:// URLs"
        )
        raise InputError(f"an fsspec package for {scheme}:// URLs", error, remedy) from error
    except ValueError as error:
        raise InputError("a folder or a URL such as s3://BUCKET/RUN", f"{path!r}: {error}") from error


def _options(scheme: str) -> dict[str, Any]:
    if scheme not in ("http", "https"):
        return {}
    import aiohttp  # of the extra "https"

    # By default, aiohttp limits a whole transfer to five minutes and does not limit the time between reads.
    timeout = aiohttp.ClientTimeout(total=None, connect=_CONNECT_S, sock_read=_SILENCE_S)
    return {"client_kwargs": {"timeout": timeout}}


def is_local(path: str) -> bool:
    """Return whether a path is on a local file system."""
    return isinstance(open_store(path)[0], LocalFileSystem)


@contextmanager
def store_errors(path: str) -> Iterator[None]:
    """Convert exceptions of object store packages to ``StoreError``. Errors of local paths are not converted."""
    try:
        yield
    except Exception as error:
        if is_server_fault(error) and isinstance(error.__cause__, Exception):
            error = error.__cause__
        is_request = isinstance(error, OSError) or type(error).__module__.split(".")[0] in _STORE_PACKAGES
        if isinstance(error, InputError) or not is_request or is_local(path):
            raise
        if (unreached := _unreached(error)) is not None:
            raise StoreError(
                subject=path,
                expected="a connection to the server",
                found=f"no network or an unknown host: {unreached}",
                remedy="check the network, the proxy (HTTPS_PROXY) and the address",
            ) from error
        error_class = MissingError if isinstance(error, FileNotFoundError | PermissionError) else StoreError
        remedy = _REMEDIES.get(
            path.split("://")[0],
            "Check the bucket, the credentials and the endpoint (for S3: AWS_ACCESS_KEY_ID, AWS_ENDPOINT_URL, ...)",
        )
        problem = f"the request failed with {type(error).__name__}: {error}"
        raise error_class(problem, remedy=remedy, subject=path) from error


def is_server_fault(error: Exception) -> bool:
    """Return whether an exception reports a missing file, but was caused by a failure of the web server."""
    cause = error.__cause__
    return (
        isinstance(error, FileNotFoundError)
        and isinstance(cause, Exception)
        and type(cause).__module__.split(".")[0] == "aiohttp"
        and getattr(cause, "status", None) not in _REFUSALS
    )


def _unreached(error: BaseException) -> OSError | None:
    """Return the connection error in the chain of causes of an exception, or None."""
    chain: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause not in chain:
        chain.append(cause)
        cause = cause.__cause__ or cause.__context__
    errors = (each for each in reversed(chain) if isinstance(each, OSError))
    return next((e for e in errors if isinstance(e, socket.gaierror) or e.errno in _UNREACHED), None)


def retry(work: Callable[[], Result], attempts: int, first_wait_s: float = 0.5) -> Result:
    """Call a function until it succeeds, with exponential backoff and jitter after each ``StoreError``.

    Args:
        work: The function to call.
        attempts: Maximum number of calls.
        first_wait_s: Maximum delay before the second call in seconds.

    Returns:
        The return value of ``work``.

    Raises:
        StoreError: The last attempt failed, or an object is missing.
    """
    wait = first_wait_s
    while True:
        try:
            return work()
        except StoreError as error:
            attempts -= 1
            if isinstance(error, MissingError) or attempts <= 0:
                raise
            # The jitter avoids that all workers retry at the same time.
            time.sleep(min(wait, _MAX_DELAY_S) * random.uniform(0.5, 1))
            wait *= 2


def read_ranges(url: str, ranges: Sequence[tuple[int, int]], attempts: int = 1) -> list[bytes]:
    """Read byte ranges of a remote file concurrently. Failed ranges are retried.

    Args:
        url: URL of the file.
        ranges: Offset and size of each range in bytes.
        attempts: Maximum number of attempts.

    Returns:
        The content of each range.

    Raises:
        StoreError: A request failed or returned an unexpected number of bytes.
    """
    found: dict[tuple[int, int], bytes] = {}

    def request() -> None:
        missing = [span for span in ranges if span not in found]
        fs, inner = open_store(url)
        starts, ends = [offset for offset, _ in missing], [offset + size for offset, size in missing]
        failure: Exception | None = None
        with store_errors(url):
            answers = fs.cat_ranges([inner] * len(missing), starts, ends, on_error="return")
            for (offset, size), answer in zip(missing, answers, strict=True):
                if isinstance(answer, Exception):
                    failure = answer
                elif len(answer) == size:
                    found[offset, size] = bytes(answer)
                else:
                    remedy = "use a server that supports range requests" if len(answer) > size else ""
                    failure = StoreError(
                        f"{size} bytes at offset {offset}", f"{len(answer)} bytes", remedy, url
                    )
            if failure is not None:
                raise failure

    retry(request, attempts)
    return [found[span] for span in ranges]
