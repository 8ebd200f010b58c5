from __future__ import annotations

import subprocess
import sys
import threading

import pytest

from coldmerge.merging import Pool


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_results_come_in_the_order_of_the_items(threads: int) -> None:
    with Pool(threads) as pool:
        assert pool.spread(lambda x: x * x, range(100)) == [x * x for x in range(100)]
        assert pool.spread(str, []) == []


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_work_may_be_spread_from_inside_work(threads: int) -> None:
    def outer(x: int) -> int:
        return sum(pool.spread(lambda y: x * y, range(20)))

    with Pool(threads) as pool:
        assert pool.spread(outer, range(30)) == [190 * x for x in range(30)]


def test_idle_threads_join_inner_work() -> None:
    meeting = threading.Barrier(3, timeout=30)

    def inner(_: int) -> int:
        return meeting.wait()

    with Pool(3) as pool:
        found = pool.spread(lambda _: pool.spread(inner, range(3)), [0])
    assert sorted(found[0]) == [0, 1, 2]


@pytest.mark.parametrize("threads", [1, 2, 4])
def test_the_first_error_ends_the_work_and_is_raised(threads: int) -> None:
    done: list[int] = []

    def work(x: int) -> None:
        if x == 5:
            raise ValueError(x)
        done.append(x)

    with Pool(threads) as pool:
        with pytest.raises(ValueError, match="5"):
            pool.spread(work, range(10_000))
        assert len(done) < 5 + 10 * threads + 1000
        assert pool.spread(abs, [-1, -2]) == [1, 2], "the pool is good for more"


def test_an_error_inside_inner_work_reaches_the_caller() -> None:
    def outer(x: int) -> list[float]:
        return pool.spread(lambda y: 1 / (y - x), range(4))

    with Pool(3) as pool, pytest.raises(ZeroDivisionError):
        pool.spread(outer, range(4))


def test_no_thread_is_left_behind() -> None:
    with Pool(4) as pool:
        pool.spread(abs, range(100))
    assert not [t for t in threading.enumerate() if t.name.startswith("merge-")]


FAULTS = """
import resource, sys
import numpy as np
from coldmerge.merging import Pool

def work(_):
    [np.ones(2**17) for _ in range(8)]

with Pool(1) as pool:
    pool.spread(work, range(5))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    pool.spread(work, range(50))
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="how other C libraries free is not ours")
def test_memory_that_blocks_free_is_used_again() -> None:
    ran = subprocess.run([sys.executable, "-c", FAULTS], capture_output=True, check=True, text=True)
    assert int(ran.stdout) < 5 * 1024, "pages of 4 KB; fifty times 8 MB have 102,400"


def test_groups_come_in_order_whatever_the_caller_does_meanwhile() -> None:
    with Pool(3) as pool:
        groups = [range(at, at + 5) for at in range(0, 100, 5)]
        found = [pool.spread(abs, group) for group in groups]
        for group, squares in zip(found, pool.spread_ahead(lambda x: x * x, groups), strict=True):
            assert squares == [x * x for x in group]
        assert list(pool.spread_ahead(abs, [])) == []


def test_the_next_group_is_under_way_while_the_last_one_is_used() -> None:
    """It waits for the caller, who uses the first: only another thread can be at the second."""
    begun, used = threading.Event(), threading.Event()

    def work(number: int) -> int:
        if number == 1:
            begun.set()
            used.wait(30)
        return number

    with Pool(2) as pool:
        groups = pool.spread_ahead(work, [[0], [1]])
        assert next(groups) == [0]
        assert begun.wait(30)
        used.set()
        assert next(groups) == [1]


def test_an_error_in_a_later_group_comes_in_its_turn_and_a_closed_iterator_is_done() -> None:
    calls: list[int] = []

    def work(number: int) -> float:
        calls.append(number)
        return 1 / (3 - number)

    with Pool(2) as pool:
        groups = pool.spread_ahead(work, [[0, 1], [2, 3], [4, 5]])
        assert next(groups) == [1 / 3, 1 / 2]
        with pytest.raises(ZeroDivisionError):
            next(groups)
        groups = pool.spread_ahead(work, [[0], [1], [2]])
        next(groups)
        groups.close()
        done = len(calls)
        assert pool.spread(abs, [-1]) == [1]
        assert len(calls) == done
