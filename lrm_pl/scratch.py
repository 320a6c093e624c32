"""Folders for what is needed for a while, and what killed runs left of them.

The process that made a folder locks ``.lock`` in it. A lock that can be had is that of a process that is gone.
"""

import contextlib
import os
import shutil
import tempfile
import time
from pathlib import Path

from lrm_pl.locks import lock

LOCK_NAME = ".lock"

#: A folder without a lock is one that is being made, or one of long ago.
_LONG_AGO_S = 3600.0


class ScratchFolder:
    """A folder that goes with its process, or with the next one that makes such a folder.

    Args:
        prefix: What its name begins with.
        parent: Where it is made; the system's folder of temporary files unless given.
        suffix: What its name ends with.
    """

    def __init__(self, prefix: str, parent: Path | None = None, suffix: str = "") -> None:
        place = parent or Path(tempfile.gettempdir())
        remove_stale(prefix, place, suffix)
        self.path = Path(tempfile.mkdtemp(prefix=prefix, suffix=suffix, dir=place))
        self._lock = open(self.path / LOCK_NAME, "w")
        lock(self._lock, wait=False)
        # A child that outlives this process holds nothing.
        os.register_at_fork(after_in_child=self._lock.close)

    def remove(self) -> None:
        """Remove it with all that is in it."""
        shutil.rmtree(self.path, ignore_errors=True)
        self._lock.close()


def remove_stale(prefix: str, place: Path, suffix: str = "") -> None:
    """Remove the folders of processes that are gone; those of other users are left alone."""
    for folder in place.iterdir():
        if not (folder.name.startswith(prefix) and folder.name.endswith(suffix) and folder.is_dir()):
            continue
        with contextlib.suppress(OSError):  # somebody works there (BlockingIOError), or it is not ours
            if not (folder / LOCK_NAME).exists():
                if time.time() - folder.stat().st_mtime > _LONG_AGO_S:
                    shutil.rmtree(folder, ignore_errors=True)
                continue
            with open(folder / LOCK_NAME, "r+") as file:
                if lock(file, wait=False):
                    shutil.rmtree(folder, ignore_errors=True)
