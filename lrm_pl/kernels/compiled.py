"""How functions are compiled on a CPU: kept from one start to the next where the cache can be written."""

from collections.abc import Callable
from typing import Any, TypeVar

import numba

F = TypeVar("F", bound=Callable[..., Any])


def compiled(**options: Any) -> Callable[[F], F]:  # noqa: ANN401 - numba's
    """Compile a function at its first call, without the interpreter's lock.

    numba keeps the code beside the source, or in the user's home; where neither can be written (a read-only container
    of a user without a home), it is compiled in each process.

    Args:
        options: Of ``numba.njit``.
    """

    def wrap(function: F) -> F:
        try:
            return numba.njit(nogil=True, cache=True, **options)(function)
        except RuntimeError as error:
            if "cannot cache function" not in str(error):
                raise
            return numba.njit(nogil=True, **options)(function)

    return wrap
