"""Paths that users typed."""

import tempfile
from pathlib import Path

from lrm_pl.errors import InputError


def user_path(text: str) -> Path:
    """Read a path that was typed; a shell leaves the ``~`` of ``--out=~/x`` as it is."""
    return Path(text).expanduser()


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
        raise InputError(f"expected to write into {folder}, found: {error}; choose another folder") from error
