"""Processes that end when the one that started them ends, also where that one was killed."""

import multiprocessing
import os
import threading
from multiprocessing.process import BaseProcess


def end_with_parent() -> None:
    """Make this process end with its parent, whatever it waits for then; ``initializer`` of a pool of processes."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    threading.Thread(target=_wait_for_end_of, args=(parent,), daemon=True).start()


def _wait_for_end_of(parent: BaseProcess) -> None:
    parent.join()
    os._exit(0)
