"""``fetch sweethome3d``: the models of the Debian package ``sweethome3d-furniture``, each converted to a GLB.

KatorLegaz is held out whole (split "val"): an author whom training never sees tells more than unseen objects of
known ones. What is no object to learn from is left out by what catalog, OBJ and MTL say, before Blender starts.
"""

import dataclasses
import importlib.util
import os
import posixpath
import re
import zipfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from tqdm import tqdm

from data_tools.assets.archives import ArchiveError, read_member
from data_tools.assets.asset_list import Asset, hash_file
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

HELD_OUT = "KatorLegaz"

#: Thinner than this part of its longest side, a model is a sheet: rugs, banknotes, road markings.
MIN_THICKNESS = 0.02

CHANGES = (
    "3D models of the Debian package sweethome3d-furniture, collected and converted to OBJ by Emmanuel Puybaret "
    "(eTeks); here converted to GLB: doubled faces dropped, materials made matt, textures shrunk to at most 512 "
    "pixels. The libraries' own license texts are in LIBRARY/LICENSE.txt."
)

_OPENINGS = "Doors and windows"
_STAIRCASES = "Staircases"


def fetch_sweethome3d(out: Path, package: Path | None) -> None:
    """Convert what is usable and not there yet, and write the list.

    Args:
        out: Folder to fill: ``LIBRARY/KEY.glb``, ``LIBRARY/LICENSE.txt``, and the files of ``write_outputs``.
        package: The Debian package; None gets it with apt-get.

    Raises:
        InputError: No Blender in this environment, or not the package that this was written for.
    """
    if importlib.util.find_spec("bpy") is None:
        raise InputError(
            expected="Blender (bpy) in this environment",
            found="none",
            remedy="use .venv-render/bin/python, which `make .venv-render` makes",
        )
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
    _print_table(assets, left_out)
    usable = [
        dataclasses.replace(asset, sha256=hash_file(out / asset.file))
        for key, asset in assets.items()
        if key not in left_out
    ]
    write_outputs(out, usable, left_out, CHANGES)


def plan_conversions(archive: Path, out: Path) -> list[tuple[Asset, ConversionTask, str]]:
    """Look at every model of a library, without Blender.

    Returns:
        What it becomes (its hash still unknown), how to convert it, and why it is left out, or "".
    """
    found = []
    with zipfile.ZipFile(archive) as members:
        for model in read_catalog(archive).values():
            key, base = make_id(model.key), posixpath.dirname(model.obj)
            surface, reason = None, ""
            try:
                surface = _surface(model, members)
                source = _source(model, members)
            except ArchiveError as error:
                source, reason = "", f"not read: {error}"
            asset = Asset(
                id=make_id(f"{model.library}-{model.key}"),
                file=f"{model.library}/{key}.glb",
                sha256="",
                name=model.name,
                creator=model.creator,
                source=source,
                license=LIBRARIES[model.library],
                tags=tuple(dict.fromkeys((*filter(None, [model.category]), *model.tags))),
                split="val" if model.library == HELD_OUT else "",
            )
            obj = posixpath.basename(model.obj)
            files = (obj, *surface.libraries, *surface.textures) if surface else ()
            task = ConversionTask(
                id=asset.id,
                archive=archive,
                members={file: posixpath.join(base, file) for file in files},
                obj=obj,
                glb=out / asset.file,
            )
            found.append((asset, task, reason or rejection_reason(model, surface)))
    return found


def rejection_reason(model: Model, surface: ObjMaterials | None) -> str:
    """Say why a model is no object to learn from, or "".

    Args:
        model: Its entry in the catalog.
        surface: What its OBJ is colored with; None where there is no OBJ.
    """
    if model.is_opening or model.category == _OPENINGS:
        return "door or window"
    if model.is_staircase or model.category == _STAIRCASES:
        return "staircase"
    thin, _, long = sorted(model.size)
    if thin < MIN_THICKNESS * long:
        return f"thin: {thin:g} cm, its longest side {long:g} cm"
    if surface is None:
        return f"missing file: {model.obj}"
    if surface.missing:
        return f"missing file: {surface.missing[0]}"
    if not surface.textures and len(surface.colors) < 2:
        return "one color without a texture"
    return ""


def _surface(model: Model, members: zipfile.ZipFile) -> ObjMaterials | None:
    obj = read_member(members, model.obj)
    if obj is None:
        return None
    base = posixpath.dirname(model.obj)
    return read_obj_materials(obj, lambda name: read_member(members, posixpath.join(base, name)))


def _source(model: Model, members: zipfile.ZipFile) -> str:
    """Say where a model came from, with the page it was first published on where a license file names it."""
    source = f"{model.key} in {model.library} of the Debian package {PACKAGE} {VERSION}"
    text = read_member(members, posixpath.join(posixpath.dirname(model.obj), "BLENDSWAP_LICENSE.txt"))
    page = re.search(rb"Downloaded from (https?://[!-~]+)", text or b"")
    return f"{source}, from {page[1].decode()}" if page else source


def _convert(tasks: list[ConversionTask], out: Path, left_out: dict[str, str]) -> None:
    """Convert what is not there; what fails is added to ``left_out``."""
    missing = [task for task in tasks if not _is_whole(task.glb)]
    if not missing:
        return
    jobs = max(1, min(16, len(missing), len(os.sched_getaffinity(0))))
    print(f"Converting {len(missing)} models, {jobs} Blender processes ...", flush=True)
    bar = tqdm(convert_all(missing, out / "convert.log", jobs), total=len(missing), unit="model")
    failures = 0
    for task, reason in bar:
        if reason:
            left_out[task.id] = reason
            failures += 1
            bar.set_postfix(failures=failures)


def _is_whole(glb: Path) -> bool:
    try:
        check_file_type(glb, str(glb))
    except (FileTypeError, FileNotFoundError):
        return False
    return True


def _print_table(assets: Mapping[str, Asset], left_out: Mapping[str, str]) -> None:
    """Print how many models of each library can be used, and why the others cannot."""
    cells = Counter(
        (left_out.get(key, "usable").partition(":")[0], asset.file.partition("/")[0])
        for key, asset in assets.items()
    )
    kinds = sorted({kind for kind, _ in cells}, key=lambda kind: (kind != "usable", kind))
    print(f"{'':28}" + "".join(f"{name:>16}" for name in LIBRARIES))
    for kind in kinds:
        print(f"{kind:28}" + "".join(f"{cells[kind, name]:16d}" for name in LIBRARIES))
