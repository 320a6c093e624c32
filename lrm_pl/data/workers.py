"""How decoding processes are started, and meet the signals that stop a run: the training process says when they end."""

import multiprocessing
import multiprocessing.forkserver
import multiprocessing.resource_tracker
import os
import signal
import threading
from multiprocessing.process import BaseProcess

import fsspec.asyn
import torch.distributed

#: What a terminal (Ctrl-C) and clusters send to every process of a job: before its time is up, and before they kill.
STOP_SIGNALS = frozenset({signal.SIGINT, signal.SIGTERM, signal.SIGUSR1})


def outlive_stop_signals(worker: int) -> None:
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
    threading.Thread(target=_wait_for_end_of, args=(parent,), daemon=True).start()


def start_method(workers: int) -> str | None:
    """Say how a DataLoader is to start its workers: its ``multiprocessing_context``.

    A process that has spoken to an object store, or belongs to a group of several, has threads that go on doing so, and
    a fork copies whatever lock one of them holds: workers were seen that waited for ever within the fork. So there
    workers are forked from a server that has no other threads; it outlives stop signals as they do.

    Args:
        workers: Number of them.

    Returns:
        None for the usual way.
    """
    together = torch.distributed.is_available() and torch.distributed.is_initialized()
    if not workers or (fsspec.asyn.iothread[0] is None and not together):
        return None
    multiprocessing.set_forkserver_preload(["lrm_pl.data.dataset"])
    multiprocessing.resource_tracker.ensure_running()  # the server would start it, and it lets SIGTERM pass again
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)  # what it starts with, it keeps
    try:
        multiprocessing.forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return "forkserver"


def _wait_for_end_of(parent: BaseProcess) -> None:
    parent.join()
    os._exit(0)


def _wait_for_word_of(parent: int) -> None:
    while True:
        received = signal.sigwaitinfo(STOP_SIGNALS)
        if received.si_signo == signal.SIGTERM and received.si_pid == parent:
            os._exit(0)
