"""``fetch folder``: the meshes of a local folder as a list of assets."""

import dataclasses
import shutil
from pathlib import Path

from data_tools.assets import LIST_NAME, AssetsError, Up, scan, write_list
from data_tools.sources.outcome import next_step


def fetch_folder(assets: Path, out: Path | None, up: Up = "") -> None:
    """Write the list of a folder's meshes.

    Args:
        assets: Folder of meshes; an ``assets.csv`` in it says more of them.
        out: Folder to copy it to first, with the materials and textures beside the meshes; None lists it in place.
        up: The axis that points up in files that do not say, and whose row in the table does not.

    Raises:
        AssetsError: No folder, no meshes, a broken table, or ``out`` lies inside ``assets``.
    """
    if not assets.is_dir():
        raise AssetsError(f"expected a folder of meshes at {assets}, found none; pass --assets DIR")
    folder = assets
    if out is not None and out.resolve() != assets.resolve():
        if out.resolve().is_relative_to(assets.resolve()):
            raise AssetsError(f"expected --out outside {assets}, found {out}; choose another folder")
        shutil.copytree(assets, out, dirs_exist_ok=True)
        folder = out
    found = [dataclasses.replace(asset, up=asset.up or up) for asset in scan(folder)]
    write_list(folder, found)
    print(f"{len(found)} assets in {folder / LIST_NAME}")
    print(next_step(folder))
