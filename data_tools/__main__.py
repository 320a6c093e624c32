"""Command line of the data tools, ``python -m data_tools <command>``."""

import argparse
import dataclasses
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from data_tools.assets.asset_list import Asset
from data_tools.assets.fetch import add_parser as add_fetch_parser
from data_tools.assets.fetch import fetch
from data_tools.assets.scan import find_assets
from data_tools.blender.process import SAMPLES_PER_S, Limits, time_limit_s
from data_tools.quality.measures import CROPPED_RULE, DEFAULT_RULES, parse_rule
from data_tools.rendering.cameras import PRESETS
from data_tools.rendering.launch import add_parser as add_launch_parser
from data_tools.rendering.launch import launch
from data_tools.rendering.resume import plan_folder
from data_tools.rendering.settings import RenderSettings, check_settings, recorded_count
from data_tools.rendering.shard_plan import default_held_out, default_shard_size
from data_tools.shards import convert
from lrm_pl.apps.broken_pipes import ignore_broken_pipes
from lrm_pl.errors import InputError
from lrm_pl.paths import escape_names, user_path

if TYPE_CHECKING:
    from argparse import _SubParsersAction

    Commands = _SubParsersAction[argparse.ArgumentParser]

DEMO_ASSETS = Path(__file__).parent / "demo_assets"


#: Commands that can be resumed after an interruption.
_RESUMABLE = ("render", "fetch")


class _Terminated(KeyboardInterrupt):
    """Raised when SIGTERM is received, for example from ``kill``, ``timeout`` or a batch system."""


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
    try:
        if args.command == "render":
            _render(args)
        elif args.command == "launch":
            rendering = _parser().parse_args(["render", *args.arguments])
            settings, assets = _settings(rendering)
            check_settings(rendering.out, settings)
            plan_folder(rendering.out, settings, assets, rendering.assets)
            launch(args, rendering.out)
        elif args.command == "validate":
            from data_tools.quality.validate import validate

            return 1 if validate(args.shards, args.jobs) else 0
        elif args.command == "inspect":
            from data_tools.quality.report import inspect

            inspect(args.shards)
        elif args.command == "index":
            from data_tools.shards.index import index_folder

            index_folder(args.folder, args.jobs)
        elif args.command in ("repack", "merge"):
            from data_tools.shards.repack import repack

            repack(args.shards, args.out, args.res, args.shard_size, args.held_out, args.where)
        elif args.command == "fetch":
            fetch(args)
        elif args.command == "convert":
            convert.run(args)
        else:
            _demo_assets(args)
    except (FileExistsError, NotADirectoryError) as error:
        return _report(InputError(f"a folder at {error.filename}", "a file", "choose another path"))
    except PermissionError as error:
        return _report(InputError(f"access to {error.filename}", "no permission", "choose another path"))
    except (InputError, OSError) as error:
        return _report(error)
    except KeyboardInterrupt as stop:
        purpose = "to resume" if args.command in _RESUMABLE else "to start over"
        print(f"interrupted; run the same command again {purpose}", file=sys.stderr)
        return 143 if isinstance(stop, _Terminated) else 130
    return 0


def _report(error: Exception) -> int:
    print(f"error: {error}", file=sys.stderr)
    return 1


def _render(args: argparse.Namespace) -> None:
    from data_tools.rendering.driver import render
    from data_tools.rendering.ray_pool import PoolOptions  # imports Ray, which is slow

    settings, assets = _settings(args)
    limits = Limits(getattr(args, "time_limit", time_limit_s(settings)), args.memory_limit)
    render(assets, args.out, PoolOptions(args.assets, settings, args.jobs, limits))


def _settings(args: argparse.Namespace) -> tuple[RenderSettings, tuple[Asset, ...]]:
    assets = find_assets(args.assets, args.out)
    held_out = getattr(args, "held_out", None)
    if held_out is None:
        held_out = recorded_count(args.out, "held_out")
    if held_out is None:
        held_out = default_held_out([asset.split for asset in assets])
    normalize = getattr(args, "normalize", PRESETS[args.preset].normalize)
    rules = (*DEFAULT_RULES, CROPPED_RULE) if PRESETS[args.preset].shows_whole(normalize) else DEFAULT_RULES
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
        rules=tuple(getattr(args, "rules", rules)),
    )
    if not settings.shard_size:
        settings = dataclasses.replace(settings, shard_size=default_shard_size(settings.object_bytes))
    return settings, assets


def _demo_assets(args: argparse.Namespace) -> None:
    from data_tools.assets.demo_library import make_demo_assets

    make_demo_assets(args.package, args.out)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m data_tools", description="Prepare training data: from meshes to shards."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="<command>")
    _add_render(commands)
    add_launch_parser(commands)
    _add_inspection(commands)
    _add_repack(commands)
    add_fetch_parser(commands)
    convert.add_parser(commands)
    _add_demo_assets(commands)
    return parser


def _add_render(commands: "Commands") -> None:
    render = commands.add_parser(
        "render",
        help="render a folder of meshes into shards with Blender Cycles",
        description=(
            "Render the assets listed in ASSETS/assets.parquet (written by `fetch`), or all glb, gltf, obj, ply and "
            "fbx files below ASSETS, into WebDataset shards. A second run resumes an interrupted one, renders added "
            "assets into additional shards, and updates names, creators, sources and licenses without rendering. "
            "Assets that cannot be rendered are listed in OUT/failures.jsonl; delete that file to retry them. "
            "Blender's output for them is in OUT/quarantine. Objects that violate a rule are stored in separate, "
            "rejected shards. OUT/filter.parquet holds the measures of all objects. If RAY_ADDRESS is set, Blender "
            "runs on that Ray cluster."
        ),
    )
    render.add_argument(
        "--assets",
        type=user_path,
        default=DEMO_ASSETS,
        help="folder of meshes, searched recursively (default: %(default)s)",
    )
    render.add_argument(
        "--out", type=user_path, default=Path("data/demo"), help="output folder (default: %(default)s)"
    )
    render.add_argument(
        "--views", type=_between(1, 999), default=16, help="views per object (default: %(default)s)"
    )
    render.add_argument(
        "--res",
        type=_between(8, 4096),
        default=128,
        help="width and height of the views, in pixels (default: %(default)s)",
    )
    render.add_argument("--depth", action="store_true", help="store a depth map for each view")
    render.add_argument("--normals", action="store_true", help="store a normal map for each view")
    render.add_argument(
        "--surface", action="store_true", help="store surface points of each object, for `lrm evaluate`"
    )
    render.add_argument(
        "--samples",
        type=_between(1, 65536),
        default=16,
        help="Cycles samples per pixel (default: %(default)s)",
    )
    render.add_argument(
        "--jobs",
        type=_between(1, 100_000),
        help="maximum number of Blender processes (default: one per GPU, or one per two CPUs, at least two)",
    )
    render.add_argument(
        "--preset", choices=sorted(PRESETS), default="frame", help="camera preset (default: %(default)s)"
    )
    render.add_argument(
        "--normalize",
        choices=("sphere", "cube"),
        default=argparse.SUPPRESS,
        help="normalize objects to a bounding sphere of radius 1 or to a longest side of 2 (default: by preset)",
    )
    render.add_argument(
        "--seed",
        type=_between(0, 2**31 - 1),
        default=0,
        help="seed of the cameras and of Cycles (default: %(default)s)",
    )
    render.add_argument(
        "--held-out",
        type=_between(0, 10**6),
        default=argparse.SUPPRESS,
        help="objects in the validation split (default: one sixth, at most 8)",
    )
    render.add_argument(
        "--shard-size",
        type=_between(1, 10**6),
        help="objects per shard (default: shards of at most about 256 MB)",
    )
    render.add_argument(
        "--time-limit",
        type=float,
        default=argparse.SUPPRESS,
        metavar="SECONDS",
        help=f"time limit per object (default: {Limits.time_s:g} s + views * res^2 * samples / {SAMPLES_PER_S:,})",
    )
    render.add_argument(
        "--memory-limit",
        type=float,
        default=Limits.memory_gb,
        metavar="GB",
        help="memory limit per object (default: %(default)s GB)",
    )
    render.add_argument(
        "--rules",
        type=_rule,
        nargs="*",
        default=argparse.SUPPRESS,
        metavar="RULE",
        help="rules that objects must satisfy; others are rejected. A rule compares a measure of OUT/filter.parquet "
        f"with a number (default: {', '.join(DEFAULT_RULES)}, and {CROPPED_RULE} for presets that show whole objects)",
    )


def _add_inspection(commands: "Commands") -> None:
    folder = argparse.ArgumentParser(add_help=False)
    folder.add_argument(
        "--shards",
        type=user_path,
        default=Path("data/demo"),
        help="folder of shards (default: %(default)s)",
    )
    check = commands.add_parser(
        "validate",
        parents=[folder],
        help="check every byte of a folder of shards",
        description=(
            "Check sizes, hashes, members, schema and images, and whether the cameras are consistent with the images. "
            "Problems are reported by shard and sample. The exit status is 1 if there are any."
        ),
    )
    check.add_argument("--jobs", type=int, help="number of processes (default: number of CPU cores)")
    commands.add_parser(
        "inspect",
        parents=[folder],
        help="print statistics of a folder of shards, and write them as an HTML page",
        description=(
            "Print statistics of cameras, images, licenses and failures, and write SHARDS/inspect.html, which also "
            "contains the contact sheet."
        ),
    )
    index = commands.add_parser(
        "index",
        help="make shards written with plain webdataset ready for training",
        description=(
            "Check the tar shards in FOLDER and write a member index for each, and manifest.json. Shards whose names "
            "begin with 'val' form the validation split. Damaged shards are refused."
        ),
    )
    index.add_argument("folder", type=user_path, metavar="FOLDER", help="folder of tar shards")
    index.add_argument("--jobs", type=int, help="number of processes (default: number of CPU cores)")


def _add_repack(commands: "Commands") -> None:
    for name, summary in (
        ("repack", "change the resolution, shard size or split of shards without rendering"),
        ("merge", "join several folders of shards"),
    ):
        parser = commands.add_parser(
            name,
            help=summary,
            description="Write one folder of shards from others. Images whose size does not change keep their bytes.",
        )
        parser.add_argument(
            "--shards", type=user_path, nargs="+", required=True, help="input folders of shards"
        )
        parser.add_argument("--out", type=user_path, required=True, help="output folder")
        parser.add_argument(
            "--res",
            type=_between(8, 4096),
            help="width and height of the views, in pixels (default: unchanged)",
        )
        parser.add_argument(
            "--shard-size",
            type=_between(1, 10**6),
            help="objects per shard (default: shards of at most about 256 MB)",
        )
        parser.add_argument(
            "--held-out",
            type=_between(0, 10**6),
            help="objects in the validation split, selected again (default: unchanged)",
        )
        parser.add_argument(
            "--where",
            type=_rule,
            nargs="+",
            metavar="RULE",
            help="keep the objects that satisfy these rules, including previously rejected ones, for example "
            "'coverage >= 0.05'; see filter.parquet for the measures (default: objects that were not rejected)",
        )


def _add_demo_assets(commands: "Commands") -> None:
    demo = commands.add_parser(
        "demo-assets",
        help="create the demo assets from the Debian package sweethome3d-furniture",
        description=(
            "Create the folder of demo assets (GLB files, assets.csv, LICENSE.txt), with reproducible bytes. "
            "`apt-get download sweethome3d-furniture` downloads the package."
        ),
    )
    demo.add_argument("--package", type=user_path, required=True, help="sweethome3d-furniture_1.8-1_all.deb")
    demo.add_argument(
        "--out", type=user_path, default=DEMO_ASSETS, help="output folder (default: %(default)s)"
    )


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
