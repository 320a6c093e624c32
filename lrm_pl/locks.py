"""File locks that exclude other processes, including processes on other machines.

Some file systems do not support locks, for example Lustre if it is mounted without ``-o flock``.
"""

import errno
import fcntl
import functools
import logging
import os
from typing import IO, Any

logger = logging.getLogger(__name__)

#: Error numbers of file systems that do not support locks.
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


def lock(file: IO[Any], *, wait: bool, posix: bool = False) -> bool:
    """Lock a file until it is closed.

    Args:
        file: An open file.
        wait: Whether to wait until the lock is free.
        posix: Whether to use a POSIX lock, which child processes do not inherit, instead of ``flock``.

    Returns:
        Whether the file is locked. If the file system does not support locks, the result is False and a warning is
        logged once per folder.

    Raises:
        BlockingIOError: The lock is not free, and ``wait`` is False.
    """
    try:
        (fcntl.lockf if posix else fcntl.flock)(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        _warn_no_locks(os.path.dirname(file.name), str(error))
        return False
    return True


@functools.cache
def _warn_no_locks(folder: str, error: str) -> None:
    logger.warning(
        "%s: the file system does not support locks (%s). Run only one job at a time in this folder",
        *(folder, error),
    )
