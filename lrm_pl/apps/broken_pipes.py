"""Handling of closed output pipes and terminals, which must not prevent a run from finishing its work.

For example, Ctrl-C in ``lrm fit ... 2>&1 | tee log`` stops tee before the run has saved a checkpoint.
"""

import errno
import os
import sys
from collections.abc import Callable
from typing import Any


def ignore_broken_pipes() -> None:
    """Discard output to closed pipes instead of raising an error, and redirect closed standard streams to /dev/null."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # without a redirection, a different file could get this descriptor
            null = os.open(os.devnull, os.O_RDWR)  # returns the lowest free descriptor
            os.set_inheritable(null, True)
            setattr(sys, name, open(null, mode))
    for stream, descriptor in ((sys.stdout, 1), (sys.stderr, 2)):
        try:
            is_standard = stream.fileno() == descriptor
        except (OSError, ValueError, AttributeError):  # streams of notebooks have no descriptor
            continue
        if is_standard:
            for name in ("write", "flush"):
                setattr(stream, name, _guarded(getattr(type(stream), name).__get__(stream), descriptor))


def _guarded(method: Callable[..., Any], descriptor: int) -> Callable[..., Any]:
    """Wrap a stream method so that ``descriptor`` is redirected to /dev/null if the reader has closed the pipe."""

    def call(*arguments: Any) -> Any:  # noqa: ANN401 - arguments of the method
        try:
            return method(*arguments)
        except OSError as error:
            if error.errno not in (errno.EPIPE, errno.EIO):
                raise
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, descriptor)
            os.close(null)
            return method(*arguments)

    return call
