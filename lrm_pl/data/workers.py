"""How decoding processes meet the signals that stop a run: the training process alone decides when they end."""

import os
import signal
import threading

#: What clusters send to every process of a job before its time is up, and before they kill.
STOP_SIGNALS = frozenset({signal.SIGTERM, signal.SIGUSR1})


def outlive_stop_signals(worker: int) -> None:
    """Ignore stop signals that others send; ``worker_init_fn`` of a DataLoader.

    A worker that died of one would take the run with it, before it could keep its last steps. The parent's own SIGTERM
    still ends the worker, as PyTorch expects; if the parent is killed, PyTorch's watchdog ends it.

    Args:
        worker: Its number; not used.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    threading.Thread(target=_wait_for_parent, args=(os.getppid(),), daemon=True).start()


def _wait_for_parent(parent: int) -> None:
    while True:
        received = signal.sigwaitinfo(STOP_SIGNALS)
        if received.si_signo == signal.SIGTERM and received.si_pid == parent:
            os._exit(0)
