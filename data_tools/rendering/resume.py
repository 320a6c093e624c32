"""Plan of a folder of shards, and changes of the plan if the list of assets has changed.

The plan is stored in ``OUT/plan.parquet``, and the list of assets in ``OUT/assets.parquet``. Differences between the
stored list and the current list have the following results:

| difference | result |
|---|---|
| added assets | rendered into additional shards, in the training split unless the list assigns them to ``val`` |
| changed name, creator, source or license | updated in the shards without rendering |
| changed tags | updated in ``assets.parquet`` |
| removed or changed asset that has not been rendered | the plan is updated |
| removed asset that has been rendered | error |
| changed mesh, up axis or split of an asset that has been rendered | error |

An object is not moved to a different shard after it has been planned. A mesh is hashed and compared with the rendered
mesh only if the size or the modification time differs from the plan.
"""

import dataclasses
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow
import pyarrow.compute
import pyarrow.parquet

from data_tools.assets.asset_list import Asset, list_matches, write_list
from data_tools.rendering.settings import SETTINGS_NAME, RenderSettings, SettingsError
from data_tools.rendering.shard_folder import find_records
from data_tools.rendering.shard_plan import PlannedShard, plan_shards, split_into_shards
from lrm_pl.data.manifest import MANIFEST_NAME, Split, write_atomically
from lrm_pl.paths import hash_file

PLAN_NAME = "plan.parquet"

#: Columns of ``plan.parquet``, which has one row per object in order of the shards. ``sha256`` and ``up`` are copied
#: from the asset list. ``bytes`` and ``mtime_ns`` are the size and the modification time of the mesh, or -1 if unknown.
_SCHEMA = pyarrow.schema([
    ("id", pyarrow.string()),
    ("shard", pyarrow.string()),
    ("sha256", pyarrow.string()),
    ("up", pyarrow.string()),
    ("bytes", pyarrow.int64()),
    ("mtime_ns", pyarrow.int64()),
])  # fmt: skip

#: Maximum total size of the meshes to hash in bytes. If it is exceeded, for example because all modification times have
#: changed, only the sizes are compared.
MAX_HASHED_BYTES = 4 << 30

#: Number of threads that read file sizes and modification times.
_THREADS = 16

_NO_STAMP = (-1, -1)


@dataclasses.dataclass(frozen=True)
class ResumePlan:
    """Plan of a folder of shards for N assets.

    Attributes:
        shards: All shards. Existing shards precede new shards.
        stamps: (N, 2) int64 sizes in bytes and modification times in nanoseconds of the meshes, or -1 if unknown.
        hashes: (N,) hashes of the meshes in the previous plan, or "" if unknown.
        is_recorded: Whether ``plan.parquet`` and ``assets.parquet`` are up to date.
        list_changed: Whether the list of assets differs from the list in the previous run.
    """

    shards: tuple[PlannedShard, ...]
    stamps: npt.NDArray[np.int64]
    hashes: npt.NDArray[np.object_]
    is_recorded: bool = False
    list_changed: bool = False


def plan_folder(out: Path, settings: RenderSettings, assets: Sequence[Asset], folder: Path) -> ResumePlan:
    """Plan a folder of shards, or update an existing plan. The function does not write files.

    Args:
        out: Folder of shards.
        settings: Render settings. They must be equal to the settings in the folder.
        assets: Assets of the run, sorted by id.
        folder: Folder of the meshes.

    Raises:
        SettingsError: A rendered asset was removed from the list or changed, or ``plan.parquet`` cannot be read.
        InputError: The settings are not valid for the assets, or a shard is damaged.
    """
    stamps, hashes = _stamp(folder, assets), np.full(len(assets), "", dtype=object)
    if not (out / SETTINGS_NAME).is_file():
        splits = {asset.id: asset.split for asset in assets}
        return ResumePlan(plan_shards(splits, settings.held_out, settings.shard_size), stamps, hashes)
    before = _read_plan(out)
    at = _positions(before["id"], assets)
    rows, gone = np.flatnonzero(at >= 0), before.filter(pyarrow.array(at < 0))
    _refuse_removed(out, _group_rows(gone, gone["id"].to_pylist()), folder)
    known = before.take(pyarrow.array(rows)) if len(gone) else before
    at = at[rows]
    shards = _group_rows(known, [assets[index].id for index in at])
    _refuse_other_splits(out, shards, assets, at)
    _refuse_changed_meshes(out, folder, assets, shards, known, at, stamps)
    new = np.setdiff1d(np.arange(len(assets)), at)
    shards += _plan_added([assets[index] for index in new], before, settings.shard_size)
    list_changed = bool(len(new) or len(gone)) or not list_matches(out, assets)
    is_recorded = bool((_stamps_of(known) == stamps[at]).all())
    hashes[at] = known["sha256"].to_numpy(zero_copy_only=False)
    return ResumePlan(shards, stamps, hashes, is_recorded and not list_changed, list_changed)


def write_plan(out: Path, plan: ResumePlan, assets: Sequence[Asset]) -> None:
    """Write ``plan.parquet`` and ``assets.parquet`` if they are not up to date."""
    if not plan.is_recorded:
        sink = pyarrow.BufferOutputStream()
        pyarrow.parquet.write_table(_table(plan, assets), sink)
        write_atomically(out / PLAN_NAME, sink.getvalue().to_pybytes())
        write_list(out, assets)


def _table(plan: ResumePlan, assets: Sequence[Asset]) -> pyarrow.Table:
    """Create the table of ``plan.parquet``."""
    shards, stamps, hashes = plan.shards, plan.stamps, plan.hashes
    index_of = {asset.id: index for index, asset in enumerate(assets)}
    at = [index_of[key] for shard in shards for key in shard.ids]
    columns = {
        "id": [key for shard in shards for key in shard.ids],
        "shard": [shard.name for shard in shards for _ in shard.ids],
        "sha256": [assets[index].sha256 or hashes[index] for index in at],
        "up": [assets[index].up for index in at],
        "bytes": stamps[at, 0],
        "mtime_ns": stamps[at, 1],
    }
    return pyarrow.table(columns, _SCHEMA)


def _stamp(folder: Path, assets: Sequence[Asset]) -> npt.NDArray[np.int64]:
    """Return the sizes and modification times of the meshes, shape (N, 2).

    They are -1 for remote meshes and for meshes whose hash is in the asset list.
    """

    def stamp(asset: Asset) -> tuple[int, int]:
        if asset.sha256 or asset.is_remote:
            return _NO_STAMP
        try:
            found = (folder / asset.file).stat()
        except OSError:  # reported when the asset is rendered
            return _NO_STAMP
        return found.st_size, found.st_mtime_ns

    def stamp_all(chunk: Sequence[Asset]) -> list[tuple[int, int]]:
        return [stamp(asset) for asset in chunk]

    size = -(-len(assets) // _THREADS) or 1
    with ThreadPoolExecutor(_THREADS) as pool:
        chunks = pool.map(stamp_all, [assets[start : start + size] for start in range(0, len(assets), size)])
        return np.array([row for chunk in chunks for row in chunk], dtype=np.int64).reshape(-1, 2)


def _read_plan(out: Path) -> pyarrow.Table:
    """Read ``plan.parquet``."""
    path = out / PLAN_NAME
    try:
        return pyarrow.parquet.read_table(path, memory_map=False).cast(_SCHEMA)
    except (OSError, ValueError, KeyError, pyarrow.ArrowException) as error:
        raise SettingsError(
            subject=path,
            expected="the plan of the shards",
            found=error,
            remedy="restore the folder, or choose another OUT=",
        ) from error


def _stamps_of(table: pyarrow.Table) -> npt.NDArray[np.int64]:
    return np.stack([table[name].to_numpy() for name in ("bytes", "mtime_ns")], axis=1)


def _positions(ids: pyarrow.ChunkedArray, assets: Sequence[Asset]) -> npt.NDArray[np.int64]:
    """Return the index of each id in ``assets``, or -1 if the id is not in ``assets``."""
    mine = pyarrow.array([asset.id for asset in assets], pyarrow.string())
    found = pyarrow.compute.fill_null(pyarrow.compute.index_in(ids, mine), -1)
    return np.asarray(found.to_numpy(), dtype=np.int64)


def _group_rows(table: pyarrow.Table, ids: Sequence[str]) -> tuple[PlannedShard, ...]:
    """Group the rows of a plan by shard.

    Args:
        table: Rows of the plan.
        ids: Values of the column ``id``.
    """
    names = table["shard"].combine_chunks().dictionary_encode()
    words, codes = names.dictionary.to_pylist(), names.indices.to_numpy()
    bounds = [*np.flatnonzero(np.diff(codes, prepend=-1)).tolist(), len(codes)]
    return tuple(
        PlannedShard(words[codes[start]], _split_of(words[codes[start]]), tuple(ids[start:end]))
        for start, end in pairwise(bounds)
    )


def _split_of(name: str) -> Split:
    return "val" if name.startswith("val-") else "train"


def _plan_added(new: Sequence[Asset], before: pyarrow.Table, shard_size: int) -> tuple[PlannedShard, ...]:
    """Plan shards for added assets. The numbers of new shards follow the numbers of existing shards."""
    members: dict[Split, list[str]] = {"train": [], "val": []}
    for asset in new:  # in order of id
        members[asset.split or "train"].append(asset.id)
    first = dict.fromkeys(members, 0)
    for name in before["shard"].unique().to_pylist():
        split, _, number = name.removesuffix(".tar").partition("-")
        first[split] = max(first[split], int(number) + 1)
    return split_into_shards(members, shard_size, first)


def _refuse_removed(out: Path, gone: Sequence[PlannedShard], folder: Path) -> None:
    rendered = [key for shard in gone for key in find_records(out, shard) if key in shard.ids]
    if rendered:
        others = f" and {len(rendered) - 1} more" if len(rendered) > 1 else ""
        raise SettingsError(
            subject=out,
            expected="all rendered assets to be listed",
            found=f"no {rendered[0]!r}{others}",
            remedy=(
                f"check ASSETS={folder}, or restore the meshes. To render other meshes only, choose another OUT= and "
                "join the folders with `python -m data_tools merge`"
            ),
        )


def _refuse_other_splits(
    out: Path, shards: Sequence[PlannedShard], assets: Sequence[Asset], at: npt.NDArray[np.int64]
) -> None:
    splits = (shard.split for shard in shards for _ in shard.ids)
    for index, split in zip(at.tolist(), splits, strict=True):
        if assets[index].split not in ("", split):
            raise SettingsError(
                subject=f"{out}: asset {assets[index].id!r}",
                expected=f"the planned split {split!r}",
                found=f"{assets[index].split!r}",
                remedy=(
                    f"list the asset as {split!r}, or change the splits of the finished folder without rendering: "
                    f"`python -m data_tools repack --shards {out} --out ... --held-out N`"
                ),
            )


def _refuse_changed_meshes(
    out: Path,
    folder: Path,
    assets: Sequence[Asset],
    shards: Sequence[PlannedShard],
    known: pyarrow.Table,
    at: npt.NDArray[np.int64],
    stamps: npt.NDArray[np.int64],
) -> None:
    """Raise an error if the mesh or the up axis of a rendered object has changed.

    Args:
        out: Folder of shards.
        folder: Folder of the meshes.
        assets: All assets.
        shards: Planned shards, without removed assets.
        known: Rows of the plan for the assets in ``shards``.
        at: Index of each row in ``assets``.
        stamps: (N, 2) current sizes and modification times of all assets.
    """
    now, then = stamps[at], _stamps_of(known)
    touched = (now[:, 0] >= 0) & (now != then).any(axis=1)
    if (size := int(now[touched, 0].sum())) > MAX_HASHED_BYTES:
        print(
            f"note: {int(touched.sum())} meshes in {folder} ({size / 1e9:.0f} GB) have new modification times. Only "
            "those whose size changed are compared with the rendered ones",
            file=sys.stderr,
        )
        touched &= (then[:, 0] >= 0) & (then[:, 0] != now[:, 0])
    hashes = np.array([assets[index].sha256 for index in at], dtype=object)
    ups = np.array([assets[index].up for index in at], dtype=object)
    relisted = (hashes != "") & (hashes != known["sha256"].to_numpy(zero_copy_only=False))
    turned = ups != known["up"].to_numpy(zero_copy_only=False)
    suspects = {assets[at[row]].id: int(row) for row in np.flatnonzero(touched | relisted | turned)}
    for shard in (shard for shard in shards if suspects and not suspects.keys().isdisjoint(shard.ids)):
        for key, (path, info) in find_records(out, shard).items():
            if key not in suspects:
                continue
            row, asset = suspects[key], assets[at[suspects[key]]]
            expected, was_up = info.sha256 or known["sha256"][row].as_py(), known["up"][row].as_py()
            remedy = (
                "restore the mesh, and add the new one under another name. To render the objects of this file again, "
                f"delete {path} and {out / MANIFEST_NAME}"
            )
            if was_up != asset.up:
                raise SettingsError(
                    subject=f"{out}: asset {key!r}",
                    expected=f"the rendered up axis {was_up or 'y'!r}",
                    found=f"{asset.up or 'y'!r}",
                    remedy=remedy,
                )
            found = asset.sha256 or (hash_file(folder / asset.file) if touched[row] else "")
            if expected and found and expected != found:
                raise SettingsError(
                    subject=f"{out}: {asset.file}",
                    expected=f"the rendered mesh with sha256 {expected}",
                    found=found,
                    remedy=remedy,
                )
