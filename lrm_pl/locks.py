"""Locks of files between processes and machines; some file systems have none (Lustre without ``-o flock``)."""

import errno
import fcntl
import functools
import logging
import os
from typing import IO, Any

logger = logging.getLogger(__name__)

#: What a file system answers that has no locks.
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


def lock(file: IO[Any], *, wait: bool) -> bool:
    """Lock a file until it is closed.

    Args:
        file: An open file.
        wait: Whether to wait for whoever holds it.

    Returns:
        Whether it is locked: not where the file system has no locks, which is said once a folder.

    Raises:
        BlockingIOError: Somebody else holds it, and ``wait`` is false.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        _say_that_there_are_none(os.path.dirname(file.name), str(error))
        return False
    return True


@functools.cache
def _say_that_there_are_none(folder: str, error: str) -> None:
    logger.warning("%s: its file system has no locks (%s): let one run at a time work there", folder, error)
