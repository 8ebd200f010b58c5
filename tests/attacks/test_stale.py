"""Attackers in continuous rounds: an old base buys no larger share, and no second one."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from coldmerge.core.errors import ConflictError
from coldmerge.wire.calls import call
from coldmerge.wire.v1 import contributions_pb2
from coldmerge_coordinator.store import releases
from coldmerge_coordinator.store.models import Round
from coldmerge_coordinator.verifying import verify_release
from coldmerge_coordinator.worker import run_once
from tests.harness import MODEL, Array, Live, MachineClient

ACCEPTING = {"on_outlier": "accept", "reference_norm": 1.0}


def unit(seed: int, scale: float = 1.0) -> dict[str, Array]:
    """A task vector of norm `scale`."""
    drawn = np.random.default_rng(seed).standard_normal((16, 4))
    return {"embeddings.weight": (drawn * (scale / np.linalg.norm(drawn))).astype(np.float32)}


def a_round(live: Live, **policy: object) -> Round:
    return live.open_round(continuous={"max_staleness": 2}, screening=ACCEPTING, **policy)


def on(live: Live, number: int) -> dict[str, Any]:
    with live.store.database.read() as session:
        digest = releases.get_release(session, MODEL, number).content_digest
    return {"base_number": number, "base_digest": digest}


def weights(live: Live) -> np.ndarray[Any, np.dtype[np.float64]]:
    with live.store.database.read() as session:
        latest = releases.latest_release(session, MODEL)
        digest = releases.get_masters(session, latest.master_digest)["embeddings.weight"]
    return live.store.blobs.block(digest, "F32", 0, 64).astype(np.float64)


def release(live: Live, *sent: tuple[MachineClient, dict[str, Array], int]) -> Round:
    round_ = a_round(live)
    for org, deltas, base in sent:
        org.contribute(round_, deltas, **on(live, base))
    assert run_once(live.store, live.clock)
    return round_


@pytest.mark.parametrize(("base", "share"), [(2, 1.0), (1, 2**-0.5), (0, 3**-0.5)])
@pytest.mark.parametrize("scale", [1e3, 1e30])
def test_a_loud_contribution_moves_no_more_for_being_old(
    live: Live, base: int, share: float, scale: float
) -> None:
    a, b = live.machine("a"), live.machine("b")
    for number in (0, 1):
        release(live, (a, unit(number), number), (b, unit(10 + number), number))
    before, honest = weights(live), unit(20)
    release(live, (a, honest, 2), (b, unit(21, scale), base))
    moved = weights(live) - before - honest["embeddings.weight"].astype(np.float64).ravel() / 2
    assert np.linalg.norm(moved) == pytest.approx(2 * share / 2, rel=1e-5)
    assert verify_release(live.store, MODEL, None, live.folder).answer == "exact"


def test_what_was_signed_for_one_round_is_not_admitted_to_the_next(live: Live) -> None:
    a, b, slow = (live.machine(name) for name in ("a", "b", "slow"))
    first = a_round(live)
    manifest, payload = slow.manifest(first, unit(1))
    upload = slow.begin(manifest).upload_id
    slow.write(upload, payload)
    a.contribute(first, unit(2))
    b.contribute(first, unit(3))
    assert run_once(live.store, live.clock)
    second = a_round(live)
    another, _ = slow.manifest(first, unit(1))
    for attempt in (lambda: slow.commit(upload), lambda: slow.begin(another)):
        with pytest.raises(ConflictError) as caught:
            attempt()
        assert caught.value.code == "round.not_open"
    request = contributions_pb2.ListContributionsRequest()
    assert not call(slow.contributions.List, request).contributions
    slow.contribute(second, unit(1), base_number=0, base_digest=first.base_digest)
    (found,) = call(slow.contributions.List, request).contributions
    assert (found.round, found.state) == (second.id, contributions_pb2.Contribution.ADMITTED)
