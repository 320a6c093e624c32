"""The command ``python -m data_tools convert``, which converts image folders to shards.

``data_tools.layouts`` defines the supported layouts. The cameras of an object must be consistent with the silhouettes.
Objects that cannot be used are skipped and listed in ``OUT/failures.jsonl``. RGBA images that are not resized are
copied unchanged.
"""

import dataclasses
import re
import shlex
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from data_tools.layouts.files import PosedViews
from data_tools.layouts.registry import Layout, ViewFormat, layout_renderer
from data_tools.quality.contact_sheet import write_contact_sheet
from data_tools.quality.validate import check_views, undetectable_message
from data_tools.rendering.shard_folder import FAILURES_NAME, write_failures
from data_tools.rendering.shard_plan import (
    default_held_out,
    default_shard_size,
    estimate_object_bytes,
    plan_shards,
)
from data_tools.shards.pool import EncodedSample, write_shards
from data_tools.shards.repack import resized
from lrm_pl.data.manifest import Manifest, new_folder, write_manifest
from lrm_pl.data.schema import Sample, SampleInfo, encode_sample
from lrm_pl.errors import InputError, counted


class ConvertError(InputError):
    """Raised if a folder cannot be converted with the given options."""


@dataclasses.dataclass(frozen=True)
class Task:
    """An object to convert.

    Attributes:
        folder: Folder of the object.
        place: Path of the folder relative to the root folder.
        view_format: Number and size of the converted views, or None if unknown.
    """

    folder: Path
    place: str
    view_format: ViewFormat | None


def convert(
    layout: Layout,
    folder: Path,
    out: Path,
    resolution: int | None = None,
    shard_size: int | None = None,
    held_out: int | None = None,
) -> Manifest:
    """Convert a folder of views to a folder of shards.

    Args:
        layout: Layout of the folder.
        folder: Folder of the objects.
        out: Output folder.
        resolution: Width and height of the views in pixels. If None, the views are not resized.
        shard_size: Number of objects per shard. If None, shards have a size of up to about 256 MB.
        held_out: Number of objects in the validation split. If None, it is one sixth of the objects, but at most 8.

    Returns:
        The manifest of the output folder.

    Raises:
        InputError: ``out`` exists, no object can be used, or two objects have the same id.
    """
    tasks = find_tasks(layout, folder, resolution)
    splits = dict.fromkeys(tasks, "")
    count = default_held_out(splits.values()) if held_out is None else held_out
    formats = Counter(task.view_format for task in tasks.values() if task.view_format)
    usual = formats.most_common(1)[0][0] if formats else None
    if shard_size is None:
        shard_size = default_shard_size(estimate_object_bytes(usual.views, max(usual.size)) if usual else 1)
    plan = plan_shards(splits, count, shard_size)
    renderer = layout_renderer(layout.name)
    with new_folder(out) as partial_out:
        make = partial(_encode, renderer=renderer, read=layout.read, usual=usual, resolution=resolution)
        shards, skipped, notes = write_shards(partial_out, plan, tasks, make)
        failures = {
            key: {"id": key, "file": tasks[key].place, "reason": reason} for key, reason in skipped.items()
        }
        if not shards or usual is None:
            path = out.with_name(f"{out.name}.{FAILURES_NAME}")
            write_failures(path, failures)
            raise ConvertError(
                subject=folder,
                expected=f"usable objects in the layout of {layout.name}",
                found=f"none among {counted(len(tasks), 'object')}",
                remedy=f"see {path}. The first object was skipped because: {next(iter(skipped.values()))}",
            )
        write_failures(partial_out / FAILURES_NAME, failures)
        settings = {
            "renderer": renderer,
            "converted_from": str(folder),
            "normalize": layout.normalize,
            "views": usual.views,
            "resolution": max(usual.size),
            "shard_size": shard_size,
            "held_out": count,
        }
        manifest = Manifest(shards=shards, views=usual.views, failures=len(failures), render=settings)
        write_contact_sheet(partial_out, shards, usual.views)
        write_manifest(partial_out, manifest)
    objects = counted(len(tasks) - len(failures), "object")
    print(f"{objects} in {counted(len(shards), 'shard')}, {len(failures)} skipped")
    if failures:
        print(f"reasons        {out / FAILURES_NAME}")
    for error, keys in notes.items():
        print(f"undetectable   {undetectable_message(error, keys)}")
    print(f"next           make train DATA={shlex.quote(str(out))}")
    return manifest


def find_tasks(layout: Layout, folder: Path, resolution: int | None) -> dict[str, Task]:
    """Return a mapping from the ids of all objects in a folder to tasks.

    Raises:
        ConvertError: There are no objects, or two objects have the same id.
    """
    tasks: dict[str, Task] = {}
    found = layout.find(folder)
    with ThreadPoolExecutor(8) as pool:  # the tasks mostly wait for the disk
        formats = list(pool.map(layout.view_format, found))
    for path, view_format in zip(found, formats, strict=True):
        place = path.relative_to(folder).as_posix()
        key = re.sub(r"[^A-Za-z0-9_-]", "_", place)
        if key in tasks:
            raise ConvertError(
                subject=folder,
                expected="folders with different ids",
                found=f"{tasks[key].place} and {place} with the id {key!r}",
                remedy="rename one of the folders",
            )
        if view_format and resolution is not None:
            view_format = ViewFormat(view_format.views, (resolution, resolution))
        tasks[key] = Task(path, place, view_format)
    if not tasks:
        raise ConvertError(
            subject=folder, expected=f"objects in the layout of {layout.name}", found="no objects"
        )
    return tasks


def _encode(
    key: str,
    task: Task,
    renderer: str,
    read: Callable[[Path], PosedViews],
    usual: ViewFormat | None,
    resolution: int | None,
) -> EncodedSample | str:
    """Convert and check an object. If it cannot be used, return the reason."""
    try:
        if task.view_format and task.view_format != usual:
            raise ConvertError(expected=f"{usual}, as for most objects", found=task.view_format)
        posed = read(task.folder)
        views = posed.views
        if resolution is not None:
            views = tuple(resized(key, view, resolution) for view in views)
        info = SampleInfo(
            id=key,
            name=task.folder.name,
            license="unknown",
            creator="unknown",
            source=task.place,
            seed=0,
            renderer=renderer,
            views=len(views),
        )
        sample = Sample(info, posed.c2w, posed.fxfycxcy, views)
        return EncodedSample(encode_sample(sample), check_views(sample).undetectable)
    except (InputError, OSError) as error:
        return str(error)
