"""``python -m data_tools render``: meshes to shards; a thin driver around Blender workers.

The order of events in OUT: ``render.json`` first, then parts and shards as objects finish (``shard_folder``),
the contact sheet, and ``manifest.json`` last.
"""

import errno
import os
import shutil
import sys
import time
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

from tqdm import tqdm

from data_tools.assets import Asset, find_assets
from data_tools.contact_sheet import SHEET_NAME, write_contact_sheet
from data_tools.plan import PlannedShard, plan_shards
from data_tools.settings import RenderSettings, check_settings, read_settings, write_settings
from data_tools.shard_folder import (
    FAILURES_NAME,
    PARTS_NAME,
    FolderError,
    clear_leftovers,
    find_shard,
    finished_ids,
    locked,
    no_space_message,
    read_failures,
    shard_ids,
    write_failures,
    write_planned_shard,
)
from data_tools.workers import PoolSetup, Worker, run_workers
from lrm_pl.data.manifest import MANIFEST_NAME, Manifest, read_manifest, write_manifest


def render(
    assets_folder: Path, out: Path, settings: RenderSettings, jobs: int, time_limit_s: float
) -> Manifest:
    """Render what is not rendered yet and finish the folder.

    Args:
        assets_folder: Folder of meshes.
        out: Folder of shards.
        settings: What decides the bytes.
        jobs: Blender processes.
        time_limit_s: Seconds that one object may take.

    Returns:
        The manifest of the finished folder.

    Raises:
        InputError: Bad assets, other settings in ``out``, no space, every asset failed, or Blender does not start.
    """
    start = time.monotonic()
    assets = find_assets(assets_folder)
    plan = plan_shards([asset.id for asset in assets], settings.held_out, settings.shard_size)
    check_settings(out, settings, assets)
    out.mkdir(parents=True, exist_ok=True)
    with locked(out) as lock:
        manifest = read_manifest(out) if (out / MANIFEST_NAME).is_file() else None
        clear_leftovers(out)
        failures = read_failures(out)
        finished = finished_ids(out, plan, set(failures))
        by_id = {asset.id: asset for asset in assets}
        pending = [by_id[key] for shard in plan for key in shard.ids if key not in finished | set(failures)]
        if not pending and manifest is not None:
            shutil.rmtree(out / PARTS_NAME)
            print(f"Nothing to render: all {len(assets)} objects of {assets_folder} are finished.")
            _print_summary(out, manifest, time.monotonic() - start, rendered=0)
            return manifest
        (out / MANIFEST_NAME).unlink(missing_ok=True)
        needed = estimate_bytes(len(pending), settings)
        if shutil.disk_usage(out).free < needed:
            raise FolderError(no_space_message(out, needed))
        pool = PoolSetup(
            assets=assets_folder,
            out=out,
            settings=settings,
            jobs=jobs,
            threads=max(1, len(os.sched_getaffinity(0)) // jobs),
            time_limit_s=time_limit_s,
            lock=lock,
        )
        try:
            rendered = _render_pending(pool, plan, assets, pending, failures)
            manifest = _finish(out, plan, settings, len(failures))
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            raise FolderError(no_space_message(out, needed)) from error
    _print_summary(out, manifest, time.monotonic() - start, rendered)
    return manifest


def estimate_bytes(objects: int, settings: RenderSettings) -> int:
    """Estimate, generously, the disk space that ``objects`` objects need: 2 bytes a pixel and headers."""
    view = 2 * settings.resolution**2 + 4096
    return (objects + 2 * settings.shard_size if objects else 0) * settings.views * view


def _render_pending(
    pool: PoolSetup,
    plan: Sequence[PlannedShard],
    assets: Sequence[Asset],
    pending: Sequence[Asset],
    failures: dict[str, dict[str, str]],
) -> int:
    """Render the pending assets, write each shard as it becomes complete; returns the objects made."""
    left = {shard.name: {asset.id for asset in pending} & set(shard.ids) for shard in plan}
    for shard in plan:
        if not left[shard.name] and shard_ids(pool.out, shard) is None:
            write_planned_shard(pool.out, shard)
    if not pending:
        return 0
    print(f"Rendering {len(pending)} of {len(assets)} objects, {pool.jobs} Blender processes ...", flush=True)
    first = Worker(pool, 0)
    try:
        if not check_settings(pool.out, pool.settings, assets, first.renderer):
            write_settings(pool.out, pool.settings, assets, first.renderer)
    except BaseException:
        first.kill()
        raise
    rendered, failed, start = 0, 0, time.monotonic()
    by_id = {key: shard for shard in plan for key in shard.ids}
    done_before = len(assets) - len(pending)
    with (
        tqdm(total=len(assets), initial=done_before, unit="object", file=sys.stderr) as bar,
        closing(run_workers(pool, first, pending)) as outcomes,
    ):
        for outcome in outcomes:
            asset = outcome.asset
            if outcome.kind == "no space":
                raise OSError(errno.ENOSPC, outcome.reason)
            if outcome.kind == "failed":
                failed += 1
                failures[asset.id] = {"id": asset.id, "file": asset.file, "reason": outcome.reason}
                write_failures(pool.out, failures)
                bar.write(f"left out: {asset.file}: {outcome.reason.splitlines()[0]}", file=sys.stderr)
            else:
                rendered += 1
            speed = rendered * pool.settings.views / (time.monotonic() - start)
            bar.set_postfix_str(f"{failed} failed, {speed:.1f} views/s", refresh=False)
            bar.update()
            shard = by_id[asset.id]
            left[shard.name].discard(asset.id)
            if not left[shard.name]:
                write_planned_shard(pool.out, shard)
    return rendered


def _finish(out: Path, plan: Sequence[PlannedShard], settings: RenderSettings, failures: int) -> Manifest:
    """Describe the shards that are there, draw the contact sheet, write the manifest last."""
    shards = tuple(shard for planned in plan if (shard := find_shard(out, planned)) is not None)
    if not shards:
        raise FolderError(
            f"expected at least one object that renders, found that all {failures} failed; "
            f"{out / FAILURES_NAME} says why: mend the assets, delete that file and run again"
        )
    write_contact_sheet(out, shards, settings.views)
    manifest = Manifest(shards=shards, views=settings.views, failures=failures, render=read_settings(out))
    write_manifest(out, manifest)
    for name in (PARTS_NAME, "scratch"):
        shutil.rmtree(out / name, ignore_errors=True)
    return manifest


def _print_summary(out: Path, manifest: Manifest, seconds: float, rendered: int) -> None:
    train, val = (sum(s.samples for s in manifest.split(split)) for split in ("train", "val"))
    print(f"objects        {train + val} ({train} train, {val} held out), {manifest.views} views each")
    print(f"shards         {len(manifest.shards)}")
    if manifest.failures:
        print(
            f"left out       {manifest.failures}, see {out / FAILURES_NAME} "
            "(they are not tried again unless you delete that file)"
        )
    if rendered:
        views = rendered * manifest.views
        print(
            f"speed          {views / seconds:.1f} views/s ({views} views in {seconds:.1f} s, start included)"
        )
    print(f"folder         {out}")
    print(f"contact sheet  {out / SHEET_NAME}")
    print(f"next           make train DATA={out}")
