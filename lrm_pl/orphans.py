"""Child processes that exit when the parent process exits or is killed."""

import multiprocessing
import os
import threading
from multiprocessing.process import BaseProcess


def end_with_parent() -> None:
    """Exit this process when the parent process exits. Use this function as the ``initializer`` of a process pool."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    threading.Thread(target=_wait_for_end_of, args=(parent,), daemon=True).start()


def _wait_for_end_of(parent: BaseProcess) -> None:
    parent.join()
    os._exit(0)
