"""The command ``python -m data_tools fetch``, which downloads meshes and writes the asset list for ``render``."""

import argparse
import errno
from typing import TypeAlias

from data_tools.assets import gso, objaverse
from data_tools.assets.folder import fetch_folder
from data_tools.assets.furniture_package import DEB
from data_tools.assets.sweethome3d import fetch_sweethome3d
from lrm_pl.errors import InputError
from lrm_pl.paths import user_path

_Parsers: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"

#: Mapping from sources to summaries and descriptions for the help.
_SOURCES = {
    "objaverse": (
        "objects of Objaverse 1.0, by uid or by LVIS category",
        "Objaverse 1.0 has 798,759 GLB files (8.9 TB) with individual Creative Commons licenses. Select objects by uid "
        "or by LVIS category (46,207 objects in 1,156 categories).",
    ),
    "gso": (
        "Google Scanned Objects, an evaluation set",
        "1,030 scanned household objects, CC-BY-4.0, as OBJ with a texture. They are commonly used for evaluation "
        'only, so all of them are assigned to the split "val".',
    ),
    "sweethome3d": (
        "furniture, people, vehicles and food from a Debian package",
        "820 models of five libraries (CC0, CC-BY), converted to GLB with Blender. The library KatorLegaz is held out. "
        "Doors, windows, stairs, flat, single-colored and incomplete models are left out.",
    ),
    "folder": (
        "local meshes",
        "List the meshes of a folder, with the metadata of its assets.csv (id,name,creator,source,license,sha256).",
    ),
}


def fetch(args: argparse.Namespace) -> None:
    """Run the ``fetch`` command.

    Args:
        args: Parsed arguments of the command.

    Raises:
        InputError: There are no usable assets, or the disk is full.
    """
    try:
        match args.source:
            case "objaverse":
                selected = args.uids or (), args.categories or ()
                objaverse.fetch_objaverse(args.out, *selected, args.limit, args.urls_only, args.base)
            case "gso":
                gso.fetch_gso(args.out, args.limit, args.base)
            case "sweethome3d":
                fetch_sweethome3d(args.out, args.package)
            case "folder":
                fetch_folder(args.assets, args.out, args.up)
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        remedy = "free some space and run the same command again to resume"
        raise InputError("the disk is full", remedy=remedy) from error


def add_parser(commands: _Parsers) -> None:
    """Add the ``fetch`` subcommand."""
    parser = commands.add_parser(
        "fetch",
        help="download meshes from a public collection and write the asset list",
        description=(
            "Download meshes to OUT and write the asset list OUT/assets.parquet, which `render --assets OUT` reads. "
            "Objects that are not available or not usable are listed with the reason in OUT/left_out.jsonl. Run the "
            "same command again to resume an interrupted download."
        ),
    )
    sources = parser.add_subparsers(dest="source", required=True, metavar="<source>")
    parsers = {
        name: sources.add_parser(name, help=summary, description=description)
        for name, (summary, description) in _SOURCES.items()
    }
    for name in ("objaverse", "gso", "sweethome3d"):
        parsers[name].add_argument(
            "--out", type=user_path, required=True, metavar="DIR", help="output folder"
        )
    for name, base in (("objaverse", objaverse.BASE), ("gso", gso.BASE)):
        add = parsers[name].add_argument
        add("--limit", type=_positive, metavar="N", help="maximum number of objects in the list")
        add(
            "--base",
            default=base,
            metavar="URL",
            help="URL of the data set or of a mirror (default: %(default)s)",
        )
    add = parsers["objaverse"].add_mutually_exclusive_group().add_argument
    add("--uids", nargs="+", metavar="UID", help="uids of the objects to download")
    add("--uids-file", dest="uids", type=_uids, metavar="FILE", help="text file with one uid per line")
    add("--categories", type=_words, metavar="A,B", help="comma-separated LVIS categories")
    add = parsers["objaverse"].add_argument
    add("--urls-only", action="store_true", help="list the URLs of the meshes without downloading the meshes")
    add = parsers["sweethome3d"].add_argument
    add(
        "--package",
        type=user_path,
        metavar="FILE.deb",
        help=f"path of {DEB} (default: download the package with `apt-get download`)",
    )
    add = parsers["folder"].add_argument
    add("--assets", type=user_path, required=True, help="folder that is searched recursively for meshes")
    add("--out", type=user_path, help="folder to which the meshes are copied (default: no copy)")
    add(
        "--up",
        choices=("y", "z"),
        default="",
        help="up axis of OBJ and PLY files for which assets.csv does not define one (default: y)",
    )


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a number above 0, but found {value}")
    return value


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]


def _uids(path: str) -> list[str]:
    try:
        return user_path(path).read_text(encoding="utf-8").split()
    except (OSError, UnicodeDecodeError) as error:
        raise argparse.ArgumentTypeError(
            f"expected a text file with one uid per line, but found {error}"
        ) from error
