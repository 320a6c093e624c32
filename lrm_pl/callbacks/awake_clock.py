"""A thread that ends the process once it has been awake too long without a sign of progress.

Compiled code outside Python: it strikes even while Python's own lock is held. It counts its own short sleeps, not the
time of day, so that a process that is stopped (Ctrl-Z, ``scontrol suspend``, a laptop's lid) and continued goes on.
"""

import ctypes
import faulthandler
import signal
import threading

import numba
import numpy as np
from numpy.typing import NDArray

#: Seconds of a sleep.
TICK_S = 0.1

#: Makes faulthandler print the stacks of all threads.
_SIGNAL = signal.SIGUSR2

_TICK_US, _STDERR, _SIGNAL_NUMBER = int(TICK_S * 1e6), 2, int(_SIGNAL)
_libc = ctypes.CDLL(None)
_usleep, _write, _raise, _exit = _libc.usleep, _libc.write, getattr(_libc, "raise"), _libc._exit
_usleep.argtypes, _raise.argtypes, _exit.argtypes = [ctypes.c_uint], [ctypes.c_int], [ctypes.c_int]
_write.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t]


@numba.njit(nogil=True)  # type: ignore[untyped-decorator]
def _watch(signs: NDArray[np.int64], limit: int, said: NDArray[np.uint8]) -> None:
    """Wait until signs[1] is set; strike where signs[0] stays the same for ``limit`` sleeps."""
    ticks, last = 0, signs[0]
    while signs[1] == 0:
        _usleep(_TICK_US)
        ticks = ticks + 1 if signs[0] == last else 0
        last = signs[0]
        if ticks >= limit and signs[1] == 0:
            _write(_STDERR, said.ctypes.data, said.size)
            _raise(_SIGNAL_NUMBER)
            _exit(1)


class AwakeClock:
    """End the process, with the stacks of all its threads on stderr, after so long without ``reset``.

    Args:
        limit_s: Seconds that the process is awake.
    """

    def __init__(self, limit_s: float) -> None:
        self._signs = np.zeros(2, np.int64)  # progress so far; whether to stop
        said = np.frombuffer(f"Timeout: no progress for {limit_s:g} s\n".encode(), np.uint8).copy()
        faulthandler.register(_SIGNAL, file=_STDERR, all_threads=True)
        limit = max(1, round(limit_s / TICK_S))
        _watch(np.ones(2, np.int64), limit, said)  # compiles, and comes back at once
        self._thread = threading.Thread(
            target=_watch, args=(self._signs, limit, said), name="hang watchdog", daemon=True
        )
        self._thread.start()

    def reset(self) -> None:
        """Begin to count anew."""
        self._signs[0] += 1

    def stop(self) -> None:
        """Count no more."""
        self._signs[1] = 1
        self._thread.join()
