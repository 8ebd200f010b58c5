"""A stock ServerApp with FedAvg over enrolled contributors: real processes, mTLS, sockets."""

from __future__ import annotations

import json
import os
import signal
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from coldmerge.core.errors import (
    ColdmergeError,
    ConfigError,
    ConflictError,
    DataError,
    NotFoundError,
    UnavailableError,
)
from coldmerge.demo import digits
from coldmerge.wire.v1 import common_pb2
from coldmerge_coordinator.store import contributions
from coldmerge_coordinator.store.models import Round
from coldmerge_simulation.flower import compat
from coldmerge_simulation.grid.contribution_grid import ContributionGrid
from coldmerge_simulation.grid.rounds import node_of
from tests.federation import Federation, Hub, Org
from tests.support import until

MODEL = "digits"
State = common_pb2.Round
TIMEOUT = 120.0
ROUNDINGS = 2.5
"""Half a unit for each of FedAvg's three products and two sums in float32. Ours are in float64."""


@pytest.fixture(scope="module")
def short_folder() -> Iterator[Path]:
    """A Unix socket below pytest's own folder would have too long a path."""
    with tempfile.TemporaryDirectory(prefix="grid-") as folder:
        yield Path(folder)


@pytest.fixture(scope="module")
def federation(short_folder: Path) -> Iterator[Federation]:
    """A served coordinator with the tiny network, and three organizations with digits."""
    made = Federation.make(short_folder)
    try:
        model = digits.pretrain(short_folder / "base", seed=0)
        made.hub.cli("model", "add", MODEL, "--from", model)
        made.hub.start()
        for org, task in zip(made.join(digits.SEEN), digits.SEEN, strict=True):
            data = digits.task(task).save(org.home / "data")
            config = {"trainer": digits.TRAINER, "data": str(data), "epochs": 1, "lr": 1e-3}
            (org.home / "train.yaml").write_text(yaml.safe_dump({**config, "threads": 1}))
        yield made
    finally:
        made.close()


def contribute(org: Org, rounds: int) -> Any:
    config = org.home / "train.yaml"
    return org.spawn("contribute", MODEL, "--config", config, "--rounds", str(rounds))


class Recorder(compat.FedAvg):
    """FedAvg, untouched, that keeps what it was given and what it made."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.replies: list[list[compat.Message]] = []
        self.made: list[compat.ArrayRecord | None] = []

    def aggregate_train(self, server_round: int, replies: Any) -> Any:
        self.replies.append(list(replies))
        found = super().aggregate_train(server_round, self.replies[-1])
        self.made.append(found[0])
        return found


def app_of(strategy: Any, results: list[Any], **options: Any) -> compat.ServerApp:
    """A ServerApp as anybody writes it."""
    app = compat.ServerApp()

    def main(grid: Any, context: compat.Context) -> None:
        initial = options.pop("initial", None) or grid.arrays()
        rounds = int(context.run_config.get("rounds", 1))
        named = {"timeout": TIMEOUT, **options}
        results.append(strategy.start(grid, initial, num_rounds=rounds, **named))

    app.main()(main)
    return app


def weights(record: Any) -> dict[str, np.ndarray[Any, Any]]:
    return {name: array.numpy() for name, array in record.items()}


def ulps(one: np.ndarray[Any, Any], other: np.ndarray[Any, Any]) -> float:
    """The largest difference, in units in the last place of the tensor's largest weight."""
    unit = np.spacing(np.float32(np.max(np.abs(other))))
    return float(np.max(np.abs(one - other)) / unit)


def test_two_rounds_of_fedavg_are_two_releases(federation: Federation) -> None:
    hub = federation.hub
    results: list[Any] = []
    strategy = Recorder(min_train_nodes=3, min_evaluate_nodes=3)
    policy = {"gate": {"min_evaluators": 3, "min_mean_gain": -100, "max_loss": 100}}
    loops = [contribute(org, 2) for org in federation.orgs]
    with ContributionGrid(hub.folder, policy=policy) as grid:
        name = grid._rounds.store.federation
        assert grid.get_node_ids() == sorted(node_of(name, org.name) for org in federation.orgs)
        before = weights(grid.arrays())
        grid.drive(app_of(strategy, results), rounds=2)
        number = grid.release(results[0].arrays, timeout=TIMEOUT)
        after = weights(grid.arrays())
    for org, loop in zip(federation.orgs, loops, strict=True):
        org.finish(loop)
    assert number == 2
    assert all(
        ulps(after[name], array) <= ROUNDINGS for name, array in weights(results[0].arrays).items()
    )
    assert any(np.any(after[name] != before[name]) for name in before)
    check_first_round(hub.folder, strategy, before)
    judged = results[0].evaluate_metrics_clientapp
    assert set(judged) == {1, 2}
    assert set(judged[1]) == {"accuracy", "macro_f1", "base_accuracy", "base_macro_f1"}
    for release in ("1", "2"):
        said = hub.cli("release", "verify", MODEL, release, "--dir", hub.folder)
        assert (said["answer"], said["merged"]) == ("exact", 3)
    log = [entry["kind"] for entry in hub.cli("audit", "show", "--dir", hub.folder)]
    assert log.count("round.opened") == 2
    assert log.count("contribution.received") == 6


def check_first_round(folder: Path, strategy: Recorder, before: dict[str, Any]) -> None:
    """FedAvg's result, our release, and base + mean τ worked out here in float64, agree."""
    replies, made = strategy.replies[0], strategy.made[0]
    assert made is not None
    examples = [reply.content["metrics"]["num-examples"] for reply in replies]
    shares = np.array(examples, np.float64) / sum(examples)
    moved = [weights(reply.content["arrays"]) for reply in replies]
    with ContributionGrid(folder) as grid:
        release = grid._rounds.store
        with release.database.read() as session:
            first = session.query(Round).order_by(Round.opened_at).first()
            assert first is not None
            rows = contributions.sealed(session, first)
            assert sorted(contributions.get_manifest(row).examples for row in rows) == sorted(
                examples
            )
            digest = first.candidate_digest
        assert digest is not None
        ours = grid._rounds.arrays(digest)
    for name, array in weights(made).items():
        wanted = before[name].astype(np.float64)
        for share, one in zip(shares, moved, strict=True):
            wanted = wanted + share * (one[name].astype(np.float64) - before[name])
        assert ulps(ours[name], wanted.astype(np.float32)) <= 1, name
        assert ulps(array, wanted.astype(np.float32)) <= ROUNDINGS, name


def test_one_that_never_answers_is_left_out_and_its_round_goes_on(federation: Federation) -> None:
    """Two of three answer; when the strategy waits no longer the round is sealed with theirs."""
    strategy = compat.FedAvg(min_train_nodes=3)
    loops = [contribute(org, 1) for org in federation.orgs[:2]]
    policy = {"gate": None, "min_contributions": 2}
    with ContributionGrid(federation.hub.folder, MODEL, policy=policy) as grid:
        with compat.identity(1):
            asked = strategy.configure_train(1, grid.arrays(), compat.ConfigRecord(), grid)
        ids = grid.push_messages(asked)
        until("two to answer", lambda: federation.hub.rounds(MODEL)[0]["contributions"] == 2)
        assert grid.pull_messages(ids) == []
        replies = grid.give_up(ids)
        arrays, _ = strategy.aggregate_train(1, replies)
        assert arrays is not None
        assert grid.release(arrays, timeout=TIMEOUT) == grid._rounds.latest().number
    for org, loop in zip(federation.orgs[:2], loops, strict=True):
        org.finish(loop)
    (missing,) = [reply for reply in replies if reply.has_error()]
    assert missing.metadata.src_node_id == node_of(
        grid._rounds.store.federation, federation.orgs[2].name
    )
    assert "no contribution came" in missing.error.reason


def test_too_few_answers_abandon_the_round_and_change_nothing(federation: Federation) -> None:
    hub = federation.hub
    results: list[Any] = []
    strategy = Recorder(min_train_nodes=3, fraction_evaluate=0.0)
    with ContributionGrid(hub.folder, policy={"gate": None}) as grid:
        before = grid._rounds.latest()
        grid.drive(app_of(strategy, results, timeout=0.5))
        ended = grid.settle()
        assert grid._rounds.latest() == before
    assert ended is not None
    assert ended.state == ended.ABANDONED
    assert "0 of at least 3 contributions counted" in ended.reason
    assert strategy.made == [None]
    assert len(results[0].arrays) == 0


@pytest.mark.slow
def test_a_strategy_asks_some_of_the_contributors(federation: Federation) -> None:
    """`fraction_train`: the round is for those who were drawn; the third is told to wait."""
    hub = federation.hub
    results: list[Any] = []
    strategy = Recorder(fraction_train=0.67, min_train_nodes=2, fraction_evaluate=0.0)
    loops = [contribute(org, 1) for org in federation.orgs]
    with ContributionGrid(hub.folder, policy={"gate": None, "min_contributions": 2}) as grid:
        grid.drive(app_of(strategy, results))
        grid.release(results[0].arrays, timeout=TIMEOUT)
        ended = grid.settle()
        assert ended is not None
        asked = json.loads(ended.policy_json)["contributors"]
    assert len(asked) == 2
    assert [reply.has_error() for reply in strategy.replies[0]] == [False, False]
    for org, loop in zip(federation.orgs, loops, strict=True):
        if org.name in asked:
            org.finish(loop)
        else:
            assert loop.poll() is None
            until("it to say so", partial(says, org, "other contributors"))
            loop.kill()
            loop.wait()


@pytest.mark.slow
def test_another_strategy_with_the_recipe_that_is_the_same_rule(federation: Federation) -> None:
    hub = federation.hub
    results: list[Any] = []
    median = compat.strategy.FedMedian(min_train_nodes=3, fraction_evaluate=0.0)
    recipe = {"method": "flower", "parameters": {"strategy": "fedmedian"}, "weights": "uniform"}
    loops = [contribute(org, 1) for org in federation.orgs]
    with ContributionGrid(hub.folder, policy={"gate": None, "merge": recipe}) as grid:
        before = grid._rounds.latest().number
        grid.drive(app_of(median, results))
        assert grid.release(results[0].arrays, timeout=TIMEOUT) == before + 1
    for org, loop in zip(federation.orgs, loops, strict=True):
        org.finish(loop)
    said = hub.cli("release", "verify", MODEL, str(before + 1), "--dir", hub.folder)
    assert said["answer"] == "exact"


@pytest.mark.slow
def test_a_strategy_that_is_not_the_recipe_is_found_out(federation: Federation) -> None:
    """FedMedian over rounds that merge by the mean."""
    hub = federation.hub
    median = compat.strategy.FedMedian(min_train_nodes=3, min_evaluate_nodes=3)
    loops = [contribute(org, 1) for org in federation.orgs]
    with (
        ContributionGrid(hub.folder, policy={"gate": None}) as grid,
        pytest.raises(ConflictError) as caught,
    ):
        grid.drive(app_of(median, []))
    assert caught.value.code == "grid.other_arrays"
    for org, loop in zip(federation.orgs, loops, strict=True):
        org.finish(loop)


def says(org: Org, words: str) -> bool:
    return words in org.log.read_text()


def train_on(grid: ContributionGrid, arrays: dict[str, np.ndarray[Any, Any]]) -> None:
    """Push one train message with these arrays to everybody."""
    record = compat.ArrayRecord({name: compat.Array(array) for name, array in arrays.items()})
    content = compat.RecordDict({"arrays": record, "config": compat.ConfigRecord()})
    grid.push_messages([grid.create_message(content, "train", n, "1") for n in grid.get_node_ids()])


def moved(arrays: dict[str, Any]) -> dict[str, Any]:
    return {**arrays, "conv1.bias": arrays["conv1.bias"] + np.float32(1e-4)}


Change = Callable[[dict[str, Any]], dict[str, Any]]


def with_bias(array: np.ndarray[Any, Any]) -> Change:
    return lambda arrays: {**arrays, "conv1.bias": array}


WRONG: list[tuple[Change, type[ColdmergeError], str]] = [
    (with_bias(np.zeros(3, np.float32)), DataError, "other_shape"),
    (lambda arrays: {**arrays, "more": np.zeros(2, np.float32)}, DataError, "other_tensors"),
    (lambda arrays: {"conv1.bias": arrays["conv1.bias"]}, DataError, "other_tensors"),
    (with_bias(np.zeros(16, np.int64)), DataError, "not_float"),
    (with_bias(np.full(16, np.nan, np.float32)), DataError, "not_finite"),
    (moved, ConflictError, "other_arrays"),
]


@pytest.mark.parametrize(("change", "kind", "code"), WRONG)
def test_arrays_that_are_not_the_release_open_no_round(
    federation: Federation, change: Change, kind: type[ColdmergeError], code: str
) -> None:
    with ContributionGrid(federation.hub.folder) as grid:
        arrays = weights(grid.arrays())
        with pytest.raises(kind) as caught:
            train_on(grid, change(arrays))
    assert caught.value.code == f"grid.{code}"
    assert all(row["state"] not in {"OPEN", "SEALED"} for row in federation.hub.rounds(MODEL))


def test_messages_that_contributors_do_not_know(federation: Federation) -> None:
    with ContributionGrid(federation.hub.folder) as grid:
        node, *_ = grid.get_node_ids()
        content = compat.RecordDict({"arrays": grid.arrays()})
        with pytest.raises(ConfigError) as query:
            grid.push_messages([grid.create_message(content, "query", node, "1")])
        with pytest.raises(DataError) as twice:
            grid.push_messages([grid.create_message(content, "train", node, "1")] * 2)
        with pytest.raises(DataError) as nobody:
            grid.push_messages([grid.create_message(content, "train", 7, "1")])
        nothing = compat.RecordDict()
        with pytest.raises(DataError) as empty:
            grid.push_messages([grid.create_message(nothing, "train", node, "1")])
        with pytest.raises(ConfigError) as few:
            grid.push_messages([grid.create_message(content, "train", node, "1")])
        (answer,) = grid.send_and_receive([grid.create_message(content, "evaluate", node, "1")])
    codes = [error.value.code for error in (query, twice, nobody, empty, few)]
    assert codes == [
        "grid.message_type",
        "grid.bad_node",
        "grid.bad_node",
        "grid.not_one_model",
        "grid.too_few",
    ]
    assert "no candidate to judge" in answer.error.reason


def test_a_federation_without_contributors_and_one_that_ended(tmp_path: Path) -> None:
    with tempfile.TemporaryDirectory(prefix="grid-") as folder:
        made = Federation.make(Path(folder))
        made.hub.cli("model", "add", MODEL, "--from", digits.pretrain(tmp_path / "base", seed=0))
        made.hub.start()
        try:
            look_for_nobody(made)
        finally:
            made.close()


def look_for_nobody(made: Federation) -> None:
    with ContributionGrid(made.hub.folder, patience=0.5) as grid:
        initial = grid.arrays()
        with pytest.raises(NotFoundError) as nobody:
            grid.drive(app_of(compat.FedAvg(), [], initial=initial))
        made.hub.stop()
        with pytest.raises(UnavailableError) as gone:
            grid.get_node_ids()
    assert nobody.value.code == "grid.no_contributor"
    assert gone.value.code == "grid.no_coordinator"


def test_a_folder_without_a_coordinator_and_a_model_that_is_not_there(
    federation: Federation, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError):
        ContributionGrid(tmp_path)
    with pytest.raises(NotFoundError) as caught:
        ContributionGrid(federation.hub.folder, "other")
    assert caught.value.code == "model.unknown"


def test_continuous_rounds_are_not_driven(federation: Federation, short_folder: Path) -> None:
    """The coordinator opens them by itself, for everybody."""
    hub, rules = federation.hub, short_folder / "rules.yaml"
    with (
        ContributionGrid(hub.folder, policy={"continuous": {}}) as grid,
        pytest.raises(ConfigError, match=r"grid\.continuous") as asked,
    ):
        train_on(grid, weights(grid.arrays()))
    rules.write_text("continuous: {pause: 1d}\ngate: null\n")
    try:
        hub.cli("model", "template", MODEL, rules, "--dir", hub.folder)
        with (
            ContributionGrid(hub.folder) as grid,
            pytest.raises(ConfigError, match=r"grid\.continuous") as template,
        ):
            train_on(grid, weights(grid.arrays()))
    finally:
        rules.write_text("gate: null\n")
        hub.cli("model", "template", MODEL, rules, "--dir", hub.folder)
        until("no continuous round", partial(abandoned, hub))
    assert (asked.value.got, template.value.got) == (
        "`continuous` in policy",
        "`continuous` in the model's template",
    )


def abandoned(hub: Hub) -> bool:
    """Whether no round is open any more; one that is, is abandoned."""
    found = [row["round"] for row in hub.rounds(MODEL) if row["state"] == "OPEN"]
    for round_id in found:
        hub.cli("round", "abandon", round_id, "--reason", "the test is over", check=False)
    return not found


def worker_of(hub: Hub) -> int:
    """The coordinator's only child."""
    assert hub.process is not None
    here = hub.process.pid
    threads = Path(f"/proc/{here}/task").iterdir()
    (worker,) = {int(n) for each in threads for n in (each / "children").read_text().split()}
    return worker


def test_a_merge_that_does_not_end_is_an_error_and_not_waited_for(federation: Federation) -> None:
    hub = federation.hub
    worker = worker_of(hub)
    loops = [contribute(org, 1) for org in federation.orgs]
    with ContributionGrid(hub.folder, policy={"gate": None}, merging=0.5) as grid:
        os.kill(worker, signal.SIGSTOP)
        try:
            arrays = weights(grid.arrays())
            train_on(grid, arrays)
            ids = [m.metadata.message_id for b in grid._batches for m in b.asked.values()]
            until("the round to be sealed", lambda: grid.pull_messages(ids) or None)
            with pytest.raises(ConflictError, match=r"grid\.round_goes_on") as caught:
                train_on(grid, arrays)
        finally:
            os.kill(worker, signal.SIGCONT)
        assert "worker" in caught.value.hint
        until("the release", lambda: grid._rounds.get(grid._last or "").state == State.PUBLISHED)
    for org, loop in zip(federation.orgs, loops, strict=True):
        org.finish(loop)
