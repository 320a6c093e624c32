"""Plan for rendering assets into a folder of shards, and updates to the plan if the list of assets changes.

The plan is stored in ``OUT/plan.parquet``, and the list of assets in ``OUT/assets.parquet``. Differences between the
stored list and the current list are handled as follows:

| difference | result |
|---|---|
| added assets | rendered into additional shards, in the training split unless the list assigns them to ``val`` |
| changed name, creator, source or license | updated in the shards without rendering |
| changed tags | updated in ``assets.parquet`` |
| removed or changed asset that has not been rendered | the plan is updated |
| removed asset that has been rendered | error |
| changed mesh, up axis or split of an asset that has been rendered | error |

An object is never moved from its planned shard to a different shard. A mesh is hashed and compared with the rendered
mesh only if the size or the modification time differs from the value in the plan.
"""

import dataclasses
import operator
import sys
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import NamedTuple

import pyarrow
import pyarrow.parquet

from data_tools.assets.asset_list import Asset, list_matches, write_list
from data_tools.rendering.settings import SETTINGS_NAME, RenderSettings
from data_tools.rendering.shard_folder import find_records
from data_tools.rendering.shard_plan import PlannedShard, plan_shards, split_into_shards
from lrm_pl.data.manifest import MANIFEST_NAME, Split, new_file
from lrm_pl.errors import InputError
from lrm_pl.paths import hash_file

PLAN_NAME = "plan.parquet"

#: Maximum total size of the meshes to hash in bytes. If it is exceeded, for example because all modification times have
#: changed, only the sizes are compared.
MAX_HASHED_BYTES = 4 << 30

#: Number of threads that read file sizes and modification times.
_THREADS = 16


class PlanRow(NamedTuple):
    """Row of ``plan.parquet``, which has one row per object in the order of the shards.

    Attributes:
        id: Id of the object.
        shard: Name of the shard.
        sha256: Hash of the mesh in the asset list, or "" if unknown.
        up: Up axis of the mesh in the asset list.
        bytes: Size of the mesh, or -1 if unknown.
        mtime_ns: Modification time of the mesh in nanoseconds, or -1 if unknown.
    """

    id: str
    shard: str
    sha256: str
    up: str
    bytes: int
    mtime_ns: int


_SCHEMA = pyarrow.schema([
    (name, pyarrow.int64() if type_ is int else pyarrow.string())
    for name, type_ in PlanRow.__annotations__.items()
])  # fmt: skip


@dataclasses.dataclass(frozen=True)
class ResumePlan:
    """Plan of a folder of shards.

    Attributes:
        shards: All shards. Existing shards precede new shards.
        rows: Rows of ``plan.parquet``.
        is_recorded: Whether ``plan.parquet`` and ``assets.parquet`` are up to date.
        list_changed: Whether the list of assets differs from the list of the previous run.
    """

    shards: tuple[PlannedShard, ...]
    rows: list[PlanRow]
    is_recorded: bool = False
    list_changed: bool = False


def plan_folder(out: Path, settings: RenderSettings, assets: Sequence[Asset], folder: Path) -> ResumePlan:
    """Plan a folder of shards, or update an existing plan. This function does not write files.

    Args:
        out: Folder of shards.
        settings: Render settings. They must be equal to the settings in the folder.
        assets: Assets of the run, sorted by id.
        folder: Folder of the meshes.

    Raises:
        InputError: A rendered asset was removed from the list or changed, ``plan.parquet`` cannot be read, the settings
            are not valid for the assets, or a shard is damaged.
    """
    by_id = {asset.id: asset for asset in assets}
    stamps = _read_stamps(folder, assets)
    if not (out / SETTINGS_NAME).is_file():
        splits = {asset.id: asset.split for asset in assets}
        shards = plan_shards(splits, settings.held_out, settings.shard_size)
        return ResumePlan(shards, list(_make_rows(shards, by_id, stamps, {})))
    is_listed = list_matches(out, assets)  # before the plan is read, because it needs memory temporarily
    before = _read_plan(out, by_id)
    _check_removed(out, [row for row in before if row.id not in by_id], folder)
    kept = [row for row in before if row.id in by_id]
    _check_splits(out, kept, by_id)
    _check_meshes(out, kept, by_id, stamps, folder)
    added = [by_id[key] for key in sorted(by_id.keys() - (row.id for row in before))]
    shards = _group_rows(kept) + _plan_added(added, before, settings.shard_size)
    hashes = {row.id: row.sha256 for row in before if row.sha256}
    list_changed = bool(added) or len(kept) < len(before) or not is_listed
    if not list_changed and all(map(operator.eq, before, _make_rows(shards, by_id, stamps, hashes))):
        return ResumePlan(shards, before, is_recorded=True)
    rows = list(_make_rows(shards, by_id, stamps, hashes))
    return ResumePlan(shards, rows, list_changed=list_changed)


def write_plan(out: Path, plan: ResumePlan, assets: Sequence[Asset]) -> None:
    """Write ``plan.parquet`` and ``assets.parquet`` if they are not up to date."""
    if not plan.is_recorded:
        columns = zip(*plan.rows, strict=True)
        with new_file(out / PLAN_NAME) as file:
            pyarrow.parquet.write_table(pyarrow.table(list(map(list, columns)), schema=_SCHEMA), file)
        write_list(out, assets)


def _make_rows(
    shards: Sequence[PlannedShard],
    assets: Mapping[str, Asset],
    stamps: Mapping[str, tuple[int, int]],
    hashes: Mapping[str, str],
) -> Iterator[PlanRow]:
    """Yield the rows of ``plan.parquet``. ``hashes`` contains the hashes in the previous plan."""
    for shard in shards:
        for key in shard.ids:
            sha256 = assets[key].sha256 or hashes.get(key, "")
            yield PlanRow(key, shard.name, sha256, assets[key].up, *stamps.get(key, (-1, -1)))


def _read_stamps(folder: Path, assets: Sequence[Asset]) -> dict[str, tuple[int, int]]:
    """Return a mapping from ids to sizes and modification times of the meshes.

    Remote meshes and meshes whose hash is in the asset list are omitted.
    """

    def read(asset: Asset) -> tuple[int, int] | None:
        try:
            found = (folder / asset.file).stat()
        except OSError:  # reported when the asset is rendered
            return None
        return found.st_size, found.st_mtime_ns

    local = [asset for asset in assets if not asset.sha256 and not asset.is_remote]
    with ThreadPool(_THREADS) as pool:
        stamps = pool.map(read, local)
    return {asset.id: stamp for asset, stamp in zip(local, stamps, strict=True) if stamp}


def _read_plan(out: Path, assets: Mapping[str, Asset]) -> list[PlanRow]:
    """Read ``plan.parquet``. To save memory, the rows share the id strings of ``assets``."""
    path = out / PLAN_NAME
    try:
        table = pyarrow.parquet.read_table(path, memory_map=False).cast(_SCHEMA)
    except (OSError, ValueError, KeyError, pyarrow.ArrowException) as error:
        raise InputError(
            subject=path,
            expected="a valid plan of the shards",
            found=error,
            remedy="restore the folder, or choose another output folder",
        ) from error
    ids, shards, *others = (column.to_pylist() for column in table.columns)
    ids = [assets[key].id if key in assets else key for key in ids]
    return list(map(PlanRow, ids, map(sys.intern, shards), *others))


def _group_rows(rows: Sequence[PlanRow]) -> tuple[PlannedShard, ...]:
    """Group the rows of a plan by shard."""
    return tuple(
        PlannedShard(name, _split_of(name), tuple(row.id for row in group))
        for name, group in groupby(rows, key=lambda row: row.shard)
    )


def _split_of(name: str) -> Split:
    return "val" if name.startswith("val-") else "train"


def _plan_added(
    added: Sequence[Asset], before: Sequence[PlanRow], shard_size: int
) -> tuple[PlannedShard, ...]:
    """Plan shards for added assets. The new shards are numbered after the existing shards."""
    members: dict[Split, list[str]] = {"train": [], "val": []}
    for asset in added:  # in order of id
        members[asset.split or "train"].append(asset.id)
    first = dict.fromkeys(members, 0)
    for name in {row.shard for row in before}:
        number = int(name.removesuffix(".tar").rpartition("-")[2])
        first[_split_of(name)] = max(first[_split_of(name)], number + 1)
    return split_into_shards(members, shard_size, first)


def _check_removed(out: Path, removed: Sequence[PlanRow], folder: Path) -> None:
    """Check that no rendered asset was removed from the list."""
    rendered = [key for shard in _group_rows(removed) for key in find_records(out, shard) if key in shard.ids]
    if rendered:
        others = f" and {len(rendered) - 1} more" if len(rendered) > 1 else ""
        raise InputError(
            subject=out,
            expected="all rendered assets in the asset list",
            found=f"no entry for {rendered[0]!r}{others}",
            remedy=f"restore the meshes in {folder}, or choose another output folder and join the folders with `merge`",
        )


def _check_splits(out: Path, rows: Sequence[PlanRow], assets: Mapping[str, Asset]) -> None:
    """Check that no asset was assigned to a different split."""
    for row in rows:
        split, found = _split_of(row.shard), assets[row.id].split
        if found not in ("", split):
            repack = f"repack --shards {out} --out ... --held-out N"
            raise InputError(
                subject=f"{out}: asset {row.id!r}",
                expected=f"the planned split {split!r}",
                found=f"{found!r}",
                remedy=f"correct the asset list, or finish the folder and run `python -m data_tools {repack}`",
            )


def _check_meshes(
    out: Path,
    rows: Sequence[PlanRow],
    assets: Mapping[str, Asset],
    stamps: Mapping[str, tuple[int, int]],
    folder: Path,
) -> None:
    """Check that the mesh and the up axis of rendered objects have not changed.

    Args:
        out: Folder of shards.
        rows: Rows of the plan, without removed assets.
        assets: Mapping from ids to assets.
        stamps: Mapping from ids to current sizes and modification times, if they are known.
        folder: Folder of the meshes.
    """
    touched = [row for row in rows if row.id in stamps and stamps[row.id] != (row.bytes, row.mtime_ns)]
    if (size := sum(stamps[row.id][0] for row in touched)) > MAX_HASHED_BYTES:
        print(
            f"note: {len(touched)} meshes in {folder} ({size / 1e9:.0f} GB) have new modification times. Only meshes "
            "whose size has changed are compared with the rendered meshes",
            file=sys.stderr,
        )
        touched = [row for row in touched if row.bytes not in (-1, stamps[row.id][0])]
    hashed = {row.id for row in touched}
    suspects = {
        row.id: row
        for row in rows
        if row.id in hashed or assets[row.id].up != row.up or assets[row.id].sha256 not in ("", row.sha256)
    }
    for shard in _group_rows(list(suspects.values())):
        for key, (path, info) in find_records(out, shard).items():
            if key not in suspects:
                continue
            row, asset = suspects[key], assets[key]
            rendered = info.sha256 or row.sha256
            found = asset.sha256 or (hash_file(folder / asset.file) if key in hashed else "")
            for name, before, now in (
                ("up axis", row.up or "y", asset.up or "y"),
                ("sha256", rendered or found, found or rendered),
            ):
                if before != now:
                    raise InputError(
                        subject=f"{out}: {asset.file}",
                        expected=f"the rendered mesh with the {name} {before}",
                        found=now,
                        remedy=f"restore the mesh, or delete {path} and {out / MANIFEST_NAME} to render it again",
                    )
