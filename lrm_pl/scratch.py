"""Temporary folders, and removal of the temporary folders of killed processes.

The process that creates a folder locks the file ``.lock`` in the folder. If the lock is free, the process has ended.
"""

import contextlib
import os
import shutil
import tempfile
import time
from pathlib import Path

from lrm_pl.locks import lock

LOCK_NAME = ".lock"

#: Age in seconds after which a folder without a lock file is considered abandoned.
_ABANDONED_S = 3600.0


class ScratchFolder:
    """A temporary folder.

    If the process is killed, the folder is removed when the next ``ScratchFolder`` with the same prefix is created.

    Args:
        prefix: Prefix of the name.
        parent: Parent folder. If None, the temporary folder of the system is used.
        suffix: Suffix of the name.
    """

    def __init__(self, prefix: str, parent: Path | None = None, suffix: str = "") -> None:
        directory = parent or Path(tempfile.gettempdir())
        remove_stale(prefix, directory, suffix)
        self.path = Path(tempfile.mkdtemp(prefix=prefix, suffix=suffix, dir=directory))
        self._lock = open(self.path / LOCK_NAME, "w")
        lock(self._lock, wait=False)
        # A forked child process must not hold the lock.
        os.register_at_fork(after_in_child=self._lock.close)

    def remove(self) -> None:
        """Remove the folder and its contents."""
        shutil.rmtree(self.path, ignore_errors=True)
        self._lock.close()


def remove_stale(prefix: str, directory: Path, suffix: str = "") -> None:
    """Remove temporary folders of processes that have ended. Folders of other users are not removed.

    Args:
        prefix: Prefix of the names.
        directory: Parent folder.
        suffix: Suffix of the names.
    """
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
