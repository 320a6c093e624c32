"""Utilities for path arguments, printed file names, the cache folder, output folders and file hashes."""

import argparse
import hashlib
import io
import os
import sys
import tempfile
from pathlib import Path

from lrm_pl.errors import InputError


def user_path(text: str) -> Path:
    """Parse a local path argument and expand ``~``, because shells do not expand it in ``--out=~/x``.

    Raises:
        argparse.ArgumentTypeError: The argument is empty or is a URL.
    """
    if "://" in text:
        raise argparse.ArgumentTypeError(
            f"expected a path on this machine, but found the URL {text}. Download it, or choose a local path"
        )
    if not text:
        raise argparse.ArgumentTypeError(
            "expected a path, but found an empty string. Check whether a shell variable is empty"
        )
    return Path(text).expanduser()


def hash_file(path: Path) -> str:
    """Return the SHA-256 hash of a file as a lower-case hexadecimal string."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def cache_folder() -> Path:
    """Return the cache folder, which all processes on a machine share.

    The folder is ``$LRM_CACHE`` if this variable is set, or ``$XDG_CACHE_HOME/lrm_pl`` if that variable is set, or
    ``~/.cache/lrm_pl`` otherwise.

    Raises:
        InputError: Neither variable is set, and the user has no home folder.
    """
    if chosen := os.environ.get("LRM_CACHE"):
        return Path(chosen).expanduser()
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "lrm_pl"
    except RuntimeError as error:  # neither HOME nor an entry in /etc/passwd, as in containers
        raise InputError("a home folder for the cache", "none", "set LRM_CACHE to a folder") from error


def escape_names() -> None:
    """Escape characters that the encoding of stdout does not support, because file names may contain any bytes."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def require_out(folder: Path) -> None:
    """Create an output folder and check that it is writable.

    Raises:
        InputError: The folder cannot be created or is not writable.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise InputError(f"a writable folder {folder}", error, "choose another folder") from error
