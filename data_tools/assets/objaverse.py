"""The source ``fetch objaverse``, which downloads objects from Objaverse 1.0.

The data set has the following tables, which are stored in ``OUT/index`` after the download:

    object-paths.json.gz        uid -> glbs/000-023/UID.glb
    lvis-annotations.json.gz    LVIS category -> uids
    metadata/000-023.json.gz    uid -> record (name, license, user, tags, categories, sizes of the files)
"""

import difflib
import gzip
import json
import re
import zlib
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from data_tools.assets.asset_list import Asset
from data_tools.assets.download import Download, download, download_all
from data_tools.assets.outputs import write_outputs
from lrm_pl.errors import InputError

BASE = "https://huggingface.co/datasets/allenai/objaverse/resolve/main"

#: Mapping from license names in the metadata to SPDX ids. All objects are from Sketchfab, which uses version 4.0 of the
#: CC BY licenses.
LICENSES = {
    "cc0": "CC0-1.0",
    **{name: f"CC-{name.upper()}-4.0" for name in ("by", "by-sa", "by-nd", "by-nc", "by-nc-sa", "by-nc-nd")},
}

CHANGES = "Objects of Objaverse 1.0 (Deitke et al., CVPR 2023), all from sketchfab.com; unchanged."

_PATH = re.compile(r"glbs/(\d{3}-\d{3})/([A-Za-z0-9_-]{1,80})\.glb")

#: Maximum unpacked size of a table in bytes. The largest table, ``object-paths.json.gz``, has about 80 MB.
_MAX_TABLE_BYTES = 1 << 30


def fetch_objaverse(
    out: Path, uids: Sequence[str], categories: Sequence[str], limit: int | None, urls_only: bool, base: str
) -> None:
    """Download missing objects and write the asset list.

    Args:
        out: Destination folder for ``glbs/000-023/UID.glb``, ``index/`` and the files that ``write_outputs`` writes.
        uids: Uids of objects to include.
        categories: LVIS categories of objects to include.
        limit: Maximum number of objects. The objects are sorted by uid, and uids are random. If None, all objects are
            included.
        urls_only: Whether to list the URLs of the meshes without downloading the meshes.
        base: Base URL of Objaverse or of a mirror.

    Raises:
        InputError: No objects are selected, a uid or category does not exist, or a table cannot be read.
    """
    if not uids and not categories:
        remedy = (
            "pass, for example, --categories chair,table --limit 100, or --uids-file with one uid per line (the keys "
            "of object-paths.json.gz are all uids)"
        )
        raise InputError("uids or categories (the complete data set is 8.9 TB)", "neither", remedy)
    base, index = base.rstrip("/"), out / "index"
    annotations = _table(base, index, "lvis-annotations.json.gz") if categories else {}
    _reject_unknown("category", categories, annotations)
    tags = {str(uid): category for category in categories for uid in annotations[category]}
    paths = _table(base, index, "object-paths.json.gz")
    _reject_unknown("uid", uids, paths)
    folders, left_out = defaultdict[str, list[str]](list), dict[str, str]()
    for uid in sorted({*uids, *tags})[:limit]:
        path = str(paths.get(uid))
        if (found := _PATH.fullmatch(path)) and found[2] == uid:
            folders[found[1]].append(uid)
        else:
            left_out[uid] = f"unexpected path: expected glbs/000-000/{uid}.glb, but found {path[:200]!r}"
    assets = dict[str, Asset]()
    for name in tqdm(sorted(folders), desc="metadata", unit="table", disable=len(folders) < 2):
        records = _table(base, index, f"metadata/{name}.json.gz")
        for uid in folders[name]:
            file = f"{base}/{paths[uid]}" if urls_only else paths[uid]
            assets[uid] = make_asset(uid, file, records.get(uid), tags.get(uid, ""))
    if not urls_only:
        _download_meshes(base, out, assets, left_out)
    write_outputs(out, list(assets.values()), left_out, CHANGES, "Run the same command again to retry.")


def make_asset(uid: str, file: str, record: object, category: str = "") -> Asset:
    """Convert the metadata of an object to an asset. If the creator or license is missing, it is "unknown".

    Args:
        uid: Uid of the object.
        file: Path of the mesh in the assets folder, or URL of the mesh.
        record: Metadata of the object. It is untrusted, so it can have any type.
        category: LVIS category by which the object was selected, or "" if it was selected by uid.
    """
    license = _text(record, "license")
    words = [category]
    for field in ("categories", "tags"):
        entries = _look_up(record, field)
        words += [_text(entry, "name") for entry in entries] if isinstance(entries, list) else []
    return Asset(
        id=uid,
        file=file,
        sha256="",
        name=_text(record, "name") or uid,
        creator=_text(record, "user", "displayName") or _text(record, "user", "username") or "unknown",
        source=_text(record, "viewerUrl") or f"https://sketchfab.com/3d-models/{uid}",
        license=LICENSES.get(license, license or "unknown"),
        tags=tuple(dict.fromkeys(filter(None, words))),
    )


def _look_up(record: object, *fields: str) -> object:
    """Return a nested field of a record, or None if it is missing."""
    for field in fields:
        record = record.get(field) if isinstance(record, dict) else None
    return record


def _text(record: object, *fields: str) -> str:
    value = _look_up(record, *fields)
    return value.strip() if isinstance(value, str) else ""


def _reject_unknown(noun: str, names: Sequence[str], known: dict[str, Any]) -> None:
    for name in names:
        if name not in known:
            # Comparing all 798,759 uids would take about a minute.
            alike = [other for other in known if len(known) < 9999 or other[:4] == name[:4]]
            near = difflib.get_close_matches(name, alike, cutoff=0.5)
            remedy = f"did you mean {' or '.join(near)}?" if near else f"an example is {min(known)}"
            raise InputError(f"a {noun} of Objaverse", repr(name), remedy)


def _table(base: str, index: Path, name: str) -> dict[str, Any]:
    """Read a table, and download it first if it is missing."""
    path = index / name
    download(f"{base}/{name}", path)
    remedy = f"delete {path} and run the same command again"
    try:
        with gzip.open(path) as file:
            content = file.read(_MAX_TABLE_BYTES + 1)
        if len(content) > _MAX_TABLE_BYTES:
            raise ValueError(f"more than {_MAX_TABLE_BYTES} bytes when unpacked")
        table = json.loads(content)
    except (OSError, EOFError, zlib.error, ValueError) as error:
        raise InputError(subject=path, expected="gzipped JSON", found=error, remedy=remedy) from error
    if not isinstance(table, dict) or not table:
        found = f"{table!r:.60}"
        raise InputError(subject=path, expected="a non-empty JSON object", found=found, remedy=remedy)
    return table


def _download_meshes(base: str, out: Path, assets: dict[str, Asset], left_out: dict[str, str]) -> None:
    """Download meshes, and store the hashes in ``assets``. Move failed downloads to ``left_out``."""
    downloads = [Download(uid, f"{base}/{asset.file}", out / asset.file) for uid, asset in assets.items()]
    bar = tqdm(download_all(downloads), total=len(downloads), unit="mesh")
    for done, digest, reason in bar:
        asset = assets.pop(done.id)
        if reason:
            left_out[done.id] = reason
            bar.set_postfix(failures=len(left_out))
        else:
            assets[done.id] = replace(asset, sha256=digest)
