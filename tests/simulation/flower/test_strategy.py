"""`ColdFusion` in Flower: merges as our engine, leaves bad clients out, adopts what is judged."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from threadpoolctl import threadpool_limits

from coldmerge.core.errors import ConfigError
from coldmerge.merging.outer import outer
from coldmerge_simulation.engines.local_grid import LocalGrid
from coldmerge_simulation.flower import compat
from coldmerge_simulation.flower.strategy import ColdFusion
from tests.simulation.flower.direct import aggregated, replies, ulps

EXAMPLE = Path(__file__).resolve().parents[3] / "examples/flower"
Arrays = dict[str, Any]


def draw(seed: int, scale: float = 1.0) -> Arrays:
    generator = np.random.default_rng(seed)
    shapes = {"a": (40, 30), "b": (7,), "empty": (0, 2)}
    return {n: generator.normal(0, scale, s).astype(np.float32) for n, s in shapes.items()}


def tuned(base: Arrays, seed: int) -> Arrays:
    return {name: base[name] + move for name, move in draw(seed, 1e-2).items()}


def record(arrays: Arrays) -> Any:
    return compat.ArrayRecord({name: compat.Array(values) for name, values in arrays.items()})


def started(base: Arrays, *settings: Any, **named: Any) -> ColdFusion:
    """A strategy that has sent `base` to two nodes."""
    made = ColdFusion(*settings, **named)
    grid = LocalGrid(compat.ClientApp(), 2)
    with grid.running():
        list(made.configure_train(1, record(base), compat.ConfigRecord(), grid))
    return made


def merged(made: ColdFusion, messages: list[Any], number: int = 1) -> Arrays:
    with compat.muted():
        arrays, _ = made.aggregate_train(number, messages)
    assert arrays is not None
    return {name: item.numpy() for name, item in arrays.items()}


def test_the_mean_is_the_exact_one_rounded_and_flowers_as_near_as_its_sum_in_float32() -> None:
    base = draw(0)
    clients = [tuned(base, seed) for seed in (1, 2, 3, 4)]
    found = merged(started(base), replies(clients))
    flowers = aggregated(compat.FedAvg(), clients)
    for name, values in flowers.items():
        each = [client[name] for client in clients]
        exact = np.mean([one.astype(np.float64) for one in each], axis=0)
        assert ulps(found[name], exact, each) <= 0.5 + 1e-6
        assert ulps(found[name], values, each) <= 1
        assert found[name].dtype == np.float32


def test_examples_weigh() -> None:
    base = draw(0)
    clients = [tuned(base, 1), tuned(base, 2)]
    found = merged(started(base, weights="examples"), replies(clients, [3, 1]))
    expected = base["a"] + (3 * (clients[0]["a"] - base["a"]) + clients[1]["a"] - base["a"]) / 4
    np.testing.assert_allclose(found["a"], expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    ("merger", "parameters"),
    [
        ("ties", {"density": 0.3}),
        ("dare_linear", {"density": 0.5}),
        ("geometric_median", {}),
        ("model_stock", {}),
        ("flower", {"strategy": "Krum"}),
    ],
)
def test_any_merger_by_name_in_any_order_of_the_replies(
    merger: str, parameters: dict[str, Any]
) -> None:
    base = draw(0)
    sent = [tuned(base, seed) for seed in range(1, 6)]
    found = merged(started(base, merger, parameters, threads=1), replies(sent))
    again = merged(started(base, merger, parameters, threads=2), replies(sent)[::-1])
    assert {n: a.tobytes() for n, a in found.items()} == {n: a.tobytes() for n, a in again.items()}
    assert 0 < np.abs(found["a"] - base["a"]).max() < 0.2


def test_an_outer_optimizer_remembers_the_rounds() -> None:
    base = draw(0)
    made = started(base, outer={"method": "momentum", "lr": 0.5})
    optimizer = outer("momentum", {"lr": 0.5})
    weights, velocity = base["a"].ravel(), np.zeros(base["a"].size, np.float32)
    now = base
    for number in (1, 2):
        client = tuned(now, number)
        tau = (client["a"] - now["a"]).ravel().astype(np.float64)
        step, slots = optimizer.step(tau, weights, {"momentum": velocity}, number)
        weights = (weights + step).astype(np.float32)
        velocity = slots["momentum"].astype(np.float32)
        now = merged(made, replies([client]), number)
        np.testing.assert_array_equal(now["a"].ravel(), weights)


def test_other_types_keep_theirs_and_small_steps_add_up() -> None:
    base: Arrays = {"half": np.ones(4, np.float16), "count": np.arange(3)}
    made = started(base)
    further: Any = base["half"] + np.spacing(base["half"])
    for _ in range(3):  # a quarter of float16's step each: the first two are rounded away
        each = [further, base["half"], base["half"], base["half"]]
        clients = [{"half": half, "count": np.arange(3) + 1} for half in each]
        found = merged(made, replies(clients))
    assert found["half"].dtype == np.float16
    assert found["count"].tolist() == [0, 1, 2]
    assert found["half"].tolist() == further.tolist()


def bad_replies(base: Arrays) -> list[Any]:
    """What clients send that went wrong, each in its way."""
    other, short, broken = tuned(base, 5), tuned(base, 6), tuned(base, 7)
    other["c"] = other.pop("b")
    short["b"] = short["b"][:3]
    broken["a"][0, 0] = np.nan
    empty = compat.message(compat.RecordDict(), "train", source=50)
    return [
        compat.error_message("it raised", 2, "train", source=51),
        empty,
        *replies([other, short, broken]),
    ]


def test_bad_clients_are_left_out_and_named(caplog: pytest.LogCaptureFixture) -> None:
    base = draw(0)
    good = replies([tuned(base, 1), tuned(base, 2)])
    made = started(base)
    arrays, _ = made.aggregate_train(1, [*bad_replies(base), *good])
    alone = merged(started(base), good)
    assert arrays is not None
    assert arrays["a"].numpy().tobytes() == alone["a"].tobytes()
    said = "\n".join(one.message for one in caplog.records)
    for words in ("it raised", "0 ArrayRecords", "other names or shapes", "NaN or infinity"):
        assert words in said


def test_nobody_left_merges_nothing() -> None:
    base = draw(0)
    assert started(base).aggregate_train(1, bad_replies(base)) == (None, None)
    krum = started(base, "krum", {"attackers": 1})
    assert krum.aggregate_train(1, replies([tuned(base, 1)])) == (None, None)


@pytest.mark.parametrize(
    ("named", "code"),
    [
        ({"merger": "tise"}, "merge.unknown_method"),
        ({"merger": "ties", "parameters": {"density": 2}}, "merge.bad_parameter"),
        ({"merger": "fisher"}, "simulation.needs_statistics"),
        ({"weights": "sizes"}, "simulation.bad_strategy"),
        ({"outer": {"method": "lion"}}, "outer.unknown_method"),
        ({"gate": {"max_lost": 1}}, "simulation.bad_gate"),
        ({"gate": {}, "fraction_evaluate": 0.0}, "simulation.gate_without_evaluation"),
    ],
)
def test_wrong_settings_are_refused_at_once(named: dict[str, Any], code: str) -> None:
    with pytest.raises(ConfigError) as caught:
        ColdFusion(**named)
    assert caught.value.code == code


def test_merging_before_sending_says_what_to_call() -> None:
    with pytest.raises(ConfigError, match="configure_train"):
        ColdFusion().aggregate_train(1, [])


class Federation:
    """Clients who move their one number by `steps[round]` and prefer larger ones up to 3."""

    def __init__(self, steps: list[float], silent: bool = False) -> None:
        self.steps, self.silent, self.seen = steps, silent, list[float]()
        self.app = compat.ClientApp()
        self.app.train()(self.train)
        self.app.evaluate()(self.evaluate)

    def train(self, message: Any, context: Any) -> Any:
        value = float(message.content["arrays"]["w"].numpy()[0])
        self.seen.append(value)
        step = self.steps[message.content["config"]["server-round"] - 1]
        content = compat.RecordDict(
            {
                "arrays": record({"w": np.array([value + step], np.float32)}),
                "metrics": compat.MetricRecord({"num-examples": 1, "step": step}),
            }
        )
        return compat.Message(content, reply_to=message)

    def evaluate(self, message: Any, context: Any) -> Any:
        value = float(message.content["arrays"]["w"].numpy()[0])
        score = (value if value <= 3 else 0.0) / 3
        metrics = {"num-examples": 1} if self.silent else {"accuracy": score, "num-examples": 1}
        content = compat.RecordDict({"metrics": compat.MetricRecord(metrics)})
        return compat.Message(content, reply_to=message)

    def run(self, strategy: ColdFusion, rounds: int) -> tuple[float, Any]:
        grid = LocalGrid(self.app, 2)
        with grid.running(), compat.muted():
            result = strategy.start(grid, record({"w": np.zeros(1, np.float32)}), rounds)
        return float(result.arrays["w"].numpy()[0]), result


def test_a_gate_adopts_what_is_better_and_goes_back_from_what_is_not() -> None:
    federation = Federation([1, 5, 1, -0.5])
    made = ColdFusion(gate={"max_loss": 1})
    final, result = federation.run(made, 4)
    assert final == 2.0
    assert federation.seen == [0, 0, 1, 1, 1, 1, 2, 2]
    found = {n: metrics["gate-adopted"] for n, metrics in result.evaluate_metrics_clientapp.items()}
    assert found == {1: 1, 2: 0, 3: 1, 4: 0}
    assert result.evaluate_metrics_clientapp[2]["accuracy"] == pytest.approx(1 / 3)
    assert result.evaluate_metrics_clientapp[1]["gate-gain"] == pytest.approx(100 / 3)
    assert [made.decisions[n].verdict.value for n in (1, 2)] == ["publish", "reject"]


def test_without_a_gate_everything_is_adopted() -> None:
    federation = Federation([1, 5, 1])
    final, result = federation.run(ColdFusion(), 3)
    assert final == 7.0
    assert result.train_metrics_clientapp[2]["step"] == 5


@pytest.mark.parametrize(("on_timeout", "final"), [("hold", 0.0), ("publish_flagged", 2.0)])
def test_where_nobody_reports_the_gate_does_as_it_was_told(on_timeout: str, final: float) -> None:
    gate = {"on_timeout": on_timeout}
    assert Federation([1, 1], silent=True).run(ColdFusion(gate=gate), 2)[0] == final


def test_the_example_is_short_and_learns(capsys: pytest.CaptureFixture[str]) -> None:
    path = EXAMPLE / "digits_app.py"
    assert len(path.read_text().splitlines()) <= 40
    spec = importlib.util.spec_from_file_location("digits_app", path)
    assert spec is not None
    assert spec.loader is not None
    app: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(app)
    grid = LocalGrid(app.client, 4)
    with threadpool_limits(1), grid.running() as context, compat.muted():
        app.server(grid, context)
    said = capsys.readouterr().out
    assert "'accuracy': '8." in said
    assert "'gate-adopted': '0'" in said, "a candidate was worse, and not adopted"


def test_the_example_is_an_app_that_flower_packs(tmp_path: Path) -> None:
    folder = tmp_path / "app"
    shutil.copytree(EXAMPLE, folder, ignore=shutil.ignore_patterns("__pycache__"))
    flwr = Path(sys.executable).parent / "flwr"
    environment = {**os.environ, "FLWR_HOME": str(tmp_path / "home")}
    done = subprocess.run(
        [str(flwr), "build"],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(list(folder.glob("*.fab"))) == 1
