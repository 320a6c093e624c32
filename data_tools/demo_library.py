"""``python -m data_tools demo-assets``: the demo objects, from the Debian package ``sweethome3d-furniture``.

The package holds the library "Blend Swap CC-0": OBJ models that their authors gave to the public domain
(CC0). The chosen 48 differ in kind and colour, are solid rather than made of wires, and neither specks nor
walls in their views.
"""

import csv
import hashlib
import io
import lzma
import re
import tarfile
import tempfile
import zipfile
from pathlib import Path, PurePosixPath

from tqdm import tqdm

from data_tools.assets import TABLE_COLUMNS, TABLE_NAME, AssetsError, hash_file

PACKAGE_SHA256 = "3ccb90c63f9525e887a767b9cd5c8b6933b8b6b2973a615a5359ee68a2118668"
LIBRARY = "BlendSwap-CC-0"
LIBRARY_MEMBER = f"./usr/share/sweethome3d/furniture/{LIBRARY}.sh3f"
CATALOGUE = "PluginFurnitureCatalog.properties"
SOURCE = f"{LIBRARY} of the Debian package sweethome3d-furniture 1.8-1"

OBJECTS = (
    *("JapaneseLantern", "ammoBox", "antiqueChair", "armchair", "augalas", "bedsideTable2", "bootie", "box"),
    *("bread", "caballito", "cartoon_biplane", "chair", "chair2", "chairWithCushion", "chicken", "childHut"),
    *("coffeeBrewer", "couch2", "cupcake", "deckChair", "desk", "desklamp", "drawersCabinet", "dustbin"),
    *(
        "fireExtinguisher",
        "forkLift",
        "handbag",
        "horse2",
        "kitchenaid",
        "lantern",
        "littlePlant",
        "lockedLocker",
    ),
    *(
        "lowerCornerCabinet",
        "mofx_mailbox",
        "motorbike",
        "oakTable",
        "outdoorLamp",
        "plant",
        "rock1",
        "rock3",
    ),
    *("sofa2", "stoneLantern", "stool2", "tableWithTablecloth", "table_football", "teddyBear"),
    *("umbrellaFolded", "woodToy"),
)

LICENCE_TEXT = """\
The 3D models in this folder come from the library "{library}" ({source}). They were made by the authors named
in {table}, published on blendswap.com, and cleaned and converted to OBJ by Emmanuel Puybaret (eTeks). Here
they were converted to GLB: doubled faces dropped, materials made matt, textures shrunk to at most 512 pixels.
All of them, these copies included, are dedicated to the public domain under CC0 1.0 Universal:
https://creativecommons.org/publicdomain/zero/1.0/

The library's own licence text:

{licence}
"""


def make_demo_assets(package: Path, out: Path) -> None:
    """Make the folder: 48 GLB files, ``assets.csv``, ``LICENCE.txt``; the same bytes each time.

    Args:
        package: ``sweethome3d-furniture_1.8-1_all.deb``.
        out: Folder to make; files of the same names are replaced.

    Raises:
        AssetsError: Not the package that this was written for.
    """
    if not package.is_file():
        raise AssetsError(
            f"expected the Debian package at {package}, found no file; "
            "get it with `apt-get download sweethome3d-furniture`"
        )
    found = hash_file(package)
    if found != PACKAGE_SHA256:
        raise AssetsError(
            f"{package}: expected sha256 {PACKAGE_SHA256} (sweethome3d-furniture 1.8-1), found {found}; "
            "get that version of the package"
        )
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as name, zipfile.ZipFile(io.BytesIO(read_library(package))) as library:
        scratch = Path(name)
        library.extractall(scratch)
        catalogue = read_catalogue((scratch / CATALOGUE).read_text(encoding="latin-1"))
        rows = [_convert(key, catalogue[key], scratch, out) for key in tqdm(OBJECTS, unit="object")]
        licence = (scratch / "LICENSE.TXT").read_text(encoding="latin-1")
    with open(out / TABLE_NAME, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, TABLE_COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    lines = [line.rstrip() for line in licence.replace("\r\n", "\n").strip().split("\n")]
    text = LICENCE_TEXT.format(library=LIBRARY, source=SOURCE, table=TABLE_NAME, licence="\n".join(lines))
    (out / "LICENCE.txt").write_text(text, encoding="utf-8")
    size = sum(path.stat().st_size for path in out.glob("*.glb"))
    print(f"{len(rows)} objects, {size / 1e6:.1f} MB, in {out}")


def read_library(package: Path) -> bytes:
    """Take the library, a zip, out of the Debian package (an ar archive that holds data.tar.xz)."""
    for name, content in _ar_members(package.read_bytes()):
        if name == "data.tar.xz":
            with tarfile.open(fileobj=io.BytesIO(lzma.decompress(content)), mode="r:") as tar:
                file = tar.extractfile(LIBRARY_MEMBER)
                assert file is not None, LIBRARY_MEMBER
                return file.read()
    raise AssetsError(f"{package}: expected a member data.tar.xz, found none; get the package again")


def read_catalogue(text: str) -> dict[str, dict[str, str]]:
    """Read the library's table: the model's own id (``armchair``) -> field -> text."""
    entries: dict[str, dict[str, str]] = {}
    for field, number, value in re.findall(r"^(\w+)#(\d+)=(.*)$", text, re.MULTILINE):
        entries.setdefault(number, {})[field] = value.strip()
    return {entry["id"].rpartition("#")[2]: entry for entry in entries.values()}


def _convert(key: str, entry: dict[str, str], library: Path, out: Path) -> dict[str, str]:
    from data_tools.blender_convert import convert_to_glb  # loads Blender

    glb = out / f"{key}.glb"
    with tempfile.TemporaryDirectory() as scratch:
        convert_to_glb(library / PurePosixPath(entry["model"]).relative_to("/"), glb, Path(scratch))
    return {
        "id": key,
        "name": entry["name"],
        "creator": entry["creator"],
        "source": f"{key} in {SOURCE}",
        "licence": "CC0-1.0",
        "sha256": hashlib.sha256(glb.read_bytes()).hexdigest(),
    }


def _ar_members(archive: bytes) -> list[tuple[str, bytes]]:
    """Cut an ar archive: 8 bytes of magic, then a 60-byte header a member, padded to even length."""
    members, at = [], 8
    while at < len(archive):
        name, size = archive[at : at + 16].decode().strip().rstrip("/"), int(archive[at + 48 : at + 58])
        members.append((name, archive[at + 60 : at + 60 + size]))
        at += 60 + size + size % 2
    return members
