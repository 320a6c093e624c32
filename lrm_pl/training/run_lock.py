"""One run at a time in a folder."""

import fcntl
import logging
import os
import weakref
from pathlib import Path

from lrm_pl.errors import InputError
from lrm_pl.locks import NO_LOCKS

logger = logging.getLogger(__name__)

LOCK_NAME = ".lock"


class RunLock:
    """Hold a run's folder for as long as this process lives, however it ends.

    A POSIX lock, not ``flock``: it is this process's alone, so that data workers that outlive a killed process do not
    hold the folder against its next start; and it holds between the nodes of a network file system.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder / LOCK_NAME, os.O_RDWR | os.O_CREAT, 0o644)
        weakref.finalize(self, os.close, descriptor)
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:  # POSIX leaves open which
            raise InputError(
                expected=f"no other run in {folder}",
                found="one at work there",
                remedy="wait for it, or take another folder: --run.folder, in Python the CheckpointAndResume's folder",
            ) from error
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            logger.warning("%s: its file system has no locks (%s): start no second run there", folder, error)
