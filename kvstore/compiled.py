"""Functions that numba compiles for this machine.

Covers: one decorator, so that all of them are compiled alike. Does not cover: what they compute.

They are compiled when their module is imported, once per machine: the result is kept beside the source, or where
`NUMBA_CACHE_DIR` says. None of them holds the interpreter lock.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import numba

F = TypeVar("F", bound=Callable[..., Any])


def compiled(signature: Any) -> Callable[[F], F]:
    """Compile a function for arguments of these numba types; its own annotations are for readers.

    Args:
        signature: As numba takes it, such as `"int64(int64, int64)"`.
    """
    decorated: Callable[[F], F] = numba.njit(signature, nogil=True, cache=True)
    return decorated
