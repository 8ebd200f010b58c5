"""What coldmerge relies on in Flower: each test is a clause of that contract."""

from __future__ import annotations

import inspect
import logging
import os
import subprocess
import sys
from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest

from coldmerge.core.errors import ConfigError
from coldmerge_simulation.flower import compat


def records(value: float, examples: int = 1) -> Any:
    return compat.RecordDict(
        {
            "arrays": compat.ArrayRecord({"w": compat.Array(np.full(3, value, np.float32))}),
            "metrics": compat.MetricRecord({"num-examples": examples}),
        }
    )


@pytest.mark.parametrize("found", ["1.41.0", "1.42.3", "1.42.0rc1"])
def test_versions_in_the_range_are_taken(found: str) -> None:
    compat.check_version(found)
    assert compat.flower_version() is not None


@pytest.mark.parametrize("found", ["1.40.9", "1.43.0", "2.0.0", "1.5", "unknown"])
def test_other_versions_are_refused(found: str) -> None:
    with pytest.raises(ConfigError, match=r"simulation\.flower_version") as caught:
        compat.check_version(found)
    assert found in str(caught.value.got)
    assert caught.value.expected == compat.RANGE


def test_no_flower_names_the_extra() -> None:
    with pytest.raises(ConfigError, match=r"simulation\.no_flower") as caught:
        compat.check_version(None)
    assert "coldmerge[simulation]" in caught.value.hint
    assert "coldmerge[flower]" in caught.value.hint


def test_importing_it_without_flower_is_that_error() -> None:
    code = (
        "import importlib.metadata as m\n"
        "real = m.version\n"
        "def version(name):\n"
        "    if name == 'flwr':\n"
        "        raise m.PackageNotFoundError(name)\n"
        "    return real(name)\n"
        "m.version = version\n"
        "try:\n"
        "    import coldmerge_simulation.flower.compat\n"
        "except Exception as error:\n"
        "    print(error.code)\n"
    )
    found = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert found.stdout == "simulation.no_flower\n"


def test_flower_calls_nobody() -> None:
    assert {key: os.environ[key] for key in compat.OFFLINE} == compat.OFFLINE
    telemetry: Any = sys.modules["flwr.supercore.telemetry"]
    assert telemetry.FLWR_TELEMETRY_ENABLED == "0"


def test_every_name_is_there() -> None:
    assert [name for name in compat.__all__ if not hasattr(compat, name)] == []


def test_a_message_needs_no_identity() -> None:
    made = compat.message(
        records(1.0), compat.MessageType.TRAIN, source=7, message_id="a", reply_to="b", group="g"
    )
    meta = made.metadata
    assert (meta.src_node_id, meta.dst_node_id, meta.message_type) == (7, 1, "train")
    assert (meta.message_id, meta.reply_to_message_id, meta.group_id) == ("a", "b", "g")
    assert made.has_content()
    assert not made.has_error()


def test_an_error_message_has_no_content() -> None:
    made = compat.error_message("it broke", 2, compat.MessageType.TRAIN, source=7)
    assert made.has_error()
    assert not made.has_content()
    assert (made.error.code, made.error.reason) == (2, "it broke")


def test_message_types_are_these_words() -> None:
    kinds = compat.MessageType
    assert (kinds.TRAIN, kinds.EVALUATE, kinds.QUERY) == ("train", "evaluate", "query")


def test_identity_is_what_new_messages_are_signed_with() -> None:
    with compat.identity(run_id=5, node_id=9, task_id=3):
        made = compat.Message(records(1.0), 42, compat.MessageType.TRAIN, group_id="1")
    assert (made.metadata.run_id, made.metadata.src_node_id) == (5, 9)
    with pytest.raises(RuntimeError, match="not set"):
        compat.Message(records(1.0), 42, compat.MessageType.TRAIN)


def test_a_reply_goes_back_and_keeps_the_group() -> None:
    asked = compat.message(
        records(1.0), compat.MessageType.EVALUATE, target=4, message_id="a", group="g"
    )
    answer = compat.Message(records(2.0), reply_to=asked)
    meta = answer.metadata
    assert (meta.src_node_id, meta.dst_node_id, meta.reply_to_message_id) == (4, 1, "a")
    assert (meta.group_id, meta.message_type) == ("g", "evaluate")


def test_a_message_takes_the_id_it_is_given() -> None:
    made = compat.message(records(1.0), compat.MessageType.TRAIN)
    compat.set_message_id(made, "m-1")
    assert made.metadata.message_id == "m-1"


def test_arrays_come_back_as_they_went_in() -> None:
    values = np.array([[1.5, -0.0], [np.float32(1e-45), 3.0]], np.float32)
    back = compat.ArrayRecord({"w": compat.Array(values)})["w"].numpy()
    assert back.dtype == np.float32
    assert back.tobytes() == values.tobytes()


def test_opaque_bytes_travel_in_a_config_record() -> None:
    record = compat.ConfigRecord({"payload": b"\x00\xff", "round": 3, "names": ["a", "b"]})
    assert record["payload"] == b"\x00\xff"
    assert record["names"] == ["a", "b"]


def test_a_strategy_runs_without_a_grid() -> None:
    sent = [compat.message(records(value, n), "train") for value, n in ((1.0, 1), (4.0, 2))]
    arrays, metrics = compat.FedAvg().aggregate_train(1, sent)
    np.testing.assert_array_equal(arrays["w"].numpy(), np.full(3, 3.0, np.float32))
    assert dict(metrics) == {}


def test_a_muted_thread_logs_nothing(caplog: pytest.LogCaptureFixture) -> None:
    logger = logging.getLogger("flwr")
    with compat.muted():
        logger.warning("within")
    logger.warning("after")
    assert [record.message for record in caplog.records] == ["after"]


def test_every_strategy_we_name_is_there() -> None:
    named = {
        *("FedAvg", "FedAvgM", "FedAdam", "FedYogi", "FedAdagrad", "FedMedian", "FedTrimmedAvg"),
        *("Krum", "MultiKrum", "Bulyan", "FedProx", "QFedAvg", "FedXgbBagging", "FedXgbCyclic"),
        *(name for name in compat.strategy.__all__ if name.startswith("DifferentialPrivacy")),
    }
    assert named - set(compat.strategy.__all__) == set()
    assert set(compat.strategy.__all__) - named == {"Strategy", "Result"}


class Quiet(compat.Grid):
    """The least that a grid of one's own must have."""

    def set_run(self, run: Any) -> None:
        self._run = run

    @property
    def run(self) -> Any:
        return self._run

    def create_message(self, *args: Any, **named: Any) -> Any:
        raise NotImplementedError

    def get_node_ids(self) -> Iterable[int]:
        return [2, 3]

    def push_messages(self, messages: Iterable[Any]) -> Iterable[str]:
        return [str(number) for number, _ in enumerate(messages)]

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Any]:
        return []

    def send_and_receive(
        self, messages: Iterable[Any], *, timeout: float | None = None
    ) -> Iterable[Any]:
        return list(messages)


def test_a_grid_of_ones_own_needs_these_methods_and_no_others() -> None:
    grid = Quiet()
    grid.set_run(compat.Run.create_empty(5))
    assert grid.run.run_id == 5
    assert [node.node_id for node in grid.get_nodes()] == [2, 3]
    assert compat.Grid.__abstractmethods__ == {
        *("set_run", "run", "create_message", "get_node_ids"),
        *("push_messages", "pull_messages", "send_and_receive"),
    }


def test_a_server_app_is_called_with_grid_and_context() -> None:
    app, seen = compat.ServerApp(), []

    def main(grid: Any, context: Any) -> None:
        seen.append((grid, context.run_config["rounds"], context.run_id))

    app.main()(main)
    grid = Quiet()
    app(grid, compat.context(run_id=5, run_config={"rounds": 2}))
    assert seen == [(grid, 2, 5)]


def test_a_client_app_is_called_with_message_and_context() -> None:
    app = compat.ClientApp()

    def train(asked: Any, context: Any) -> Any:
        examples = context.node_config["partition-id"]
        return compat.Message(records(1.0, examples), reply_to=asked)

    app.train()(train)
    asked = compat.message(records(0.0), compat.MessageType.TRAIN, target=4)
    answer = app(asked, compat.context(run_id=5, node_id=4, node_config={"partition-id": 8}))
    assert answer.content["metrics"]["num-examples"] == 8


def test_strategies_start_and_hooks_have_these_signatures() -> None:
    def words(function: Any) -> list[str]:
        return list(inspect.signature(function).parameters)

    assert words(compat.Strategy.configure_train) == [
        *("self", "server_round", "arrays", "config", "grid")
    ]
    assert words(compat.Strategy.aggregate_train) == ["self", "server_round", "replies"]
    assert words(compat.Strategy.start)[:4] == ["self", "grid", "initial_arrays", "num_rounds"]
    assert {"arrays", "evaluate_metrics_clientapp"} <= set(vars(compat.Result()))
