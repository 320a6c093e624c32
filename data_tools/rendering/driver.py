"""``python -m data_tools render``: meshes to shards; a thin driver around Blender processes.

The order of events in OUT: ``plan.parquet``, ``assets.parquet`` and ``render.json`` first, then parts and shards as
objects finish (``shard_folder``), the contact sheet, ``filter.parquet``, and ``manifest.json`` last.
"""

import dataclasses
import errno
import os
import shlex
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from functools import partial
from pathlib import Path

from tqdm import tqdm

from data_tools.assets.asset_list import Asset
from data_tools.quality.contact_sheet import SHEET_NAME, write_contact_sheet
from data_tools.quality.filter_table import FILTER_NAME, write_filter_table
from data_tools.quality.measures import parse_rule
from data_tools.rendering.ray_pool import PoolOptions, RenderPool, connect_ray
from data_tools.rendering.resume import ResumePlan, plan_folder, write_plan
from data_tools.rendering.settings import (
    SETTINGS_NAME,
    RenderSettings,
    check_settings,
    read_settings,
    write_settings,
)
from data_tools.rendering.shard_folder import (
    FAILURES_NAME,
    PARTS_NAME,
    QUARANTINE_NAME,
    FolderError,
    add_failure,
    check_recorded_hashes,
    describe_shards,
    finished_ids,
    lock_folder,
    no_space_message,
    part_ids,
    read_failures,
    remove_partial_files,
    update_records,
    write_failures,
    write_part,
    write_planned_shard,
    write_quarantine,
)
from data_tools.rendering.shard_plan import PlannedShard
from lrm_pl.data.manifest import MANIFEST_NAME, Manifest, Shard, read_manifest, write_manifest
from lrm_pl.data.surface import SURFACE_POINTS
from lrm_pl.errors import counted

#: Meshes that cannot be downloaded, one after the other, before a run takes it for the network's fault.
_UNREACHABLE = 5


@dataclasses.dataclass
class _Done:
    """What this run rendered: objects, the share of the processes' time that Cycles itself took."""

    objects: int = 0
    cycles: float = 0.0


@dataclasses.dataclass(frozen=True)
class _Last:
    """The manifest of before this run, and when it was written."""

    manifest: Manifest | None = None
    written_ns: int = 0


def render(assets: Sequence[Asset], out: Path, settings: RenderSettings, options: PoolOptions) -> Manifest:
    """Render what is not rendered yet and finish the folder.

    Args:
        assets: The assets.
        out: Folder of shards.
        settings: What decides the bytes.
        options: Where the meshes lie, and what Blender processes may take.

    Returns:
        The manifest of the finished folder.

    Raises:
        InputError: Bad assets, other settings in ``out``, no space, every asset failed, or Blender does not start.
    """
    start = time.monotonic()
    rules = [parse_rule(rule) for rule in settings.rules]
    check_settings(out, settings)
    out.mkdir(parents=True, exist_ok=True)
    with lock_folder(out):
        last = _read_last(out)
        continuation = plan_folder(out, settings, assets, options.assets)
        plan = continuation.shards
        remove_partial_files(out)
        by_id = {asset.id: asset for asset in assets}
        failures = {key: record for key, record in read_failures(out).items() if key in by_id}
        finished = finished_ids(out, plan, set(failures))
        ended = finished | failures.keys()
        pending = [by_id[key] for shard in plan for key in shard.ids if key not in ended]
        if (
            not pending
            and last.manifest is not None
            and not continuation.is_relisted
            and _is_described(out, last)
        ):
            write_plan(out, continuation, assets)
            manifest = last.manifest
            shutil.rmtree(out / PARTS_NAME)
            print(
                f"Nothing to render: all {counted(len(assets), 'object')} of {options.assets} are finished."
            )
            _require_kept(out, manifest, len(assets))
            _print_summary(out, manifest, time.monotonic() - start, _Done())
            return manifest
        _require_as_recorded(out, plan, by_id, last)
        write_failures(out / FAILURES_NAME, failures)  # without a line that a killed run began
        needed = estimate_bytes(len(pending), settings)
        if shutil.disk_usage(out).free < needed:
            raise FolderError(no_space_message(out, needed))
        try:
            left = {shard: {key for key in shard.ids if key not in ended} for shard in plan}
            have = part_ids(out)
            for shard in (shard for shard in plan if not left[shard] and have.intersection(shard.ids)):
                write_planned_shard(out, shard, rules)
            done = _Done()
            if pending:
                with connect_ray(options.jobs):
                    done = _render_pending(options, out, assets, pending, left, failures, continuation)
            else:
                _begin(out, continuation, assets)
            write_failures(out / FAILURES_NAME, failures)  # sorted, each once
            manifest, updated = _finish(out, plan, by_id, failures, last)
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            raise FolderError(no_space_message(out, needed)) from error
    _require_kept(out, manifest, len(assets))
    if updated:
        print(
            f"updated        the records of {counted(updated, 'object')}, without rendering: name, creator, source, "
            "license"
        )
    _print_summary(out, manifest, time.monotonic() - start, done)
    return manifest


def _read_last(out: Path) -> _Last:
    path = out / MANIFEST_NAME
    return _Last(read_manifest(out), path.stat().st_mtime_ns) if path.is_file() else _Last()


def _is_described(out: Path, last: _Last) -> bool:
    """Say whether the table and the contact sheet of a finished folder are there."""
    has_kept = last.manifest is not None and not all(shard.rejected for shard in last.manifest.shards)
    return all((out / name).is_file() for name in (FILTER_NAME, *[SHEET_NAME] * has_kept))


def _require_as_recorded(
    out: Path, plan: Sequence[PlannedShard], assets: Mapping[str, Asset], last: _Last
) -> None:
    if last.manifest is not None:
        known = {shard.name: shard for shard in last.manifest.shards}
        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
            check = partial(check_recorded_hashes, out, assets=assets, known=known, before_ns=last.written_ns)
            list(pool.map(check, plan))


def _begin(out: Path, continuation: ResumePlan, assets: Sequence[Asset]) -> None:
    """Make the folder one that is not finished, and record what it is to hold."""
    (out / MANIFEST_NAME).unlink(missing_ok=True)
    write_plan(out, continuation, assets)


def estimate_bytes(objects: int, settings: RenderSettings) -> int:
    """Estimate, generously, the disk space that ``objects`` objects need: 2 bytes a pixel and headers.

    Depth takes 2 more, normals 3; a surface 24 bytes a point.
    """
    view = (2 + 2 * settings.depth + 3 * settings.normals) * settings.resolution**2 + 4096
    one = settings.views * view + settings.surface * SURFACE_POINTS * 24
    return (objects + 2 * settings.shard_size if objects else 0) * one


def _render_pending(
    options: PoolOptions,
    out: Path,
    assets: Sequence[Asset],
    pending: Sequence[Asset],
    left: Mapping[PlannedShard, set[str]],
    failures: dict[str, dict[str, str]],
    continuation: ResumePlan,
) -> _Done:
    """Render the pending assets, write each shard as it becomes complete."""
    rules = [parse_rule(rule) for rule in options.settings.rules]
    rendered, failed, cycles_s = 0, 0, 0.0
    unreachable: list[str] = []
    start = time.monotonic()
    by_id = {key: shard for shard in left for key in shard.ids}
    with closing(RenderPool(options)) as pool, closing(pool.render(pending)) as outcomes:
        is_new = not check_settings(out, options.settings, pool.renderer)
        _begin(out, continuation, assets)
        if is_new:
            write_settings(out, options.settings, pool.renderer)
        print(
            f"Rendering {len(pending)} of {counted(len(assets), 'object')}, {pool.describe()} ...", flush=True
        )
        begun = time.monotonic()
        with tqdm(
            total=len(assets), initial=len(assets) - len(pending), unit="object", file=sys.stderr
        ) as bar:
            for outcome in outcomes:
                asset = outcome.asset
                if outcome.kind == "no space":
                    raise FolderError(
                        expected="room for a few images in the scratch folder of each node",
                        found=outcome.reason,
                        remedy="free some space there and run the same command again, it goes on where it was",
                    )
                unreachable = [*unreachable, asset.id] if outcome.kind == "unreachable" else []
                if len(unreachable) >= _UNREACHABLE:
                    for key in unreachable:  # no fault of theirs
                        failures.pop(key, None)
                    write_failures(out / FAILURES_NAME, failures)
                    raise FolderError(
                        expected="to download meshes",
                        found=f"that {_UNREACHABLE} in a row could not be: {outcome.reason}",
                        remedy="run the same command again when the network is back, it goes on where it was",
                    )
                if outcome.kind == "done":
                    rendered += 1
                    cycles_s += outcome.cycles_s
                    write_part(out, asset.id, outcome.members)
                else:
                    failed += 1
                    failures[asset.id] = {"id": asset.id, "file": asset.file, "reason": outcome.reason}
                    write_quarantine(out, asset.id, f"{outcome.reason}\n\n{outcome.log}")
                    add_failure(out / FAILURES_NAME, failures[asset.id])
                    bar.write(f"left out: {asset.file}: {outcome.reason.splitlines()[0]}", file=sys.stderr)
                speed = rendered * options.settings.views / (time.monotonic() - begun)
                bar.set_postfix_str(f"{failed} failed, {speed:.1f} views/s", refresh=False)
                bar.update()
                shard = by_id[asset.id]
                left[shard].discard(asset.id)
                if not left[shard]:
                    write_planned_shard(out, shard, rules)
        return _Done(rendered, cycles_s / ((time.monotonic() - start) * max(1, pool.processes)))


def _finish(
    out: Path,
    plan: Sequence[PlannedShard],
    assets: Mapping[str, Asset],
    failures: Mapping[str, Mapping[str, str]],
    last: _Last,
) -> tuple[Manifest, int]:
    """Bring the records up to date, describe the shards, draw the contact sheet, write the manifest last.

    Returns:
        The manifest, and how many records were updated.
    """
    settings = read_settings(out) if (out / SETTINGS_NAME).is_file() else {}
    rules = settings.get("rules", ())
    known = {shard.name: shard for shard in last.manifest.shards} if last.manifest else {}

    def describe(planned: PlannedShard) -> tuple[int, list[Shard]]:
        updated = update_records(out, planned, assets, [parse_rule(rule) for rule in rules])
        return updated, describe_shards(out, planned, known, last.written_ns)

    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:  # hashes what is new
        found = list(pool.map(describe, plan))
    shards = tuple(shard for _, described in found for shard in described)
    kept = tuple(shard for shard in shards if not shard.rejected)
    write_filter_table(out, shards, tuple(assets.values()), rules, failures)
    if not shards:
        raise FolderError(
            expected="at least one object",
            found=f"that all {len(assets)} failed",
            remedy=f"{out / FAILURES_NAME} says why: mend them, delete that file and run again",
        )
    views = settings["views"]
    if kept:
        write_contact_sheet(out, kept, views)
    manifest = Manifest(shards=shards, views=views, failures=len(failures), render=settings)
    write_manifest(out, manifest)
    shutil.rmtree(out / PARTS_NAME, ignore_errors=True)
    return manifest, sum(updated for updated, _ in found)


def _require_kept(out: Path, manifest: Manifest, assets: int) -> None:
    if all(shard.rejected for shard in manifest.shards):
        raise FolderError(
            expected="at least one object to keep",
            found=f"that of {assets} {manifest.failures} failed and the rules reject the others",
            remedy=(
                f"{out / FILTER_NAME} and {out / FAILURES_NAME} say why: choose other rules with `python "
                f"-m data_tools repack --shards {out} --out ... --where ...`, or mend the assets"
            ),
        )


def _print_summary(out: Path, manifest: Manifest, seconds: float, done: _Done) -> None:
    train, val = (sum(s.samples for s in manifest.split(split)) for split in ("train", "val"))
    rejected = sum(shard.samples for shard in manifest.shards if shard.rejected)
    print(
        f"objects        {train + val} ({train} train, {val} held out), {counted(manifest.views, 'view')} each"
    )
    print(f"shards         {len(manifest.shards)}")
    if rejected:
        print(f"rejected       {rejected}, see {out / FILTER_NAME}; `repack --where` chooses again")
    if manifest.failures:
        print(
            f"left out       {manifest.failures}, see {out / FAILURES_NAME} and {out / QUARANTINE_NAME} (they are not "
            "tried again unless you delete that file)"
        )
    if done.objects:
        views = done.objects * manifest.views
        print(
            f"speed          {views / seconds:.1f} views/s ({views} views in {seconds:.1f} s, start included); Cycles "
            f"itself took {done.cycles:.0%}"
        )
    print(f"folder         {out}")
    print(f"contact sheet  {out / SHEET_NAME}")
    print(f"next           make train DATA={shlex.quote(str(out))}")
