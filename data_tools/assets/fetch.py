"""``python -m data_tools fetch <source>``: get meshes and write the list of assets that ``render`` goes by."""

import argparse
import errno
from typing import TypeAlias

from data_tools.assets.gso import BASE as GSO
from data_tools.assets.objaverse import BASE as OBJAVERSE
from lrm_pl.errors import InputError
from lrm_pl.paths import user_path

_Parsers: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"


def fetch(args: argparse.Namespace) -> None:
    """Run one source.

    Raises:
        InputError: Nothing can be had, or the disk is full.
    """
    try:
        _fetch(args)
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        raise InputError(
            expected="free disk space for the rest",
            found="none",
            remedy="free some, and run the same command again: it goes on where it was",
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
    """Add the command to those of ``python -m data_tools``."""
    fetching = commands.add_parser(
        "fetch",
        help="get meshes from a public collection and write the list of assets",
        description=(
            "Get meshes into OUT and write OUT/assets.parquet, the list of what this command names, which `render "
            "--assets OUT` goes by. What cannot be had or used is listed with its reason in OUT/left_out.jsonl. A "
            "second run goes on where the first one was."
        ),
    )
    sources = fetching.add_subparsers(dest="source", required=True, metavar="<source>")
    objaverse = _source(
        sources,
        "objaverse",
        "objects of Objaverse 1.0, by uid or by LVIS category",
        "Objaverse 1.0 holds 798,759 GLB files (8.9 TB), each under a Creative Commons license of its own. Name the "
        "objects by uid, or by category of LVIS (46,207 objects of 1,156 categories).",
    )
    which = objaverse.add_mutually_exclusive_group()
    which.add_argument("--uids", nargs="+", metavar="UID", help="the objects")
    which.add_argument("--uids-file", type=user_path, metavar="FILE", help="the objects, a uid a line")
    which.add_argument("--categories", type=_words, metavar="A,B", help="LVIS categories: chair,table")
    _add_limit(objaverse)
    objaverse.add_argument(
        "--urls-only",
        action="store_true",
        help="list the URLs and leave the meshes there; render brings each when its turn comes",
    )
    objaverse.add_argument("--base", default=OBJAVERSE, metavar="URL", help="another copy of %(default)s")
    gso = _source(
        sources,
        "gso",
        "Google Scanned Objects, the field's evaluation set",
        "1,030 scanned household objects, CC-BY-4.0, as OBJ with a texture. The field measures on them and trains on "
        'none, so all of them get the split "val".',
    )
    _add_limit(gso)
    gso.add_argument("--base", default=GSO, metavar="URL", help="another copy of %(default)s")
    sweethome3d = _source(
        sources,
        "sweethome3d",
        "furniture, people, vehicles, food of a Debian package; needs no other network",
        "820 models of five libraries (CC0, CC-BY), converted to GLB by Blender; the library KatorLegaz is held out. "
        "Doors, windows, stairs, sheets, one-colored and incomplete models are left out.",
    )
    sweethome3d.add_argument(
        "--package",
        type=user_path,
        metavar="FILE.deb",
        help="sweethome3d-furniture_1.8-1_all.deb; unless given, `apt-get download` brings it",
    )
    folder = sources.add_parser(
        "folder",
        help="meshes that you have",
        description="List a folder's meshes, with what its assets.csv says (id,name,creator,source,license,sha256).",
    )
    folder.add_argument(
        "--assets", type=user_path, required=True, help="folder of meshes, searched recursively"
    )
    folder.add_argument("--out", type=user_path, help="folder to copy it to first; in place unless given")
    folder.add_argument(
        "--up",
        choices=("y", "z"),
        default="",
        help="the axis that points up in OBJ and PLY files whose row does not say (y)",
    )


def _source(sources: _Parsers, name: str, help_: str, description: str) -> argparse.ArgumentParser:
    parser = sources.add_parser(name, help=help_, description=description)
    parser.add_argument(
        "--out", type=user_path, required=True, metavar="DIR", help="folder of assets to fill"
    )
    return parser


def _add_limit(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--limit", type=_positive, metavar="N", help="at most so many objects")


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
        raise InputError(expected=f"a file of uids at {args.uids_file}", found=error) from error
