"""``python -m data_tools <command>``: meshes to shards. Runs in the render environment."""

import argparse
import signal
import sys
from collections.abc import Callable
from pathlib import Path

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
from data_tools.rendering.settings import RenderSettings, check_settings, recorded_held_out
from data_tools.rendering.shard_plan import default_held_out
from data_tools.shards import convert
from lrm_pl.apps.broken_pipes import ignore_broken_pipes
from lrm_pl.errors import InputError
from lrm_pl.paths import escape_names, user_path

DEMO_ASSETS = Path(__file__).parent / "demo_assets"


#: Commands that keep what a run that was stopped has done.
_GO_ON = ("render", "fetch")


class _Terminated(KeyboardInterrupt):
    """SIGTERM: from `kill`, `timeout`, or a batch system whose time is up."""


def _terminate(*_: object) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # what is being put in order now is not disturbed
    raise _Terminated


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit status."""
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
        print(
            f"error: expected a folder at {error.filename}, but found a file; choose another path",
            file=sys.stderr,
        )
        return 1
    except PermissionError as error:
        print(
            f"error: expected access to {error.filename}, but found none; choose another path",
            file=sys.stderr,
        )
        return 1
    except (InputError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt as stop:
        goes_on = ", it goes on where it was" if args.command in _GO_ON else ""
        print(f"stopped; run the same command again{goes_on}", file=sys.stderr)
        return 143 if isinstance(stop, _Terminated) else 130
    return 0


def _render(args: argparse.Namespace) -> None:
    from data_tools.rendering.driver import render
    from data_tools.rendering.ray_pool import PoolOptions  # loads Ray

    settings, assets = _settings(args)
    limits = Limits(getattr(args, "time_limit", time_limit_s(settings)), args.memory_limit)
    render(assets, args.out, settings, PoolOptions(args.assets, settings, args.jobs, limits))


def _settings(args: argparse.Namespace) -> tuple[RenderSettings, tuple[Asset, ...]]:
    assets = find_assets(args.assets, args.out)
    held_out = getattr(args, "held_out", None)
    if held_out is None:
        held_out = recorded_held_out(args.out)
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
        shard_size=args.shard_size,
        depth=args.depth,
        normals=args.normals,
        surface=args.surface,
        rules=tuple(getattr(args, "rules", rules)),
    )
    return settings, assets


def _demo_assets(args: argparse.Namespace) -> None:
    from data_tools.assets.demo_library import make_demo_assets

    make_demo_assets(args.package, args.out)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m data_tools", description="Turn meshes into shards. Runs in the render environment."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="<command>")
    render = commands.add_parser(
        "render",
        help="render a folder of meshes into shards with Blender's Cycles",
        description=(
            "Render what ASSETS/assets.parquet lists (`fetch` writes it), or else every glb, gltf, obj, ply and fbx "
            "below ASSETS, into WebDataset shards. A second run goes on where the first one was; it renders what was "
            "added to ASSETS since into further shards, and updates names, creators, sources and licenses without "
            "rendering. Assets that cannot be rendered are left out and listed in OUT/failures.jsonl; delete that file "
            "to have them tried again. What "
            "Blender printed about them is in OUT/quarantine. Objects that break a rule go to shards of their own; "
            "OUT/filter.parquet holds what was measured of all. With RAY_ADDRESS the processes run on that Ray cluster."
        ),
    )
    render.add_argument(
        "--assets",
        type=user_path,
        default=DEMO_ASSETS,
        help="folder of meshes, searched recursively (%(default)s)",
    )
    render.add_argument(
        "--out", type=user_path, default=Path("data/demo"), help="folder of shards to make (%(default)s)"
    )
    render.add_argument("--views", type=_between(1, 999), default=16, help="views an object (%(default)s)")
    render.add_argument(
        "--res", type=_between(8, 4096), default=128, help="side of the square views, pixels (%(default)s)"
    )
    render.add_argument("--depth", action="store_true", help="keep the depth of each view too")
    render.add_argument("--normals", action="store_true", help="keep the normals of each view too")
    render.add_argument(
        "--surface",
        action="store_true",
        help="keep points of each surface too: `lrm evaluate` holds meshes to them",
    )
    render.add_argument(
        "--samples", type=_between(1, 65536), default=16, help="Cycles samples a pixel (%(default)s)"
    )
    render.add_argument(
        "--jobs",
        type=_between(1, 100_000),
        help="Blender processes; one a GPU, or one for two CPUs but at least two, unless given",
    )
    render.add_argument(
        "--preset", choices=sorted(PRESETS), default="frame", help="ranges of the cameras (%(default)s)"
    )
    render.add_argument(
        "--normalize",
        choices=("sphere", "cube"),
        default=argparse.SUPPRESS,
        help="bounding sphere of radius 1, or longest side 2; the preset's choice unless given",
    )
    render.add_argument(
        "--seed", type=_between(0, 2**31 - 1), default=0, help="seed of cameras and of Cycles (%(default)s)"
    )
    render.add_argument(
        "--held-out",
        type=_between(0, 10**6),
        default=argparse.SUPPRESS,
        help="objects in the validation split; a sixth of all, at most 8, unless given",
    )
    render.add_argument(
        "--shard-size", type=_between(1, 10**6), default=8, help="objects a shard (%(default)s)"
    )
    render.add_argument(
        "--time-limit",
        type=float,
        default=argparse.SUPPRESS,
        metavar="SECONDS",
        help=f"time that one object may take; unless given, {Limits.time_s:g} s + views * res^2 * samples / "
        f"{SAMPLES_PER_S:,}",
    )
    render.add_argument(
        "--memory-limit",
        type=float,
        default=Limits.memory_gb,
        help="GB of memory that one object may take (%(default)s)",
    )
    render.add_argument(
        "--rules",
        type=_rule,
        nargs="*",
        default=argparse.SUPPRESS,
        metavar="RULE",
        help="what an object must obey, else it is rejected: measures of OUT/filter.parquet compared with numbers; "
        f"unless given, {', '.join(DEFAULT_RULES)}, and {CROPPED_RULE} where the preset's images show whole objects",
    )
    add_launch_parser(commands)
    check = commands.add_parser(
        "validate",
        help="look at every byte of a folder of shards",
        description=(
            "Check sizes, hashes, members, schema, images, and whether cameras fit images; names what is wrong by "
            "shard and sample, and ends with status 1 if anything is."
        ),
    )
    check.add_argument(
        "--shards", type=user_path, default=Path("data/demo"), help="folder of shards (%(default)s)"
    )
    check.add_argument("--jobs", type=int, help="processes; one per core unless given")
    look = commands.add_parser(
        "inspect",
        help="say what a folder of shards holds, with a page of images",
        description=(
            "Print statistics of cameras, images, licenses and failures, and write SHARDS/inspect.html with the "
            "contact sheet."
        ),
    )
    look.add_argument(
        "--shards", type=user_path, default=Path("data/demo"), help="folder of shards (%(default)s)"
    )
    for name, what in (
        ("repack", "another resolution, shard size or split, without rendering"),
        ("merge", "join folders of shards to one"),
    ):
        pack = commands.add_parser(
            name,
            help=what,
            description="Make one folder of shards out of others; images that keep their size keep their bytes.",
        )
        pack.add_argument("--shards", type=user_path, nargs="+", required=True, help="folders of shards")
        pack.add_argument("--out", type=user_path, required=True, help="folder to make")
        pack.add_argument(
            "--res", type=_between(8, 4096), help="side of the views, pixels; as they are unless given"
        )
        pack.add_argument(
            "--shard-size", type=_between(1, 10**6), default=8, help="objects a shard (%(default)s)"
        )
        pack.add_argument(
            "--held-out",
            type=_between(0, 10**6),
            help="objects in the validation split, chosen anew; as they are unless given",
        )
        pack.add_argument(
            "--where",
            type=_rule,
            nargs="+",
            metavar="RULE",
            help="keep what obeys, such as 'coverage >= 0.05' (measures of filter.parquet), those that were rejected "
            "before too; unless given, all that was not rejected",
        )
    add_fetch_parser(commands)
    convert.add_parser(commands)
    demo = commands.add_parser(
        "demo-assets",
        help="make the demo assets from the Debian package sweethome3d-furniture",
        description=(
            "Make the folder of demo assets (GLB, assets.csv, LICENSE.txt) again, to the byte. "
            "Get the package with `apt-get download sweethome3d-furniture`."
        ),
    )
    demo.add_argument("--package", type=user_path, required=True, help="sweethome3d-furniture_1.8-1_all.deb")
    demo.add_argument("--out", type=user_path, default=DEMO_ASSETS, help="folder to make (%(default)s)")
    return parser


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
