"""The source ``fetch folder``, which lists the meshes of a local folder and optionally copies them."""

import dataclasses
import os
import shutil
from collections import Counter
from pathlib import Path

from data_tools.assets.asset_list import LIST_NAME, MESH_SUFFIXES, AssetsError, UpAxis, read_ids, write_list
from data_tools.assets.outputs import next_command
from data_tools.assets.scan import (
    TABLE_NAME,
    UNSUPPORTED_SUFFIXES,
    find_meshes,
    format_ignored,
    is_hidden_name,
    scan_folder,
)
from lrm_pl.errors import counted

#: Suffixes of material, buffer, texture and text files, which are copied with the meshes.
_COMPANION_SUFFIXES = (
    ".mtl", ".bin", ".png", ".jpg", ".jpeg", ".jp2", ".j2c", ".tga", ".bmp", ".tif", ".tiff", ".webp", ".dds", ".gif",
    ".hdr", ".exr", ".psd", ".sgi", ".rgb", ".rgba", ".bw", ".cin", ".dpx", ".ktx", ".ktx2", ".basis", ".txt", ".md",
)  # fmt: skip


def fetch_folder(assets: Path, out: Path | None, up: UpAxis = "") -> None:
    """Write the asset list of a folder of meshes.

    Args:
        assets: Folder of meshes, which can contain an ``assets.csv``.
        out: Folder to which the meshes, materials, textures and text files are copied before they are listed.
            Symbolic links are followed. If None, the meshes are listed in ``assets``.
        up: Up axis of OBJ and PLY files for which ``assets.csv`` does not define an up axis.

    Raises:
        AssetsError: The folder is missing or has no meshes, ``assets.csv`` is invalid, or ``out`` is inside
            ``assets``.
    """
    if not assets.is_dir():
        expected = f"a folder of meshes at {assets}"
        raise AssetsError(expected, found="none", remedy="pass --assets DIR")
    folder = out or assets
    if folder.resolve() != assets.resolve():
        if folder.resolve().is_relative_to(assets.resolve()):
            raise AssetsError(
                expected=f"--out outside {assets}", found=out, remedy="pass another folder to --out"
            )
        folder.mkdir(parents=True, exist_ok=True)
        ignored = _copy(assets, folder) + _count_unsupported(assets)
        if ignored:
            print(f"Not copied: {format_ignored(ignored)}")
    found = [dataclasses.replace(asset, up=asset.up or up) for asset in scan_folder(folder, read_ids(folder))]
    write_list(folder, found)
    print(f"Listed {counted(len(found), 'asset')} in {folder / LIST_NAME}")
    print(next_command(folder))


def _copy(assets: Path, out: Path) -> Counter[str]:
    """Copy meshes, ``assets.csv``, and files whose suffix is in ``_COMPANION_SUFFIXES``. Symbolic links are followed.

    Returns:
        Number of skipped links by kind.
    """
    ignored = Counter[str]()
    for path, folders, files in os.walk(assets, followlinks=True, onerror=_raise):
        current = Path(path)
        parents = {folder.resolve() for folder in (out, current, *current.parents)}
        circular = {name for name in folders if (current / name).resolve() in parents}
        dangling = [name for name in files if not (current / name).exists()]
        ignored += Counter({"circular link": len(circular), "dangling link": len(dangling)})
        folders[:] = [name for name in folders if name not in circular and not is_hidden_name(name)]
        for name in filter(_is_copied, set(files).difference(dangling)):
            target = out / (current / name).relative_to(assets)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(current / name, target)
    return ignored


def _raise(error: OSError) -> None:
    raise error


def _is_copied(name: str) -> bool:
    return not is_hidden_name(name) and (
        name == TABLE_NAME or name.lower().endswith((*MESH_SUFFIXES, *_COMPANION_SUFFIXES))
    )


def _count_unsupported(folder: Path) -> Counter[str]:
    ignored = find_meshes(folder)[1]
    return Counter({suffix: count for suffix, count in ignored.items() if suffix in UNSUPPORTED_SUFFIXES})
