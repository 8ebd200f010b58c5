"""The comparison of Flower's rules, small: every row is within its bound."""

from __future__ import annotations

from benchmarks.flower_rules import MERGES, OUTERS, merges, on_weights, outers


def test_every_rule_agrees_with_flowers_class() -> None:
    rows = [*merges(500, 10), *outers(500, 7, 2)]
    assert len(rows) == len(MERGES) + len(OUTERS)
    assert [row.line() for row in rows if row.ulp > row.bound] == []
    exact = [row.ours for row in rows if row.ulp == 0]
    assert len([ours for ours in exact if ours.startswith("flower")]) == 6


def test_distances_of_weights_lose_their_digits() -> None:
    lines = on_weights(500, 7)
    assert len(lines) == 3
    assert "by mean" in lines[0]
