"""Reader for the Debian package ``sweethome3d-furniture`` 1.8-1, which contains five libraries of OBJ models.

The hash of the package is verified, so its contents are trusted.

The package is an ar archive that contains a ``data.tar.xz``. Each library in the tar file is a zip file, for example,
``Scopia.sh3f``, with a catalog (``PluginFurnitureCatalog.properties``), a license (``LICENSE.TXT``) and one folder per
model (OBJ, MTL, textures).
"""

import dataclasses
import lzma
import os
import re
import subprocess
import tarfile
import tempfile
import zipfile
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from lrm_pl.errors import InputError
from lrm_pl.paths import hash_file

PACKAGE = "sweethome3d-furniture"
VERSION = "1.8-1"
DEB = f"{PACKAGE}_{VERSION}_all.deb"
PACKAGE_SHA256 = "3ccb90c63f9525e887a767b9cd5c8b6933b8b6b2973a615a5359ee68a2118668"

CATALOG = "PluginFurnitureCatalog.properties"
LICENSE = "LICENSE.TXT"

#: Mapping from libraries to the licenses of their models, according to the ``LICENSE.TXT`` files.
LIBRARIES = {
    "Scopia": "CC-BY-3.0",
    "BlendSwap-CC-0": "CC0-1.0",
    "BlendSwap-CC-BY": "CC-BY-3.0",
    "Reallusion": "CC-BY-3.0-US",
    "KatorLegaz": "CC-BY-3.0-US",
}


class PackageError(InputError):
    """Raised if the package cannot be downloaded or is not the expected version."""


@dataclasses.dataclass(frozen=True)
class Model:
    """Catalog entry that describes a model in a library.

    Attributes:
        library: Name of the library.
        key: Id of the model in the library.
        name: Display name.
        creator: Author.
        obj: Path of the OBJ in the zip file of the library.
        category: Category, for example, "Kitchen".
        tags: Keywords.
        size: Width, depth and height in centimeters. A value that the catalog does not define is 0.
        is_opening: Whether the catalog describes the model as a door or window.
        is_staircase: Whether the catalog defines a cut-out in the ceiling for the model.
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
    """Verify the package and unpack the libraries to a temporary folder.

    Args:
        package: Path of ``sweethome3d-furniture_1.8-1_all.deb``. If None, the package is downloaded with ``apt-get``.

    Yields:
        Path of the folder, which contains ``LIBRARY.sh3f`` for each library in ``LIBRARIES``.

    Raises:
        PackageError: The package is missing, cannot be downloaded, or is not the expected version.
    """
    with tempfile.TemporaryDirectory(prefix="sweethome3d-") as name:
        folder = Path(name)
        found = package or _download(folder)
        _check(found)
        _unpack(found, folder)
        yield folder


def read_catalog(library: Path) -> dict[str, Model]:
    """Read the catalog of a library.

    Args:
        library: Path of the ``.sh3f`` file.

    Returns:
        Mapping from model keys, for example, ``armchair``, to catalog entries.
    """
    entries = defaultdict[str, dict[str, str]](dict)
    for field, number, value in re.findall(r"^(\w+)#(\d+)=(.*)$", _read_text(library, CATALOG), re.MULTILINE):
        entries[number][field] = _unescape(value.strip())
    models = [_model(library.stem, entry) for entry in entries.values()]
    return {model.key: model for model in models}


def read_license(library: Path) -> str:
    """Return the license text of a library without trailing whitespace."""
    lines = _read_text(library, LICENSE).strip().split("\n")
    return "\n".join(line.rstrip() for line in lines)


def _read_text(library: Path, name: str) -> str:
    with zipfile.ZipFile(library) as archive:
        return archive.read(name).decode("latin-1")


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


def _unescape(text: str) -> str:
    r"""Decode the escape sequences of a Java properties file. ``Bill 10\u20ac`` becomes ``Bill 10€``."""
    return re.sub(r"\\u([0-9a-fA-F]{4})", lambda match: chr(int(match[1], 16)), text)


def _download(folder: Path) -> Path:
    """Download the package with ``apt-get``."""
    command = ["apt-get", "download", f"{PACKAGE}={VERSION}"]
    try:
        subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True, timeout=600)
    except (OSError, subprocess.SubprocessError) as error:
        reason = getattr(error, "stderr", None) or str(error)
        remedy = f"download {PACKAGE} {VERSION} from a Debian mirror and pass --package FILE.deb"
        raise PackageError(f"`{' '.join(command)}` failed: {reason.strip()}", remedy=remedy) from error
    return folder / DEB


def _check(package: Path) -> None:
    if not package.is_file():
        remedy = f"download it with `apt-get download {PACKAGE}`"
        raise PackageError(f"the Debian package at {package}", "no file", remedy)
    found = hash_file(package)
    if found != PACKAGE_SHA256:
        expected = f"sha256 {PACKAGE_SHA256} ({PACKAGE} {VERSION})"
        raise PackageError(expected, found, "download the expected version of the package", package)


def _unpack(package: Path, folder: Path) -> None:
    """Extract the libraries to a folder."""
    with open(package, "rb") as file:
        _seek_member(file, b"data.tar.xz")
        with lzma.open(file) as data, tarfile.open(fileobj=data, mode="r|") as tar:
            for member in tar:
                if member.isfile() and member.name.endswith(".sh3f"):
                    member.name = Path(member.name).name
                    tar.extract(member, folder, filter="data")


def _seek_member(file: BinaryIO, name: bytes) -> None:
    """Seek to the data of a member of an ar archive.

    The archive starts with 8 magic bytes. Each member consists of a header of 60 bytes and the data, which are padded
    to an even size.
    """
    file.seek(8)
    while (header := file.read(60))[:16].rstrip() != name:
        size = int(header[48:58])
        file.seek(size + size % 2, os.SEEK_CUR)
