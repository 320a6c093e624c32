"""Local paths: command-line arguments, printed names, and hashes of files."""

import argparse
import hashlib
import io
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
            f"expected a path on this machine, but found the address {text}; download it, or choose a local path"
        )
    if not text:
        raise argparse.ArgumentTypeError(
            "expected a path, but found nothing; is a variable of the shell empty?"
        )
    return Path(text).expanduser()


def hash_file(path: Path) -> str:
    """Return the SHA-256 of a file in lower-case hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def escape_names() -> None:
    """Escape characters that the encoding of stdout does not support, because file names may contain any bytes."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def require_out(folder: Path) -> None:
    """Create an output folder and check that it is writable.

    Raises:
        InputError: The folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise InputError(
            expected=f"a writable folder {folder}", found=error, remedy="choose another folder"
        ) from error
