"""The source ``fetch objaverse``, which downloads objects of Objaverse 1.0.

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
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from data_tools.assets.asset_list import Asset
from data_tools.assets.download import Download, download, download_all
from data_tools.assets.outputs import write_outputs
from lrm_pl.errors import InputError, counted

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
    out: Path,
    uids: Sequence[str] | None,
    categories: Sequence[str] | None,
    limit: int | None,
    urls_only: bool,
    base: str,
) -> None:
    """Download missing objects and write the asset list.

    Args:
        out: Destination folder of ``glbs/000-023/UID.glb``, ``index/`` and the files of ``write_outputs``.
        uids: Uids of objects to include. If None, objects are selected by category only.
        categories: LVIS categories of objects to include. If None, objects are selected by uid only.
        limit: Maximum number of objects. The objects are sorted by uid, and uids are random. If None, all objects are
            included.
        urls_only: Whether to list the URLs of the meshes without downloading the meshes.
        base: Base URL of Objaverse or of a mirror.

    Raises:
        InputError: No objects are selected, a uid or category does not exist, or a table cannot be read.
    """
    if not uids and not categories:
        raise InputError(
            expected="uids or categories (all of Objaverse is 8.9 TB)",
            found="neither",
            remedy=(
                "pass for example --categories chair,table --limit 100, or --uids-file with one uid per "
                "line (the keys of object-paths.json.gz are all uids)"
            ),
        )
    base, index = base.rstrip("/"), out / "index"
    tags: dict[str, str] = {}
    if categories:
        tags = _by_category(_table(base, index, "lvis-annotations.json.gz"), categories)
    paths = _table(base, index, "object-paths.json.gz")
    _refuse_unknown("uid", uids or (), paths)
    left_out: dict[str, str] = {}
    folders = _by_folder(sorted({*(uids or ()), *tags})[:limit], paths, left_out)
    assets: list[Asset] = []
    downloads: list[Download] = []
    sizes: dict[str, int] = {}
    bar = tqdm(sorted(folders.items()), desc="metadata", unit="table", disable=len(folders) < 2)
    for name, members in bar:
        records = _table(base, index, f"metadata/{name}.json.gz")
        for uid in members:
            path, record = str(paths[uid]), records.get(uid)
            asset = make_asset(uid, f"{base}/{path}" if urls_only else path, record, tags.get(uid, ""))
            assets.append(asset)
            downloads.append(Download(uid, f"{base}/{path}", out / path))
            sizes |= _size(uid, record)
    if not urls_only:
        hashes = _download_meshes(downloads, sizes, left_out)
        assets = [replace(asset, sha256=hashes[asset.id]) for asset in assets if asset.id in hashes]
    hint = "Run the same command again to retry." if left_out else ""
    write_outputs(out, assets, left_out, CHANGES, hint)


def make_asset(uid: str, file: str, record: object, category: str = "") -> Asset:
    """Convert the metadata of an object to an asset. If the creator or license is missing, it is "unknown".

    Args:
        uid: Uid of the object.
        file: Path of the mesh in the assets folder, or URL of the mesh.
        record: Metadata of the object. It is untrusted, so the value can have any type.
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


def _size(uid: str, record: object) -> dict[str, int]:
    """Return a mapping from the uid to the size of the GLB in bytes, or {} if the metadata has no size."""
    size = _look_up(record, "archives", "glb", "size")
    return {uid: size} if isinstance(size, int) and size > 0 else {}


def _by_folder(uids: Sequence[str], paths: dict[str, Any], left_out: dict[str, str]) -> dict[str, list[str]]:
    """Return a mapping from folders, for example ``000-023``, to uids.

    Args:
        uids: Uids of the objects.
        paths: Mapping from uids to paths.
        left_out: Mapping from ids to reasons, to which objects with an unexpected path are added.
    """
    folders: dict[str, list[str]] = {}
    for uid in uids:
        path = str(paths.get(uid))
        found = _PATH.fullmatch(path)
        if found and found[2] == uid:
            folders.setdefault(found[1], []).append(uid)
        else:
            left_out[uid] = f"unexpected path: expected glbs/000-000/{uid}.glb, but found {path[:200]!r}"
    return folders


def _by_category(annotations: dict[str, Any], categories: Sequence[str]) -> dict[str, str]:
    """Return a mapping from uids to categories for the objects of LVIS categories."""
    _refuse_unknown("category", categories, annotations)
    return {str(uid): category for category in categories for uid in annotations[category]}


def _refuse_unknown(noun: str, names: Sequence[str], known: dict[str, Any]) -> None:
    unknown = [name for name in names if name not in known]
    if unknown:
        head, tail = unknown[0][:4], unknown[0][-4:]  # comparing all 798,759 uids would take about a minute
        alike = [name for name in known if len(known) < 9999 or name[:4] == head or name[-4:] == tail]
        near = difflib.get_close_matches(unknown[0], alike, n=3, cutoff=0.5)
        meant = (
            f"did you mean {', '.join(near)}?"
            if near
            else f"there are {len(known)}, for example {min(known)}"
        )
        more = f" (and {len(unknown) - 1} more)" if len(unknown) > 1 else ""
        raise InputError(expected=f"a {noun} of Objaverse", found=f"{unknown[0]!r}{more}", remedy=meant)


def _table(base: str, index: Path, name: str) -> dict[str, Any]:
    """Read a table. If it is missing, it is downloaded."""
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
        raise InputError(
            subject=path, expected="a non-empty JSON object", found=f"{table!r:.60}", remedy=remedy
        )
    return table


def _download_meshes(
    downloads: Sequence[Download], sizes: dict[str, int], left_out: dict[str, str]
) -> dict[str, str]:
    """Download meshes.

    The size of a GLB file is compared with the length in the header of the file. If it differs from the size in the
    metadata, a note is printed and the file is accepted, because the metadata may be older than the file.

    Args:
        downloads: Meshes to download.
        sizes: Mapping from uids to sizes in bytes according to the metadata.
        left_out: Mapping from ids to reasons, to which failures are added.

    Returns:
        Mapping from uids to sha256 hashes.
    """
    hashes: dict[str, str] = {}
    others: list[str] = []
    bar = tqdm(download_all(downloads), total=len(downloads), unit="mesh")
    for done, digest, reason in bar:
        if reason:
            left_out[done.id] = reason
            bar.set_postfix(failures=len(left_out))
        else:
            hashes[done.id] = digest
            size = done.path.stat().st_size
            if size != sizes.get(done.id, size):
                others.append(f"{done.id} ({size} bytes, not {sizes[done.id]})")
    if others:
        print(
            f"Note: the size of {counted(len(others), 'mesh')} differs from the metadata, for example {min(others)}."
        )
    return hashes
