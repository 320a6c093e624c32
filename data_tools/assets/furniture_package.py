"""The Debian package ``sweethome3d-furniture`` 1.8-1: five libraries of OBJ models with a catalog each.

The package is an ar archive that holds ``data.tar.xz``; in it a library is a zip (``Scopia.sh3f``) of
``PluginFurnitureCatalog.properties``, ``LICENSE.TXT``, and a folder a model (OBJ, MTL, textures).
"""

import dataclasses
import lzma
import re
import shutil
import subprocess
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from data_tools.assets.archives import read_member
from data_tools.assets.asset_list import hash_file
from lrm_pl.errors import InputError

PACKAGE = "sweethome3d-furniture"
VERSION = "1.8-1"
PACKAGE_SHA256 = "3ccb90c63f9525e887a767b9cd5c8b6933b8b6b2973a615a5359ee68a2118668"

CATALOG = "PluginFurnitureCatalog.properties"
LICENSE = "LICENSE.TXT"

#: Library -> license of every model in it, as its ``LICENSE.TXT`` says.
LIBRARIES = {
    "Scopia": "CC-BY-3.0",
    "BlendSwap-CC-0": "CC0-1.0",
    "BlendSwap-CC-BY": "CC-BY-3.0",
    "Reallusion": "CC-BY-3.0-US",
    "KatorLegaz": "CC-BY-3.0-US",
}

_MAX_TEXT_BYTES = 1 << 20


class PackageError(InputError):
    """The package cannot be had, or is not the one that this was written for."""


@dataclasses.dataclass(frozen=True)
class Model:
    """One entry of a library's catalog.

    Attributes:
        library: Name of its library.
        key: Its id in the library.
        name: Name for people.
        creator: Who made it.
        obj: Its OBJ in the library's zip.
        category: Its category ("Kitchen").
        tags: Further words.
        size: Width, depth, height, centimeters; 0 where the catalog does not say.
        is_opening: Whether it is a door or a window, by the catalog's flag.
        is_staircase: Whether it cuts a hole into the ceiling.
    """

    library: str
    key: str
    name: str
    creator: str
    obj: str
    category: str
    tags: tuple[str, ...]
    size: tuple[float, float, float]
    is_opening: bool
    is_staircase: bool


@contextmanager
def open_package(package: Path | None) -> Iterator[Path]:
    """Check the package and unpack its libraries into a temporary folder.

    Args:
        package: ``sweethome3d-furniture_1.8-1_all.deb``; None gets it with apt-get.

    Yields:
        The folder, with a file ``LIBRARY.sh3f`` for each of ``LIBRARIES``.

    Raises:
        PackageError: No package, or not the one that this was written for.
    """
    with tempfile.TemporaryDirectory(prefix="sweethome3d-") as name:
        folder = Path(name)
        found = package or _download(folder)
        _check(found)
        _unpack(found, folder)
        yield folder


def read_catalog(library: Path) -> dict[str, Model]:
    """Read the catalog of a library: the model's own id (``armchair``) -> its entry.

    Raises:
        PackageError: No catalog, or one without ids and models.
    """
    with zipfile.ZipFile(library) as archive:
        content = read_member(archive, CATALOG, _MAX_TEXT_BYTES)
    if content is None:
        raise PackageError(
            subject=library, expected=f"a file {CATALOG}", found="none", remedy="get the package again"
        )
    entries: dict[str, dict[str, str]] = {}
    for field, number, value in re.findall(r"^(\w+)#(\d+)=(.*)$", content.decode("latin-1"), re.MULTILINE):
        entries.setdefault(number, {})[field] = _unescaped(value.strip())
    try:
        models = [_model(library.stem, entry) for entry in entries.values()]
    except (KeyError, ValueError) as error:
        raise PackageError(
            subject=library,
            expected="id, name, model, width, depth and height of each entry",
            found=f"{error!r}",
            remedy="get the package again",
        ) from error
    return {model.key: model for model in models}


def read_license(library: Path) -> str:
    """Return a library's own license text, trailing blanks dropped."""
    with zipfile.ZipFile(library) as archive:
        text = (read_member(archive, LICENSE, _MAX_TEXT_BYTES) or b"").decode("latin-1")
    return "\n".join(line.rstrip() for line in text.replace("\r\n", "\n").strip().split("\n"))


def _model(library: str, entry: dict[str, str]) -> Model:
    width, depth, height = (float(entry.get(side, "0")) for side in ("width", "depth", "height"))
    return Model(
        library=library,
        key=entry["id"].rpartition("#")[2],
        name=entry["name"],
        creator=entry.get("creator") or "unknown",
        obj=entry["model"].lstrip("/"),
        category=entry.get("category", ""),
        tags=tuple(tag.strip() for tag in entry.get("tags", "").split(",") if tag.strip()),
        size=(width, depth, height),
        is_opening=entry.get("doorOrWindow") == "true",
        is_staircase="staircaseCutOutShape" in entry,
    )


def _unescaped(text: str) -> str:
    r"""Resolve the escapes of Java's properties: ``Bill 10\u20ac`` -> ``Bill 10€``."""
    return re.sub(r"\\u([0-9a-fA-F]{4})", lambda match: chr(int(match[1], 16)), text)


def _download(folder: Path) -> Path:
    remedy = f"get {PACKAGE} {VERSION} from a Debian mirror and pass --package FILE.deb"
    command = ["apt-get", "download", f"{PACKAGE}={VERSION}"]
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=600)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise PackageError(expected=f"`{' '.join(command)}` to run", found=error, remedy=remedy) from error
    packages = list(folder.glob("*.deb"))
    if done.returncode or len(packages) != 1:
        said = (done.stderr.strip() or "nothing").splitlines()[-1]
        raise PackageError(f"expected `{' '.join(command)}` to bring one package, it said: {said}; {remedy}")
    return packages[0]


def _check(package: Path) -> None:
    if not package.is_file():
        raise PackageError(
            expected=f"the Debian package at {package}",
            found="no file",
            remedy=f"get it with `apt-get download {PACKAGE}`",
        )
    found = hash_file(package)
    if found != PACKAGE_SHA256:
        raise PackageError(
            subject=package,
            expected=f"sha256 {PACKAGE_SHA256} ({PACKAGE} {VERSION})",
            found=found,
            remedy="get that version of the package",
        )


def _unpack(package: Path, folder: Path) -> None:
    """Take the libraries out of the package; its hash is known, so it is what it was when this was written."""
    with open(package, "rb") as file:
        _seek_member(file, "data.tar.xz", package)
        with lzma.open(file) as data, tarfile.open(fileobj=data, mode="r|") as tar:
            for member in tar:
                name = Path(member.name).name
                if member.isfile() and name in {f"{library}.sh3f" for library in LIBRARIES}:
                    content = tar.extractfile(member)
                    assert content is not None  # it is a file
                    with open(folder / name, "wb") as library:
                        shutil.copyfileobj(content, library)
    missing = [name for name in LIBRARIES if not (folder / f"{name}.sh3f").is_file()]
    if missing:
        raise PackageError(
            subject=package,
            expected=f"the library {missing[0]}.sh3f",
            found="none",
            remedy="get the package again",
        )


def _seek_member(file: BinaryIO, name: str, package: Path) -> None:
    """Go to a member of an ar archive: 8 bytes of magic, then a 60-byte header a member, padded to even length."""
    at = 8
    while True:
        file.seek(at)
        header = file.read(60)
        if len(header) < 60:
            raise PackageError(
                subject=package, expected=f"a member {name}", found="none", remedy="get the package again"
            )
        if header[:16].decode("latin-1").strip().rstrip("/") == name:
            return
        size = int(header[48:58])
        at += 60 + size + size % 2
