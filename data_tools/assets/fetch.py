"""The command ``python -m data_tools fetch``, which downloads meshes and writes the asset list for ``render``."""

import argparse
import errno
from typing import TypeAlias

from data_tools.assets.gso import BASE as GSO
from data_tools.assets.objaverse import BASE as OBJAVERSE
from lrm_pl.errors import InputError
from lrm_pl.paths import user_path

_Parsers: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"


def fetch(args: argparse.Namespace) -> None:
    """Run the ``fetch`` command.

    Args:
        args: Parsed arguments of the command.

    Raises:
        InputError: There are no usable assets, or the disk is full.
    """
    try:
        _fetch(args)
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        raise InputError(
            "the disk is full", remedy="free some space and run the same command again to resume"
        ) from error


def _fetch(args: argparse.Namespace) -> None:
    if args.source == "objaverse":
        from data_tools.assets.objaverse import fetch_objaverse

        fetch_objaverse(args.out, _uids(args), args.categories, args.limit, args.urls_only, args.base)
    elif args.source == "gso":
        from data_tools.assets.gso import fetch_gso

        fetch_gso(args.out, args.limit, args.base)
    elif args.source == "sweethome3d":
        from data_tools.assets.sweethome3d import fetch_sweethome3d

        fetch_sweethome3d(args.out, args.package)
    else:
        from data_tools.assets.folder import fetch_folder

        fetch_folder(args.assets, args.out, args.up)


def add_parser(commands: _Parsers) -> None:
    """Add the ``fetch`` subcommand."""
    fetching = commands.add_parser(
        "fetch",
        help="download meshes from a public collection and write the asset list",
        description=(
            "Download meshes to OUT and write the asset list OUT/assets.parquet, which `render --assets OUT` reads. "
            "Objects that are not available or not usable are listed with the reason in OUT/left_out.jsonl. Run the "
            "same command again to resume."
        ),
    )
    sources = fetching.add_subparsers(dest="source", required=True, metavar="<source>")
    objaverse = _source(
        sources,
        "objaverse",
        "objects of Objaverse 1.0, by uid or by LVIS category",
        "Objaverse 1.0 has 798,759 GLB files (8.9 TB) with individual Creative Commons licenses. Select objects by "
        "uid or by LVIS category (46,207 objects in 1,156 categories).",
    )
    which = objaverse.add_mutually_exclusive_group()
    which.add_argument("--uids", nargs="+", metavar="UID", help="uids of the objects")
    which.add_argument("--uids-file", type=user_path, metavar="FILE", help="file of uids, one per line")
    which.add_argument(
        "--categories", type=_words, metavar="A,B", help="LVIS categories, for example chair,table"
    )
    _add_limit(objaverse)
    objaverse.add_argument(
        "--urls-only",
        action="store_true",
        help="list the URLs without downloading the meshes; render downloads each one when needed",
    )
    objaverse.add_argument(
        "--base", default=OBJAVERSE, metavar="URL", help="base URL of the data set or a mirror (%(default)s)"
    )
    gso = _source(
        sources,
        "gso",
        "Google Scanned Objects, an evaluation set",
        "1,030 scanned household objects, CC-BY-4.0, as OBJ with a texture. They are commonly used for evaluation "
        'only, so all of them get the split "val".',
    )
    _add_limit(gso)
    gso.add_argument(
        "--base", default=GSO, metavar="URL", help="base URL of the data set or a mirror (%(default)s)"
    )
    sweethome3d = _source(
        sources,
        "sweethome3d",
        "furniture, people, vehicles and food from a Debian package",
        "820 models of five libraries (CC0, CC-BY), converted to GLB with Blender. The library KatorLegaz is held out. "
        "Doors, windows, stairs, flat, single-colored and incomplete models are left out.",
    )
    sweethome3d.add_argument(
        "--package",
        type=user_path,
        metavar="FILE.deb",
        help="sweethome3d-furniture_1.8-1_all.deb (default: run `apt-get download`)",
    )
    folder = sources.add_parser(
        "folder",
        help="local meshes",
        description="List the meshes of a folder, with the metadata of its assets.csv "
        "(id,name,creator,source,license,sha256).",
    )
    folder.add_argument(
        "--assets", type=user_path, required=True, help="folder of meshes, searched recursively"
    )
    folder.add_argument(
        "--out", type=user_path, help="folder to copy the meshes to first (default: list them in place)"
    )
    folder.add_argument(
        "--up",
        choices=("y", "z"),
        default="",
        help="up axis of OBJ and PLY files without one in assets.csv (default: y)",
    )


def _source(sources: _Parsers, name: str, help_: str, description: str) -> argparse.ArgumentParser:
    parser = sources.add_parser(name, help=help_, description=description)
    parser.add_argument(
        "--out", type=user_path, required=True, metavar="DIR", help="folder of assets to write"
    )
    return parser


def _add_limit(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--limit", type=_positive, metavar="N", help="maximum number of objects")


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a number above 0, but found {value}")
    return value


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]


def _uids(args: argparse.Namespace) -> list[str] | None:
    if args.uids_file is None:
        return args.uids
    try:
        return args.uids_file.read_text(encoding="utf-8").split()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"cannot read {args.uids_file}: {error}", remedy="pass a text file with one uid per line"
        ) from error
