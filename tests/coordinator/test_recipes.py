"""What a round's policy may say about its merge, and every method through the real worker."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from coldmerge.core.errors import ColdmergeError, ConfigError
from coldmerge.merging import merger_class, method_names, uniform
from coldmerge.rounds.policy import MergePolicy, RoundPolicy, RoundTemplate
from coldmerge.rounds.state import Abandon
from coldmerge_coordinator.importing import check_template, set_template
from coldmerge_coordinator.merging.recipes import cautions, resolved
from coldmerge_coordinator.store import contributions, releases, rounds
from coldmerge_coordinator.worker import BEAT, Worker, run_once

if TYPE_CHECKING:
    from collections.abc import Callable
    from datetime import datetime
    from pathlib import Path

    from coldmerge.core.dtypes import Floats32
    from tests.coordinator.conftest import Bench

ROWS, COLUMNS = 40, 30


def draw(seed: int, scale: float = 1.0) -> Floats32:
    return np.random.default_rng(seed).normal(0, scale, (ROWS, COLUMNS)).astype(np.float32)


def with_merge(merge: dict[str, Any], **policy: Any) -> RoundPolicy:
    return RoundPolicy.model_validate({**policy, "merge": merge})


def merges_three(name: str) -> bool:
    """Whether the method merges three contributions that ship no statistics."""
    merger = uniform(merger_class(name), {}, [1.0] * 3).merger
    try:
        merger.check_inputs(3)
    except ColdmergeError:
        return False
    return not merger.needs


def deltas_of(bench: Bench, round_id: str, taus: dict[str, Floats32]) -> list[Floats32]:
    """The task vectors in the order of the sealed manifests."""
    with bench.store.database.read() as session:
        sealed = contributions.sealed(session, rounds.get(session, round_id))
    return [taus[item.contributor] for item in sealed]


@pytest.mark.parametrize("name", [name for name in method_names() if merges_three(name)])
def test_a_round_merges_by_any_method(bench: Bench, name: str) -> None:
    base = draw(0)
    bench.add_model({"w": base, "idle": draw(9)})
    opened = bench.open_round(min_contributions=3, merge={"method": name})
    for number in (1, 2, 3):
        bench.contribute(opened, f"org-{number}", {"w": draw(number, 1e-2)})
    assert run_once(bench.store, bench.clock)
    assert (bench.round(opened).state, bench.round(opened).reason) == (
        "PUBLISHED",
        "the round has no gate",
    )
    moved = bench.masters(bench.release())["w"] - base.ravel()
    assert 0 < np.abs(moved).max() < 0.1
    recipe = releases.get_record(bench.release()).recipe
    words = {key.removeprefix("parameters.") for key in recipe if key.startswith("parameters.")}
    method = merger_class(name)
    own = {field.alias or key for key, field in method.model_fields.items()}
    assert words <= own | set(method.Each.model_fields)
    assert recipe["method"] == name


def test_ties_of_a_round_is_that_of_the_formula(bench: Bench) -> None:
    base = draw(0)
    bench.add_model({"w": base})
    parameters = {"density": 0.5, "lambda": 0.25, "weight": 3}
    merge = {"method": "ties", "parameters": parameters, "weights": "examples"}
    opened = bench.open_round(min_contributions=3, merge=merge)
    taus = {f"org-{number}": draw(number, 1e-2) for number in (1, 2, 3)}
    counts = {name: 10 * number for number, name in enumerate(taus, 1)}
    for name, tau in taus.items():
        bench.contribute(opened, name, {"w": tau}, examples=counts[name])
    assert run_once(bench.store, bench.clock)

    kept = {}
    for name, tau in taus.items():
        least = np.sort(np.abs(tau).ravel())[tau.size // 2]
        kept[name] = np.where(np.abs(tau) >= least, tau, 0).astype(np.float64)
    votes = sum(3 * counts[name] * tau for name, tau in kept.items())
    agree = {name: (tau * votes > 0) * 3 * counts[name] for name, tau in kept.items()}
    total = np.asarray(sum(agree[name] * tau for name, tau in kept.items()))
    share = np.asarray(sum(agree.values()))
    expected = base + 0.25 * np.divide(total, share, out=np.zeros_like(total), where=share > 0)
    found = bench.masters(bench.release())["w"]
    np.testing.assert_allclose(found, expected.ravel(), rtol=1e-6, atol=1e-8)
    recipe = releases.get_record(bench.release()).recipe
    assert (recipe["method"], recipe["weights"]) == ("ties", "examples")
    assert (
        recipe.items()
        >= {
            "parameters.density": 0.5,
            "parameters.lambda": 0.25,
            "parameters.weight": 3,
            "parameters.normalize": True,
        }.items()
    )


def test_methods_of_weights_read_the_published_release_and_move_the_master(bench: Bench) -> None:
    """The master has digits that bf16 does not show; contributors never saw them."""
    start = draw(0).astype(np.dtype("<f2"))
    bench.add_model({"w": start})
    hidden = draw(5, 1e-5)
    opened = bench.open_round()
    bench.contribute(opened, "a", {"w": hidden})
    assert run_once(bench.store, bench.clock)
    master = bench.masters(bench.release())["w"].astype(np.float64)
    published = bench.published(bench.release())["w"].astype(np.float32)
    assert np.any(master != published)

    opened = bench.open_round(  # far longer than `hidden`: unclipped
        min_contributions=2, merge={"method": "linear"}, screening={"clip": None}
    )
    taus = {"a": draw(6, 1e-2), "b": draw(7, 1e-2)}
    for name, tau in taus.items():
        bench.contribute(opened, name, {"w": tau})
    assert run_once(bench.store, bench.clock)
    one, two = (published + tau.ravel() for tau in deltas_of(bench, opened, taus))
    average = ((one + two) / np.float32(2)).astype(np.float64)
    expected = (master + (average - published)).astype(np.float32)
    assert bench.masters(bench.release())["w"].tobytes() == expected.tobytes()


def test_fisher_of_a_round_reads_what_contributors_shipped(bench: Bench) -> None:
    base = draw(0)
    bench.add_model({"w": base})
    opened = bench.open_round(min_contributions=2, merge={"method": "fisher"})
    taus = {"a": draw(1, 1e-2), "b": draw(2, 1e-2)}
    fishers = {"a": np.abs(draw(3)), "b": np.abs(draw(4))}
    for name, tau in taus.items():
        sent = {"w": tau, "w.fisher": fishers[name]}
        bench.contribute(opened, name, sent, statistics={"fisher": 100.0})
    assert run_once(bench.store, bench.clock)
    top = sum(fishers[name].astype(np.float64) * tau for name, tau in taus.items())
    bottom = sum(fishers[name].astype(np.float64) for name in taus)
    expected = (base + top / bottom).astype(np.float32)
    np.testing.assert_allclose(
        bench.masters(bench.release())["w"], expected.ravel(), rtol=1e-6, atol=1e-7
    )


def test_shipped_thresholds_give_the_bytes_of_exact_ones(
    make_bench: Callable[[str], Bench],
) -> None:
    taus = {"a": draw(1, 1e-2), "b": draw(2, 1e-2)}
    found = {}
    for thresholds in ("exact", "shipped"):
        bench = make_bench(thresholds)
        bench.add_model({"w": draw(0)})
        parameters = {"density": 0.25, "thresholds": thresholds}
        merge = {"method": "ties", "parameters": parameters}
        opened = bench.open_round(min_contributions=2, merge=merge)
        for name, tau in taus.items():
            kept = np.sort(np.abs(tau).ravel())[-tau.size // 4 :][:1]
            if thresholds == "shipped":
                sent = {"w": tau, "w.trim": kept}
                bench.contribute(opened, name, sent, statistics={"trim": 0.25})
            else:
                bench.contribute(opened, name, {"w": tau})
        assert run_once(bench.store, bench.clock)
        found[thresholds] = bench.release().master_digest
    assert found["exact"] == found["shipped"]


def test_a_first_pass_over_the_inputs_can_be_interrupted(bench: Bench) -> None:
    bench.add_model({"w": draw(0)})
    merge = {"method": "ties", "parameters": {"density": 0.2, "trim_scope": "global"}}
    opened = bench.open_round(merge=merge)
    bench.contribute(opened, "a", {"w": draw(1)})
    before, readings = blobs(bench), 0

    class Clock:
        def now(self) -> datetime:
            nonlocal readings
            readings += 1
            if readings == 5:  # after the file was verified
                assert not list((bench.store.blobs.folder / "incoming").iterdir())
                with bench.store.database.write() as session:
                    row = rounds.get(session, opened, lock=True)
                    rounds.apply(session, row, Abandon("no"), bench.clock.now(), bench.store.signer)
                bench.clock.advance(BEAT)
            return bench.clock.now()

    assert Worker(bench.store, Clock()).run_once()
    assert (bench.round(opened).state, bench.round(opened).merge_attempts) == ("ABANDONED", 0)
    assert blobs(bench) == before


def blobs(bench: Bench) -> set[Path]:
    return {path for path in bench.store.blobs.folder.rglob("*") if path.is_file()}


def test_a_round_freezes_every_parameter(bench: Bench) -> None:
    bench.add_model({"w": draw(0)})
    merge = {"method": "ties", "parameters": {"density": 0.2}, "outer": {"method": "nesterov"}}
    opened = bench.open_round(merge=merge)
    with bench.store.database.read() as session:
        frozen = rounds.get_policy(rounds.get(session, opened)).merge
    assert frozen.parameters.items() >= {"density": 0.2, "lambda": 1.0, "normalize": True}.items()
    assert frozen.outer == {"method": "nesterov", "lr": 0.7, "momentum": 0.9}
    assert resolved(RoundPolicy(merge=frozen)).merge == frozen
    assert resolved(RoundPolicy()).merge == MergePolicy()


@pytest.mark.parametrize(
    ("policy", "code", "ids"),
    [
        (with_merge({"method": "averageish"}), "merge.unknown_method", {}),
        (
            with_merge({"method": "ties", "parameters": {"density": 1.5}}),
            "merge.bad_parameter",
            {"parameter": "density"},
        ),
        (
            with_merge({"method": "mean", "parameters": {"lambda": 1}}),
            "merge.bad_parameter",
            {"parameter": "lambda"},
        ),
        (with_merge({"outer": {"method": "lion"}}), "outer.unknown_method", {}),
        (
            with_merge({"outer": {"method": "adam", "momentum": 0.9}}),
            "outer.bad_parameter",
            {"parameter": "momentum"},
        ),
    ],
)
def test_what_cannot_merge_is_refused_before_a_round_opens(
    bench: Bench, policy: RoundPolicy, code: str, ids: dict[str, str]
) -> None:
    bench.add_model({"w": draw(0)})
    with pytest.raises(ConfigError) as caught:
        bench.open_round(**policy.to_json())
    assert (caught.value.code, caught.value.ids) == (code, ids)
    template = RoundTemplate.model_validate(policy.to_json())
    with pytest.raises(ConfigError) as caught:
        check_template(template, bench.clock.now())
    assert caught.value.code == code
    with bench.store.database.read() as session:
        assert rounds.list_rounds(session, "m") == []


def test_a_method_of_two_inputs_cannot_wait_for_three() -> None:
    with pytest.raises(ConfigError):
        resolved(with_merge({"method": "nuslerp"}, min_contributions=3))
    with pytest.raises(ConfigError):
        resolved(with_merge({"method": "nuslerp"}, min_contributions=2, max_contributions=3))
    two = resolved(with_merge({"method": "nuslerp"}, min_contributions=2))
    assert two.merge.method == "nuslerp"


def test_methods_that_wear_off_over_rounds_carry_a_caution(bench: Bench) -> None:
    bench.add_model({"w": draw(0)})
    template = RoundTemplate.model_validate({"merge": {"method": "dare_ties"}})
    (note,) = set_template(bench.store, "m", template, clock=bench.clock)
    assert note.startswith("dare_ties: ")
    assert cautions(MergePolicy(method="dare_linear")) != ()
    assert cautions(MergePolicy(method="ties")) == ()
