"""The command ``python -m data_tools render``, which renders meshes into shards.

The first files in OUT are ``plan.parquet``, ``assets.parquet`` and ``render.json``. Parts and shards are written when
objects are complete (see ``shard_folder``). After the last shard, ``filter.parquet`` and the contact sheet are written.
The last file is ``manifest.json``.
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
    no_space_error,
    part_ids,
    read_failures,
    remove_partial_files,
    update_records,
    write_failures,
    write_part,
    write_planned_shard,
    write_quarantine,
)
from data_tools.rendering.shard_plan import PlannedShard, estimate_object_bytes
from lrm_pl.data.manifest import MANIFEST_NAME, Manifest, Shard, read_manifest, write_manifest
from lrm_pl.errors import counted

#: Number of consecutive download failures after which the network is assumed to be unavailable.
_UNREACHABLE = 5


@dataclasses.dataclass
class _RenderStatistics:
    """Statistics of a run.

    Attributes:
        objects: Number of rendered objects.
        cycles_fraction: Fraction of the time that the processes spent in Cycles.
    """

    objects: int = 0
    cycles_fraction: float = 0.0


@dataclasses.dataclass(frozen=True)
class _PreviousManifest:
    """Manifest that a previous run wrote.

    Attributes:
        manifest: The manifest, or None if there is none.
        written_ns: Modification time of the manifest in nanoseconds.
    """

    manifest: Manifest | None = None
    written_ns: int = 0


def render(assets: Sequence[Asset], out: Path, settings: RenderSettings, options: PoolOptions) -> Manifest:
    """Render all assets that have not been rendered, and write the manifest.

    Args:
        assets: Assets to render.
        out: Folder of shards.
        settings: Render settings.
        options: Options of the Blender processes.

    Returns:
        The manifest.

    Raises:
        InputError: The assets or settings are invalid, the disk is full, all assets failed or were rejected, or Blender
            cannot be started.
    """
    start = time.monotonic()
    rules = [parse_rule(rule) for rule in settings.rules]
    check_settings(out, settings)
    out.mkdir(parents=True, exist_ok=True)
    with lock_folder(out):
        last = _read_previous(out)
        plan = plan_folder(out, settings, assets, options.assets)
        remove_partial_files(out)
        by_id = {asset.id: asset for asset in assets}
        failures = {key: record for key, record in read_failures(out).items() if key in by_id}
        ended = finished_ids(out, plan.shards, set(failures)) | failures.keys()
        pending = [by_id[key] for shard in plan.shards for key in shard.ids if key not in ended]
        if not pending and last.manifest is not None and not plan.list_changed and _is_described(out, last):
            write_plan(out, plan, assets)
            manifest = last.manifest
            shutil.rmtree(out / PARTS_NAME)
            print(
                f"Nothing to render: all {counted(len(assets), 'object')} of {options.assets} are finished."
            )
            _require_kept(out, manifest, len(assets))
            _print_summary(out, manifest, time.monotonic() - start, _RenderStatistics())
            return manifest
        _check_recorded_hashes(out, plan.shards, by_id, last)
        write_failures(out / FAILURES_NAME, failures)  # removes an incomplete last line
        needed = estimate_bytes(len(pending), settings)
        if shutil.disk_usage(out).free < needed:
            raise no_space_error(out, needed)
        try:
            left = {shard: {key for key in shard.ids if key not in ended} for shard in plan.shards}
            have = part_ids(out)
            for shard in (shard for shard in plan.shards if not left[shard] and have.intersection(shard.ids)):
                write_planned_shard(out, shard, rules)
            statistics = _RenderStatistics()
            if pending:
                with connect_ray(options.jobs):
                    statistics = _render_pending(options, out, assets, pending, left, failures, plan)
            else:
                _mark_unfinished(out, plan, assets)
            write_failures(out / FAILURES_NAME, failures)  # sorted, without duplicates
            manifest, updated = _finish(out, plan.shards, by_id, failures, last)
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            raise no_space_error(out, needed) from error
    _require_kept(out, manifest, len(assets))
    if updated:
        print(
            f"updated        name, creator, source or license of {counted(updated, 'object')}, without rendering"
        )
    _print_summary(out, manifest, time.monotonic() - start, statistics)
    return manifest


def _read_previous(out: Path) -> _PreviousManifest:
    path = out / MANIFEST_NAME
    return (
        _PreviousManifest(read_manifest(out), path.stat().st_mtime_ns)
        if path.is_file()
        else _PreviousManifest()
    )


def _is_described(out: Path, last: _PreviousManifest) -> bool:
    """Return whether the filter table and the contact sheet of a complete folder exist."""
    has_kept = last.manifest is not None and not all(shard.rejected for shard in last.manifest.shards)
    return all((out / name).is_file() for name in (FILTER_NAME, *[SHEET_NAME] * has_kept))


def _check_recorded_hashes(
    out: Path, plan: Sequence[PlannedShard], assets: Mapping[str, Asset], last: _PreviousManifest
) -> None:
    if last.manifest is not None:
        known = {shard.name: shard for shard in last.manifest.shards}
        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
            check = partial(check_recorded_hashes, out, assets=assets, known=known, before_ns=last.written_ns)
            list(pool.map(check, plan))


def _mark_unfinished(out: Path, plan: ResumePlan, assets: Sequence[Asset]) -> None:
    """Remove the manifest and write the plan."""
    (out / MANIFEST_NAME).unlink(missing_ok=True)
    write_plan(out, plan, assets)


def estimate_bytes(objects: int, settings: RenderSettings) -> int:
    """Estimate the required disk space, including the space for two shards whose parts have not been deleted.

    Args:
        objects: Number of objects to render.
        settings: Render settings.

    Returns:
        Upper estimate of the size in bytes.
    """
    one = estimate_object_bytes(
        settings.views,
        settings.resolution,
        depth=settings.depth,
        normals=settings.normals,
        surface=settings.surface,
    )
    return (objects + min(objects, 2 * settings.shard_size)) * one


def _render_pending(
    options: PoolOptions,
    out: Path,
    assets: Sequence[Asset],
    pending: Sequence[Asset],
    left: Mapping[PlannedShard, set[str]],
    failures: dict[str, dict[str, str]],
    plan: ResumePlan,
) -> _RenderStatistics:
    """Render the pending assets, and write each shard when it is complete."""
    rules = [parse_rule(rule) for rule in options.settings.rules]
    rendered, failed, cycles_s = 0, 0, 0.0
    unreachable: list[str] = []
    start = time.monotonic()
    by_id = {key: shard for shard in left for key in shard.ids}
    with closing(RenderPool(options)) as pool, closing(pool.render(pending)) as results:
        is_new = not check_settings(out, options.settings, pool.renderer)
        _mark_unfinished(out, plan, assets)
        if is_new:
            write_settings(out, options.settings, pool.renderer)
        print(
            f"Rendering {len(pending)} of {counted(len(assets), 'object')}, {pool.describe()} ...", flush=True
        )
        begun = time.monotonic()
        with tqdm(
            total=len(assets), initial=len(assets) - len(pending), unit="object", file=sys.stderr
        ) as bar:
            for result in results:
                asset = result.asset
                if result.status == "no space":
                    raise FolderError(
                        expected="free disk space in the temporary folder of each node",
                        found=result.reason,
                        remedy="free some space, then run the same command again to resume",
                    )
                unreachable = [*unreachable, asset.id] if result.status == "unreachable" else []
                if len(unreachable) >= _UNREACHABLE:
                    for key in unreachable:  # the assets did not cause these failures
                        failures.pop(key, None)
                    write_failures(out / FAILURES_NAME, failures)
                    raise FolderError(
                        expected="reachable meshes",
                        found=f"{_UNREACHABLE} consecutive download failures: {result.reason}",
                        remedy="run the same command again to resume, once the network is available",
                    )
                if result.status == "done":
                    rendered += 1
                    cycles_s += result.cycles_s
                    write_part(out, asset.id, result.members)
                else:
                    failed += 1
                    failures[asset.id] = {"id": asset.id, "file": asset.file, "reason": result.reason}
                    write_quarantine(out, asset.id, f"{result.reason}\n\n{result.log}")
                    add_failure(out / FAILURES_NAME, failures[asset.id])
                    bar.write(f"failed: {asset.file}: {result.reason.splitlines()[0]}", file=sys.stderr)
                speed = rendered * options.settings.views / (time.monotonic() - begun)
                bar.set_postfix_str(f"{failed} failed, {speed:.1f} views/s", refresh=False)
                bar.update()
                shard = by_id[asset.id]
                left[shard].discard(asset.id)
                if not left[shard]:
                    write_planned_shard(out, shard, rules)
        return _RenderStatistics(rendered, cycles_s / ((time.monotonic() - start) * max(1, pool.processes)))


def _finish(
    out: Path,
    plan: Sequence[PlannedShard],
    assets: Mapping[str, Asset],
    failures: Mapping[str, Mapping[str, str]],
    last: _PreviousManifest,
) -> tuple[Manifest, int]:
    """Update the records in the shards, and write the filter table, the contact sheet and the manifest.

    Returns:
        The manifest, and the number of updated records.
    """
    settings = read_settings(out) if (out / SETTINGS_NAME).is_file() else {}
    rules = settings.get("rules", ())
    known = {shard.name: shard for shard in last.manifest.shards} if last.manifest else {}

    def describe(planned: PlannedShard) -> tuple[int, list[Shard]]:
        updated = update_records(out, planned, assets, [parse_rule(rule) for rule in rules])
        return updated, describe_shards(out, planned, known, last.written_ns)

    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        found = list(pool.map(describe, plan))
    shards = tuple(shard for _, described in found for shard in described)
    kept = tuple(shard for shard in shards if not shard.rejected)
    write_filter_table(out, shards, tuple(assets.values()), rules, failures)
    if not shards:
        raise FolderError(
            expected="at least one rendered object",
            found=f"{counted(len(assets), 'failure')}",
            remedy=f"see {out / FAILURES_NAME} for the reasons, correct the assets, delete that file and run again",
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
            expected="at least one accepted object",
            found=f"{manifest.failures} failed and {assets - manifest.failures} rejected ones",
            remedy=(
                f"see {out / FILTER_NAME} and {out / FAILURES_NAME} for the reasons. Choose other rules with `python "
                f"-m data_tools repack --shards {out} --out ... --where ...`, or correct the assets"
            ),
        )


def _print_summary(out: Path, manifest: Manifest, seconds: float, statistics: _RenderStatistics) -> None:
    train, val = (sum(s.samples for s in manifest.split(split)) for split in ("train", "val"))
    rejected = sum(shard.samples for shard in manifest.shards if shard.rejected)
    print(
        f"objects        {train + val} ({train} train, {val} held out), {counted(manifest.views, 'view')} each"
    )
    print(f"shards         {len(manifest.shards)}")
    if rejected:
        print(f"rejected       {rejected}, see {out / FILTER_NAME}; `repack --where` applies other rules")
    if manifest.failures:
        print(
            f"failed         {manifest.failures}, see {out / FAILURES_NAME} and {out / QUARANTINE_NAME}; delete "
            f"{FAILURES_NAME} to retry"
        )
    if statistics.objects:
        views = statistics.objects * manifest.views
        print(
            f"speed          {views / seconds:.1f} views/s ({views} views in {seconds:.1f} s, including startup); "
            f"{statistics.cycles_fraction:.0%} of the time in Cycles"
        )
    print(f"folder         {out}")
    print(f"contact sheet  {out / SHEET_NAME}")
    print(f"next           make train DATA={shlex.quote(str(out))}")
