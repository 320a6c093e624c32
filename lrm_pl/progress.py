"""Named stages of long operations, for measuring and displaying progress."""

import contextlib
import contextvars
import time
from collections.abc import Callable, Iterator

#: Function that is called with the name of each stage when the stage starts.
Listener = Callable[[str], None]

_LISTENER: contextvars.ContextVar[Listener | None] = contextvars.ContextVar("listener", default=None)
_SECONDS: contextvars.ContextVar[dict[str, float] | None] = contextvars.ContextVar("seconds", default=None)
_WAIT: contextvars.ContextVar[Callable[[], None] | None] = contextvars.ContextVar("wait", default=None)


@contextlib.contextmanager
def stage(name: str) -> Iterator[None]:
    """Return a context that notifies the active listener and measures the duration of a stage."""
    listener, seconds = _LISTENER.get(), _SECONDS.get()
    if listener is not None:
        listener(name)
    start = time.perf_counter()
    try:
        yield
    finally:
        if seconds is not None:
            if (wait := _WAIT.get()) is not None:
                wait()
            seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - start


@contextlib.contextmanager
def listening(
    listener: Listener | None = None, wait: Callable[[], None] | None = None
) -> Iterator[dict[str, float]]:
    """Listen to the stages of the current thread.

    Args:
        listener: Function that is called when a stage starts.
        wait: Function that is called at the end of a stage before the clock is read, to synchronize with a GPU.

    Yields:
        Seconds by stage, which are updated when a stage ends.
    """
    seconds = dict[str, float]()
    tokens = _LISTENER.set(listener), _SECONDS.set(seconds), _WAIT.set(wait)
    try:
        yield seconds
    finally:
        _LISTENER.reset(tokens[0])
        _SECONDS.reset(tokens[1])
        _WAIT.reset(tokens[2])
