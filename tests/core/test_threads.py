"""One BLAS thread, however many workers ask for it."""

from __future__ import annotations

import threading

import pytest
from threadpoolctl import threadpool_info

from coldmerge.core.threads import one_blas_thread


def blas_threads() -> set[int]:
    return {pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas"}


def test_blas_has_one_thread_until_the_last_worker_is_out() -> None:
    """The first worker in is not the last one out."""
    first_in, second_in, first_out = (threading.Event() for _ in range(3))
    seen: list[set[int]] = []

    def second() -> None:
        first_in.wait(10)
        with one_blas_thread():
            second_in.set()
            first_out.wait(10)
            seen.append(blas_threads())

    before = blas_threads()
    worker = threading.Thread(target=second)
    worker.start()
    with one_blas_thread():
        first_in.set()
        assert second_in.wait(10)
        seen.append(blas_threads())
    first_out.set()
    worker.join()
    assert seen == [{1}, {1}]
    assert blas_threads() == before
    with pytest.raises(RuntimeError, match="inside"), one_blas_thread():
        raise RuntimeError("inside")
    assert blas_threads() == before
