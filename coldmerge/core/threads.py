"""How many threads linear algebra may use: one, so that results do not depend on it."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any


def one_blas_thread() -> AbstractContextManager[Any]:
    """A context in which BLAS and LAPACK run on one thread, where threadpoolctl is installed.

    With more threads the last bits of a product may differ from machine to machine.
    """
    try:
        from threadpoolctl import threadpool_limits
    except ImportError:
        return nullcontext()
    limits: AbstractContextManager[Any] = threadpool_limits(1, "blas")
    return limits
