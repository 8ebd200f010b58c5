"""Evaluations and a fixed time."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime

import pytest

from coldmerge.core.documents import Evaluation, Scores

Judge = Callable[..., Evaluation]


def _judge(name: str, points: float, f1_points: float = 0.0) -> Evaluation:
    """`name` finds the candidate better by `points` of accuracy, on 10,000 items."""
    n = 10_000
    net = round(points * n / 100)
    return Evaluation(
        federation="fed",
        model="triage",
        round="round-1",
        contributor=name,
        base_digest="a" * 64,
        candidate_digest="b" * 64,
        n=n,
        base=Scores(accuracy=0.5, macro_f1=0.5),
        candidate=Scores(accuracy=0.5 + net / n, macro_f1=0.5 + f1_points / 100),
        gained=max(net, 0),
        lost=max(-net, 0),
        probe_seed=7,
        created_at=datetime(2026, 1, 1, tzinfo=UTC),
    )


@pytest.fixture
def judge() -> Judge:
    """Makes an evaluation: judge(name, points gained)."""
    return _judge
