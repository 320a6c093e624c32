"""The command ``python -m data_tools render``, which renders meshes into shards.

The files ``plan.parquet``, ``assets.parquet`` and ``render.json`` are written to the output folder first. During
rendering, parts and shards are written as soon as they are complete (see ``shard_folder``). After the last shard,
``filter.parquet``, the contact sheet and finally ``manifest.json`` are written.
"""

import errno
import os
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from functools import partial
from itertools import chain, compress
from pathlib import Path
from typing import TypeVar

from tqdm import tqdm

from data_tools.assets.asset_list import Asset
from data_tools.quality.contact_sheet import SHEET_NAME, write_contact_sheet
from data_tools.quality.filter_table import FILTER_NAME, write_filter_table
from data_tools.quality.report import count_rejected, describe_objects
from data_tools.rendering import shard_folder
from data_tools.rendering.ray_pool import PoolOptions, RenderPool, connect_ray
from data_tools.rendering.resume import ResumePlan, plan_folder, write_plan
from data_tools.rendering.settings import RenderSettings, check_settings, read_settings, write_settings
from data_tools.rendering.shard_folder import FAILURES_NAME, PARTS_NAME, QUARANTINE_NAME, PreviousShards
from data_tools.rendering.shard_plan import PlannedShard
from lrm_pl.data.manifest import MANIFEST_NAME, Manifest, write_manifest
from lrm_pl.errors import InputError, counted

T = TypeVar("T")

#: Number of consecutive download failures after which the network is assumed to be unavailable.
_UNREACHABLE = 5


def render(assets: Sequence[Asset], out: Path, options: PoolOptions) -> Manifest:
    """Render all assets that have not been rendered, and write the manifest.

    Args:
        assets: Assets to render.
        out: Folder of shards.
        options: Render settings, and options of the Blender processes.

    Returns:
        The manifest.

    Raises:
        InputError: The assets or settings are invalid, the disk is full, all assets failed or were rejected, or Blender
            cannot be started.
    """
    start = time.monotonic()
    check_settings(out, options.settings)
    out.mkdir(parents=True, exist_ok=True)
    with shard_folder.lock_folder(out):
        manifest, rendered, cycles_fraction = _complete_folder(assets, out, options)
    if all(shard.rejected for shard in manifest.shards):
        raise InputError(
            expected="at least one accepted object",
            found=f"{manifest.failures} failed and {len(assets) - manifest.failures} rejected objects",
            remedy=f"see {FILTER_NAME} and {FAILURES_NAME} in {out}, and correct the assets or use `repack --where`",
        )
    _print_summary(out, manifest)
    if rendered:
        views, seconds = rendered * manifest.views, time.monotonic() - start
        print(
            f"speed          {views / seconds:.1f} views/s ({views} views in {seconds:.1f} s, including startup); "
            f"{cycles_fraction:.0%} of the time in Cycles"
        )
    print(f"next           make train DATA={shlex.quote(str(out))}")
    return manifest


def _complete_folder(assets: Sequence[Asset], out: Path, options: PoolOptions) -> tuple[Manifest, int, float]:
    """Render the pending assets and complete the folder.

    Returns:
        The manifest, the number of rendered objects, and the fraction of the time that the processes spent in Cycles.
    """
    settings, previous = options.settings, PreviousShards(out)
    plan = plan_folder(out, settings, assets, options.assets)
    shard_folder.remove_partial_files(out)
    by_id = {asset.id: asset for asset in assets}
    failures = {key: record for key, record in shard_folder.read_failures(out).items() if key in by_id}
    ended = shard_folder.part_ids(out).union(
        failures, *(shard_folder.shard_ids(out, shard) for shard in plan.shards)
    )
    pending = {shard: {key for key in shard.ids if key not in ended} for shard in plan.shards}
    number = sum(map(len, pending.values()))
    is_described = (out / FILTER_NAME).is_file() and (out / SHEET_NAME).is_file()
    if not number and previous.manifest and not plan.list_changed and is_described:
        write_plan(out, plan, assets)
        shutil.rmtree(out / PARTS_NAME)
        print(f"Nothing to render: all {counted(len(assets), 'object')} of {options.assets} are finished.")
        return previous.manifest, 0, 0.0
    # The list is written after all records have been updated. If it has not changed, the records are up to date.
    listed = by_id if plan.list_changed else {}
    find_changed = partial(shard_folder.find_changed_records, out, assets=listed, previous=previous)
    changes = _map(find_changed, plan.shards)
    # In addition to the shards, the parts of up to two shards that are not complete need space.
    needed = (number + min(number, 2 * settings.shard_size)) * settings.object_bytes
    if shutil.disk_usage(out).free < needed:
        raise _no_space_error(out, needed)
    try:
        shard_folder.write_failures(out / FAILURES_NAME, failures)  # removes an incomplete last line
        reopened = _map(partial(shard_folder.reopen_shard, out, failed=failures), plan.shards, changes)
        complete = [shard for shard in compress(plan.shards, reopened) if not pending[shard]]
        _map(partial(shard_folder.write_planned_shard, out, rules=settings.parsed_rules), complete)
        rendered, cycles_fraction = 0, 0.0
        if number:
            with connect_ray(options.jobs):
                rendered, cycles_fraction = _render_pending(options, out, plan, by_id, pending, failures)
        else:
            _mark_unfinished(out, plan, assets)
        shard_folder.write_failures(out / FAILURES_NAME, failures)  # sorted, without duplicates
        manifest = _write_manifest(out, plan.shards, settings, by_id, failures, previous)
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        raise _no_space_error(out, needed) from error
    if updated := sum(map(len, changes)):
        print(
            f"updated        name, creator, source or license of {counted(updated, 'object')}, without rendering"
        )
    return manifest, rendered, cycles_fraction


def _map(function: Callable[..., T], *arguments: Iterable[object]) -> list[T]:
    """Return ``list(map(function, *arguments))``, computed using one thread per CPU core."""
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        return list(pool.map(function, *arguments))


def _mark_unfinished(out: Path, plan: ResumePlan, assets: Sequence[Asset]) -> None:
    """Remove the manifest and write the plan."""
    (out / MANIFEST_NAME).unlink(missing_ok=True)
    write_plan(out, plan, assets)


def _no_space_error(folder: Path, needed: int) -> InputError:
    """Return the exception for a full disk.

    Args:
        folder: Folder on the disk.
        needed: Required space in bytes.
    """
    return InputError(
        subject=folder,
        expected=f"about {needed / 1e6:.1f} MB of free disk space",
        found=f"{shutil.disk_usage(folder).free / 1e6:.1f} MB",
        remedy="free some space, then run the same command again to resume",
    )


def _render_pending(
    options: PoolOptions,
    out: Path,
    plan: ResumePlan,
    assets: Mapping[str, Asset],
    pending: Mapping[PlannedShard, set[str]],
    failures: dict[str, dict[str, str]],
) -> tuple[int, float]:
    """Render the pending assets, and write each shard when it is complete.

    Returns:
        The number of rendered objects, and the fraction of the time that the processes spent in Cycles.
    """
    settings = options.settings
    rendered, failed, cycles_s = 0, 0, 0.0
    unreachable: list[str] = []
    start = time.monotonic()
    shard_of = {key: shard for shard in plan.shards for key in shard.ids}
    queue = [assets[key] for shard in plan.shards for key in shard.ids if key in pending[shard]]
    with closing(RenderPool(options)) as pool, closing(pool.render(queue)) as results:
        is_new = not check_settings(out, settings, pool.renderer)
        _mark_unfinished(out, plan, tuple(assets.values()))
        if is_new:
            write_settings(out, settings, pool.renderer)
        print(
            f"Rendering {len(queue)} of {counted(len(assets), 'object')}, {pool.describe()} ...", flush=True
        )
        begun = time.monotonic()
        done = len(assets) - len(queue)
        with tqdm(total=len(assets), initial=done, unit="object", file=sys.stderr) as bar:
            for result in results:
                asset = result.asset
                if result.status == "no space":
                    raise InputError(
                        expected="free disk space in the temporary folder of each node",
                        found=result.reason,
                        remedy="free some space, then run the same command again to resume",
                    )
                unreachable = [*unreachable, asset.id] if result.status == "unreachable" else []
                if len(unreachable) >= _UNREACHABLE:
                    for key in unreachable:  # the assets did not cause these failures
                        failures.pop(key, None)
                    shard_folder.write_failures(out / FAILURES_NAME, failures)
                    raise InputError(
                        expected="reachable meshes",
                        found=f"{_UNREACHABLE} consecutive download failures: {result.reason}",
                        remedy="check the network connection, then run the same command again to resume",
                    )
                if result.status == "done":
                    rendered += 1
                    cycles_s += result.cycles_s
                    shard_folder.write_part(out, asset.id, result.members)
                else:
                    failed += 1
                    failures[asset.id] = {"id": asset.id, "file": asset.file, "reason": result.reason}
                    shard_folder.add_failure(out, failures[asset.id], result.log)
                    bar.write(f"failed: {asset.file}: {result.reason.splitlines()[0]}", file=sys.stderr)
                speed = rendered * settings.views / (time.monotonic() - begun)
                bar.set_postfix_str(f"{failed} failed, {speed:.1f} views/s", refresh=False)
                bar.update()
                shard = shard_of[asset.id]
                pending[shard].discard(asset.id)
                if not pending[shard]:
                    shard_folder.write_planned_shard(out, shard, settings.parsed_rules)
        return rendered, cycles_s / ((time.monotonic() - start) * max(1, pool.processes))


def _write_manifest(
    out: Path,
    plan: Sequence[PlannedShard],
    settings: RenderSettings,
    assets: Mapping[str, Asset],
    failures: Mapping[str, Mapping[str, str]],
    previous: PreviousShards,
) -> Manifest:
    """Write the filter table, the contact sheet and the manifest."""
    described = _map(partial(shard_folder.describe_shards, out, previous=previous), plan)
    shards = tuple(chain.from_iterable(described))
    write_filter_table(out, shards, assets.values(), settings.parsed_rules, failures)
    if not shards:
        raise InputError(
            expected="at least one rendered object",
            found=counted(len(assets), "failure"),
            remedy=f"see {out / FAILURES_NAME}, correct the assets, delete this file and run the command again",
        )
    write_contact_sheet(out, shards, settings.views)
    manifest = Manifest(shards, settings.views, len(failures), read_settings(out))
    write_manifest(out, manifest)
    shutil.rmtree(out / PARTS_NAME, ignore_errors=True)
    return manifest


def _print_summary(out: Path, manifest: Manifest) -> None:
    print(f"objects        {describe_objects(manifest)}")
    print(f"shards         {len(manifest.shards)}")
    if rejected := count_rejected(manifest):
        print(f"rejected       {rejected}, see {out / FILTER_NAME}; `repack --where` applies other rules")
    if manifest.failures:
        print(
            f"failed         {manifest.failures}, see {out / FAILURES_NAME} and {out / QUARANTINE_NAME}; delete "
            f"{FAILURES_NAME} to retry"
        )
    print(f"folder         {out}")
    print(f"contact sheet  {out / SHEET_NAME}")
