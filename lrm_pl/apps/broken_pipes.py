"""Ignore closed output pipes and terminals, so that a run can finish its work.

For example, Ctrl-C in `lrm fit ... 2>&1 | tee log` ends tee before the run has saved its checkpoint.
"""

import errno
import os
import sys
from collections.abc import Callable
from typing import Any


def ignore_broken_pipes() -> None:
    """Discard output to closed pipes instead of raising, and open closed standard streams on the null device."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # closed: another file could be opened with its descriptor
            null = os.open(os.devnull, os.O_RDWR)  # returns the lowest free descriptor
            os.set_inheritable(null, True)
            setattr(sys, name, open(null, mode))
    for stream, descriptor in ((sys.stdout, 1), (sys.stderr, 2)):
        try:
            is_standard = stream.fileno() == descriptor
        except (OSError, ValueError, AttributeError):  # in notebooks
            continue
        if is_standard:
            for name in ("write", "flush"):
                setattr(stream, name, _guarded(getattr(type(stream), name).__get__(stream), descriptor))


def _guarded(method: Callable[..., Any], descriptor: int) -> Callable[..., Any]:
    """Redirect the descriptor to the null device when a write fails because the reader is gone."""

    def call(*arguments: Any) -> Any:  # noqa: ANN401 - the method's own
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
