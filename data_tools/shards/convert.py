"""The command ``python -m data_tools convert``, which converts image folders to shards.

``data_tools.layouts`` defines the supported layouts. The cameras of an object must be consistent with the silhouettes.
Objects that cannot be used are skipped and listed in ``OUT/failures.jsonl``. The bytes of RGBA images do not change if
the images are not resized.
"""

import argparse
import dataclasses
import re
import shlex
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from data_tools.layouts.files import PosedViews
from data_tools.layouts.registry import LAYOUTS, Layout, ViewFormat, get_layout, layout_renderer
from data_tools.quality.contact_sheet import write_contact_sheet
from data_tools.quality.validate import check_views, undetectable_message
from data_tools.rendering.shard_folder import FAILURES_NAME, write_failures
from data_tools.rendering.shard_plan import (
    default_held_out,
    default_shard_size,
    estimate_object_bytes,
    plan_shards,
)
from data_tools.shards.pool import EncodedSample, SkippedObject, write_shards
from data_tools.shards.repack import resized
from lrm_pl.data.manifest import Manifest, new_folder, write_manifest
from lrm_pl.data.schema import Sample, SampleInfo, encode_sample
from lrm_pl.errors import InputError, counted
from lrm_pl.paths import user_path


class ConvertError(InputError):
    """Raised if a folder cannot be converted with the given options."""


@dataclasses.dataclass(frozen=True)
class Task:
    """An object to convert.

    Attributes:
        folder: Folder of the object.
        place: Path of the folder relative to the root folder.
        kind: Number and size of the views, or None if unknown.
    """

    folder: Path
    place: str
    kind: ViewFormat | None


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the ``convert`` subcommand."""
    parser = commands.add_parser(
        "convert",
        help="convert image folders of other projects to shards",
        description=(
            "Convert views in the layout of OpenLRM, Zero-1-to-3, InstantMesh or MVImgNet to shards. Objects that "
            "cannot be used are skipped and listed in OUT/failures.jsonl."
        ),
    )
    parser.add_argument("--from", dest="layout", choices=LAYOUTS, required=True, help="layout of FOLDER")
    parser.add_argument("--folder", type=user_path, required=True, help="folder of the objects")
    parser.add_argument("--out", type=user_path, required=True, help="output folder")
    parser.add_argument(
        "--shard-size", type=int, help="objects per shard (default: shards of at most about 256 MB)"
    )
    parser.add_argument(
        "--held-out", type=int, help="objects in the validation split (default: a sixth, at most 8)"
    )
    parser.add_argument(
        "--res", type=int, help="side of the views in pixels (default: unchanged; mvimgnet: 512)"
    )
    parser.add_argument("--views", type=int, help="mvimgnet: views per object, evenly spaced (default: 24)")
    parser.add_argument(
        "--masks",
        type=user_path,
        help="mvimgnet: folder of masks (default: the folder masks of each instance)",
    )


def run(args: argparse.Namespace) -> None:
    """Run the ``convert`` command.

    Args:
        args: Parsed arguments of the command.

    Raises:
        InputError: The options are incompatible, or ``convert`` raises an error.
    """
    layout = get_layout(args.layout, args.folder, args.res, args.views, args.masks)
    resolution = None if args.layout == "mvimgnet" else args.res
    convert(layout, args.folder, args.out, resolution, args.shard_size, args.held_out)


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
        shard_size: Number of objects per shard. If None, the size of a shard is at most about 256 MB.
        held_out: Number of objects in the validation split. If None, it is one sixth of the objects, but at most 8.

    Returns:
        The manifest of the output folder.

    Raises:
        InputError: ``out`` exists, no object can be used, or two objects have the same id.
    """
    tasks = find_tasks(layout, folder)
    splits = dict.fromkeys(tasks, "")
    count = default_held_out(splits.values()) if held_out is None else held_out
    kinds = Counter(_wanted(task.kind, resolution) for task in tasks.values() if task.kind)
    kind = kinds.most_common(1)[0][0] if kinds else None
    if shard_size is None:
        shard_size = default_shard_size(estimate_object_bytes(kind.views, max(kind.size)) if kind else 1)
    plan = plan_shards(splits, count, shard_size)
    with new_folder(out) as partial_out:
        make = partial(_members, name=layout.name, read=layout.read, kind=kind, resolution=resolution)
        shards, skipped, notes = write_shards(partial_out, plan, tasks, make)
        failures = {
            key: {"id": key, "file": tasks[key].place, "reason": left.reason} for key, left in skipped.items()
        }
        if not shards or kind is None:
            why = out.with_name(f"{out.name}.{FAILURES_NAME}")
            write_failures(why, failures)
            raise ConvertError(
                subject=folder,
                expected=f"objects as {layout.name} lays them out",
                found=f"none among {len(tasks)} that can be used",
                remedy=f"see {why}. The first reason: {next(iter(skipped.values())).reason}",
            )
        write_failures(partial_out / FAILURES_NAME, failures)
        settings = {
            "renderer": layout_renderer(layout.name),
            "converted_from": str(folder),
            "normalize": layout.normalize,
            "views": kind.views,
            "resolution": max(kind.size),
            "shard_size": shard_size,
            "held_out": count,
        }
        manifest = Manifest(shards=shards, views=kind.views, failures=len(failures), render=settings)
        write_contact_sheet(partial_out, shards, kind.views)
        write_manifest(partial_out, manifest)
    objects = counted(len(tasks) - len(failures), "object")
    print(f"{objects} in {counted(len(shards), 'shard')}, {len(failures)} skipped")
    if failures:
        print(f"why            {out / FAILURES_NAME}")
    for error, keys in notes.items():
        print(f"undetectable   {undetectable_message(error, keys)}")
    print(f"next           make train DATA={shlex.quote(str(out))}")
    return manifest


def find_tasks(layout: Layout, folder: Path) -> dict[str, Task]:
    """Return a mapping from the ids of all objects in a folder to tasks.

    Raises:
        ConvertError: There are no objects, or two objects have the same id.
    """
    tasks: dict[str, Task] = {}
    found = layout.find(folder)
    with ThreadPoolExecutor(8) as pool:  # the tasks mostly wait for the disk
        kinds = list(pool.map(layout.view_format, found))
    for path, kind in zip(found, kinds, strict=True):
        place = path.relative_to(folder).as_posix()
        key = re.sub(r"[^A-Za-z0-9_-]", "_", place)
        if key in tasks:
            raise ConvertError(
                subject=folder,
                expected="one object a name",
                found=f"{tasks[key].place} and {place}, which are both {key!r}",
                remedy="rename one of them",
            )
        tasks[key] = Task(path, place, kind)
    if not tasks:
        raise ConvertError(subject=folder, expected=f"objects as {layout.name} lays them out", found="none")
    return tasks


def _members(
    key: str,
    task: Task,
    name: str,
    read: Callable[[Path], PosedViews],
    kind: ViewFormat | None,
    resolution: int | None,
) -> EncodedSample | SkippedObject:
    """Convert and check an object. If it cannot be used, return a ``SkippedObject``."""
    try:
        if task.kind and _wanted(task.kind, resolution) != kind:
            raise ConvertError(expected=f"{kind}, as most objects have", found=task.kind)
        posed = read(task.folder)
        views = (
            posed.views
            if resolution is None
            else tuple(resized(key, view, resolution) for view in posed.views)
        )
        info = SampleInfo(
            id=key,
            name=task.folder.name,
            license="unknown",
            creator="unknown",
            source=task.place,
            seed=0,
            renderer=layout_renderer(name),
            views=len(views),
        )
        sample = Sample(info, posed.c2w, posed.fxfycxcy, views)
        return EncodedSample(encode_sample(sample), check_views(sample).undetectable)
    except (InputError, OSError) as error:
        return SkippedObject(str(error))


def _wanted(kind: ViewFormat, resolution: int | None) -> ViewFormat:
    return kind if resolution is None else ViewFormat(kind.views, (resolution, resolution))
