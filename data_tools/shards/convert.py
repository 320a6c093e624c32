"""``python -m data_tools convert``: folders of views that others rendered or filmed, made into shards.

What a layout's files and numbers mean is in ``data_tools.layouts``; whether that is so is checked for every object: its
cameras must fit its silhouettes (``silhouettes``). An object that cannot be used is left out, and named in
``OUT/failures.jsonl``. RGBA images keep their bytes.
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
from data_tools.shards.pool import LeftOut, Made, write_shards
from data_tools.shards.repack import resized
from lrm_pl.data.manifest import Manifest, new_folder, write_manifest
from lrm_pl.data.schema import Sample, SampleInfo, encode_sample
from lrm_pl.errors import InputError, counted
from lrm_pl.paths import user_path


class ConvertError(InputError):
    """A folder cannot be converted as it was asked for."""


@dataclasses.dataclass(frozen=True)
class Task:
    """An object to be converted.

    Attributes:
        folder: Its folder.
        place: The same, from the root on.
        kind: What it is.
    """

    folder: Path
    place: str
    kind: ViewFormat | None


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command to the others."""
    parser = commands.add_parser(
        "convert",
        help="folders that others rendered or filmed, made into shards",
        description=(
            "Make shards out of views in the layout of OpenLRM, Zero-1-to-3, InstantMesh or MVImgNet. An object that "
            "cannot be used is left out and listed in OUT/failures.jsonl."
        ),
    )
    parser.add_argument("--from", dest="layout", choices=LAYOUTS, required=True, help="whose layout it is")
    parser.add_argument("--folder", type=user_path, required=True, help="where the objects are")
    parser.add_argument("--out", type=user_path, required=True, help="folder to make")
    parser.add_argument(
        "--shard-size", type=int, help="objects per shard (default: shards of at most about 256 MB)"
    )
    parser.add_argument(
        "--held-out", type=int, help="objects in the validation split; a sixth, at most 8, unless given"
    )
    parser.add_argument(
        "--res", type=int, help="side of the views, pixels; as they are (mvimgnet: 512) unless given"
    )
    parser.add_argument("--views", type=int, help="mvimgnet: views an object, evenly spaced; 24 unless given")
    parser.add_argument(
        "--masks", type=user_path, help="mvimgnet: folder of masks; else each instance has a folder masks"
    )


def run(args: argparse.Namespace) -> None:
    """Do what the command line says.

    Raises:
        InputError: It does not go together, or see ``convert``.
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
    """Make a folder of shards out of a folder of others' views.

    Args:
        layout: How the folder is laid out.
        folder: Where the objects are.
        out: The folder to make.
        resolution: Side of the views; None leaves them as they are.
        shard_size: Objects per shard; None: shards of at most about 256 MB.
        held_out: Objects in the validation split; None takes the renderer's number.

    Raises:
        InputError: ``out`` is there, there are no objects, none can be used, or two have one name.
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
        shards, left_out, notes = write_shards(partial_out, plan, tasks, make)
        failures = {
            key: {"id": key, "file": tasks[key].place, "reason": left.reason}
            for key, left in left_out.items()
        }
        if not shards or kind is None:
            why = out.with_name(f"{out.name}.{FAILURES_NAME}")
            write_failures(why, failures)
            raise ConvertError(
                subject=folder,
                expected=f"objects as {layout.name} lays them out",
                found=f"none among {len(tasks)} that can be used",
                remedy=f"{why} says why; the first: {next(iter(left_out.values())).reason}",
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
    print(f"{objects} in {counted(len(shards), 'shard')}, {len(failures)} left out")
    if failures:
        print(f"why            {out / FAILURES_NAME}")
    for error, keys in notes.items():
        print(f"undetectable   {undetectable_message(error, keys)}")
    print(f"next           make train DATA={shlex.quote(str(out))}")
    return manifest


def find_tasks(layout: Layout, folder: Path) -> dict[str, Task]:
    """Find the objects of a folder, by the ids that they get: id -> object.

    Raises:
        ConvertError: There are none, or two have one id.
    """
    tasks: dict[str, Task] = {}
    found = layout.find(folder)
    with ThreadPoolExecutor(8) as pool:  # it waits for the disk
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
) -> Made | LeftOut:
    """Convert an object and look at it; what is wrong with it stops nothing else."""
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
        return Made(encode_sample(sample), check_views(sample).undetectable)
    except (InputError, OSError) as error:
        return LeftOut(str(error))


def _wanted(kind: ViewFormat, resolution: int | None) -> ViewFormat:
    return kind if resolution is None else ViewFormat(kind.views, (resolution, resolution))
