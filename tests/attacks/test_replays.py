"""A sample of what `python -m tests.attacks.replays` sends."""

from __future__ import annotations

from tests.attacks.replays import run
from tests.harness import Live


def test_nothing_replayed_or_flipped_is_accepted(live: Live) -> None:
    result = run(live, 400, seed=1)
    assert (result.sent, result.accepted) == (400, 0)
    assert {"document.bad_signature", "round.not_open", "manifest.replayed"} <= set(result.refused)
