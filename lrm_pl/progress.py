"""Named stages of long operations, for timing and progress display."""

import contextlib
import contextvars
import time
from collections.abc import Callable, Iterator

#: Called with the name of each stage when it starts.
Listener = Callable[[str], None]

_LISTENER: contextvars.ContextVar[Listener | None] = contextvars.ContextVar("listener", default=None)
_SECONDS: contextvars.ContextVar[dict[str, float] | None] = contextvars.ContextVar("seconds", default=None)
_WAIT: contextvars.ContextVar[Callable[[], None] | None] = contextvars.ContextVar("wait", default=None)


@contextlib.contextmanager
def stage(name: str) -> Iterator[None]:
    """Run a stage: notify the active listener and add its duration to the active timing."""
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
    """Listen to the stages of this thread.

    Args:
        listener: Called when a stage starts.
        wait: Called before the clock is read, to synchronize with a GPU.

    Returns:
        Seconds by stage, updated when stages end.
    """
    seconds = dict[str, float]()
    tokens = _LISTENER.set(listener), _SECONDS.set(seconds), _WAIT.set(wait)
    try:
        yield seconds
    finally:
        _LISTENER.reset(tokens[0])
        _SECONDS.reset(tokens[1])
        _WAIT.reset(tokens[2])
