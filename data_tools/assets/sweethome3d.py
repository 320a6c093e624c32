"""The source ``fetch sweethome3d``, which converts models of the Debian package ``sweethome3d-furniture`` to GLB files.

Models of the library KatorLegaz are assigned to the split "val". Their author is not represented in the training split.
Models that are not suitable for training are left out before Blender is started, based on the catalog, OBJ and MTL
files.
"""

import dataclasses
import importlib.util
import os
import posixpath
import re
import zipfile
from pathlib import Path

from tqdm import tqdm

from data_tools.assets.archives import read_member
from data_tools.assets.asset_list import Asset
from data_tools.assets.file_types import FileTypeError, check_file_type
from data_tools.assets.furniture_package import (
    LIBRARIES,
    PACKAGE,
    VERSION,
    Model,
    open_package,
    read_catalog,
    read_license,
)
from data_tools.assets.obj_materials import ObjMaterials, read_obj_materials
from data_tools.assets.outputs import make_id, write_outputs
from data_tools.blender.conversion_pool import ConversionTask, convert_all
from lrm_pl.errors import InputError
from lrm_pl.paths import hash_file

HELD_OUT = "KatorLegaz"

#: Minimum thickness as a fraction of the longest side. It excludes rugs, banknotes and road markings.
MIN_THICKNESS = 0.02

CHANGES = (
    "3D models of the Debian package sweethome3d-furniture, collected and converted to OBJ by Emmanuel Puybaret "
    "(eTeks); here converted to GLB: duplicate faces removed, materials made matte, textures resized to 512 "
    "pixels or less. The license texts of the libraries are in LIBRARY/LICENSE.txt."
)

_OPENINGS = "Doors and windows"
_STAIRCASES = "Staircases"


def fetch_sweethome3d(out: Path, package: Path | None) -> None:
    """Convert missing models and write the asset list.

    Args:
        out: Destination folder for ``LIBRARY/KEY.glb``, ``LIBRARY/LICENSE.txt`` and the files that ``write_outputs``
            writes.
        package: Path of the Debian package. If None, the package is downloaded with ``apt-get``.

    Raises:
        InputError: Blender is not installed, the package cannot be downloaded or is not the expected version, or there
            are no usable models.
    """
    if importlib.util.find_spec("bpy") is None:
        remedy = "use .venv-render/bin/python, which `make .venv-render` creates"
        raise InputError("Blender (bpy) is not installed in this environment", remedy=remedy)
    out.mkdir(parents=True, exist_ok=True)
    assets: dict[str, Asset] = {}
    left_out: dict[str, str] = {}
    tasks: list[ConversionTask] = []
    with open_package(package) as folder:
        for library in LIBRARIES:
            archive = folder / f"{library}.sh3f"
            (out / library).mkdir(exist_ok=True)
            (out / library / "LICENSE.txt").write_text(read_license(archive) + "\n", encoding="utf-8")
            for asset, task, reason in plan_conversions(archive, out):
                assets[asset.id] = asset
                if reason:
                    left_out[asset.id] = reason
                else:
                    tasks.append(task)
        _convert(tasks, out, left_out)
    usable = [asset for key, asset in assets.items() if key not in left_out]
    hashed = [dataclasses.replace(asset, sha256=hash_file(out / asset.file)) for asset in usable]
    write_outputs(out, hashed, left_out, CHANGES)


def plan_conversions(archive: Path, out: Path) -> list[tuple[Asset, ConversionTask, str]]:
    """List the models of a library without starting Blender.

    Args:
        archive: Path of the ``.sh3f`` file of the library.
        out: Destination folder for the GLB files.

    Returns:
        A tuple (asset, task, reason) per model. The hash of the asset is "", and the reason is "" if the model is
        usable.
    """
    found = []
    with zipfile.ZipFile(archive) as members:
        for model in read_catalog(archive).values():
            base, obj = posixpath.split(model.obj)
            materials = _read_materials(model, members)
            asset = Asset(
                id=make_id(f"{model.library}-{model.key}"),
                file=f"{model.library}/{make_id(model.key)}.glb",
                sha256="",
                name=model.name,
                creator=model.creator,
                source=_source(model, members),
                license=LIBRARIES[model.library],
                tags=tuple(dict.fromkeys((*filter(None, [model.category]), *model.tags))),
                split="val" if model.library == HELD_OUT else "",
            )
            files = (obj, *materials.libraries, *materials.textures) if materials else ()
            task = ConversionTask(
                id=asset.id,
                archive=archive,
                members={file: posixpath.join(base, file) for file in files},
                obj=obj,
                glb=out / asset.file,
            )
            found.append((asset, task, rejection_reason(model, materials)))
    return found


def rejection_reason(model: Model, materials: ObjMaterials | None) -> str:
    """Return the reason why a model is not suitable for training, or "" if it is suitable.

    Args:
        model: Catalog entry of the model.
        materials: Materials of the OBJ, or None if the OBJ is missing.
    """
    if model.is_opening or model.category == _OPENINGS:
        return "door or window"
    if model.is_staircase or model.category == _STAIRCASES:
        return "staircase"
    thin, _, long = sorted(model.size)
    if thin < MIN_THICKNESS * long:
        return f"too thin: {thin:g} cm thick, longest side {long:g} cm"
    if materials is None:
        return f"missing file: {model.obj}"
    if materials.missing:
        return f"missing file: {materials.missing[0]}"
    if not materials.textures and len(materials.colors) < 2:
        return "single color without a texture"
    return ""


def _read_materials(model: Model, members: zipfile.ZipFile) -> ObjMaterials | None:
    obj = read_member(members, model.obj)
    if obj is None:
        return None
    base = posixpath.dirname(model.obj)
    return read_obj_materials(obj, lambda name: read_member(members, posixpath.join(base, name)))


def _source(model: Model, members: zipfile.ZipFile) -> str:
    """Return the origin of a model, including the URL of the original page if the license file contains this URL."""
    source = f"{model.key} in {model.library} of the Debian package {PACKAGE} {VERSION}"
    text = read_member(members, posixpath.join(posixpath.dirname(model.obj), "BLENDSWAP_LICENSE.txt"))
    page = re.search(rb"Downloaded from (https?://[!-~]+)", text or b"")
    return f"{source}, from {page[1].decode()}" if page else source


def _convert(tasks: list[ConversionTask], out: Path, left_out: dict[str, str]) -> None:
    """Convert models that do not have a complete GLB, and add failures to ``left_out``."""
    missing = [task for task in tasks if not _is_complete(task.glb)]
    if not missing:
        return
    jobs = max(1, min(16, len(missing), len(os.sched_getaffinity(0))))
    print(f"Converting {len(missing)} models in {jobs} Blender processes ...", flush=True)
    bar = tqdm(convert_all(missing, out / "convert.log", jobs), total=len(missing), unit="model")
    for task, reason in bar:
        if reason:
            left_out[task.id] = reason
            bar.set_postfix(left_out=len(left_out))


def _is_complete(glb: Path) -> bool:
    try:
        check_file_type(glb, glb.suffix, str(glb))
    except (FileTypeError, FileNotFoundError):
        return False
    return True
