"""``fetch folder``: the meshes of a local folder as a list of assets."""

import dataclasses
import os
import shutil
from collections import Counter
from pathlib import Path

from data_tools.assets.asset_list import (
    LIST_NAME,
    MESH_SUFFIXES,
    TABLE_NAME,
    UNSUPPORTED_SUFFIXES,
    AssetsError,
    Up,
    find_meshes,
    format_ignored,
    is_hidden_name,
    read_ids,
    scan,
    write_list,
)
from data_tools.assets.outputs import next_command
from lrm_pl.errors import counted

#: What meshes of these kinds use, and what says whose they are.
_BESIDE = (
    ".mtl", ".bin", ".png", ".jpg", ".jpeg", ".jp2", ".j2c", ".tga", ".bmp", ".tif", ".tiff", ".webp", ".dds", ".gif",
    ".hdr", ".exr", ".psd", ".sgi", ".rgb", ".rgba", ".bw", ".cin", ".dpx", ".ktx", ".ktx2", ".basis", ".txt", ".md",
)  # fmt: skip


def fetch_folder(assets: Path, out: Path | None, up: Up = "") -> None:
    """Write the list of a folder's meshes.

    Args:
        assets: Folder of meshes; an ``assets.csv`` in it says more of them.
        out: Folder to copy it to first, with the materials, textures and texts beside the meshes; links are followed.
            None lists it in place.
        up: The axis that points up in files that do not say, and whose row in the table does not.

    Raises:
        AssetsError: No folder, no meshes, a broken table, or ``out`` lies inside ``assets``.
    """
    if not assets.is_dir():
        raise AssetsError(
            expected=f"a folder of meshes at {assets}", found="none", remedy="pass --assets DIR"
        )
    folder = assets
    if out is not None and out.resolve() != assets.resolve():
        if out.resolve().is_relative_to(assets.resolve()):
            raise AssetsError(expected=f"--out outside {assets}", found=out, remedy="choose another folder")
        out.mkdir(parents=True, exist_ok=True)
        ignored = _copy(assets, out, (_identity(out),)) + _of_other_kinds(assets)
        if ignored:
            print(f"not copied: {format_ignored(ignored)}")
        folder = out
    found = [dataclasses.replace(asset, up=asset.up or up) for asset in scan(folder, read_ids(folder))]
    write_list(folder, found)
    print(f"{counted(len(found), 'asset')} in {folder / LIST_NAME}")
    print(next_command(folder))


def _copy(folder: Path, out: Path, above: tuple[tuple[int, int], ...]) -> Counter[str]:
    """Copy what meshes need; returns what was not copied, and how much of it.

    Args:
        folder: What is copied.
        out: Where to; made when there is something to copy.
        above: The folders that this one is reached through, and the one that all is copied to.
    """
    above = (*above, _identity(folder))
    ignored = Counter[str]()
    with os.scandir(folder) as entries:
        for entry in entries:
            if not os.path.exists(entry.path):  # nor does what a link to itself names
                ignored["dangling link"] += 1
            elif entry.is_dir():
                if _identity(Path(entry.path)) in above:
                    ignored["circular link"] += 1
                elif not is_hidden_name(entry.name):
                    ignored += _copy(folder / entry.name, out / entry.name, above)
            elif _is_wanted(entry.name) and entry.is_file():
                out.mkdir(parents=True, exist_ok=True)
                shutil.copy2(entry.path, out / entry.name)
    return ignored


def _identity(folder: Path) -> tuple[int, int]:
    found = folder.stat()
    return found.st_dev, found.st_ino


def _is_wanted(name: str) -> bool:
    return not is_hidden_name(name) and (
        name == TABLE_NAME or name.lower().endswith((*MESH_SUFFIXES, *_BESIDE))
    )


def _of_other_kinds(folder: Path) -> Counter[str]:
    """Count what looks like meshes of kinds that are not rendered."""
    return Counter(
        {what: count for what, count in find_meshes(folder).ignored.items() if what in UNSUPPORTED_SUFFIXES}
    )
