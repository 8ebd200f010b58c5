"""The merge method `flower`: Flower's own classes, whole and in blocks, and what is refused."""

from __future__ import annotations

import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from coldmerge.core.dtypes import Floats32
from coldmerge.core.errors import ConfigError
from coldmerge.merging import Input, Job, Pool, Scope, merger, merger_class, uniform
from coldmerge_simulation.flower import compat
from coldmerge_simulation.flower.merger import COPIES, GIB, Flower
from coldmerge_simulation.flower.rules import MERGES, REFUSED, SLOTS
from tests.simulation.flower.direct import Arrays, aggregated, ulps

SHAPES = {"a.weight": (13, 7), "b.bias": (11,), "c.scale": (1,), "d.empty": (0, 3), "e": (5, 1)}


class Held:
    """Arrays in memory, as an input or a base of a merge."""

    base_digest = ""

    def __init__(self, arrays: Arrays) -> None:
        self._arrays = arrays
        self.names = frozenset(arrays)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._arrays[name].shape)

    def block(self, name: str, start: int, stop: int) -> Floats32:
        return self._arrays[name].reshape(-1)[start:stop].astype(np.float32)


def draw(seed: int, scale: float = 1e-2) -> dict[str, Floats32]:
    generator = np.random.default_rng(seed)
    return {
        name: generator.normal(0, scale, shape).astype(np.float32) for name, shape in SHAPES.items()
    }


def merged(
    parameters: dict[str, Any],
    clients: list[dict[str, Floats32]],
    weights: list[float] | None = None,
    block: int | None = None,
    method: str = "flower",
) -> dict[str, Floats32]:
    """The merged deltas through the engine."""
    base = Held({name: np.zeros(shape, np.float32) for name, shape in SHAPES.items()})
    inputs = [Input(f"{n:02}", Held(arrays)) for n, arrays in enumerate(clients)]
    recipe = uniform(merger_class(method), parameters, weights or [1.0] * len(clients))
    job = Job(base, SHAPES, inputs, recipe, block)
    found = {name: np.zeros(shape, np.float32).reshape(-1) for name, shape in SHAPES.items()}
    with Pool(2) as pool:
        job.survey(pool)
        for name in job.names:

            def put(start: int, values: Floats32, name: str = name) -> None:
                found[name][start : start + len(values)] = values

            job.tensor(name, pool, put)
    return {name: values.reshape(SHAPES[name]) for name, values in found.items()}


STRATEGIES: list[tuple[dict[str, Any], Any]] = [
    ({"strategy": "FedAvg"}, lambda: compat.strategy.FedAvg()),
    ({"strategy": "fed_median"}, lambda: compat.strategy.FedMedian()),
    ({"strategy": "fedtrimmedavg"}, lambda: compat.strategy.FedTrimmedAvg()),
    (
        {"strategy": "FedTrimmedAvg", "beta": 0.35},
        lambda: compat.strategy.FedTrimmedAvg(beta=0.35),
    ),
    (
        {"strategy": "krum", "num_malicious_nodes": 2},
        lambda: compat.strategy.Krum(num_malicious_nodes=2),
    ),
    (
        {"strategy": "multi_krum", "num_malicious_nodes": 2, "num_nodes_to_select": 5},
        lambda: compat.strategy.MultiKrum(num_malicious_nodes=2, num_nodes_to_select=5),
    ),
    (
        {"strategy": "bulyan", "num_malicious_nodes": 2},
        lambda: compat.strategy.Bulyan(num_malicious_nodes=2),
    ),
]
IDS = [f"{found['strategy']}-{len(found)}" for found, _ in STRATEGIES]


@pytest.mark.parametrize("block", [None, 5, 1])
@pytest.mark.parametrize(("parameters", "make"), STRATEGIES, ids=IDS)
def test_it_gives_the_bytes_of_flowers_own_class(
    parameters: dict[str, Any], make: Any, block: int | None
) -> None:
    clients = [draw(seed) for seed in range(11)]
    clients[3] = {name: values * np.float32(40) for name, values in clients[3].items()}
    weights = [float(seed + 1) for seed in range(11)]
    expected = aggregated(make(), clients, weights)
    found = merged(parameters, clients, weights, block)
    assert {name: values.tobytes() for name, values in found.items()} == {
        name: values.astype(np.float32).tobytes() for name, values in expected.items()
    }


OURS: list[tuple[str, dict[str, Any], Any]] = [
    ("mean", {}, compat.strategy.FedAvg()),
    ("median", {}, compat.strategy.FedMedian()),
    ("trimmed_mean", {"trim": 0.2}, compat.strategy.FedTrimmedAvg(beta=0.2)),
    ("krum", {"attackers": 2}, compat.strategy.Krum(num_malicious_nodes=2)),
    (
        "krum",
        {"attackers": 2, "keep": 5},
        compat.strategy.MultiKrum(num_malicious_nodes=2, num_nodes_to_select=5),
    ),
]


@pytest.mark.parametrize("count", [10, 15])
@pytest.mark.parametrize(
    ("method", "parameters", "flowers"), OURS, ids=[f"{m}-{len(p)}" for m, p, _ in OURS]
)
def test_our_own_methods_are_flowers_within_an_ulp(
    method: str, parameters: dict[str, Any], flowers: Any, count: int
) -> None:
    clients = [draw(seed) for seed in range(count)]
    found = merged(parameters, clients, method=method)
    for name, expected in aggregated(flowers, clients).items():
        assert ulps(found[name], expected, [one[name] for one in clients]) <= 1


def test_a_tensor_that_an_input_leaves_out_counts_as_zero() -> None:
    clients = [draw(seed) for seed in range(3)]
    zeros = [dict(clients[0]), dict(clients[1]), dict(clients[2])]
    del clients[1]["b.bias"]
    zeros[1]["b.bias"] = np.zeros(11, np.float32)
    for strategy in ("FedAvg", "Krum"):
        assert merged({"strategy": strategy}, clients)["b.bias"].tobytes() == (
            merged({"strategy": strategy}, zeros)["b.bias"].tobytes()
        )


@pytest.mark.parametrize(
    ("strategy", "scope"), [("FedAvg", Scope.TENSOR), ("FedMedian", Scope.TENSOR)]
)
def test_rules_on_columns_are_streamed(strategy: str, scope: Scope) -> None:
    assert merger("flower", strategy=strategy).scope is scope
    assert merger("flower", strategy="Krum").scope is Scope.GLOBAL


def test_every_parameter_is_written_down_and_read_back() -> None:
    found = merger("flower", strategy="multikrum", num_malicious_nodes=1)
    values = {key: value for key, value in found.model_dump().items() if value is not None}
    assert values == {
        "strategy": "MultiKrum",
        "num_malicious_nodes": 1,
        "num_nodes_to_select": 1,
        "max_memory": 4.0,
    }
    assert merger("flower", **values) == found
    assert b"MultiKrum" in pickle.dumps(found), "Ray sends it to other processes"


@pytest.mark.parametrize(
    ("parameters", "code", "words"),
    [
        ({"strategy": "krumm"}, "flower.unknown_strategy", "Did you mean `Krum`?"),
        ({"strategy": "average"}, "flower.unknown_strategy", "FedMedian"),
        ({"strategy": "fedadam"}, "flower.not_applicable", "outer: {method: flower"),
        ({"strategy": "FedAvgM"}, "flower.not_applicable", "outer: {method: flower"),
        ({"strategy": "QFedAvg"}, "flower.not_applicable", "training losses"),
        ({"strategy": "FedProx"}, "flower.not_applicable", "merges as FedAvg does"),
        ({"strategy": "FedXgbBagging"}, "flower.not_applicable", "trees"),
        (
            {"strategy": "DifferentialPrivacyServerSideFixedClipping"},
            "flower.not_applicable",
            "recomputed",
        ),
        ({"strategy": "krum", "num_malicius_nodes": 1}, "flower.bad_parameter", "Did you mean"),
        ({"strategy": "krum", "num_malicious_nodes": 1.5}, "flower.bad_parameter", "type int"),
        ({"strategy": "krum", "num_malicious_nodes": True}, "flower.bad_parameter", "type int"),
        ({"strategy": "krum", "num_nodes_to_select": 2}, "flower.bad_parameter", "not one of"),
        ({"strategy": "krum", "fraction_train": 0.5}, "flower.bad_parameter", "round policy"),
        ({"strategy": "fedtrimmedavg", "beta": 0.5}, "merge.bad_parameter", "less than 0.5"),
        ({"strategy": "krum", "num_malicious_nodes": -1}, "merge.bad_parameter", "greater than"),
        ({"strategy": "bulyan", "selection_rule": "x"}, "flower.bad_parameter", "not one of"),
    ],
)
def test_what_cannot_be_is_refused_with_what_can(
    parameters: dict[str, Any], code: str, words: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        merger("flower", **parameters)
    assert caught.value.code == code
    assert words in str(caught.value)


def test_each_strategy_of_flower_is_either_used_or_refused_for_a_reason() -> None:
    known = {*MERGES, *SLOTS, *REFUSED}
    assert known == set(compat.strategy.__all__) - {"Strategy", "Result"}


@pytest.mark.parametrize(
    ("parameters", "enough"),
    [
        ({"strategy": "Krum", "num_malicious_nodes": 1}, 5),
        ({"strategy": "MultiKrum", "num_malicious_nodes": 1, "num_nodes_to_select": 6}, 7),
        ({"strategy": "Bulyan", "num_malicious_nodes": 1}, 7),
        ({"strategy": "FedMedian"}, 1),
    ],
)
def test_too_few_inputs_for_what_a_rule_promises(parameters: dict[str, Any], enough: int) -> None:
    found = merger("flower", **parameters)
    found.check_inputs(enough)
    if enough > 1:
        with pytest.raises(ConfigError, match=r"merge\.input_count"):
            found.check_inputs(enough - 1)


def test_more_than_fits_is_refused_before_anything_is_read() -> None:
    krum = merger("flower", strategy="Krum", max_memory=0.5)
    most = int(0.5 * GIB / 4 / COPIES / 10)
    krum.check_size(most, 10)
    with pytest.raises(ConfigError, match=r"flower\.memory") as caught:
        krum.check_size(most + 1, 10)
    assert "krum" in caught.value.hint
    merger("flower", strategy="FedMedian", max_memory=0.5).check_size(10**12, 10)
    with pytest.raises(ConfigError, match=r"flower\.memory"):
        merged({"strategy": "Krum", "max_memory": 1e-6}, [draw(1), draw(2), draw(3)])


class Silent(compat.FedAvg):
    """Skips every round."""

    def aggregate_train(self, server_round: int, replies: Any) -> Any:
        return None, None


class Loud(compat.FedAvg):
    """Fails."""

    def aggregate_train(self, server_round: int, replies: Any) -> Any:
        raise RuntimeError("no model today")


class Renames(compat.FedAvg):
    """Gives other tensors back."""

    def aggregate_train(self, server_round: int, replies: Any) -> Any:
        arrays, metrics = super().aggregate_train(server_round, replies)
        return compat.ArrayRecord({f"{name}.x": item for name, item in arrays.items()}), metrics


@pytest.mark.parametrize(
    ("kind", "got"),
    [(Silent, "nothing"), (Loud, "RuntimeError: no model today"), (Renames, "other tensors: ")],
)
def test_a_strategy_that_fails_says_so(
    kind: Any, got: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compat.strategy, "FedAvg", kind)
    with pytest.raises(ConfigError, match=r"flower\.failed") as caught:
        merged({"strategy": "FedAvg"}, [draw(1), draw(2)])
    assert (caught.value.got or "").startswith(got)


OWN = '''
from flwr.app import Array, ArrayRecord
from flwr.serverapp.strategy import FedAvg

class First(FedAvg):
    """Takes a share of the first client's arrays."""

    def __init__(self, part: float = 0.5) -> None:
        super().__init__()
        self.part = part

    def aggregate_train(self, server_round, replies):
        record = next(iter(replies[0].content.array_records.values()))
        return ArrayRecord({k: Array(v.numpy() * self.part) for k, v in record.items()}), None

not_a_strategy = 5
'''
POINTS = """[coldmerge.strategies]
take_first = mine:First
wrong = mine:not_a_strategy
"""


def test_a_strategy_of_ones_own_comes_by_entry_point(tmp_path: Path) -> None:
    info = tmp_path / "mine-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: mine\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(POINTS)
    (tmp_path / "mine.py").write_text(OWN)
    script = """
import sys
sys.path.insert(0, sys.argv[1])
import numpy as np
from coldmerge.core.errors import ConfigError
from tests.simulation.flower.test_merger import draw, merged
found = merged({"strategy": "take_first", "part": 0.25}, [draw(1), draw(2)])
assert all((found[name] == 0.25 * values).all() for name, values in draw(1).items())
for parameters, code in (
    ({"strategy": "wrong"}, "flower.broken_plugin"),
    ({"strategy": "take_frist"}, "flower.unknown_strategy"),
    ({"strategy": "take_first", "part": "half"}, "flower.bad_parameter"),
):
    try:
        merged(parameters, [draw(1)])
    except ConfigError as error:
        assert error.code == code, error
        assert code != "flower.unknown_strategy" or "take_first" in error.hint, error
    else:
        raise SystemExit(f"{parameters} was accepted")
"""
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr


def test_without_flower_the_recipe_is_refused_and_the_extra_named() -> None:
    script = """
import importlib.metadata as metadata
real = metadata.version
def version(name):
    if name == "flwr":
        raise metadata.PackageNotFoundError(name)
    return real(name)
metadata.version = version
from coldmerge.core.errors import ConfigError
from coldmerge.merging import merger, merger_class
from coldmerge.merging.plan.describe import methods
from coldmerge.rounds.policy import RoundPolicy
from coldmerge_coordinator.merging.recipes import resolved
assert "flower" in [method.name for method in methods()]
for merge in (
    {"method": "flower", "parameters": {"strategy": "krum"}},
    {"outer": {"method": "flower", "strategy": "fedadam"}},
):
    try:
        resolved(RoundPolicy.model_validate({"merge": merge}))
    except ConfigError as error:
        assert error.code == "simulation.no_flower", error
        assert "coldmerge[flower]" in error.hint, error
    else:
        raise SystemExit("accepted")
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr


def test_it_is_found_by_name() -> None:
    assert merger_class("flower") is Flower
