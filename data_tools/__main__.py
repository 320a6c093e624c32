"""Command line of the data tools, ``python -m data_tools <command>``."""

import argparse
import dataclasses
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from data_tools.assets.asset_list import Asset
from data_tools.assets.demo_library import make_demo_assets
from data_tools.assets.fetch import add_parser as add_fetch_parser
from data_tools.assets.fetch import fetch
from data_tools.assets.scan import find_assets
from data_tools.blender.process import SAMPLES_PER_S, Limits, time_limit_s
from data_tools.layouts.registry import LAYOUTS, get_layout
from data_tools.quality.measures import CROPPED_RULE, DEFAULT_RULES, parse_rule
from data_tools.quality.report import inspect
from data_tools.quality.validate import validate
from data_tools.rendering.cameras import PRESETS
from data_tools.rendering.launch import add_parser as add_launch_parser
from data_tools.rendering.launch import launch
from data_tools.rendering.resume import plan_folder
from data_tools.rendering.settings import RenderSettings, check_settings, recorded_count
from data_tools.rendering.shard_plan import default_held_out, default_shard_size
from data_tools.shards.convert import convert
from data_tools.shards.index import index_folder
from data_tools.shards.repack import repack
from lrm_pl.apps.broken_pipes import ignore_broken_pipes
from lrm_pl.errors import InputError
from lrm_pl.paths import escape_names, user_path

if TYPE_CHECKING:
    from argparse import _SubParsersAction

    Commands = _SubParsersAction[argparse.ArgumentParser]

DEMO_ASSETS = Path(__file__).parent / "demo_assets"

#: Commands that can be resumed after an interruption.
_RESUMABLE = ("render", "fetch")

#: Maximum value of ``--jobs``.
_MAX_JOBS = 100_000


class _Terminated(KeyboardInterrupt):
    """Raised when SIGTERM is received, for example, from ``kill``, ``timeout`` or a batch system."""


def _terminate(*_: object) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # do not interrupt the cleanup
    raise _Terminated


def main(argv: list[str] | None = None) -> int:
    """Run a command.

    Args:
        argv: Command-line arguments. If None, ``sys.argv[1:]`` is used.

    Returns:
        The exit status.
    """
    args = _parser().parse_args(argv)
    problem: Exception
    try:
        return _run(args)
    except (FileExistsError, NotADirectoryError) as error:
        problem = InputError(f"a folder at {error.filename}", "a file", "choose another path")
    except PermissionError as error:
        problem = InputError(f"access to {error.filename}", "no permission", "choose another path")
    except (InputError, OSError) as error:
        problem = error
    except KeyboardInterrupt as stop:
        purpose = "to resume" if args.command in _RESUMABLE else "to start over"
        print(f"interrupted; run the same command again {purpose}", file=sys.stderr)
        return 143 if isinstance(stop, _Terminated) else 130
    print(f"error: {problem}", file=sys.stderr)
    return 1


def _run(args: argparse.Namespace) -> int:
    if args.command == "render":
        _render(args)
    elif args.command == "launch":
        render_args = _parser().parse_args(["render", *args.arguments])
        settings, assets = _settings(render_args)
        check_settings(render_args.out, settings)
        plan_folder(render_args.out, settings, assets, render_args.assets)
        launch(args, render_args.out)
    elif args.command == "validate":
        return 1 if validate(args.shards, args.jobs) else 0
    elif args.command == "inspect":
        inspect(args.shards)
    elif args.command == "index":
        index_folder(args.folder, args.jobs)
    elif args.command in ("repack", "merge"):
        repack(args.shards, args.out, args.res, args.shard_size, args.held_out, args.where)
    elif args.command == "fetch":
        fetch(args)
    elif args.command == "convert":
        layout = get_layout(args.layout, args.folder, args.res, args.views, args.masks)
        resolution = None if args.layout == "mvimgnet" else args.res
        convert(layout, args.folder, args.out, resolution, args.shard_size, args.held_out)
    else:
        make_demo_assets(args.package, args.out)
    return 0


def _render(args: argparse.Namespace) -> None:
    from data_tools.rendering.driver import render
    from data_tools.rendering.ray_pool import PoolOptions  # imports Ray, which is slow

    settings, assets = _settings(args)
    time_s = time_limit_s(settings) if args.time_limit is None else args.time_limit
    limits = Limits(time_s, args.memory_limit)
    render(assets, args.out, PoolOptions(args.assets, settings, args.jobs, limits))


def _settings(args: argparse.Namespace) -> tuple[RenderSettings, tuple[Asset, ...]]:
    assets = find_assets(args.assets, args.out)
    held_out = args.held_out
    if held_out is None:
        held_out = recorded_count(args.out, "held_out")
    if held_out is None:
        held_out = default_held_out([asset.split for asset in assets])
    preset = PRESETS[args.preset]
    normalize = args.normalize or preset.normalize
    default_rules = (*DEFAULT_RULES, CROPPED_RULE) if preset.shows_whole(normalize) else DEFAULT_RULES
    settings = RenderSettings(
        preset=args.preset,
        normalize=normalize,
        views=args.views,
        resolution=args.res,
        samples=args.samples,
        seed=args.seed,
        held_out=held_out,
        shard_size=args.shard_size or recorded_count(args.out, "shard_size") or 0,
        depth=args.depth,
        normals=args.normals,
        surface=args.surface,
        rules=default_rules if args.rules is None else tuple(args.rules),
    )
    if not settings.shard_size:
        settings = dataclasses.replace(settings, shard_size=default_shard_size(settings.object_bytes))
    return settings, assets


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m data_tools", description="Convert meshes or images to shards for training."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="<command>")
    _add_render(commands)
    add_launch_parser(commands)
    _add_inspection(commands)
    _add_repack(commands)
    add_fetch_parser(commands)
    _add_convert(commands)
    _add_demo_assets(commands)
    return parser


def _add_render(commands: "Commands") -> None:
    add = commands.add_parser(
        "render",
        help="render a folder of meshes into shards with Blender Cycles",
        description=(
            "Render the assets listed in ASSETS/assets.parquet (written by `fetch`), or all glb, gltf, obj, ply and "
            "fbx files below ASSETS, into WebDataset shards. A second run resumes an interrupted one, renders added "
            "assets into additional shards, and updates names, creators, sources and licenses without rendering. "
            "Assets that cannot be rendered are listed in OUT/failures.jsonl; delete that file to retry them. "
            "The output of Blender for failed assets is in OUT/quarantine. Objects that violate a rule are stored in "
            "separate, rejected shards. OUT/filter.parquet contains the measures of all objects. If RAY_ADDRESS is "
            "set, Blender runs on the Ray cluster at this address."
        ),
    ).add_argument
    default = "(default: %(default)s)"
    add("--assets", type=user_path, default=DEMO_ASSETS, help=f"folder to search for meshes {default}")
    add("--out", type=user_path, default=Path("data/demo"), help=f"output folder {default}")
    add("--views", type=_between(1, 999), default=16, help=f"number of views per object {default}")
    add("--res", type=_between(8, 4096), default=128, help=f"view width and height in pixels {default}")
    add("--depth", action="store_true", help="store a depth map for each view")
    add("--normals", action="store_true", help="store a normal map for each view")
    add(
        "--surface",
        action="store_true",
        help="store surface points for each object, for use by `lrm evaluate`",
    )
    add(
        "--samples", type=_between(1, 65536), default=16, help=f"number of Cycles samples per pixel {default}"
    )
    add(
        "--jobs",
        type=_between(1, _MAX_JOBS),
        help="number of Blender processes (default: one per GPU; without GPUs, one per two CPUs but at least 2)",
    )
    add("--preset", choices=sorted(PRESETS), default="frame", help=f"camera preset {default}")
    add(
        "--normalize",
        choices=("sphere", "cube"),
        help="normalize objects to a bounding sphere of radius 1 or to a longest side of 2 "
        "(default: depends on the preset)",
    )
    add(
        "--seed",
        type=_between(0, 2**31 - 1),
        default=0,
        help=f"random seed for the cameras and for Cycles {default}",
    )
    _add_plan(add, held_out="default: one sixth, at most 8")
    add(
        "--time-limit",
        type=float,
        metavar="SECONDS",
        help="time limit per object in seconds "
        f"(default: {Limits.time_s:g} + views * res^2 * samples / {SAMPLES_PER_S:,})",
    )
    add(
        "--memory-limit",
        type=float,
        default=Limits.memory_gb,
        metavar="GB",
        help=f"memory limit per Blender process in GB {default}",
    )
    add(
        "--rules",
        type=_rule,
        nargs="*",
        metavar="RULE",
        help="rules that objects must satisfy. Objects that violate a rule are rejected. A rule compares a measure "
        f"in OUT/filter.parquet with a number (default: {', '.join(DEFAULT_RULES)}, and {CROPPED_RULE} for presets "
        "that show whole objects)",
    )


def _add_plan(add: Callable[..., argparse.Action], held_out: str) -> None:
    """Add the options that assign objects to splits and shards."""
    add("--held-out", type=_between(0, 10**6), help=f"number of objects in the validation split ({held_out})")
    add(
        "--shard-size",
        type=_between(1, 10**6),
        help="number of objects per shard (default: shards of at most about 256 MB)",
    )


def _add_inspection(commands: "Commands") -> None:
    folder, jobs = argparse.ArgumentParser(add_help=False), argparse.ArgumentParser(add_help=False)
    folder.add_argument(
        "--shards", type=user_path, default=Path("data/demo"), help="folder of shards (default: %(default)s)"
    )
    jobs.add_argument(
        "--jobs", type=_between(1, _MAX_JOBS), help="number of processes (default: number of CPU cores)"
    )
    commands.add_parser(
        "validate",
        parents=[folder, jobs],
        help="check every byte of a folder of shards",
        description=(
            "Check sizes, hashes, members, schema and images, and whether the cameras are consistent with the images. "
            "Problems are reported by shard and sample. If there are problems, the exit status is 1."
        ),
    )
    commands.add_parser(
        "inspect",
        parents=[folder],
        help="print statistics about a folder of shards, and write them to an HTML page",
        description=(
            "Print statistics about cameras, images, licenses and failures, and write SHARDS/inspect.html, which also "
            "contains the contact sheet."
        ),
    )
    index = commands.add_parser(
        "index",
        parents=[jobs],
        help="make shards written with the webdataset package usable for training",
        description=(
            "Check the tar shards in FOLDER, and write manifest.json and an index of the members of each shard. Shards "
            "whose names begin with 'val' form the validation split. Damaged shards are reported as errors."
        ),
    )
    index.add_argument("folder", type=user_path, metavar="FOLDER", help="folder of tar shards")


def _add_repack(commands: "Commands") -> None:
    for name, summary in (
        ("repack", "change the resolution, shard size or split of shards without rendering"),
        ("merge", "join several folders of shards"),
    ):
        add = commands.add_parser(
            name,
            help=summary,
            description="Write one folder of shards from existing folders. Images that are not resized are copied byte "
            "for byte.",
        ).add_argument
        add("--shards", type=user_path, nargs="+", required=True, help="input folders of shards")
        add("--out", type=user_path, required=True, help="output folder")
        add(
            "--res",
            type=_between(8, 4096),
            help="view width and height in pixels (default: unchanged)",
        )
        _add_plan(add, held_out="if set, these objects are selected again; default: unchanged")
        add(
            "--where",
            type=_rule,
            nargs="+",
            metavar="RULE",
            help="keep the objects that satisfy these rules (for example, 'coverage >= 0.05'), even if they were "
            "previously rejected; see filter.parquet for the measures (default: objects that were not rejected)",
        )


def _add_convert(commands: "Commands") -> None:
    add = commands.add_parser(
        "convert",
        help="convert image folders of other projects to shards",
        description=(
            "Convert views in the layout of OpenLRM, Zero-1-to-3, InstantMesh or MVImgNet to shards. Objects that "
            "cannot be used are skipped and listed in OUT/failures.jsonl."
        ),
    ).add_argument
    add("--from", dest="layout", choices=LAYOUTS, required=True, help="layout of FOLDER")
    add("--folder", type=user_path, required=True, help="folder that contains a subfolder for each object")
    add("--out", type=user_path, required=True, help="output folder")
    _add_plan(add, held_out="default: one sixth, at most 8")
    add("--res", type=int, help="view width and height in pixels (default: unchanged; mvimgnet: 512)")
    add("--views", type=int, help="mvimgnet: number of evenly spaced views per object (default: 24)")
    add(
        "--masks",
        type=user_path,
        help="mvimgnet: folder of masks (default: the folder 'masks' of each instance)",
    )


def _add_demo_assets(commands: "Commands") -> None:
    add = commands.add_parser(
        "demo-assets",
        help="create the demo assets from the Debian package sweethome3d-furniture",
        description=(
            "Create the folder of demo assets (GLB files, assets.csv, LICENSE.txt). The output is reproducible byte "
            "for byte. Download the package with `apt-get download sweethome3d-furniture`."
        ),
    ).add_argument
    add("--package", type=user_path, required=True, help="path of sweethome3d-furniture_1.8-1_all.deb")
    add("--out", type=user_path, default=DEMO_ASSETS, help="output folder (default: %(default)s)")


def _rule(text: str) -> str:
    try:
        parse_rule(text)
    except InputError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return text


def _between(low: int, high: int) -> Callable[[str], int]:
    def number(text: str) -> int:
        value = int(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"expected a number from {low} to {high}, but found {value}")
        return value

    return number


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, _terminate)
    ignore_broken_pipes()
    escape_names()
    sys.exit(main())
