"""The list of assets: what is to be rendered, and what is known of it.

``assets.parquet`` in the assets folder is the list; ``python -m data_tools fetch`` writes it. Its columns are the
fields of ``Asset``, and a mesh may be a URL, which is then downloaded when its turn comes.

A folder without one is searched for meshes. An id is then the mesh's path in the folder without its suffix, every
character that a shard key cannot hold replaced by "_", and a table ``assets.csv`` (UTF-8, with the header
``id,name,creator,source,license,sha256``) may say more: ``sha256`` (may be empty) is the hash of the mesh
file. Meshes are not opened here: whoever renders one hashes it, and compares the hash with the listed one. A column
``up`` may follow: ``z`` for OBJ and PLY files whose z axis points up.
Assets without a row are called by their id, everything else is "unknown".
"""

import csv
import dataclasses
import hashlib
import os
import re
import sys
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, cast, get_args

import pyarrow
import pyarrow.parquet

from lrm_pl.data.manifest import write_atomically
from lrm_pl.data.schema import KEY_PATTERN
from lrm_pl.errors import InputError, counted

MESH_SUFFIXES = (".glb", ".gltf", ".obj", ".ply", ".fbx")

#: Kinds of meshes that are not rendered, and archives that meshes come in.
UNSUPPORTED_SUFFIXES = frozenset(
    ".3dm .3ds .3mf .7z .abc .blend .bz2 .c4d .ctm .dae .dxf .e57 .gz .iges .igs .jt .lwo .ma .max .mb .ms3d .off .pcd "
    ".rar .skp .sldprt .spz .splat .step .stl .stp .tar .tgz .u3d .usd .usda .usdc .usdz .vox .vrm .vrml .vtk .vtp "
    ".wrl .x3d .xz .zip .zst".split()
)

LIST_NAME = "assets.parquet"

TABLE_NAME = "assets.csv"
TABLE_COLUMNS = ("id", "name", "creator", "source", "license", "sha256")
#: May follow them.
UP_COLUMN = "up"

#: The axis that points up in a file that does not say (OBJ, PLY); "" means y, as most programs write both.
Up = Literal["", "y", "z"]

MAX_ID_LENGTH = 80

_SHA256 = re.compile("([0-9a-f]{64})?")

_KINDS = ", ".join(suffix[1:] for suffix in MESH_SUFFIXES)


class AssetsError(InputError):
    """The assets folder cannot be rendered as it is; the message says what to do."""


class AssetError(ValueError):
    """One asset cannot be rendered; the message is its reason in ``failures.jsonl``."""


@dataclasses.dataclass(frozen=True, slots=True)
class Asset:
    """One mesh file and what is known of it.

    Attributes:
        id: Key of its sample.
        file: Path relative to the assets folder, with forward slashes; or a URL.
        sha256: Hash that the list expects of that file (textures and materials beside it are not hashed); "": any file.
        name: Name for people.
        creator: Who made it.
        source: Where it came from.
        license: Its license.
        tags: Words that describe it: categories, keywords.
        split: "train" or "val" where its source says so (unseen authors are held out); "" leaves it to the plan.
        up: The axis that points up in an OBJ or PLY.
    """

    id: str
    file: str
    sha256: str
    name: str
    creator: str
    source: str
    license: str
    tags: tuple[str, ...] = ()
    split: Literal["", "train", "val"] = ""
    up: Up = ""

    @property
    def is_remote(self) -> bool:
        """Whether ``file`` is a URL."""
        return "://" in self.file

    def record(self) -> dict[str, Any]:
        """Return what the record of its sample says of it."""
        return {
            "name": self.name, "license": self.license, "creator": self.creator, "source": self.source
        }  # fmt: skip


#: Columns of ``assets.parquet``.
LIST_SCHEMA = pyarrow.schema([
    (field.name, pyarrow.list_(pyarrow.string()) if field.name == "tags" else pyarrow.string())
    for field in dataclasses.fields(Asset)
])  # fmt: skip


def find_assets(folder: Path, out: Path | None = None) -> tuple[Asset, ...]:
    """List the assets of a folder: those of its ``assets.parquet``, else all meshes in it and its subfolders.

    Args:
        folder: Folder of assets.
        out: Folder of shards that may have been begun with them: what it lists keeps its id, whatever came beside it.

    Returns:
        The assets, sorted by id.

    Raises:
        AssetsError: No folder, no assets, a broken list or table, or shards among the meshes.
    """
    if not folder.is_dir():
        raise AssetsError(
            expected=f"a folder of {_KINDS} files at {folder}",
            found="no folder",
            remedy="pass ASSETS=<folder>",
        )
    if out and out.resolve() == folder.resolve():
        raise AssetsError(
            expected="shards in another folder than the meshes",
            found=f"{out} for both",
            remedy="pass another OUT=",
        )
    if (folder / LIST_NAME).is_file():
        assets = read_list(folder)
        _say_what_is_not_listed(folder, assets)
        return assets
    return scan(folder, read_ids(out) if out else {})


def read_ids(folder: Path) -> dict[str, str]:
    """Read what a folder's ``assets.parquet`` calls its files: file -> id; nothing where there is none."""
    try:
        table = pyarrow.parquet.read_table(folder / LIST_NAME, columns=["file", "id"], memory_map=False)
    except (OSError, pyarrow.ArrowException):  # who needs the list says what is wrong with it
        return {}
    return dict(zip(*(column.to_pylist() for column in table.columns), strict=True))


def _say_what_is_not_listed(folder: Path, assets: Iterable[Asset]) -> None:
    listed = {asset.file for asset in assets if not asset.is_remote}
    count = sum(path.relative_to(folder).as_posix() not in listed for path in find_meshes(folder).meshes)
    if count:
        print(
            f"note: not rendered, since its {LIST_NAME} does not list them: {counted(count, 'mesh')} in {folder}; the "
            "`fetch` command that wrote it, run again, lists what is there now",
            file=sys.stderr,
        )


def write_list(folder: Path, assets: Iterable[Asset]) -> None:
    """Write ``assets.parquet``, sorted by id."""
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(_table(assets), sink)
    write_atomically(folder / LIST_NAME, sink.getvalue().to_pybytes())


def list_matches(folder: Path, assets: Iterable[Asset]) -> bool:
    """Return whether ``assets.parquet`` lists these assets, without making objects of it; false if it is damaged."""
    try:
        return bool(pyarrow.parquet.read_table(folder / LIST_NAME, memory_map=False).equals(_table(assets)))
    except (OSError, pyarrow.ArrowException):
        return False


def _table(assets: Iterable[Asset]) -> pyarrow.Table:
    rows = sorted(assets, key=lambda asset: asset.id)
    columns = {name: [getattr(asset, name) for asset in rows] for name in LIST_SCHEMA.names}
    return pyarrow.table(columns, LIST_SCHEMA)


def read_list(folder: Path) -> tuple[Asset, ...]:
    """Read and check ``assets.parquet``; meshes are not opened, whoever renders them checks their hashes.

    Raises:
        AssetsError: It is damaged, has other columns, an id twice or one that no shard can hold, a mesh of another
            kind, a path that leaves the folder, or no rows.
    """
    path = folder / LIST_NAME
    remedy = "make the list again: python -m data_tools fetch"
    try:
        table = pyarrow.parquet.read_table(path, memory_map=False)
    except (OSError, pyarrow.ArrowException) as error:
        raise AssetsError(subject=path, expected="a Parquet file", found=error, remedy=remedy) from error
    if table.schema.names != LIST_SCHEMA.names or any(column.null_count for column in table.columns):
        raise AssetsError(
            subject=path,
            expected=f"the columns {', '.join(LIST_SCHEMA.names)} without gaps",
            found=", ".join(table.schema.names),
            remedy=remedy,
        )
    try:
        rows = table.cast(LIST_SCHEMA).to_pylist()
    except pyarrow.ArrowException as error:
        raise AssetsError(subject=path, expected="columns of text", found=error, remedy=remedy) from error
    assets = sorted((Asset(**row | {"tags": tuple(row["tags"])}) for row in rows), key=lambda asset: asset.id)
    if not assets:
        raise AssetsError(subject=path, expected="at least one asset", found="none", remedy=remedy)
    twice = [key for key, count in Counter(asset.id for asset in assets).items() if count > 1]
    if twice:
        raise AssetsError(subject=path, expected="every id once", found=f"{twice[0]!r} twice", remedy=remedy)
    for asset in assets:
        _check(path, asset, remedy)
    return tuple(assets)


def _check(path: Path, asset: Asset, remedy: str) -> None:
    for what, fits, found in (
        ("an id of letters, digits, '_' and '-'", KEY_PATTERN.fullmatch(asset.id), asset.id),
        (f"a mesh that ends in one of {_KINDS}", asset.file.lower().endswith(MESH_SUFFIXES), asset.file),
        (
            "a path inside the folder, or a URL",
            asset.is_remote or not (asset.file.startswith("/") or ".." in asset.file.split("/")),
            asset.file,
        ),
        ("a sha256 or nothing", _SHA256.fullmatch(asset.sha256), asset.sha256),
        ('the split "train", "val" or nothing', asset.split in ("", "train", "val"), asset.split),
        ('the axis up "y", "z" or nothing', asset.up in get_args(Up), asset.up),
    ):
        if not fits:
            raise AssetsError(
                subject=f"{path}: asset {asset.id!r}", expected=what, found=f"{found!r}", remedy=remedy
            )


def scan(folder: Path, known: Mapping[str, str] = MappingProxyType({})) -> tuple[Asset, ...]:
    """Find all meshes in a folder and its subfolders, and look them up in ``assets.csv``; none is opened.

    Args:
        folder: Folder of assets.
        known: File -> id of those that have one already.

    Raises:
        AssetsError: No assets, or a broken table.
    """
    found = find_meshes(folder)
    files = sorted(path for path in found.meshes if _is_text(path))
    for path in sorted(set(found.meshes) - set(files)):
        print(f"left out: {path!r}: expected a name in UTF-8; rename it", file=sys.stderr)
    if found.ignored:
        print(
            f"ignored: {format_ignored(found.ignored)}; {_KINDS} files in {folder} itself are rendered",
            file=sys.stderr,
        )
    if not files:
        raise AssetsError(
            expected=f"{_KINDS} files in {folder}", found="none", remedy="pass another ASSETS=<folder>"
        )
    by_id = name_files((path.relative_to(folder) for path in files), known)
    table = read_table(folder / TABLE_NAME)
    if unused := sorted(set(table) - set(by_id)):
        print(
            f"note: no mesh has the id of {counted(len(unused), 'row')} of {folder / TABLE_NAME}, such as "
            f"{unused[0]!r}; ids here are such as {min(by_id)!r}",
            file=sys.stderr,
        )
    return tuple(_asset(folder, key, folder / by_id[key], table.get(key, {})) for key in sorted(by_id))


@dataclasses.dataclass(frozen=True)
class FoundMeshes:
    """What lies in a folder of assets.

    Attributes:
        meshes: Mesh files, in no order.
        ignored: What looks like meshes and is not rendered -> how many: suffixes, links, hidden meshes.
    """

    meshes: tuple[Path, ...]
    ignored: Counter[str]


def format_ignored(ignored: Counter[str]) -> str:
    """Say what is ignored, most of it first: ``41 .stl, 19 .dae, 1 linked folder``."""
    return ", ".join(
        f"{count} {what}" if what.startswith(".") else counted(count, what)
        for what, count in ignored.most_common()
    )


def find_meshes(folder: Path) -> FoundMeshes:
    """Search a folder and its subfolders; links to folders are not followed, hidden files are no assets.

    Neither is what macOS leaves in archives (``__MACOSX``).
    """
    meshes, ignored, waiting = list[Path](), Counter[str](), [(folder, False)]
    while waiting:
        place, hidden = waiting.pop()
        try:
            entries = list(os.scandir(place))
        except PermissionError:
            ignored["unreadable folder"] += 1
            continue
        for entry in entries:
            suffix = os.path.splitext(entry.name)[1].lower()
            is_hidden, is_link = hidden or is_hidden_name(entry.name), entry.is_symlink()
            if entry.is_dir(follow_symlinks=False):
                waiting.append((Path(entry.path), is_hidden))
            elif is_link and os.path.isdir(entry.path):
                ignored["linked folder"] += not is_hidden
            elif suffix in MESH_SUFFIXES and is_hidden:
                ignored["hidden mesh"] += not entry.name.startswith("._")
            elif suffix in MESH_SUFFIXES and (os.path.isfile(entry.path) if is_link else entry.is_file()):
                meshes.append(Path(entry.path))
            elif suffix in MESH_SUFFIXES and is_link:
                ignored["dangling link"] += 1
            elif suffix in UNSUPPORTED_SUFFIXES and not is_hidden:
                ignored[suffix] += 1
    return FoundMeshes(tuple(meshes), +ignored)


def is_hidden_name(name: str) -> bool:
    """Say whether files and folders of this name are passed over."""
    return name.startswith(".") or name == "__MACOSX"


def _is_text(path: Path) -> bool:
    """Say whether a name is UTF-8, as a list can hold it; archives of other systems have others."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        return False
    return True


def name_files(files: Iterable[Path], known: Mapping[str, str] = MappingProxyType({})) -> dict[str, Path]:
    """Name assets after their paths in the assets folder: ``chairs/red 1.glb`` -> ``chairs_red_1``.

    Where several would have one name (``a.obj`` and ``a.ply``, ``a b.glb`` and ``a_b.glb``) it is followed by the
    suffix, and then by a hash of the path; so is one of other letters than a shard key holds, or of too many.

    Args:
        files: Paths relative to the folder.
        known: File -> id of those that keep theirs.
    """
    files = sorted(files)
    names = [re.sub(r"[^A-Za-z0-9_-]", "_", file.with_suffix("").as_posix()) for file in files]
    with_suffix = [f"{name}_{file.suffix[1:].lower()}" for name, file in zip(names, files, strict=True)]
    counts, suffix_counts = Counter(names), Counter(with_suffix)
    found = {known[file.as_posix()]: file for file in files if file.as_posix() in known}
    kept, taken = set(found.values()), set(found)
    others = counts.keys() | taken
    for file, name, longer in zip(files, names, with_suffix, strict=True):
        if file in kept:
            continue
        plain = file.with_suffix("").as_posix().isascii() and KEY_PATTERN.fullmatch(name)
        if plain and counts[name] == 1 and name not in taken:
            key = name
        elif plain and suffix_counts[longer] == 1 and longer not in others and KEY_PATTERN.fullmatch(longer):
            key = longer
        else:
            mark = "_" + hashlib.sha256(file.as_posix().encode("utf-8", "surrogateescape")).hexdigest()[:8]
            key = name[: MAX_ID_LENGTH - len(mark)] + mark
        found[key] = file
    return found


def read_table(path: Path) -> dict[str, dict[str, str]]:
    """Read ``assets.csv``: id -> column -> text; an absent file is an empty table.

    Raises:
        AssetsError: No CSV of UTF-8, other columns, or an id twice.
    """
    if not path.is_file():
        return {}
    try:
        return _parse_table(path)
    except (UnicodeDecodeError, csv.Error) as error:
        raise AssetsError(
            subject=path, expected="a CSV", found=error, remedy="save it as CSV in UTF-8"
        ) from error


def _parse_table(path: Path) -> dict[str, dict[str, str]]:
    with open(path, newline="", encoding="utf-8-sig") as file:  # spreadsheets put a mark first
        reader = csv.DictReader(file)
        columns = tuple(reader.fieldnames or ())
        if columns not in (TABLE_COLUMNS, (*TABLE_COLUMNS, UP_COLUMN)):
            raise AssetsError(
                subject=path,
                expected=f"the columns {','.join(TABLE_COLUMNS)}, and perhaps {UP_COLUMN}",
                found=columns,
            )
        table: dict[str, dict[str, str]] = {}
        for row in reader:
            if row["id"] in table or None in row.values() or None in row:
                raise AssetsError(
                    subject=f"{path}, line {reader.line_num}",
                    expected=f"{len(columns)} columns and a new id",
                    found=row,
                )
            if row.get(UP_COLUMN, "") not in get_args(Up):
                raise AssetsError(
                    subject=f"{path}, line {reader.line_num}",
                    expected="up as y, z or nothing",
                    found=f"{row[UP_COLUMN]!r}",
                )
            if not _SHA256.fullmatch(row["sha256"]):
                raise AssetsError(
                    subject=f"{path}, line {reader.line_num}",
                    expected="a sha256 of 64 lower-case hex digits or nothing",
                    found=f"{row['sha256']!r}",
                    remedy="`sha256sum FILE` prints it",
                )
            table[row["id"]] = row
    return table


def hash_file(path: Path) -> str:
    """Return the sha256 of a file, lower-case hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _asset(folder: Path, key: str, path: Path, row: dict[str, str]) -> Asset:
    if row.get(UP_COLUMN) and path.suffix.lower() not in (".obj", ".ply"):
        raise AssetsError(
            subject=folder / TABLE_NAME,
            expected="up of OBJ and PLY files only, which do not say it themselves",
            found=f"it of {key!r}, {path.name}",
            remedy="leave it empty there",
        )
    return Asset(
        id=key,
        file=path.relative_to(folder).as_posix(),
        sha256=row.get("sha256", ""),
        name=row.get("name") or key,
        creator=row.get("creator") or "unknown",
        source=row.get("source") or "unknown",
        license=row.get("license") or "unknown",
        up=cast(Up, row.get(UP_COLUMN, "")),
    )
