"""Contributors that fail in every way: the round goes on without them, and says why."""

from __future__ import annotations

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
from coldmerge_simulation.flower.compat import ClientApp, ConfigRecord, Context, Message, RecordDict
from coldmerge_simulation.folder import RunFolder
from coldmerge_simulation.run import prepare, result
from tests.simulation.settings import digests, settings

TRAINER = f"{Path(__file__).parents[1] / 'bad_trainer.py'}:create"


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
