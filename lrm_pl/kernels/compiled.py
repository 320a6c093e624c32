"""Compile functions with numba, with an on-disk cache if it is writable."""

from collections.abc import Callable
from typing import Any, TypeVar

import numba

F = TypeVar("F", bound=Callable[..., Any])


def compiled(**options: Any) -> Callable[[F], F]:  # noqa: ANN401 - numba's
    """Return a decorator that compiles a function at its first call and releases the GIL while it runs.

    numba caches the code next to the source or in the home folder. If neither is writable, as in a read-only
    container, each process compiles it again.

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
