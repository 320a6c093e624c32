"""Where files lie: a local folder, an object store or a web server, through fsspec; and what goes wrong there."""

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

#: Packages under object stores, whose exceptions are no OSErrors: not reached, no credentials, cut off.
_STORE_PACKAGES = (
    "botocore", "aiobotocore", "aiohttp", "gcsfs", "google", "huggingface_hub", "httpx", "httpx2", "httpcore",
    "httpcore2",
)  # fmt: skip

#: A web server's answers that will be the same tomorrow.
_REFUSALS = (401, 403, 404, 410)

#: Errors of a connection that was never made.
_UNREACHED = (errno.ENETUNREACH, errno.EHOSTUNREACH, errno.ENETDOWN, errno.EHOSTDOWN, errno.ECONNREFUSED)

#: URL scheme -> what to look at where a store fails.
_REMEDIES = {
    "http": "look at the URL and its server",
    "https": "look at the URL and its server",
    "hf": "look at the name of the repository, and at HF_TOKEN if it is not public",
}

#: URL scheme -> our extra that brings its fsspec package.
_EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs", "http": "https", "https": "https"}

#: Begins the name of a network on the Hugging Face hub: a path that is mistyped must not open a stranger's.
HUB = "hf://"

#: Seconds that a web server gets to accept a connection, and then to send the next bytes.
_CONNECT_S, _SILENCE_S = 10.0, 30.0

#: Longest wait between two attempts, seconds.
_LONGEST_WAIT_S = 30.0


class StoreError(InputError, OSError):
    """An object store does not do what it was asked for."""


class MissingError(StoreError):
    """What was asked for is not in the store, or not for us: to ask again is of no use."""


class StoreDownError(InputError):
    """A whole store does not answer: no fault of what was asked for."""


def open_store(path: str) -> tuple[Any, str]:
    """Return the file system of a path or URL, and the path inside it.

    Raises:
        InputError: The package for it is not installed, or there is none.
    """
    scheme = path.split("://")[0]
    try:
        # A listing that is remembered is wrong as soon as another process has written.
        return url_to_fs(path, use_listings_cache=False, **_options(scheme))
    except ImportError as error:
        extra = _EXTRAS.get(scheme)
        how = f"pip install 'lrm_pl[{extra}]'" if extra else f"install the fsspec package for {scheme}"
        raise InputError(
            expected=f"the package that reads {scheme}://", found=error, remedy=f"install it: {how}"
        ) from error
    except ValueError as error:
        raise InputError(
            expected="a folder or a URL such as s3://BUCKET/RUN", found=f"{path!r}: {error}"
        ) from error


def _options(scheme: str) -> dict[str, Any]:
    if scheme not in ("http", "https"):
        return {}
    import aiohttp  # of the extra "https"

    # By default a transfer may take five minutes in all, and be silent for as long.
    timeout = aiohttp.ClientTimeout(total=None, connect=_CONNECT_S, sock_read=_SILENCE_S)
    return {"client_kwargs": {"timeout": timeout}}


def is_local(path: str) -> bool:
    """Say whether a path is on this machine's file systems."""
    return isinstance(open_store(path)[0], LocalFileSystem)


@contextmanager
def store_errors(path: str) -> Iterator[None]:
    """Turn what an object store's packages raise into one error; local paths keep their OSErrors."""
    try:
        yield
    except Exception as error:
        if is_server_fault(error) and isinstance(error.__cause__, Exception):
            error = error.__cause__
        ours = isinstance(error, InputError)
        theirs = isinstance(error, OSError) or type(error).__module__.split(".")[0] in _STORE_PACKAGES
        if ours or not theirs or is_local(path):
            raise
        if (unreached := _unreached(error)) is not None:
            raise StoreError(
                subject=path,
                expected="to reach its server",
                found=f"no network or no such host: {unreached}",
                remedy="look at the network, the proxy (HTTPS_PROXY) and the address",
            ) from error
        kind = MissingError if isinstance(error, FileNotFoundError | PermissionError) else StoreError
        remedy = _REMEDIES.get(
            path.split("://")[0],
            "look at the bucket, the credentials and the endpoint (for S3: AWS_ACCESS_KEY_ID, AWS_ENDPOINT_URL, ...)",
        )
        raise kind(
            f"{path}: expected the object store to do as asked, but found {type(error).__name__}: {error}; {remedy}"
        ) from error


def is_server_fault(error: Exception) -> bool:
    """Say whether fsspec calls a file missing whose web server only failed, or was not reached."""
    cause = error.__cause__
    return (
        isinstance(error, FileNotFoundError)
        and isinstance(cause, Exception)
        and type(cause).__module__.split(".")[0] == "aiohttp"
        and getattr(cause, "status", None) not in _REFUSALS
    )


def _unreached(error: BaseException) -> OSError | None:
    """Return the error of the connection that was never made, if there is one behind an error."""
    chain, found = [error], error.__cause__ or error.__context__
    while found is not None and found not in chain:
        chain.append(found)
        found = found.__cause__ or found.__context__
    for each in reversed(chain):
        if isinstance(each, socket.gaierror) or (isinstance(each, OSError) and each.errno in _UNREACHED):
            return each
    return None


def retry(work: Callable[[], Result], attempts: int, first_wait_s: float = 0.5) -> Result:
    """Do it again where the store failed, after twice as long each time (half of it by chance).

    Args:
        work: What to do; from its beginning each time.
        attempts: How often at most.
        first_wait_s: Seconds before the second attempt.

    Raises:
        StoreError: Of the last attempt; at once where the file is not there.
    """
    for attempt in range(1, attempts + 1):
        try:
            return work()
        except MissingError:
            raise
        except StoreError:
            if attempt == attempts:
                raise
            wait = min(first_wait_s * 2 ** (attempt - 1), _LONGEST_WAIT_S)
            time.sleep(wait * random.uniform(0.5, 1))  # else all workers of a cluster would knock at once
    raise ValueError(f"expected at least one attempt, but found {attempts}")


def read_ranges(url: str, ranges: Sequence[tuple[int, int]], attempts: int = 1) -> list[bytes]:
    """Read parts of one remote file, at the same time; those that fail are asked for again.

    Args:
        url: The file.
        ranges: (offset, size) of each part.
        attempts: How often at most.

    Raises:
        StoreError: The store failed, or sent less than was asked for.
    """
    found: dict[tuple[int, int], bytes] = {}

    def ask() -> None:
        missing = [part for part in ranges if part not in found]
        fs, inner = open_store(url)
        starts, ends = [offset for offset, _ in missing], [offset + size for offset, size in missing]
        with store_errors(url):
            answers = fs.cat_ranges([inner] * len(missing), starts, ends, on_error="return")
            for part, answer in zip(missing, answers, strict=True):
                if not isinstance(answer, Exception) and len(answer) == part[1]:
                    found[part] = bytes(answer)
            for answer in answers:
                if isinstance(answer, Exception):
                    raise answer
        for (offset, size), answer in zip(missing, answers, strict=True):
            if len(answer) != size:
                more = (
                    "; a server must answer requests for a part of a file (Range)"
                    if len(answer) > size
                    else ""
                )
                raise StoreError(
                    subject=url, expected=f"{size} bytes at {offset}", found=f"{len(answer)}{more}"
                )

    retry(ask, attempts)
    return [found[part] for part in ranges]
