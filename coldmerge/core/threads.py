"""How many threads linear algebra may use: one, so that results do not depend on it."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any


def one_blas_thread() -> AbstractContextManager[Any]:
    """A context in which BLAS and LAPACK run on one thread.

    With more threads the last bits of a product may differ from machine to machine.
    """
    from threadpoolctl import threadpool_limits

    limits: AbstractContextManager[Any] = threadpool_limits(1, "blas")
    return limits
