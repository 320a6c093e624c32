"""Named stages of long operations, for measuring and displaying progress."""

import contextlib
import contextvars
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

#: Function that is called with the name of each stage when the stage starts.
Listener = Callable[[str], None]


class _Recorder(NamedTuple):
    listener: Listener | None
    wait: Callable[[], None] | None
    seconds: dict[str, float]


_RECORDER: contextvars.ContextVar[_Recorder | None] = contextvars.ContextVar("recorder", default=None)


@contextlib.contextmanager
def stage(name: str) -> Iterator[None]:
    """Return a context manager that notifies the active listener and measures the duration of a stage."""
    recorder = _RECORDER.get()
    if recorder is None:
        yield
        return
    if recorder.listener is not None:
        recorder.listener(name)
    start = time.perf_counter()
    try:
        yield
    finally:
        if recorder.wait is not None:
            recorder.wait()
        recorder.seconds[name] = recorder.seconds.get(name, 0.0) + time.perf_counter() - start


@contextlib.contextmanager
def listening(
    listener: Listener | None = None, wait: Callable[[], None] | None = None
) -> Iterator[dict[str, float]]:
    """Listen to the stages of the current thread.

    Args:
        listener: Function that is called when a stage starts.
        wait: Function that is called at the end of a stage before the clock is read, to synchronize with a GPU.

    Yields:
        Mapping from the name of each stage to its duration in seconds, which is updated when a stage ends.
    """
    recorder = _Recorder(listener, wait, {})
    token = _RECORDER.set(recorder)
    try:
        yield recorder.seconds
    finally:
        _RECORDER.reset(token)
