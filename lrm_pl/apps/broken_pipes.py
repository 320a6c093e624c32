"""A command outlives whoever reads its output: of `2>&1 | tee log`, Ctrl-C ends tee before a run has stopped.

And of a terminal that is closed, nothing is left to write to when the run hears of it.
"""

import errno
import os
import sys
from collections.abc import Callable
from typing import Any


def outlive_readers() -> None:
    """Discard output to closed pipes instead of raising, and open closed standard streams on the null device."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if (
            getattr(sys, name) is None
        ):  # closed: the next file opened would get its descriptor, and what children print
            nowhere = os.open(os.devnull, os.O_RDWR)  # the lowest descriptor that is free
            os.set_inheritable(nowhere, True)
            setattr(sys, name, open(nowhere, mode))
    for stream, descriptor in ((sys.stdout, 1), (sys.stderr, 2)):
        try:
            ours = stream.fileno() == descriptor
        except (OSError, ValueError, AttributeError):  # a notebook's, or none
            continue
        if ours:
            for name in ("write", "flush"):
                setattr(stream, name, _guarded(getattr(type(stream), name).__get__(stream), descriptor))


def _guarded(method: Callable[..., Any], descriptor: int) -> Callable[..., Any]:
    def call(*arguments: Any) -> Any:  # noqa: ANN401 - the method's own
        try:
            return method(*arguments)
        except OSError as error:
            if error.errno not in (errno.EPIPE, errno.EIO):
                raise
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, descriptor)
            os.close(nowhere)
            return method(*arguments)

    return call
