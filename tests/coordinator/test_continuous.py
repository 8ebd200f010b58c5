"""Continuous rounds on a coordinator's folder: opening, discounts, lineage, verification."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta
from math import nextafter
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pytest
from sqlalchemy import select

from coldmerge.rounds.continuous import discount
from coldmerge.rounds.policy import RoundTemplate
from coldmerge.rounds.state import Abandon
from coldmerge_coordinator.driver import Driver
from coldmerge_coordinator.exporting import export
from coldmerge_coordinator.importing import set_template
from coldmerge_coordinator.service import admin
from coldmerge_coordinator.store import continuous, releases, rounds
from coldmerge_coordinator.store.models import Notice, Round
from coldmerge_coordinator.verifying import verify_release
from coldmerge_coordinator.worker import run_once

if TYPE_CHECKING:
    from tests.coordinator.conftest import Bench

Array = npt.NDArray[np.float32]
NOWHERE = "http://127.0.0.1:9/hook"
SECOND = timedelta(seconds=1)


def random(seed: int, scale: float = 1.0) -> Array:
    """A matrix of norm `scale`."""
    drawn = np.random.default_rng(seed).standard_normal((30, 40)).astype(np.float32)
    return np.asarray(drawn * np.float32(scale / np.linalg.norm(drawn)))


def template(**rule: Any) -> RoundTemplate:
    """Two arrivals a round, no gate; `rule` is the `continuous` section."""
    values = {"min_contributions": 2, "gate": None, "webhook": NOWHERE, "continuous": rule}
    return RoundTemplate.model_validate(values)


@pytest.fixture
def driver(bench: Bench) -> Iterator[Driver]:
    bench.add_model({"w": random(1), "other": np.ones(3, np.float32)}, template=template())
    made = Driver(bench.store, bench.clock)
    yield made
    made.close()


def opened(bench: Bench, driver: Driver) -> str:
    """The round that is open once the driver has looked, a second later."""
    bench.clock.advance(SECOND)
    assert driver.step()
    with bench.store.database.read() as session:
        row = rounds.active_round(session, "m")
    assert row is not None
    assert row.state == "OPEN"
    return row.id


def play(bench: Bench, driver: Driver, *sent: tuple[str, Array, int]) -> str:
    """A round of the driver's to its release: who sends what, trained on which release."""
    round_id = opened(bench, driver)
    for name, vector, base in sent:
        bench.contribute(round_id, name, {"w": vector}, base=base)
    assert run_once(bench.store, bench.clock)
    assert bench.round(round_id).state == "PUBLISHED", bench.round(round_id).reason
    return round_id


def fresh(bench: Bench, driver: Driver, seed: int) -> str:
    number = bench.release().number
    return play(bench, driver, ("a", random(seed), number), ("b", random(seed + 1), number))


def master(bench: Bench, number: int | None = None) -> Array:
    return bench.masters(bench.release(number))["w"]


def abandon(bench: Bench) -> None:
    with bench.store.database.read() as session:
        row = rounds.active_round(session, "m")
    assert row is not None
    admin.move_round(bench.store, row.id, Abandon("no"), bench.clock.now())


def bases(bench: Bench, round_id: str) -> list[tuple[int, int]]:
    with bench.store.database.read() as session:
        found = continuous.bases_of(session, rounds.get(session, round_id))
    return [(base.number, base.staleness) for base in found]


def test_one_round_follows_on_the_other_without_a_schedule(bench: Bench, driver: Driver) -> None:
    for number in range(3):
        fresh(bench, driver, 10 * number)
        assert bench.release().number == number + 1
    assert bases(bench, opened(bench, driver)) == [(3, 0), (2, 1), (1, 2)]
    for _ in range(3):
        driver.step()
    with bench.store.database.read() as session:
        assert len(rounds.list_rounds(session, "m")) == 4
    set_template(bench.store, "m", RoundTemplate(), clock=bench.clock)
    round_id = opened(bench, driver)
    bench.contribute(round_id, "a", {"w": random(1)})
    bench.contribute(round_id, "b", {"w": random(2)})
    assert run_once(bench.store, bench.clock)
    bench.clock.advance(SECOND)
    driver.step()
    with bench.store.database.read() as session:
        assert rounds.active_round(session, "m") is None, "the template is windowed by now"


def test_a_stale_task_vector_is_added_to_the_newest_master_for_less(
    bench: Bench, driver: Driver
) -> None:
    fresh(bench, driver, 10)
    fresh(bench, driver, 20)
    before, new, old = master(bench).astype(np.float64), random(3), random(4)
    round_id = play(bench, driver, ("a", new, 2), ("c", old, 0))
    factor = 3**-0.5
    scaled = np.multiply(old, factor, dtype=np.float64).astype(np.float32)
    mean = (new.astype(np.float64) + scaled.astype(np.float64)).ravel() / 2
    np.testing.assert_array_equal(master(bench), (before + mean).astype(np.float32))
    record = releases.get_record(bench.release())
    screening = bench.round(round_id).screening
    assert screening is not None
    ((digest, facts),) = screening["stale"].items()
    assert facts == {"staleness": 2, "discount": factor}
    said = {key: value for key, value in record.recipe.items() if key.startswith("continuous.")}
    assert said == {
        "continuous.max_staleness": 2,
        "continuous.discount": 0.5,
        f"continuous.staleness.{digest}": 2,
        f"continuous.factor.{digest}": factor,
    }
    report = {row["contributor"]: row["factor"] for row in screening["report"]["inputs"]}
    assert report == {"a": 1.0, "c": factor}
    found = verify_release(bench.store, "m", None, bench.folder)
    assert (found.answer, found.problems) == ("exact", [])
    export(bench.store, "m", 3, bench.folder / "out")
    card = (bench.folder / "out" / "README.md").read_text()
    assert f"| continuous.factor.{digest} | {factor} |" in card
    assert "1 of them was trained on an older release" in card


def test_a_discount_that_the_manifests_do_not_warrant_is_found(
    bench: Bench, driver: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    fresh(bench, driver, 10)
    round_id = play(bench, driver, ("a", random(3), 1), ("c", random(4), 0))
    assert verify_release(bench.store, "m", None, bench.folder).answer == "exact"
    with monkeypatch.context() as rounded_otherwise:
        rounded_otherwise.setattr(continuous, "discount", lambda *of: nextafter(discount(*of), 0))
        assert verify_release(bench.store, "m", None, bench.folder).answer == "exact"
    with bench.store.database.write() as session:
        row = session.get_one(Round, round_id)
        policy = {**row.policy, "continuous": {**row.policy["continuous"], "discount": 0.25}}
        row.policy = policy
    found = verify_release(bench.store, "m", None, bench.folder)
    assert found.answer == "different"
    assert "discounts contributions otherwise" in found.problems[0]


def test_an_old_base_is_no_way_around_the_clip(bench: Bench, driver: Driver) -> None:
    fresh(bench, driver, 10)
    fresh(bench, driver, 20)
    before, new = master(bench).astype(np.float64), random(3)
    round_id = play(bench, driver, ("a", new, 2), ("c", random(4, 1e6), 0))
    moved = master(bench).astype(np.float64) - before - new.astype(np.float64).ravel() / 2
    screening = bench.round(round_id).screening
    assert screening is not None
    assert screening["reference_norm"] == pytest.approx(1.0, rel=1e-5)
    assert np.linalg.norm(moved) == pytest.approx(2 * 3**-0.5 / 2, rel=1e-4)
    recipe = releases.get_record(bench.release()).recipe
    (digest,) = screening["stale"]
    assert recipe[f"screening.factor.{digest}"] == pytest.approx(2e-6, rel=1e-4)
    assert verify_release(bench.store, "m", None, bench.folder).answer == "exact"


def test_discounts_do_not_shrink_the_reference_from_round_to_round(
    bench: Bench, driver: Driver
) -> None:
    set_template(bench.store, "m", template(discount=5), clock=bench.clock)
    fresh(bench, driver, 10)
    for number in range(1, 5):
        round_id = play(
            bench, driver, ("a", random(number), number - 1), ("b", random(50 + number), number - 1)
        )
        screening = bench.round(round_id).screening
        assert screening is not None
        assert screening["reference_norm"] == pytest.approx(1.0, rel=1e-5)
        assert set(screening["factors"].values()) == {1.0}
        assert {facts["discount"] for facts in screening["stale"].values()} == {2.0**-5}


def test_only_releases_of_the_line_that_led_here_are_bases(bench: Bench, driver: Driver) -> None:
    fresh(bench, driver, 10)
    fresh(bench, driver, 20)
    fresh(bench, driver, 30)
    opened(bench, driver)
    abandon(bench)
    admin.rollback(bench.store, "m", 2, "3 was bad", bench.clock.now())
    bench.clock.advance(timedelta(minutes=5))
    round_id = opened(bench, driver)
    assert bases(bench, round_id) == [(4, 0), (2, 0), (1, 1), (0, 2)]
    bench.contribute(round_id, "a", {"w": random(41)}, base=2)
    bench.contribute(round_id, "b", {"w": random(42)}, base=1)
    assert run_once(bench.store, bench.clock)
    screening = bench.round(round_id).screening
    assert screening is not None
    assert [facts["staleness"] for facts in screening["stale"].values()] == [1]
    assert verify_release(bench.store, "m", None, bench.folder).answer == "exact"


def test_what_was_trained_on_a_release_that_was_made_anew_is_not_taken(
    bench: Bench, driver: Driver
) -> None:
    fresh(bench, driver, 10)
    play(bench, driver, ("a", random(20), 1), ("b", random(21), 0))
    play(bench, driver, ("a", random(30), 2), ("c", random(31), 1))
    opened(bench, driver)
    abandon(bench)
    bench.clock.advance(SECOND)
    admin.remerge(bench.store, "m", ["c"], "left", bench.clock.now())
    assert run_once(bench.store, bench.clock)
    assert bench.release().number == 4
    found = verify_release(bench.store, "m", None, bench.folder)
    assert (found.answer, found.merged) == ("exact", 1)
    assert bases(bench, opened(bench, driver)) == [(4, 0), (2, 1), (1, 2)]
    abandon(bench)
    bench.clock.advance(SECOND)
    admin.remerge(bench.store, "m", ["a"], "left, too", bench.clock.now())
    assert run_once(bench.store, bench.clock)
    recipe = releases.get_record(bench.release()).recipe
    factors = [value for key, value in recipe.items() if key.startswith("continuous.factor.")]
    assert factors == [2**-0.5], "a re-merge discounts as the round did"
    assert verify_release(bench.store, "m", None, bench.folder).answer == "exact"


def test_a_round_that_made_no_release_is_followed_after_a_pause(
    bench: Bench, driver: Driver
) -> None:
    def states() -> list[str]:
        with bench.store.database.read() as session:
            return [row.state for row in rounds.list_rounds(session, "m")]

    driver.step()
    for at, minutes in enumerate((5, 10, 20), 1):
        abandon(bench)
        bench.clock.advance(timedelta(minutes=minutes) - SECOND)
        driver.step()
        assert states() == ["ABANDONED"] * at
        bench.clock.advance(SECOND)
        driver.step()
        assert states() == ["OPEN", *["ABANDONED"] * at]
    with bench.store.database.read() as session:
        texts = [notice.body["text"] for notice in session.scalars(select(Notice))]
    assert "no; the next round opens at 2026-03-02 12:05:00 UTC" in texts
    fresh(bench, driver, 10)
    bench.clock.advance(SECOND)
    driver.step()
    assert states()[:2] == ["OPEN", "PUBLISHED"], "a release ends the pauses"
