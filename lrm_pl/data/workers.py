"""How decoding processes are started, and meet the signals that stop a run: the training process says when they end."""

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

#: What a terminal (Ctrl-C, its end) and clusters send to every process of a job: before its time is up, and before they
#: kill.
STOP_SIGNALS = frozenset({signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP})

#: The path of a socket has at most 107 bytes; multiprocessing's are TMPDIR/pymp-xxxxxxxx/listener-xxxxxxxx.
_LONGEST_TEMP_DIR = 107 - len("/listener-xxxxxxxx")


def ignore_stop_signals(worker: int) -> None:
    """Ignore stop signals that others send; ``worker_init_fn`` of a DataLoader.

    A worker that died of one would take the run with it, before it could keep its last steps. The parent's own SIGTERM
    still ends the worker, as PyTorch expects, and so does the parent's end: PyTorch looks for that only between two
    batches, and a worker that waits for room in a pipe never gets there.

    Args:
        worker: Its number; not used.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    parent = multiprocessing.parent_process()
    assert parent is not None
    threading.Thread(target=_wait_for_word_of, args=(parent.pid,), daemon=True).start()
    end_with_parent()


def start_method(workers: int) -> str | None:
    """Say how a DataLoader is to start its workers: its ``multiprocessing_context``.

    A process that has spoken to an object store, or belongs to a group of several, has threads that go on doing so, and
    a fork copies whatever lock one of them holds: workers were seen that waited for ever within the fork. So there
    workers are forked from a server that has no other threads; it outlives stop signals as they do.

    Args:
        workers: Number of them.

    Returns:
        None for the usual way.

    Raises:
        InputError: The folder of temporary files has too long a name for the sockets that workers hand batches over by.
    """
    if workers and (found := len(os.fsencode(multiprocessing.util.get_temp_dir()))) > _LONGEST_TEMP_DIR:
        raise InputError(
            expected=(
                f"a folder of temporary files with a name of at most {_LONGEST_TEMP_DIR} bytes for the "
                "sockets of data workers"
            ),
            found=f"{found}: {multiprocessing.util.get_temp_dir()}",
            remedy="set TMPDIR=/tmp, or --data.workers 0",
        )
    together = torch.distributed.is_available() and torch.distributed.is_initialized()
    if not workers or (fsspec.asyn.iothread[0] is None and not together):
        return None
    multiprocessing.set_forkserver_preload(["lrm_pl.data.stream"])
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)  # what they start with, they keep
    try:
        multiprocessing.resource_tracker.ensure_running()
        signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)  # that let SIGTERM pass again
        multiprocessing.forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return "forkserver"


def _wait_for_word_of(parent: int) -> None:
    while True:
        received = signal.sigwaitinfo(STOP_SIGNALS)
        if received.si_signo == signal.SIGTERM and received.si_pid == parent:
            os._exit(0)
