"""Watchdog that ends a hanging job and prints the stacks of all threads.

A rank that waits for a hanging rank makes no progress either, so every rank of the job prints its stacks and exits. The
timer runs in a thread of compiled code, so it works while the GIL is held. The timer counts sleeps instead of measuring
the time, so the time during which the process is suspended (Ctrl-Z, ``scontrol suspend``) does not count.
"""

import ctypes
import faulthandler
import signal
import threading
from typing import final

import lightning as L
import numba
import numpy as np
from numpy.typing import NDArray

from lrm_pl.errors import InputError

#: Seconds between the timeouts of consecutive ranks of a node, so that their stacks do not interleave in a shared log.
STAGGER_S = 0.25

#: Seconds per sleep of the timer.
TICK_S = 0.1

#: Signal that makes faulthandler print the stacks of all threads.
_SIGNAL = signal.SIGUSR2

_TICK_US, _STDERR, _SIGNAL_NUMBER = int(TICK_S * 1e6), 2, int(_SIGNAL)
_libc = ctypes.CDLL(None)
_usleep, _write, _raise, _exit = _libc.usleep, _libc.write, getattr(_libc, "raise"), _libc._exit
_usleep.argtypes, _raise.argtypes, _exit.argtypes = [ctypes.c_uint], [ctypes.c_int], [ctypes.c_int]
_write.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t]


@numba.njit(nogil=True)  # type: ignore[untyped-decorator]
def _run_timer(state: NDArray[np.int64], limit: int, message: NDArray[np.uint8]) -> None:
    """Exit the process if the counter state[0] does not change during ``limit`` consecutive sleeps.

    The function returns when state[1] is set.
    """
    ticks, last = 0, state[0]
    while state[1] == 0:
        _usleep(_TICK_US)
        ticks = ticks + 1 if state[0] == last else 0
        last = state[0]
        if ticks >= limit and state[1] == 0:
            _write(_STDERR, message.ctypes.data, message.size)
            _raise(_SIGNAL_NUMBER)
            _exit(1)


class WatchdogTimer:
    """Timer that prints the stacks of all threads to stderr and ends the process, unless it is reset in time.

    Args:
        limit_s: Timeout in seconds. The time during which the process is suspended does not count.
    """

    def __init__(self, limit_s: float) -> None:
        self._state = np.zeros(2, np.int64)  # progress counter, stop flag
        message = np.frombuffer(f"Timeout: no progress for {limit_s:g} s\n".encode(), np.uint8).copy()
        faulthandler.register(_SIGNAL, file=_STDERR, all_threads=True)
        limit = max(1, round(limit_s / TICK_S))
        _run_timer(np.ones(2, np.int64), limit, message)  # compiles the function and returns immediately
        self._thread = threading.Thread(
            target=_run_timer, args=(self._state, limit, message), name="hang watchdog", daemon=True
        )
        self._thread.start()

    def reset(self) -> None:
        """Restart the timeout."""
        self._state[0] += 1

    def stop(self) -> None:
        """Stop the timer."""
        self._state[1] = 1
        self._thread.join()


@final
class HangWatchdog(L.Callback):
    """Callback that ends the process if neither a batch nor a checkpoint is completed within a time limit.

    Args:
        limit_s: Time limit in seconds. The time during which the process is suspended does not count. The limit must
            exceed the longest regular pause, for example, compilation, the first read of a large data set, or a
            checkpoint on a slow disk.
    """

    def __init__(self, limit_s: float = 1800.0) -> None:
        if limit_s <= 0:
            raise InputError("limit_s above 0", limit_s, "remove the callback to disable the watchdog")
        self.limit_s = limit_s
        self._timer: WatchdogTimer | None = None

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Start the timer."""
        self.teardown()
        self._timer = WatchdogTimer(self.limit_s + STAGGER_S * trainer.local_rank)

    def teardown(self, *_: object, **__: object) -> None:
        """Stop the timer."""
        if self._timer is not None:
            self._timer.stop()
            self._timer = None

    on_exception = teardown

    def _reset(self, *_: object, **__: object) -> None:
        if self._timer is not None:
            self._timer.reset()

    # Checkpoints are saved between the start of a batch and backward, and at the end of training.
    on_train_start = on_train_batch_start = on_before_backward = on_train_batch_end = on_train_end = _reset
    on_validation_start = on_validation_batch_start = on_validation_end = _reset
    on_test_start = on_test_batch_start = on_test_end = _reset
    on_predict_start = on_predict_batch_start = on_predict_batch_end = on_predict_end = _reset
