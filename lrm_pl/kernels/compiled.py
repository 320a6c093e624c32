"""Compilation of functions with numba, with an on-disk cache if possible."""

from collections.abc import Callable
from typing import Any, TypeVar

import numba

F = TypeVar("F", bound=Callable[..., Any])


def compiled(**options: Any) -> Callable[[F], F]:  # noqa: ANN401 - numba's
    """Return a decorator that compiles a function on its first call and releases the GIL while it runs.

    numba caches the compiled code next to the source file or in the home folder. If neither folder is writable, for
    example, in a read-only container, each process compiles the function again.

    Args:
        options: Options of ``numba.njit``.
    """

    def wrap(function: F) -> F:
        try:
            return numba.njit(nogil=True, cache=True, **options)(function)
        except RuntimeError as error:
            if "cannot cache function" not in str(error):
                raise
            return numba.njit(nogil=True, **options)(function)

    return wrap
