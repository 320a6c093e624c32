"""Start method and signal handling for DataLoader workers."""

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

#: Signals that terminals and clusters send to all processes of a job before they kill the processes.
STOP_SIGNALS = frozenset({signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP})

#: Maximum length of the path of the temporary folder of multiprocessing, because socket paths have at most 107 bytes.
_LONGEST_TEMP_DIR = 107 - len("/listener-xxxxxxxx")


def ignore_stop_signals(worker: int) -> None:
    """Ignore stop signals in a DataLoader worker, except for SIGTERM sent by the parent process.

    Use this function as the ``worker_init_fn`` of a DataLoader. Otherwise, a stop signal would kill the workers, and
    the run would fail before it saves a checkpoint. The worker also exits when the parent process exits. PyTorch checks
    only between batches whether the parent process exists, but a worker can be blocked on a full pipe.

    Args:
        worker: Index of the worker, which is not used.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    parent = multiprocessing.parent_process()
    assert parent is not None
    threading.Thread(target=_exit_on_sigterm_of, args=(parent.pid,), daemon=True).start()
    end_with_parent()


def start_method(workers: int) -> str | None:
    """Return the ``multiprocessing_context`` of a DataLoader.

    A process that uses an object store or a process group has background threads. A fork copies locks that are held by
    these threads, which can cause a deadlock in the worker. Such a process therefore starts workers from a fork server,
    which has no threads and ignores stop signals.

    Args:
        workers: Number of workers.

    Returns:
        "forkserver", or None to use the default start method.

    Raises:
        InputError: The path of the temporary folder is too long for the sockets of the workers.
    """
    if workers and (found := len(os.fsencode(multiprocessing.util.get_temp_dir()))) > _LONGEST_TEMP_DIR:
        raise InputError(
            expected=f"a temporary folder with a path of at most {_LONGEST_TEMP_DIR} bytes for the sockets of workers",
            found=f"{found} bytes: {multiprocessing.util.get_temp_dir()}",
            remedy="set TMPDIR=/tmp, or pass --data.workers 0",
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
