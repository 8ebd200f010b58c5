"""Bounds of a round from its opening to its release, on a coordinator's folder."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pytest

from coldmerge.core.documents import Statistic
from coldmerge_coordinator.service import admin
from coldmerge_coordinator.store import releases
from coldmerge_coordinator.worker import run_once

if TYPE_CHECKING:
    from tests.coordinator.conftest import Bench

Array = npt.NDArray[np.float32]

ROWS, COLUMNS = 30, 100
FISHER: dict[Statistic, float] = {"fisher": 100.0}


def random(seed: int, scale: float = 1.0) -> Array:
    """A matrix of norm `scale`."""
    drawn = np.random.default_rng(seed).standard_normal((ROWS, COLUMNS)).astype(np.float32)
    return np.asarray(drawn * np.float32(scale / np.linalg.norm(drawn)))


def add_model(bench: Bench, dtype: str = "<f4") -> None:
    bench.add_model({"w": random(1).astype(dtype), "other": np.ones(3, dtype)})


def play(bench: Bench, *vectors: Array, **policy: Any) -> str:
    round_id = bench.open_round(min_contributions=len(vectors), **policy)
    for at, vector in enumerate(vectors):
        bench.contribute(round_id, f"org-{at}", {"w": vector})
    assert run_once(bench.store, bench.clock)
    assert bench.round(round_id).state == "PUBLISHED", bench.round(round_id).reason
    return round_id


def screened(bench: Bench, round_id: str) -> dict[str, Any]:
    found = bench.round(round_id).screening
    assert found is not None
    return found


def moved(bench: Bench) -> npt.NDArray[np.float64]:
    """What the last round added to the master of `w`."""
    last = bench.release().number
    after, before = (bench.masters(bench.release(number))["w"] for number in (last, last - 1))
    return np.asarray(after.astype(np.float64) - before)


def test_an_honest_round_has_the_bytes_of_one_without_a_clip(make_bench: Any) -> None:
    digests = []
    for name, policy in (("a", {}), ("b", {"screening": {"clip": None}})):
        bench = make_bench(name)
        add_model(bench)
        play(bench, random(2), random(3, 1.9), random(4, 0.5), **policy)
        play(bench, random(5), random(6, 1.9), random(7, 0.5), **policy)
        digests.append(bench.release().content_digest)
    assert digests[0] == digests[1]


@pytest.mark.parametrize("scale", [1e3, 1e30])
@pytest.mark.parametrize("dtype", ["<f4", "<f2"])
def test_a_loud_attacker_moves_no_more_than_its_share(
    bench: Bench, scale: float, dtype: str
) -> None:
    add_model(bench, dtype)
    attack = (random(9).astype(np.float64) * scale).astype(np.float32)
    honest = [random(2), random(3)]
    round_id = play(bench, *honest, attack)
    found = screened(bench, round_id)
    assert found["reference_from"] == "round"
    reference = found["reference_norm"]
    assert reference == pytest.approx(1.0, rel=1e-5)
    rest = np.sum([vector.astype(np.float64).ravel() for vector in honest], axis=0) / 3
    share = np.linalg.norm(moved(bench) - rest)
    assert share <= 2 * reference / 3 * (1 + 1e-5)
    record = releases.get_record(bench.release())
    digest, factor = next((d, f) for d, f in found["factors"].items() if f != 1.0)
    assert record.recipe[f"screening.factor.{digest}"] == factor
    assert record.recipe["screening.reference_norm"] == reference
    assert sum("screening.factor" in key for key in record.recipe) == 1
    report = found["report"]
    loud = next(row for row in report["inputs"] if row["contributor"] == "org-2")
    assert loud["factor"] == factor == 2 * reference / loud["norm"]


def test_the_reference_is_what_the_base_release_merged(bench: Bench) -> None:
    add_model(bench)
    with_key = bench.open_round(screening={"reference_norm": 3.0})
    assert screened(bench, with_key) == {"reference_norm": 3.0, "reference_from": "policy"}
    bench.contribute(with_key, "a", {"w": random(2)})
    run_once(bench.store, bench.clock)
    first = play(bench, random(2), random(3, 4.0), random(4, 100.0), screening={"clip": 2.0})
    assert screened(bench, first)["reference_norm"] == pytest.approx(1.0, rel=1e-5)
    assert screened(bench, first)["reference_from"] == "release 1"
    second = bench.open_round(screening={"reference_norm": 3.0})
    known = screened(bench, second)
    assert known["reference_from"] == "release 2"
    assert known["reference_norm"] == pytest.approx(2.0, rel=1e-5), "as long as it was merged"


def test_after_a_rollback_the_reference_is_that_of_the_old_release(bench: Bench) -> None:
    add_model(bench)
    play(bench, random(2, 5.0))
    play(bench, random(3, 7.0))
    with bench.store.database.write() as session:
        releases.rollback(session, bench.store.signer, "m", 1, "", bench.clock.now())
    known = screened(bench, bench.open_round())
    assert known["reference_from"] == "release 1"
    assert known["reference_norm"] == pytest.approx(5.0, rel=1e-5)


@pytest.mark.parametrize(("bound", "expected"), [(10.0, 10 / 12), (None, 1.0)])
def test_fisher_information_counts_for_at_most_so_many_medians(
    bench: Bench, bound: float | None, expected: float
) -> None:
    add_model(bench)
    round_id = bench.open_round(
        min_contributions=3,
        merge={"method": "fisher"},
        screening={"statistics": bound, "clip": None},
    )
    ones = np.ones((ROWS, COLUMNS), np.float32)
    for name, delta, fisher in (("a", 0, 1.0), ("b", 0, 1.0), ("c", 1, 1e9)):
        bench.contribute(
            round_id,
            name,
            {"w": ones * np.float32(delta or 1e-9), "w.fisher": ones * np.float32(fisher)},
            statistics=FISHER,
        )
    assert run_once(bench.store, bench.clock)
    np.testing.assert_allclose(moved(bench), expected, rtol=1e-5)
    said = releases.get_record(bench.release()).recipe
    assert said["screening.statistics"] == bound


def test_the_report_compares_what_was_merged(bench: Bench) -> None:
    add_model(bench)
    a, b = random(2), random(3)
    report = screened(bench, play(bench, a, b, a))["report"]
    assert [hint["kind"] for hint in report["hints"]] == ["copies"]
    assert sorted(report["hints"][0]["contributors"]) == ["org-0", "org-2"]
    assert report["merged_norm"] == pytest.approx(np.linalg.norm(moved(bench)), rel=1e-4)
    rows = {row["contributor"]: row for row in report["inputs"]}
    merged = (2 * a + b).astype(np.float64).ravel() / 3
    for name, vector in (("org-0", a), ("org-1", b)):
        wide = vector.astype(np.float64).ravel()
        cosine = wide @ merged / np.linalg.norm(wide) / np.linalg.norm(merged)
        assert rows[name]["cosine_to_merged"] == pytest.approx(cosine, abs=1e-5)


def test_a_re_merge_clips_as_the_round_did_and_its_record_says_so(bench: Bench) -> None:
    add_model(bench)
    loud, honest = random(4, 1000.0), [random(2), random(3)]
    round_id = play(bench, *honest, loud)
    factors = screened(bench, round_id)["factors"]
    clipped = {digest: factor for digest, factor in factors.items() if factor != 1.0}
    again = admin.remerge(bench.store, "m", ("org-0",), "left", bench.clock.now()).id
    assert run_once(bench.store, bench.clock)
    assert bench.round(again).state == "PUBLISHED", bench.round(again).reason
    ((digest, factor),) = clipped.items()
    recipe = releases.get_record(bench.release()).recipe
    assert recipe[f"screening.factor.{digest}"] == factor
    kept = [honest[1].astype(np.float64), loud.astype(np.float64) * factor]
    expected = (bench.masters(bench.release(0))["w"] + np.sum(kept, axis=0).ravel() / 2).astype(
        "f4"
    )
    np.testing.assert_allclose(bench.masters(bench.release())["w"], expected, rtol=1e-6, atol=1e-9)
