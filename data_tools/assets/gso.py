"""The source ``fetch gso``, which downloads Google Scanned Objects from Gazebo Fuel.

The zip file of a model contains ``meshes/model.obj``, ``meshes/model.mtl`` and ``materials/textures/texture.png``. All
files are unpacked to one folder, because the MTL refers to ``texture.png`` without a folder.
"""

import contextlib
import json
import posixpath
import shutil
import zipfile
from pathlib import Path
from typing import Any
from urllib.parse import quote

from tqdm import tqdm

from data_tools.assets.archives import ArchiveError, extract, open_zip, read_member
from data_tools.assets.asset_list import Asset
from data_tools.assets.download import Download, download_all, read_url
from data_tools.assets.obj_materials import read_obj_materials
from data_tools.assets.outputs import make_id, write_outputs
from lrm_pl.errors import InputError
from lrm_pl.paths import hash_file
from lrm_pl.storage import MissingError

BASE = "https://fuel.gazebosim.org/1.0/GoogleResearch"

LICENSE = "CC-BY-4.0"

CHANGES = (
    "Google Scanned Objects (Downs et al., ICRA 2022), from Gazebo Fuel; textures were moved to the folder of "
    "the mesh."
)

#: Number of models per page of the model list, and maximum size of a page in bytes.
PAGE, MAX_PAGE_BYTES = 100, 32 << 20

#: Maximum number of pages. The data set has 1,030 models.
MAX_PAGES = 1000


def fetch_gso(out: Path, limit: int | None, base: str) -> None:
    """Download and unpack missing models, and write the asset list.

    Args:
        out: Destination folder for ``NAME/model.obj``, the MTL files, the textures and the files that ``write_outputs``
            writes.
        limit: Maximum number of models. The models are sorted by name. If None, all models are included.
        base: Base URL of the collection.

    Raises:
        InputError: The list of models is not available, or there are no usable models.
    """
    base = base.rstrip("/")
    records = {make_id(name): record for name, record in sorted(list_models(base).items())[:limit]}
    left_out: dict[str, str] = {}
    missing = [
        Download(key, f"{base}/models/{quote(str(record['name']), safe='')}.zip", out / "zips" / f"{key}.zip")
        for key, record in records.items()
        if not (out / key / "model.obj").is_file()
    ]
    bar = tqdm(download_all(missing), total=len(missing), unit="model", disable=not missing)
    for done, _, reason in bar:
        try:
            if not reason:
                _unpack(done.path, out / done.id)
        except ArchiveError as error:
            reason = f"not unpacked: {error}"
        done.path.unlink(missing_ok=True)
        if reason:
            left_out[done.id] = reason
            bar.set_postfix(failures=len(left_out))
    with contextlib.suppress(OSError):  # the folder is not empty if there are partial downloads
        (out / "zips").rmdir()
    assets = [_asset(key, record, base, out) for key, record in records.items() if key not in left_out]
    write_outputs(out, assets, left_out, CHANGES, "Run the same command again to retry.")


def list_models(base: str) -> dict[str, dict[str, Any]]:
    """Return a mapping from the names of all models to their records.

    Pages of the list are read until a page is missing or contains no new models.

    Args:
        base: Base URL of the collection.

    Raises:
        InputError: The response is not a list of models.
    """
    models: dict[str, dict[str, Any]] = {}
    for page in range(1, MAX_PAGES + 1):
        url = f"{base}/models?page={page}&per_page={PAGE}"
        try:
            content = read_url(url, MAX_PAGE_BYTES)
        except MissingError:  # there are no more pages
            if models:
                return models
            raise
        try:
            records = {str(record["name"]): dict(record) for record in json.loads(content)}
            if not models and not records:
                raise ValueError("the list is empty")
        except (ValueError, TypeError, KeyError) as error:
            found = f"{content[:60]!r} ({error!r})"
            raise InputError("a JSON list of models", found, "check the URL", subject=url) from error
        if not records.keys() - models.keys():
            break
        models |= records
    return models


def _unpack(path: Path, folder: Path) -> None:
    """Unpack the mesh, materials and textures to a temporary folder, and rename it to ``folder`` on completion."""
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    with open_zip(path) as archive:
        obj = read_member(archive, "meshes/model.obj") or b""  # extract raises an error if it is missing
        materials = read_obj_materials(obj, lambda name: read_member(archive, _member_path(archive, name)))
        if materials.missing:
            raise ArchiveError(subject=path.name, expected=f"the file {materials.missing[0]}", found="none")
        names = (*materials.libraries, *materials.textures)
        members = {name: _member_path(archive, name) for name in names}
        extract(archive, {"model.obj": "meshes/model.obj"} | members, partial)
    partial.rename(folder)


def _member_path(archive: zipfile.ZipFile, name: str) -> str:
    """Convert a file name in the OBJ or MTL to a path in the zip file."""
    beside = f"meshes/{name}"
    return beside if beside in archive.namelist() else f"materials/textures/{posixpath.basename(name)}"


def _asset(key: str, record: dict[str, Any], base: str, out: Path) -> Asset:
    words = [*(record.get("categories") or ()), *(record.get("tags") or ())]
    file = f"{key}/model.obj"
    return Asset(
        id=key,
        file=file,
        sha256=hash_file(out / file),
        name=str(record["name"]).replace("_", " "),
        creator="Google Research",
        source=f"{base}/models/{record['name']}",
        license=LICENSE,
        tags=tuple(dict.fromkeys(word for word in words if isinstance(word, str))),
        split="val",
        up="z",  # the up axis in Gazebo
    )
