"""Find the meshes in a folder, name them, and look up what ``assets.csv`` says of them.

``assets.csv`` lies in the assets folder itself and is optional. It is UTF-8 with the header
``id,name,creator,source,licence,sha256``: ``id`` is the asset's id as below, ``sha256`` (may be empty) is the
hash of its mesh file and is checked. Assets without a row are called by their id, everything else "unknown".

An id is the mesh's path in the folder without its suffix, every character that a shard key cannot hold
replaced by "_".
"""

import csv
import dataclasses
import hashlib
import re
from pathlib import Path

from lrm_pl.data.schema import KEY_PATTERN
from lrm_pl.errors import InputError

SUFFIXES = (".glb", ".gltf", ".obj", ".ply", ".fbx")

TABLE_NAME = "assets.csv"
TABLE_COLUMNS = ("id", "name", "creator", "source", "licence", "sha256")

MAX_ID_LENGTH = 80


class AssetsError(InputError):
    """The assets folder cannot be rendered as it is; the message says what to do."""


@dataclasses.dataclass(frozen=True)
class Asset:
    """One mesh file and what is known of it.

    Attributes:
        id: Key of its sample.
        file: Path relative to the assets folder, with forward slashes.
        sha256: Hash of that file (textures and materials that lie beside it are not hashed).
        name: Name for people.
        creator: Who made it.
        source: Where it came from.
        licence: Its licence.
    """

    id: str
    file: str
    sha256: str
    name: str
    creator: str
    source: str
    licence: str


def find_assets(folder: Path) -> tuple[Asset, ...]:
    """List the assets of a folder and its subfolders, sorted by id.

    Raises:
        AssetsError: No folder, no assets, an id too long, two files with one id, or a broken table.
    """
    kinds = ", ".join(suffix[1:] for suffix in SUFFIXES)
    if not folder.is_dir():
        raise AssetsError(
            f"expected a folder of {kinds} files at {folder}, found no folder; pass ASSETS=<folder>"
        )
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
    if not files:
        raise AssetsError(f"expected {kinds} files in {folder}, found none; pass another ASSETS=<folder>")
    by_id: dict[str, Path] = {}
    for path in files:
        key = asset_id(path.relative_to(folder))
        if key in by_id:
            raise AssetsError(
                f"expected one file an id, found {by_id[key]} and {path}, which are both {key!r}; "
                "rename one of them"
            )
        by_id[key] = path
    table = read_table(folder / TABLE_NAME)
    return tuple(_asset(folder, key, by_id[key], table.get(key, {})) for key in sorted(by_id))


def asset_id(relative: Path) -> str:
    """Name an asset after its path in the assets folder: ``chairs/red 1.glb`` -> ``chairs_red_1``.

    Raises:
        AssetsError: The id is longer than a shard key may be.
    """
    key = re.sub(r"[^A-Za-z0-9_-]", "_", relative.with_suffix("").as_posix())
    if not KEY_PATTERN.fullmatch(key):
        raise AssetsError(
            f"expected an id of at most {MAX_ID_LENGTH} characters, found {len(key)} for {relative}; "
            "shorten the name"
        )
    return key


def read_table(path: Path) -> dict[str, dict[str, str]]:
    """Read ``assets.csv``: id -> column -> text; an absent file is an empty table.

    Raises:
        AssetsError: Other columns, or an id twice.
    """
    if not path.is_file():
        return {}
    with open(path, newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        if tuple(reader.fieldnames or ()) != TABLE_COLUMNS:
            raise AssetsError(
                f"{path}: expected the columns {','.join(TABLE_COLUMNS)}, found {reader.fieldnames}"
            )
        table: dict[str, dict[str, str]] = {}
        for row in reader:
            if row["id"] in table or None in row.values() or None in row:
                raise AssetsError(
                    f"{path}, line {reader.line_num}: expected {len(TABLE_COLUMNS)} columns and a new id, "
                    f"found {row}"
                )
            table[row["id"]] = row
    return table


def hash_file(path: Path) -> str:
    """Return the sha256 of a file, lower-case hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _asset(folder: Path, key: str, path: Path, row: dict[str, str]) -> Asset:
    sha256 = hash_file(path)
    if row.get("sha256") not in (None, "", sha256):
        raise AssetsError(
            f"{path}: expected sha256 {row['sha256']} as in {TABLE_NAME}, found {sha256}; "
            f"fetch the file again, or mend its row"
        )
    return Asset(
        id=key,
        file=path.relative_to(folder).as_posix(),
        sha256=sha256,
        name=row.get("name") or key,
        creator=row.get("creator") or "unknown",
        source=row.get("source") or "unknown",
        licence=row.get("licence") or "unknown",
    )
