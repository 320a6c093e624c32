"""Temporary folders, and removal of those of killed processes.

The process that creates a folder locks ``.lock`` in it. If the lock is free, the process has ended.
"""

import contextlib
import os
import shutil
import tempfile
import time
from pathlib import Path

from lrm_pl.locks import lock

LOCK_NAME = ".lock"

#: Age in seconds from which a folder without a lock file is considered abandoned rather than new.
_ABANDONED_S = 3600.0


class ScratchFolder:
    """A temporary folder. If its process is killed, the next ``ScratchFolder`` of the same prefix removes it.

    Args:
        prefix: Prefix of its name.
        parent: Parent folder; None: the system's temporary folder.
        suffix: Suffix of its name.
    """

    def __init__(self, prefix: str, parent: Path | None = None, suffix: str = "") -> None:
        directory = parent or Path(tempfile.gettempdir())
        remove_stale(prefix, directory, suffix)
        self.path = Path(tempfile.mkdtemp(prefix=prefix, suffix=suffix, dir=directory))
        self._lock = open(self.path / LOCK_NAME, "w")
        lock(self._lock, wait=False)
        # A forked child must not keep the lock.
        os.register_at_fork(after_in_child=self._lock.close)

    def remove(self) -> None:
        """Remove the folder and its content."""
        shutil.rmtree(self.path, ignore_errors=True)
        self._lock.close()


def remove_stale(prefix: str, directory: Path, suffix: str = "") -> None:
    """Remove the folders of ended processes; folders of other users are kept."""
    for folder in directory.iterdir():
        if not (folder.name.startswith(prefix) and folder.name.endswith(suffix) and folder.is_dir()):
            continue
        with contextlib.suppress(OSError):  # in use (BlockingIOError), or owned by another user
            if not (folder / LOCK_NAME).exists():
                if time.time() - folder.stat().st_mtime > _ABANDONED_S:
                    shutil.rmtree(folder, ignore_errors=True)
                continue
            with open(folder / LOCK_NAME, "r+") as file:
                if lock(file, wait=False):
                    shutil.rmtree(folder, ignore_errors=True)
