"""What contributors are asked for is what the merge methods need."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from coldmerge.core.errors import ConfigError
from coldmerge.merging import merger_class, method_names, uniform
from coldmerge.rounds.policy import MergePolicy, RoundPolicy
from coldmerge.rounds.statistics import statistics_for, trim_density
from coldmerge_coordinator.merging.recipes import resolved

SETTINGS: list[tuple[str, dict[str, Any]]] = [
    *((name, {}) for name in method_names()),
    ("ties", {"thresholds": "shipped", "density": 0.2}),
    ("mats", {"statistic": "fisher"}),
    ("mats", {"statistic": "gram"}),
]


@pytest.mark.parametrize(("method", "parameters"), SETTINGS)
def test_each_method_gets_what_it_needs(method: str, parameters: dict[str, Any]) -> None:
    policy = MergePolicy(method=method, parameters=parameters)
    needs = uniform(merger_class(method), parameters, [1.0, 1.0]).merger.needs
    assert statistics_for(policy) == needs


def test_a_frozen_policy_asks_for_the_same() -> None:
    for method, parameters in SETTINGS[-3:]:
        given = MergePolicy(method=method, parameters=parameters)
        frozen = resolved(RoundPolicy(merge=given)).merge
        assert statistics_for(frozen) == statistics_for(given)
        assert trim_density(frozen) == trim_density(given)


PLUGIN = '''
from typing import ClassVar
from coldmerge.merging import Merger

class Nosy(Merger):
    """Wants to know everything."""
    name: ClassVar[str] = "nosy"

    @property
    def needs(self):
        return frozenset({"gram"})

    def merge(self, block, facts):
        return block.stack()[0]
'''


def test_a_method_of_ones_own_that_needs_statistics_merges_no_round(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    info = tmp_path / "nosy-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: nosy\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[coldmerge.mergers]\nnosy = nosy_plugin:Nosy\n")
    (tmp_path / "nosy_plugin.py").write_text(PLUGIN)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError) as caught:
        resolved(RoundPolicy(merge=MergePolicy(method="nosy")))
    assert caught.value.code == "policy.needs_statistics"
