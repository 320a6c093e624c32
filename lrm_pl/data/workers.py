"""Start method and signal handling of data loading workers."""

import multiprocessing
import multiprocessing.forkserver
import multiprocessing.resource_tracker
import multiprocessing.util
import os
import signal
import threading

import fsspec.asyn
import torch.distributed

from lrm_pl.errors import InputError
from lrm_pl.orphans import end_with_parent

#: Signals that terminals (Ctrl-C, hang-up) and clusters send to all processes of a job before they kill it.
STOP_SIGNALS = frozenset({signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP})

#: Socket paths have at most 107 bytes; those of multiprocessing are TMPDIR/pymp-xxxxxxxx/listener-xxxxxxxx.
_LONGEST_TEMP_DIR = 107 - len("/listener-xxxxxxxx")


def ignore_stop_signals(worker: int) -> None:
    """Ignore stop signals in a DataLoader worker, except SIGTERM from its parent; use as ``worker_init_fn``.

    Otherwise a stop signal would kill the workers, and with them the run before it can save a checkpoint. The worker
    also ends when its parent ends: PyTorch checks this only between batches, which a worker blocked on a full pipe
    does not reach.

    Args:
        worker: Number of the worker; unused.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    parent = multiprocessing.parent_process()
    assert parent is not None
    threading.Thread(target=_exit_on_sigterm_of, args=(parent.pid,), daemon=True).start()
    end_with_parent()


def start_method(workers: int) -> str | None:
    """Return the ``multiprocessing_context`` of a DataLoader.

    A process that uses an object store or a process group has background threads, and a fork copies the locks that they
    hold, which can deadlock the worker. Such a process starts workers from a fork server without threads. The server
    ignores stop signals, like the workers.

    Args:
        workers: Number of workers.

    Returns:
        "forkserver", or None for the default.

    Raises:
        InputError: The path of the temporary folder is too long for the sockets of the workers.
    """
    if workers and (found := len(os.fsencode(multiprocessing.util.get_temp_dir()))) > _LONGEST_TEMP_DIR:
        raise InputError(
            expected=f"a temporary folder with a path of at most {_LONGEST_TEMP_DIR} bytes for the sockets of workers",
            found=f"{found}: {multiprocessing.util.get_temp_dir()}",
            remedy="set TMPDIR=/tmp, or --data.workers 0",
        )
    together = torch.distributed.is_available() and torch.distributed.is_initialized()
    if not workers or (fsspec.asyn.iothread[0] is None and not together):
        return None
    multiprocessing.set_forkserver_preload(["lrm_pl.data.stream"])
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)  # children inherit the mask
    try:
        multiprocessing.resource_tracker.ensure_running()
        signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)  # ensure_running unblocks SIGTERM
        multiprocessing.forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return "forkserver"


def _exit_on_sigterm_of(parent: int) -> None:
    while True:
        received = signal.sigwaitinfo(STOP_SIGNALS)
        if received.si_signo == signal.SIGTERM and received.si_pid == parent:
            os._exit(0)
