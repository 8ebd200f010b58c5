"""Flower's strategies in rounds of a coordinator, through the real worker, beside Flower itself."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from coldmerge.core.dtypes import Floats32
from coldmerge.core.errors import ConfigError
from coldmerge_coordinator.service import admin
from coldmerge_coordinator.store import releases, rounds, states
from coldmerge_coordinator.worker import run_once
from coldmerge_simulation.flower.compat import strategy
from tests.coordinator.conftest import merged_apart
from tests.simulation.flower.direct import aggregated, told

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from tests.coordinator.conftest import Bench
    from tests.support import FixedClock

ORGS = 7
SHAPES = {"idle": (4, 3), "v": (90_000,), "w": (40, 30)}


def draw(seed: int, scale: float = 1e-2) -> dict[str, Floats32]:
    generator = np.random.default_rng(seed)
    found = {
        name: generator.normal(0, scale, shape).astype(np.float32) for name, shape in SHAPES.items()
    }
    if seed:
        del found["idle"]
    return found


def clients(round_number: int = 0) -> list[dict[str, Floats32]]:
    """Task vectors of seven organizations, of which the last is far from the others."""
    found = [draw(1 + 10 * round_number + number) for number in range(ORGS)]
    found[-1] = {name: values * np.float32(-20) for name, values in found[-1].items()}
    return found


def play(
    bench: Bench, merge: dict[str, Any], sent: list[dict[str, Floats32]], **policy: Any
) -> str:
    policy = {"screening": {"clip": None}, **policy}  # as they are: Flower shortens none
    opened = bench.open_round(min_contributions=len(sent), merge=merge, **policy)
    for number, deltas in enumerate(sent):
        bench.contribute(opened, f"org-{number}", deltas, examples=100 * (number + 1))
    assert run_once(bench.store, bench.clock)
    return opened


MERGES: list[tuple[dict[str, Any], Any]] = [
    ({"strategy": "fedavg"}, strategy.FedAvg()),
    ({"strategy": "fed_median"}, strategy.FedMedian()),
    ({"strategy": "FedTrimmedAvg", "beta": 0.3}, strategy.FedTrimmedAvg(beta=0.3)),
    ({"strategy": "krum", "num_malicious_nodes": 1}, strategy.Krum(num_malicious_nodes=1)),
    (
        {"strategy": "MultiKrum", "num_malicious_nodes": 1, "num_nodes_to_select": 3},
        strategy.MultiKrum(num_malicious_nodes=1, num_nodes_to_select=3),
    ),
    ({"strategy": "bulyan", "num_malicious_nodes": 1}, strategy.Bulyan(num_malicious_nodes=1)),
]


@pytest.mark.parametrize("weights", ["uniform", "examples"])
@pytest.mark.parametrize(
    ("parameters", "made"), MERGES, ids=[str(found["strategy"]) for found, _ in MERGES]
)
def test_a_round_merges_as_flowers_class(
    bench: Bench, parameters: dict[str, Any], made: Any, weights: str
) -> None:
    base, sent = draw(0, 1.0), clients()
    bench.add_model(base)
    play(bench, {"method": "flower", "parameters": parameters, "weights": weights}, sent)
    shares = [100.0 * (number + 1) if weights == "examples" else 1.0 for number in range(ORGS)]
    expected = aggregated(made, sent, shares)
    found = bench.masters(bench.release())
    assert found["idle"].tobytes() == base["idle"].tobytes()
    for name, tau in expected.items():
        weight = (base[name].astype(np.float64) + tau).astype(np.float32).ravel()
        # Flower adds in float32, in the order of the inputs, which here is that of their keys.
        largest = np.abs([one[name] for one in sent]).max(axis=0).ravel()
        apart = np.abs(found[name].astype(np.float64) - weight)
        assert np.all(apart <= np.spacing(np.abs(weight)) + 2.0**-22 * largest)
        assert np.mean(found[name] == weight) > 0.8


def test_flower_ignores_an_outlier_that_the_mean_follows(bench: Bench) -> None:
    base, sent = draw(0, 1.0), clients()
    bench.add_model(base)
    play(bench, {"method": "flower", "parameters": {"strategy": "krum"}}, sent)
    found = bench.masters(bench.release())["w"]
    each = [(base["w"].astype(np.float64) + one["w"]).astype(np.float32).ravel() for one in sent]
    assert [index for index, one in enumerate(each) if one.tobytes() == found.tobytes()] not in (
        [],
        [ORGS - 1],
    )


def test_the_record_has_the_strategy_and_its_parameters(bench: Bench) -> None:
    bench.add_model(draw(0, 1.0))
    merge = {
        "method": "flower",
        "parameters": {"strategy": "fed_trimmed_avg"},
        "outer": {"method": "flower", "strategy": "fed_adam", "eta": 0.01},
    }
    play(bench, merge, clients())
    recipe = releases.get_record(bench.release()).recipe
    assert {key: value for key, value in recipe.items() if "screening" not in key} == {
        "method": "flower",
        "mode": "screened",
        "weights": "uniform",
        "parameters.strategy": "FedTrimmedAvg",
        "parameters.beta": 0.2,
        "parameters.max_memory": 4.0,
        "outer.method": "flower",
        "outer.strategy": "FedAdam",
        "outer.eta": 0.01,
        "outer.beta_1": 0.9,
        "outer.beta_2": 0.99,
        "outer.tau": 0.001,
    }


OUTERS: list[tuple[dict[str, Any], Any, set[str]]] = [
    ({"strategy": "fedadam", "eta": 0.01}, lambda: strategy.FedAdam(eta=0.01), {"m", "v"}),
    ({"strategy": "FedYogi"}, lambda: strategy.FedYogi(), {"m", "v"}),
    ({"strategy": "fed_adagrad"}, lambda: strategy.FedAdagrad(), {"v"}),
    (
        {"strategy": "fedavgm", "server_momentum": 0.9, "server_learning_rate": 0.5},
        lambda: strategy.FedAvgM(server_momentum=0.9, server_learning_rate=0.5),
        {"momentum"},
    ),
]


@pytest.mark.parametrize(
    ("outer", "make", "slots"), OUTERS, ids=[str(found["strategy"]) for found, *_ in OUTERS]
)
def test_three_rounds_step_as_flowers_class_on_weights(
    bench: Bench, outer: dict[str, Any], make: Any, slots: set[str]
) -> None:
    start = {name: values for name, values in draw(0, 1.0).items() if name != "idle"}
    bench.add_model(start)
    weights: Mapping[str, Any] = {name: a.astype(np.float64) for name, a in start.items()}
    direct = make()
    for number in range(3):
        sent = clients(number)
        play(bench, {"outer": {"method": "flower", **outer}}, sent)
        told(direct, weights)
        trained = [{name: weights[name] + one[name] for name in weights} for one in sent]
        weights = aggregated(direct, trained, number=number + 1)
    found = bench.masters(bench.release())
    for name, expected in weights.items():
        # One rounding of the weights a round, and those of what is remembered.
        np.testing.assert_allclose(found[name], expected.ravel(), rtol=3e-7, atol=1e-7)
    digest = bench.release().state_digest
    with bench.store.database.read() as session:
        held = states.get_state(session, digest or "")
    assert (held.method, held.steps, set(held.slots)) == (
        f"flower.{type(direct).__name__}",
        3,
        slots,
    )


def test_momentum_of_nothing_remembers_nothing(bench: Bench) -> None:
    bench.add_model(draw(0, 1.0))
    play(bench, {"outer": {"method": "flower", "strategy": "FedAvgM"}}, clients())
    assert bench.release().state_digest is None


ADAM = {"outer": {"method": "flower", "strategy": "FedAdam", "eta": 0.01}}


def test_a_rollback_restores_flowers_state_and_another_strategy_starts_afresh(
    bench: Bench,
) -> None:
    bench.add_model(draw(0, 1.0))
    play(bench, ADAM, clients(0))
    play(bench, ADAM, clients(1))
    with bench.store.database.write() as session:
        releases.rollback(session, bench.store.signer, "m", 1, "worse", bench.clock.now())
    assert bench.release().state_digest == bench.release(1).state_digest
    yogi = {"outer": {"method": "flower", "strategy": "FedYogi"}}
    opened = play(bench, yogi, clients(2), gate={"window": "1h"})
    assert bench.round(opened).reason == (
        "the outer optimizer was flower.FedAdam and is flower.FedYogi now: what it remembered of "
        "1 rounds is not used"
    )


def test_a_remerge_steps_as_flowers_class_without_whoever_left(bench: Bench) -> None:
    start = {name: values for name, values in draw(0, 1.0).items() if name != "idle"}
    bench.add_model(start)
    weights: Mapping[str, Any] = {name: a.astype(np.float64) for name, a in start.items()}
    direct = strategy.FedAdam(eta=0.01)
    for number in range(2):
        sent = clients(number)
        play(bench, ADAM, sent)
        told(direct, weights)
        trained = [{name: weights[name] + one[name] for name in weights} for one in sent[1:]]
        weights = aggregated(direct, trained, number=number + 1)
    admin.remerge(bench.store, "m", ("org-0",), "left", bench.clock.now())
    assert run_once(bench.store, bench.clock)
    assert bench.release().number == 3
    found = bench.masters(bench.release())
    for name, expected in weights.items():
        np.testing.assert_allclose(found[name], expected.ravel(), rtol=3e-7, atol=1e-7)
    with bench.store.database.read() as session:
        held = states.get_state(session, bench.release().state_digest or "")
    assert (held.method, held.steps) == ("flower.FedAdam", 2)


def test_the_same_round_gives_the_same_bytes_again(
    bench: Bench, clock: FixedClock, tmp_path: Path
) -> None:
    bench.add_model(draw(0, 1.0))
    merge = {"method": "flower", "parameters": {"strategy": "MultiKrum"}, **ADAM}
    play(bench, merge, clients(0))
    opened = bench.open_round(min_contributions=ORGS, merge=merge)
    for number, deltas in enumerate(clients(1)):
        bench.contribute(opened, f"org-{number}", deltas)
    first, second = merged_apart(bench, clock, tmp_path)
    assert first == second


@pytest.mark.parametrize(
    ("merge", "code"),
    [
        ({"method": "flower", "parameters": {"strategy": "crumb"}}, "flower.unknown_strategy"),
        ({"method": "flower", "parameters": {"strategy": "fedadam"}}, "flower.not_applicable"),
        (
            {"method": "flower", "parameters": {"strategy": "krum", "num_malicious_nodes": 3}},
            "merge.input_count",
        ),
        (
            {"method": "flower", "parameters": {"strategy": "krum", "max_memory": 1e-6}},
            "flower.memory",
        ),
        ({"outer": {"method": "flower", "strategy": "krum"}}, "flower.not_applicable"),
        ({"outer": {"method": "flower", "lr": 1.0}}, "flower.bad_parameter"),
    ],
)
def test_what_cannot_merge_is_refused_before_a_round_opens(
    bench: Bench, merge: dict[str, Any], code: str
) -> None:
    bench.add_model(draw(0, 1.0))
    with pytest.raises(ConfigError) as caught:
        bench.open_round(min_contributions=ORGS, merge=merge)
    assert caught.value.code == code
    with bench.store.database.read() as session:
        assert rounds.list_rounds(session, "m") == []
