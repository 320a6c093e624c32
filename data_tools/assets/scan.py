"""Functions that find the meshes in a folder and read their metadata from ``assets.csv``.

``assets.csv`` is a UTF-8 file with the header ``id,name,creator,source,license,sha256`` and an optional last column
``up``, which is "z" for OBJ and PLY files whose z axis points up. The id of a mesh is the path in the folder without
the suffix, with invalid characters replaced by "_". If there is no row for a mesh, the name is the id, and the creator,
source and license are "unknown".
"""

import csv
import os
import re
import sys
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import cast, get_args

from data_tools.assets.asset_list import (
    LIST_NAME,
    MESH_FORMATS,
    MESH_SUFFIXES,
    SHA256_PATTERN,
    Asset,
    AssetsError,
    UpAxis,
    hashed_id,
    read_ids,
    read_list,
)
from lrm_pl.data.schema import KEY_PATTERN
from lrm_pl.errors import counted

#: Suffixes of unsupported mesh formats and of archives that may contain meshes. These files are reported as ignored.
UNSUPPORTED_SUFFIXES = frozenset(
    ".3dm .3ds .3mf .7z .abc .blend .bz2 .c4d .ctm .dae .dxf .e57 .gz .iges .igs .jt .lwo .ma .max .mb .ms3d .off .pcd "
    ".rar .skp .sldprt .spz .splat .step .stl .stp .tar .tgz .u3d .usd .usda .usdc .usdz .vox .vrm .vrml .vtk .vtp "
    ".wrl .x3d .xz .zip .zst".split()
)

#: Characters that represent bytes of a file name that are not valid UTF-8.
_SURROGATES = re.compile(r"[\ud800-\udfff]")

TABLE_NAME = "assets.csv"
TABLE_COLUMNS = ("id", "name", "creator", "source", "license", "sha256")
_UP_COLUMN = "up"


def find_assets(folder: Path, out: Path | None = None) -> tuple[Asset, ...]:
    """Return the assets in a folder.

    If the folder contains ``assets.parquet``, the assets in this list are returned. Otherwise, the folder is searched
    recursively for meshes.

    Args:
        folder: Folder of assets.
        out: Folder of shards from an earlier run. Assets that are listed in its ``assets.parquet`` keep their ids.
            If None, all ids are derived from the paths.

    Returns:
        The assets, sorted by id.

    Raises:
        AssetsError: The folder is missing or has no assets, ``assets.parquet`` or ``assets.csv`` is invalid, or ``out``
            is ``folder``.
    """
    if not folder.is_dir():
        expected = f"a folder of {MESH_FORMATS} files at {folder}"
        raise AssetsError(expected, "no folder", "pass ASSETS=<folder>")
    if out and out.resolve() == folder.resolve():
        raise AssetsError(
            "different folders for meshes and shards", f"{out} for both", "set OUT to another folder"
        )
    if (folder / LIST_NAME).is_file():
        assets = read_list(folder)
        _report_unlisted(folder, assets)
        return assets
    return scan_folder(folder, read_ids(out) if out else {})


def _report_unlisted(folder: Path, assets: Iterable[Asset]) -> None:
    listed = {asset.file for asset in assets if not asset.is_remote}
    count = sum(path.relative_to(folder).as_posix() not in listed for path in find_meshes(folder)[0])
    if count:
        print(
            f"Note: {LIST_NAME} does not list {counted(count, 'mesh')} in {folder}; only listed meshes are rendered. "
            "Run the `fetch` command again to update the list.",
            file=sys.stderr,
        )


def scan_folder(folder: Path, known: Mapping[str, str] = MappingProxyType({})) -> tuple[Asset, ...]:
    """Find all meshes in a folder and its subfolders, and read their metadata from ``assets.csv``.

    Mesh files are not opened.

    Args:
        folder: Folder of assets.
        known: Mapping from files to ids, for assets that already have an id.

    Returns:
        The assets, sorted by id.

    Raises:
        AssetsError: There are no meshes, or ``assets.csv`` is invalid.
    """
    meshes, ignored = find_meshes(folder)
    files = list[Path]()
    for path in sorted(meshes):
        if _SURROGATES.search(str(path)):
            print(f"Skipped {path!r}: the name is not valid UTF-8. Rename the file.", file=sys.stderr)
        else:
            files.append(path.relative_to(folder))
    if ignored:
        note = f"Ignored: {format_ignored(ignored)}. Only {MESH_FORMATS} files in {folder} are rendered."
        print(note, file=sys.stderr)
    if not files:
        raise AssetsError(
            f"{MESH_FORMATS} files in {folder}", "none", "pass another folder with ASSETS=<folder>"
        )
    by_id = assign_ids(files, known)
    table = read_table(folder / TABLE_NAME)
    if unused := sorted(set(table) - set(by_id)):
        print(
            f"Note: {folder / TABLE_NAME} has {counted(len(unused), 'row')} whose id does not match any mesh, for "
            f"example, {unused[0]!r}. An example of a valid id is {min(by_id)!r}.",
            file=sys.stderr,
        )
    return tuple(_make_asset(folder, key, by_id[key], table.get(key, {})) for key in sorted(by_id))


def format_ignored(ignored: Counter[str]) -> str:
    """Format counts in descending order, for example, as ``41 .stl, 19 .dae, 1 linked folder``."""
    return ", ".join(
        f"{count} {what}" if what.startswith(".") else counted(count, what)
        for what, count in ignored.most_common()
    )


def find_meshes(folder: Path) -> tuple[list[Path], Counter[str]]:
    """Search a folder recursively for meshes.

    Symbolic links to folders, hidden files, hidden folders and ``__MACOSX`` folders are skipped.

    Returns:
        The paths of mesh files, in no specific order, and the number of files and folders that are not rendered, by
        suffix or description, for example, "hidden mesh".
    """
    meshes, ignored, pending = list[Path](), Counter[str](), [(folder, False)]
    while pending:
        current, hidden = pending.pop()
        try:
            entries = list(os.scandir(current))
        except PermissionError:
            ignored["unreadable folder"] += 1
            continue
        for entry in entries:
            suffix = os.path.splitext(entry.name)[1].lower()
            is_hidden, is_link = hidden or is_hidden_name(entry.name), entry.is_symlink()
            if entry.is_dir(follow_symlinks=False):
                pending.append((Path(entry.path), is_hidden))
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
    return meshes, +ignored


def is_hidden_name(name: str) -> bool:
    """Return whether files and folders with the given name are skipped."""
    return name.startswith(".") or name == "__MACOSX"


def assign_ids(files: Iterable[Path], known: Mapping[str, str] = MappingProxyType({})) -> dict[str, Path]:
    """Derive ids from paths in the assets folder. The id of ``chairs/red 1.glb`` is ``chairs_red_1``.

    If ids are equal, as for ``a.obj`` and ``a.ply``, the suffix of the file is appended. If the ids are still
    equal, as for ``a b.glb`` and ``a_b.glb``, a hash of the path is appended instead. The hash is also
    appended if a path is too long or not ASCII.

    Args:
        files: Paths relative to the assets folder.
        known: Mapping from files to ids, for files that already have an id.

    Returns:
        Mapping from ids to paths.
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
            key = hashed_id(file.as_posix())
        found[key] = file
    return found


def read_table(path: Path) -> dict[str, dict[str, str]]:
    """Read ``assets.csv``.

    Args:
        path: Path of the file.

    Returns:
        Mapping from ids to rows, where a row is a mapping from columns to text. If the file does not exist, the mapping
        is empty.

    Raises:
        AssetsError: The file is not a UTF-8 CSV file, has unexpected columns, or contains an invalid value.
    """
    if not path.is_file():
        return {}
    table: dict[str, dict[str, str]] = {}
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:  # spreadsheets write a byte order mark
            reader = csv.DictReader(file)
            columns = tuple(reader.fieldnames or ())
            if columns not in (TABLE_COLUMNS, (*TABLE_COLUMNS, _UP_COLUMN)):
                expected = f"the columns {','.join(TABLE_COLUMNS)} and optionally {_UP_COLUMN}"
                raise AssetsError(subject=path, expected=expected, found=columns)
            for row in reader:
                where = f"{path}, line {reader.line_num}"
                if row["id"] in table or None in row.values() or None in row:
                    expected = f"{len(columns)} columns and a unique id"
                    raise AssetsError(subject=where, expected=expected, found=row)
                _validate_row(row, where)
                table[row["id"]] = row
    except (UnicodeDecodeError, csv.Error) as error:
        raise AssetsError("a CSV file", error, "save the file as CSV in UTF-8", path) from error
    return table


def _validate_row(row: dict[str, str], where: str) -> None:
    if row.get(_UP_COLUMN, "") not in get_args(UpAxis):
        raise AssetsError("y, z or an empty value as the up axis", repr(row[_UP_COLUMN]), subject=where)
    if not SHA256_PATTERN.fullmatch(row["sha256"]):
        expected = "a sha256 of 64 lower-case hex digits or an empty value"
        raise AssetsError(expected, repr(row["sha256"]), "compute the hash with `sha256sum FILE`", where)


def _make_asset(folder: Path, key: str, file: Path, row: dict[str, str]) -> Asset:
    if row.get(_UP_COLUMN) and file.suffix.lower() not in (".obj", ".ply"):
        remedy = "leave the column empty in this row, because the format defines the axis"
        found = f"one for {key!r} ({file.name})"
        raise AssetsError("an up axis for OBJ and PLY files only", found, remedy, folder / TABLE_NAME)
    return Asset(
        id=key,
        file=file.as_posix(),
        sha256=row.get("sha256", ""),
        name=row.get("name") or key,
        creator=row.get("creator") or "unknown",
        source=row.get("source") or "unknown",
        license=row.get("license") or "unknown",
        up=cast(UpAxis, row.get(_UP_COLUMN, "")),
    )
