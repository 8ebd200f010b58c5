"""Contributors that fail in every way: the round goes on without them, and says why."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from coldmerge.core.errors import UnavailableError
from coldmerge_simulation import SimulationConfig, simulate
from coldmerge_simulation.contributors import client_app
from coldmerge_simulation.coordinator import desk
from coldmerge_simulation.coordinator.driver import Setting, drive
from coldmerge_simulation.engines.local_grid import LocalGrid
from coldmerge_simulation.flower import compat
from coldmerge_simulation.flower.compat import (
    ClientApp,
    ConfigRecord,
    Context,
    Message,
    RecordDict,
)
from coldmerge_simulation.folder import RunFolder
from coldmerge_simulation.orders import answer_of, pack
from coldmerge_simulation.run import prepare, result
from tests.simulation.settings import digests, settings

TRAINER = f"{Path(__file__).with_name('bad_trainer.py')}:create"


def test_a_round_goes_on_without_those_that_fail(tmp_path: Path) -> None:
    ways = ["raises", "nothing", "nan", "shape", "keys", "unpaid"]
    options = {f"org-{place}": way for place, way in enumerate(ways, 1)}
    values = settings(
        rounds=1, contributors=8, train={"epochs": 1, "trainer": TRAINER, "options": options}
    )
    found = simulate(values, out=tmp_path / "run")
    line = found.values["rounds"][0]
    assert line["state"] == "PUBLISHED"
    assert line["accepted"] == ["org-7", "org-8"]
    codes = {item["contributor"]: item["code"] for item in line["failed"]}
    assert codes == {
        "org-1": "simulation.client_failed",
        "org-2": "simulation.nothing_trained",
        "org-3": "extract.not_finite",
        "org-4": codes["org-4"],
        "org-5": "extract.no_match",
        "org-6": "push.bad_numbers",
    }
    assert "shape" in codes["org-4"]
    said = {item["contributor"]: item["message"] for item in line["failed"]}
    assert "out of coffee" in said["org-1"]
    assert set(found.contributions["outcome"]) == {"accepted", "failed"}


def test_below_the_quorum_there_is_no_release(tmp_path: Path) -> None:
    options = {f"org-{place}": "raises" for place in (1, 2, 3)}
    values = settings(rounds=1, train={"epochs": 1, "trainer": TRAINER, "options": options})
    found = simulate(values, out=tmp_path / "run")
    assert found.values["rounds"][0]["state"] == "ABANDONED"
    assert len(digests(found)) == 1


def test_evaluators_that_fail_do_not_hold_the_round_up(tmp_path: Path) -> None:
    options = {"org-1": "blind"}
    gate = {"max_loss": 100, "min_mean_gain": -100, "min_evaluators": 3}
    train = {"epochs": 1, "trainer": TRAINER, "options": options}
    policy = {"min_contributions": 2, "gate": gate}
    found = simulate(settings(rounds=1, round=policy, train=train), out=tmp_path / "run")
    line = found.values["rounds"][0]
    assert [item["contributor"] for item in line["silent"]] == ["org-1"]
    assert line["state"] in {"PUBLISHED", "REJECTED"}


def driven(tmp_path: Path, app: ClientApp, **changes: Any) -> dict[str, Any]:
    """What a run with another ClientApp comes to."""
    folder = RunFolder(tmp_path / "run")
    config = SimulationConfig.parse(settings(rounds=1, **changes))
    prepare(folder, config, resume=False)
    grid = LocalGrid(app, config.contributors)
    with grid.running():
        drive(grid, folder, Setting())
    return result(folder, "local")


def app_of(train: Callable[[Message, Context], Message | None]) -> ClientApp:
    """A ClientApp that introduces itself, and trains by `train` where it is org-1."""
    app = ClientApp()
    app.query()(client_app.hello)

    def chosen(message: Message, context: Context) -> Message | None:
        first = context.node_config["partition-id"] == 0
        return train(message, context) if first else client_app.train(message, context)

    app.train()(chosen)
    return app


def forged(message: Message, context: Context) -> Message:
    """Signed by nobody that the hub knows."""
    reply = client_app.train(message, context)
    text = reply.content["coldmerge"]["json"]
    changed = str(text).replace('"signature": "', '"signature": "AAAA')
    reply.content["coldmerge"]["json"] = changed
    return reply


def raises(_message: Message, _context: Context) -> Message:
    raise MemoryError("no more")


def saying(text: str) -> Callable[[Message, Context], Message]:
    content = RecordDict({"coldmerge": ConfigRecord({"json": text})})
    return lambda message, _context: Message(content, reply_to=message)


DEEP = "[" * 200_000 + "]" * 200_000


@pytest.mark.parametrize(
    ("train", "where", "code"),
    [
        (saying(DEEP), "failed", "simulation.unreadable_answer"),
        (saying('{"error": {"kind": ["DataError"]}}'), "failed", "simulation.unreadable_answer"),
        (saying('{"error": {"kind": "DataError", "code": []}}'), "failed", "[]"),
        (saying('{"signed": ["document"]}'), "refused", "simulation.unreadable_answer"),
        (raises, "failed", "simulation.client_failed"),
        (lambda _message, _context: None, "failed", "simulation.client_failed"),
        (
            lambda message, _context: Message(RecordDict({}), reply_to=message),
            "failed",
            "simulation.unreadable_answer",
        ),
        (forged, "refused", "document.bad_signature"),
    ],
    ids=["deep", "kind", "code", "signed", "raises", "nothing", "empty", "forged"],
)
def test_answers_of_another_app_are_noted(
    tmp_path: Path, train: Callable[[Message, Context], Message | None], where: str, code: str
) -> None:
    line = driven(tmp_path, app_of(train))["rounds"][0]
    assert [(item["contributor"], item["code"]) for item in line[where]] == [("org-1", code)]
    assert line["accepted"] == ["org-2", "org-3", "org-4"]


def test_no_nodes_is_an_error_and_no_hang(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(desk, "MEETING_SECONDS", 0.2)
    folder = RunFolder(tmp_path / "run")
    config = SimulationConfig.parse(settings())
    prepare(folder, config, resume=False)
    grid = LocalGrid(client_app.app, 0)
    with grid.running(), pytest.raises(UnavailableError, match=r"simulation\.no_contributors"):
        drive(grid, folder, Setting())


def test_a_reason_is_as_long_as_a_person_reads() -> None:
    said = {"error": {"kind": "DataError", "code": "x", "message": "a" * 10**6, "got": "b" * 10**6}}
    found = answer_of(compat.message(pack(said, {}), "train")).error
    assert found is not None
    assert len(str(found)) < 2000


class Nodes:
    """Nodes that share no folder with the server; the order number `lost` loses their models."""

    def __init__(self, folder: Path, lost: int | None = None) -> None:
        self.folder, self.lost = folder, lost
        self.orders, self.kept = 0, set[str]()

    def app(self) -> ClientApp:
        app = ClientApp()
        app.query()(client_app.hello)
        app.train()(self.train)
        return app

    def train(self, message: Message, context: Context) -> Message:
        context.node_config["home"] = str(self.folder)
        context.node_config["data"] = str(self.folder.parent / "run" / "data")
        self.orders += 1
        if self.orders == self.lost:
            shutil.rmtree(self.folder / "models")
            raise MemoryError("no more")
        reply = client_app.train(message, context)
        self.kept = {path.name for path in (self.folder / "models").iterdir()}
        return reply


def of_messages(tmp_path: Path, nodes: Nodes, config: SimulationConfig) -> dict[str, Any]:
    folder = RunFolder(tmp_path / "run")
    prepare(folder, config, resume=True)
    grid = LocalGrid(nodes.app(), 1)
    with grid.running():
        drive(grid, folder, Setting(shared=False, at_a_time=1))
    return result(folder, "federation")


def test_a_node_keeps_no_model_that_is_done_with_and_gets_again_what_it_lost(
    tmp_path: Path,
) -> None:
    nodes = Nodes(tmp_path / "node", lost=6)
    config = SimulationConfig.parse(settings(rounds=3))
    rounds = of_messages(tmp_path, nodes, config)["rounds"]
    assert [len(line["failed"]) for line in rounds] == [0, 1, 0]
    assert [len(line["accepted"]) for line in rounds] == [4, 3, 4]
    assert len(nodes.kept) == 1


def test_a_head_that_is_elsewhere_is_no_new_beginning(tmp_path: Path) -> None:
    nodes = Nodes(tmp_path / "node")
    values = settings(round={"min_contributions": 4, "gate": None})
    of_messages(tmp_path, nodes, SimulationConfig.parse({**values, "rounds": 1}))
    shutil.move(tmp_path / "node" / "homes" / "org-1", tmp_path / "elsewhere")
    RunFolder(tmp_path / "run").write(
        "simulation.json", {"config": SimulationConfig.parse(values).to_json()}
    )
    line = of_messages(tmp_path, nodes, SimulationConfig.parse(values))["rounds"][1]
    codes = [(item["contributor"], item["code"]) for item in line["failed"]]
    assert codes == [("org-1", "simulation.no_head")]
