"""A federation stopped just before its rounds go on, to be copied and killed in many ways."""

from __future__ import annotations

import shutil
import signal
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from numpy.typing import NDArray

from coldmerge_client.bases import open_round
from coldmerge_client.evaluate import evaluate, report
from coldmerge_client.home import Home
from coldmerge_client.prepare import Facts, prepare
from coldmerge_client.push import push
from coldmerge_client.session import Session
from coldmerge_client.training import TrainConfig
from tests.federation import Federation, Hub, Org, until
from tests.support import write_model

FACTS = Facts(examples=10)
KILLS = 25
INJECT = Path(__file__).parent / "inject"
TRAINER = Path(__file__).parent / "trainer.py"
NO_GATE: dict[str, object] = {"gate": None}
WITH_GATE: dict[str, object] = {"gate": {"min_evaluators": 3, "window": "1d"}}

Array = NDArray[np.float32]


def tensors(count: int, elements: int) -> dict[str, Array]:
    """A model's worth of random float32 tensors."""
    draw = np.random.default_rng(0)
    return {f"layer.{n:02}.weight": draw.random(elements, np.float32) for n in range(count)}


def moved(base: dict[str, Array], seed: int) -> dict[str, Array]:
    """A fine-tune of `base`."""
    draw = np.random.default_rng(seed)
    return {name: a + 0.01 * draw.random(a.shape, np.float32) for name, a in base.items()}


def rows(hub: Hub, query: str) -> list[tuple[Any, ...]]:
    """What the database of a running coordinator says."""
    with closing(sqlite3.connect(hub.folder / "coldmerge.db")) as database:
        return database.execute(query).fetchall()


def remains(hub: Hub, query: str, scratch: Path) -> list[tuple[Any, ...]]:
    """What the database of a killed coordinator says, read from a copy: reading recovers it."""
    assert hub.process is not None
    assert hub.process.returncode == -signal.SIGKILL
    scratch.mkdir()
    for path in hub.folder.glob("coldmerge.db*"):
        shutil.copy2(path, scratch)
    with closing(sqlite3.connect(scratch / "coldmerge.db")) as database:
        found = database.execute(query).fetchall()
    shutil.rmtree(scratch)
    return found


def published(hub: Hub, model: str) -> dict[str, object]:
    """The one release that the round made; all of its signed record but the time."""
    until(f"release 1 of {model}", lambda: len(hub.releases(model)) == 2)
    assert [found["state"] for found in hub.rounds(model)] == ["PUBLISHED"]
    record: dict[str, object] = hub.cli("release", "show", model, "1")
    del record["created_at"], record["record_digest"]
    return record


def wait_killed(hub: Hub) -> None:
    """Until an injected kill has ended the coordinator."""
    assert hub.process is not None
    assert hub.process.wait(60) == -signal.SIGKILL


@dataclass(frozen=True)
class Paused:
    """A federation whose processes are stopped. It listens on the same ports in every copy."""

    federation: Federation

    def copy(self, folder: Path) -> Federation:
        """The coordinator's folder and the homes, to go on from there."""
        hub = self.federation.hub
        homes = [(org.name, folder / org.home.name) for org in self.federation.orgs]
        for source, target in [
            (hub.folder, folder / hub.folder.name),
            *((org.home, home) for org, (_, home) in zip(self.federation.orgs, homes, strict=True)),
        ]:
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("*.sock"))
        copied = Hub(folder / hub.folder.name, hub.ports, fingerprint=hub.fingerprint)
        return Federation(folder, copied, [Org(name, home) for name, home in homes])


@dataclass(frozen=True)
class Maker:
    """Brings a new federation to the point where it is to be paused."""

    federation: Federation

    def add(self, model: str, base: dict[str, Array], policy: dict[str, object]) -> None:
        """A model with an open round."""
        folder, hub = self.federation.folder, self.federation.hub
        hub.cli("model", "add", model, "--from", write_model(folder / f"base-{model}", base))
        rules = folder / f"{model}.yaml"
        rules.write_text(yaml.safe_dump({"min_contributions": 3, **policy}))
        hub.cli("round", "open", model, "--policy", rules)

    def contribute(self, model: str, base: dict[str, Array], send: int) -> None:
        """A fine-tune of every organization; the first `send` are sent, others wait."""
        for seed, org in enumerate(self.federation.orgs, 1):
            tuned = self.federation.folder / "tuned"
            write_model(tuned, moved(base, seed))
            with Session.open(Home(org.home)) as session:
                if seed <= send:
                    push(session, model, tuned, FACTS)
                else:
                    prepare(session, open_round(session, model), tuned, FACTS)
            shutil.rmtree(tuned)

    def judge(self, model: str, reports: int) -> None:
        """Evaluations of the first `reports` organizations; every one gets a configuration."""
        hub = self.federation.hub
        until("the candidate", lambda: hub.rounds(model)[0]["state"] == "CANDIDATE")
        for number, org in enumerate(self.federation.orgs):
            known = org.home / "release.json"
            known.write_text(f'{{"release_0": "{hub.releases(model)[0]["digest"]}"}}')
            path = Home(org.home).config(model)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(yaml.safe_dump({"trainer": f"{TRAINER}:create", "data": str(known)}))
            if number < reports:
                with Session.open(Home(org.home)) as session:
                    found = session.newest_round(model)
                    assert found is not None
                    scores = evaluate(session, found, TrainConfig.load(path))
                    report(session, found, scores)


def pytest_addoption(parser: pytest.Parser) -> None:
    """How long the random tests of this folder go on."""
    parser.addoption("--kills", type=int, default=KILLS, help="random kills of the coordinator")
    parser.addoption("--seed", type=int, default=1, help="where random choices begin")


@pytest.fixture
def kills(pytestconfig: pytest.Config) -> int:
    """`--kills`. Run from the tests' root, this file is read too late to add its options."""
    return int(pytestconfig.getoption("--kills", KILLS))


@pytest.fixture
def seed(pytestconfig: pytest.Config) -> int:
    """`--seed`."""
    return int(pytestconfig.getoption("--seed", 1))


Prepare = Callable[[Maker], None]


@pytest.fixture(scope="module")
def pause(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[Prepare], Paused]]:
    """Make a federation of three, prepare it, stop it."""
    made: list[Federation] = []

    def build(prepare: Prepare) -> Paused:
        federation = Federation.make(tmp_path_factory.mktemp("paused"))
        made.append(federation)
        federation.hub.start()
        federation.join(["a", "b", "c"])
        prepare(Maker(federation))
        assert federation.hub.stop() == 0
        return Paused(federation)

    yield build
    for federation in made:
        federation.close()
        shutil.rmtree(federation.folder, ignore_errors=True)


@pytest.fixture
def copy(tmp_path: Path) -> Iterator[Callable[[Paused], Federation]]:
    """A copy of a paused federation; its processes and its files end with the test."""
    made: list[Federation] = []

    def begin(paused: Paused) -> Federation:
        made.append(paused.copy(tmp_path / "again"))
        return made[-1]

    yield begin
    for federation in made:
        federation.close()
        shutil.rmtree(federation.folder)


def injected(table: str, point: str) -> dict[str, str]:
    """The environment in which the coordinator is killed at that point."""
    return {"PYTHONPATH": str(INJECT), "CRASH_TABLE": table, "CRASH_POINT": point}


def restarts(points: Sequence[str], table: str) -> Iterator[dict[str, str]]:
    """One environment for every start but the last, which is left in peace."""
    yield from (injected(table, point) for point in points)
    yield {}
