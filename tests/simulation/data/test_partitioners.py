"""How a pool is dealt: every example once, and nobody left with nothing to learn from."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coldmerge.core.errors import ConfigError
from coldmerge_simulation.data import (
    DataConfig,
    Partitioner,
    Pool,
    deal_again,
    make,
    partitioner,
    serves,
)


def config(partition: Any) -> DataConfig:
    return DataConfig.model_validate({"partition": partition}, context={"folder": Path.cwd()})


def pool(labels: Sequence[int]) -> Pool:
    rows = [{"text": str(n), "label": label, "c": n % 5} for n, label in enumerate(labels)]
    return Pool("pool", rows, np.array(labels, np.int64))


WAYS = (
    partitioner("iid", {}),
    partitioner("dirichlet", {"alpha": 0.1, "minimum": 4}),
    partitioner("dirichlet", {"alpha": 1e-6}),
    partitioner("dirichlet", {"alpha": 1e6}),
    partitioner("shards", {"each": 1}),
    partitioner("shards", {"each": 3}),
)


@given(
    st.sampled_from(WAYS),
    st.lists(st.integers(8, 40), min_size=2, max_size=9),
    st.integers(1, 12),
    st.integers(0, 2**32),
)
@settings(max_examples=60, deadline=None)
def test_every_way_deals_all_rows_once_and_two_labels_to_everybody(
    way: Partitioner, held: list[int], count: int, seed: int
) -> None:
    labels = [label for label, many in enumerate(held) for _ in range(many)]
    count = min(count, len(labels) // 8)
    parts = way.deal(pool(labels), count, np.random.default_rng(seed))
    assert len(parts) == count
    assert sorted(position for part in parts for position in part) == list(range(len(labels)))
    assert all(len(part) >= getattr(way, "minimum", 3) for part in parts)
    assert all(serves(Counter(labels[position] for position in part)) for part in parts)
    assert parts == way.deal(pool(labels), count, np.random.default_rng(seed))


def test_a_small_alpha_makes_contributors_unlike() -> None:
    labels = [n % 4 for n in range(800)]

    def unlike(alpha: float) -> float:
        way = partitioner("dirichlet", {"alpha": alpha})
        parts = way.deal(pool(labels), 10, np.random.default_rng(0))
        shares = [np.bincount([labels[i] for i in p], minlength=4) / len(p) for p in parts]
        return float(np.mean([abs(share - 0.25).sum() for share in shares]))

    assert unlike(0.1) > 1.3 * unlike(1.0) > 4 * unlike(100.0)


def test_a_column_is_never_cut() -> None:
    parts = partitioner("column", {"column": "c"}).deal(
        pool([n % 2 for n in range(100)]), 3, np.random.default_rng(0)
    )
    held = [{position % 5 for position in part} for part in parts]
    assert sum(map(len, held)) == 5
    assert sorted(map(len, parts)) == [20, 40, 40]


def test_parts_that_cannot_be_mended_stay() -> None:
    labels = np.array([0, 0, 0, 0, 1], np.int64)
    assert deal_again([[0, 1], [2, 3, 4]], labels, 2) == [[0, 1], [2, 3, 4]]
    assert deal_again([[0, 1], [2, 3, 4]], labels, 9) == [[0, 1], [2, 3, 4]]
    assert sorted(map(len, deal_again([[], [0, 1, 2, 3, 4]], labels, 2))) == [2, 3]


def test_an_unknown_partitioner_lists_the_valid_ones() -> None:
    with pytest.raises(ConfigError) as caught:
        config("dirichlett")
    assert caught.value.expected == "column | dirichlet | iid | shards | task"
    assert "`dirichlet`" in caught.value.hint
    with pytest.raises(ConfigError, match=r"wrong at alpha: .*greater than 0"):
        config({"by": "dirichlet", "alpha": 0})
    with pytest.raises(ConfigError, match="wrong at beta"):
        config({"by": "dirichlet", "beta": 1})


def plug_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: str) -> None:
    """What installing a package with such an entry point does."""
    about = tmp_path / "researcher-1.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: researcher\nVersion: 1\n")
    (about / "entry_points.txt").write_text(f"[coldmerge.partitioners]\nevery-other = {target}\n")
    monkeypatch.syspath_prepend(tmp_path)


OWN = """
from coldmerge_simulation.data import Partitioner

class EveryOther(Partitioner):
    name = "every-other"
    broken: bool = False

    def deal(self, pool, count, draw):
        step = 1 if self.broken else count
        return [list(range(start, len(pool.rows), step)) for start in range(count)]
"""


def test_a_partitioner_of_ones_own_comes_by_entry_point(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "researchers_own.py").write_text(OWN)
    plug_in(tmp_path, monkeypatch, "researchers_own:EveryOther")
    how = config("every-other")
    assert how.model_dump(mode="json")["partition"] == {"by": "every-other", "broken": False}
    assert len(make(how, 4, 0, tmp_path / "data").shares) == 4
    with pytest.raises(ConfigError) as caught:
        make(config({"by": "every-other", "broken": True}), 4, 0, tmp_path / "other")
    assert caught.value.code == "simulation.bad_parts"


def test_a_broken_entry_point_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plug_in(tmp_path, monkeypatch, "no_such_module:Thing")
    with pytest.raises(ConfigError, match="every-other of another package") as caught:
        config("every-other")
    assert "ModuleNotFoundError" in str(caught.value.got)
