"""Paths that users typed, and names of files that are printed."""

import argparse
import io
import sys
import tempfile
from pathlib import Path

from lrm_pl.errors import InputError


def user_path(text: str) -> Path:
    """Read a path that was typed; a shell leaves the ``~`` of ``--out=~/x`` as it is.

    Raises:
        argparse.ArgumentTypeError: It is a URL, or nothing: ``Path`` would make another path, or the current folder,
            of them.
    """
    if "://" in text:
        raise argparse.ArgumentTypeError(
            f"expected a path on this machine, but found the address {text}; download it, or choose a local path"
        )
    if not text:
        raise argparse.ArgumentTypeError(
            "expected a path, but found nothing; is a variable of the shell empty?"
        )
    return Path(text).expanduser()


def escape_names() -> None:
    """Escape on stdout what its encoding cannot print, as stderr does: names of files may be any bytes."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def require_out(folder: Path) -> None:
    """Make a folder of results, before anything is worked on.

    Raises:
        InputError: It cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise InputError(
            expected=f"to write into {folder}", found=error, remedy="choose another folder"
        ) from error
