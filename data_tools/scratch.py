"""Folders for what is needed for a while, in the system's folder of temporary files, and what killed runs left there.

The process that made a folder locks ``.lock`` in it. A lock that can be had is that of a process that is gone.
"""

import contextlib
import shutil
import tempfile
import time
from pathlib import Path

from lrm_pl.data.locks import lock

LOCK_NAME = ".lock"

#: A folder without a lock is one that is being made, or one of long ago.
_LONG_AGO_S = 3600.0


class ScratchFolder:
    """A folder that goes with its process, or with the next one that makes such a folder.

    Args:
        prefix: What its name begins with.
        parent: Where it is made; the system's folder of temporary files unless given.
    """

    def __init__(self, prefix: str, parent: Path | None = None) -> None:
        place = parent or Path(tempfile.gettempdir())
        remove_stale(prefix, place)
        self.path = Path(tempfile.mkdtemp(prefix=prefix, dir=place))
        self._lock = open(self.path / LOCK_NAME, "w")
        lock(self._lock, wait=False)

    def remove(self) -> None:
        """Remove it with all that is in it."""
        shutil.rmtree(self.path, ignore_errors=True)
        self._lock.close()


def remove_stale(prefix: str, place: Path) -> None:
    """Remove the folders of processes that are gone; those of other users are left alone."""
    for folder in place.glob(f"{prefix}*"):
        with contextlib.suppress(OSError):  # somebody works there (BlockingIOError), or it is not ours
            if not (folder / LOCK_NAME).exists():
                if time.time() - folder.stat().st_mtime > _LONG_AGO_S:
                    shutil.rmtree(folder, ignore_errors=True)
                continue
            with open(folder / LOCK_NAME, "r+") as file:
                if lock(file, wait=False):
                    shutil.rmtree(folder, ignore_errors=True)
