"""How a folder of shards that was begun takes what is listed now: ``OUT/plan.parquet`` and ``OUT/assets.parquet``.

    added           rendered into further shards behind those that there are; without a listed split it trains
    name, creator, source, license    updated in the shards, without rendering (``shard_folder.update_records``)
    tags            updated in ``assets.parquet``
    not rendered    removed, changed or mended: as if it had been so from the beginning
    rendered        and now removed, another mesh, another axis up, another split: refused

No object that is planned ever changes its shard. Whether a mesh is another one is seen from its size and its time of
change, which the plan records; only where these differ is it hashed, and compared with the hash of its rendering.
"""

import dataclasses
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow
import pyarrow.compute
import pyarrow.parquet

from data_tools.assets.asset_list import LIST_NAME, Asset, hash_file, list_matches, write_list
from data_tools.rendering.settings import SETTINGS_NAME, RenderSettings, SettingsError
from data_tools.rendering.shard_folder import find_records
from data_tools.rendering.shard_plan import PlannedShard, plan_shards, split_into_shards
from lrm_pl.data.manifest import MANIFEST_NAME, Split, write_atomically

PLAN_NAME = "plan.parquet"

#: One row an object, in order of the shards; of its mesh as it was planned: the hash and the axis up that were listed,
#: size and time of change (-1: unknown).
_SCHEMA = pyarrow.schema([
    ("id", pyarrow.string()),
    ("shard", pyarrow.string()),
    ("sha256", pyarrow.string()),
    ("up", pyarrow.string()),
    ("bytes", pyarrow.int64()),
    ("mtime_ns", pyarrow.int64()),
])  # fmt: skip

#: Where more than this would have to be hashed (a folder that was copied without its times), sizes must do.
MAX_HASHED_BYTES = 4 << 30

#: Files looked at or hashed at the same time.
_THREADS = 16

_NO_STAMP = (-1, -1)


@dataclasses.dataclass(frozen=True)
class ResumePlan:
    """What is to be made of a folder.

    Attributes:
        shards: All shards, those that there are first.
        stamps: (N, 2) int64, size and time of change (ns) of each asset's mesh, in order of the assets; -1: unknown.
        hashes: (N) the hash that was listed of each before; "": none.
        is_recorded: Whether ``plan.parquet`` and ``assets.parquet`` say so already.
        is_relisted: Whether shards and manifest may be those of another list.
    """

    shards: tuple[PlannedShard, ...]
    stamps: npt.NDArray[np.int64]
    hashes: npt.NDArray[np.object_]
    is_recorded: bool = False
    is_relisted: bool = False


def plan_folder(out: Path, settings: RenderSettings, assets: Sequence[Asset], folder: Path) -> ResumePlan:
    """Plan a folder of shards, or go on with its plan. Writes nothing.

    Args:
        out: Folder of shards, of these settings.
        settings: Settings.
        assets: Assets of this run, sorted by id.
        folder: Where their meshes lie.

    Raises:
        SettingsError: An object that is rendered is not listed any more, or not as it was rendered.
        InputError: The settings do not fit the assets, or a shard is damaged.
    """
    stamps, hashes = _stamp(folder, assets), np.full(len(assets), "", dtype=object)
    if not (out / SETTINGS_NAME).is_file():
        shards = _plan({asset.id: asset.split for asset in assets}, settings)
        return ResumePlan(shards, stamps, hashes)
    before = _read_plan(out, settings)
    at = _positions(before["id"], assets)
    rows, gone = np.flatnonzero(at >= 0), before.filter(pyarrow.array(at < 0))
    _refuse_removed(out, _cut_as(gone, gone["id"].to_pylist()), folder)
    known = before.take(pyarrow.array(rows)) if len(gone) else before
    at = at[rows]
    shards = _cut_as(known, [assets[index].id for index in at])
    _refuse_other_splits(out, shards, assets, at)
    _refuse_others(out, folder, assets, shards, known, at, stamps)
    new = np.setdiff1d(np.arange(len(assets)), at)
    shards += _cut_new([assets[index] for index in new], before, settings.shard_size)
    is_relisted = bool(len(new) or len(gone)) or not list_matches(out, assets)
    is_recorded = (out / PLAN_NAME).is_file() and bool((_stamps_of(known) == stamps[at]).all())
    hashes[at] = known["sha256"].to_numpy(zero_copy_only=False)
    return ResumePlan(shards, stamps, hashes, is_recorded and not is_relisted, is_relisted)


def write_plan(out: Path, continuation: ResumePlan, assets: Sequence[Asset]) -> None:
    """Write ``plan.parquet`` and ``assets.parquet``, unless they say so already."""
    if not continuation.is_recorded:
        sink = pyarrow.BufferOutputStream()
        pyarrow.parquet.write_table(_table(continuation, assets), sink)
        write_atomically(out / PLAN_NAME, sink.getvalue().to_pybytes())
        write_list(out, assets)


def _table(continuation: ResumePlan, assets: Sequence[Asset]) -> pyarrow.Table:
    """Make the content of ``plan.parquet``."""
    shards, stamps, hashes = continuation.shards, continuation.stamps, continuation.hashes
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


def _plan(splits: Mapping[str, str], settings: RenderSettings) -> tuple[PlannedShard, ...]:
    return plan_shards(splits, settings.held_out, settings.shard_size)


def _stamp(folder: Path, assets: Sequence[Asset]) -> npt.NDArray[np.int64]:
    """Take the size and the time of change of each mesh on this machine of which the list has no hash."""

    def look(part: Sequence[Asset]) -> list[tuple[int, int]]:
        return [_stamp_of(folder / asset.file) if _is_watched(asset) else _NO_STAMP for asset in part]

    size = -(-len(assets) // _THREADS) or 1
    with ThreadPoolExecutor(_THREADS) as pool:  # it waits for the disk
        parts = pool.map(look, [assets[start : start + size] for start in range(0, len(assets), size)])
        return np.array([stamp for part in parts for stamp in part], dtype=np.int64).reshape(-1, 2)


def _is_watched(asset: Asset) -> bool:
    return not asset.sha256 and not asset.is_remote


def _stamp_of(path: Path) -> tuple[int, int]:
    try:
        found = path.stat()
    except OSError:  # whoever renders it says so
        return _NO_STAMP
    return found.st_size, found.st_mtime_ns


def _read_plan(out: Path, settings: RenderSettings) -> pyarrow.Table:
    """Read the plan; that of a folder of before there were such files follows from its list."""
    path = out / PLAN_NAME if (out / PLAN_NAME).is_file() else out / LIST_NAME
    try:
        table = pyarrow.parquet.read_table(path, memory_map=False)
        if path.name == PLAN_NAME:
            return table.cast(_SCHEMA)
        rows = {row["id"]: row for row in table.select(["id", "sha256", "split", "up"]).to_pylist()}
        shards = _plan({key: row["split"] for key, row in rows.items()}, settings)
    except (OSError, ValueError, KeyError, pyarrow.ArrowException) as error:
        raise SettingsError(
            subject=path,
            expected="what these shards were planned with",
            found=error,
            remedy="copy the folder again, or choose another OUT=",
        ) from error
    found = [
        {
            "id": key,
            "shard": shard.name,
            "sha256": rows[key]["sha256"],
            "up": rows[key]["up"],
            "bytes": -1,
            "mtime_ns": -1,
        }
        for shard in shards
        for key in shard.ids
    ]
    return pyarrow.Table.from_pylist(found, _SCHEMA)


def _stamps_of(table: pyarrow.Table) -> npt.NDArray[np.int64]:
    return np.stack([table[name].to_numpy() for name in ("bytes", "mtime_ns")], axis=1)


def _positions(ids: pyarrow.ChunkedArray, assets: Sequence[Asset]) -> npt.NDArray[np.int64]:
    """Say where in the assets each id is; -1: nowhere."""
    mine = pyarrow.array([asset.id for asset in assets], pyarrow.string())
    found = pyarrow.compute.fill_null(pyarrow.compute.index_in(ids, mine), -1)
    return np.asarray(found.to_numpy(), dtype=np.int64)


def _cut_as(table: pyarrow.Table, ids: Sequence[str]) -> tuple[PlannedShard, ...]:
    """Make the shards that the rows of a plan name; ``ids`` are its column, as strings that there are already."""
    names = table["shard"].combine_chunks().dictionary_encode()
    words, codes = names.dictionary.to_pylist(), names.indices.to_numpy()
    bounds = [*np.flatnonzero(np.diff(codes, prepend=-1)).tolist(), len(codes)]
    return tuple(
        PlannedShard(words[codes[start]], _split_of(words[codes[start]]), tuple(ids[start:end]))
        for start, end in pairwise(bounds)
    )


def _split_of(name: str) -> Split:
    return "val" if name.startswith("val-") else "train"


def _cut_new(new: Sequence[Asset], before: pyarrow.Table, shard_size: int) -> tuple[PlannedShard, ...]:
    """Plan shards for new assets, with numbers above those of the shards that there are."""
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
        others = f", nor {len(rendered) - 1} others" if len(rendered) > 1 else ""
        raise SettingsError(
            subject=out,
            expected="the assets that are rendered already",
            found=f"{rendered[0]!r} no longer listed{others}",
            remedy=(
                f"look at ASSETS={folder}, or put its mesh back. Shards need no meshes: a finished folder "
                "may also stay as it is, and what is new be rendered into another OUT= and joined with "
                "it by `python -m data_tools merge`"
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
                expected=f"the split {split!r}, in which it is planned",
                found=f"{assets[index].split!r}",
                remedy=(
                    f"list it as {split!r}, or split the finished folder anew without rendering: `python -m "
                    f"data_tools repack --shards {out} --out ... --held-out N`"
                ),
            )


def _refuse_others(
    out: Path,
    folder: Path,
    assets: Sequence[Asset],
    shards: Sequence[PlannedShard],
    known: pyarrow.Table,
    at: npt.NDArray[np.int64],
    stamps: npt.NDArray[np.int64],
) -> None:
    """Refuse rendered objects whose mesh or axis up is another one now.

    Args:
        out: Folder of shards.
        folder: Where the meshes lie.
        assets: All assets.
        shards: The planned ones that are still listed.
        known: Their rows of the plan.
        at: Their positions in ``assets``.
        stamps: Of all assets, as they are now.
    """
    now, then = stamps[at], _stamps_of(known)
    touched = (now[:, 0] >= 0) & (now != then).any(axis=1)
    if (size := int(now[touched, 0].sum())) > MAX_HASHED_BYTES:
        print(
            f"note: {int(touched.sum())} meshes in {folder} ({size / 1e9:.0f} GB) were changed or copied since they "
            "were planned: only those of another size are compared with what was rendered",
            file=sys.stderr,
        )
        touched &= (then[:, 0] >= 0) & (then[:, 0] != now[:, 0])
    hashes = np.array([assets[index].sha256 for index in at], dtype=object)
    ups = np.array([assets[index].up for index in at], dtype=object)
    relisted = (hashes != "") & (hashes != known["sha256"].to_numpy(zero_copy_only=False))
    turned = ups != known["up"].to_numpy(zero_copy_only=False)
    doubtful = {assets[at[row]].id: int(row) for row in np.flatnonzero(touched | relisted | turned)}
    for shard in (shard for shard in shards if doubtful and not doubtful.keys().isdisjoint(shard.ids)):
        for key, (place, info) in find_records(out, shard).items():
            if key not in doubtful:
                continue
            row, asset = doubtful[key], assets[at[doubtful[key]]]
            expected, was_up = info.sha256 or known["sha256"][row].as_py(), known["up"][row].as_py()
            remedy = (
                f"let it be as it was, and put a new mesh beside it under another name; or delete {place} and "
                f"{out / MANIFEST_NAME}: what that file holds, and nothing else, is then rendered again"
            )
            if was_up != asset.up:
                raise SettingsError(
                    subject=f"{out}: asset {key!r}",
                    expected=f"the axis up {was_up or 'y'!r}, as it is rendered",
                    found=f"{asset.up or 'y'!r}",
                    remedy=remedy,
                )
            found = asset.sha256 or (hash_file(folder / asset.file) if touched[row] else "")
            if expected and found and expected != found:
                raise SettingsError(
                    subject=f"{out}: {asset.file}",
                    expected=f"the mesh that is rendered already, of sha256 {expected}",
                    found=f"one of {found}",
                    remedy=remedy,
                )
