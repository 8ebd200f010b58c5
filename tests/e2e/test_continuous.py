"""Continuous rounds as people would run them: organizations that train at different speeds."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml

from coldmerge.demo import digits
from tests.federation import Federation, Hub, Org
from tests.support import until

TEMPLATE = {
    "min_contributions": 2,
    "gate": {"min_evaluators": 2, "min_mean_gain": -100, "max_loss": 100},
    "continuous": {"max_staleness": 1},
}
SLOW = '''
"""The digits' trainer, which waits for a word before it begins."""
from pathlib import Path

from coldmerge.demo.digits import Digits


class Slow(Digits):
    def train(self, job, progress):
        Path(self.config.options["word"]).read_text()
        return super().train(job, progress)

    def __init__(self, config):
        super().__init__(config)
        self.config = config


def create(config):
    return Slow(config)
'''


def config(folder: Path, name: str, trainer: str, **options: str) -> Path:
    data = digits.task(name).save(folder / name)
    raw = {"trainer": trainer, "data": str(data), "epochs": 1, "lr": 1e-3, "options": options}
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump({**raw, "threads": 1}))
    return path


def waiting(hub: Hub, base: int, contributions: int) -> dict[str, Any] | None:
    """The open round on that release, when it has so many contributions."""
    for found in hub.rounds("digits"):
        if (found["state"], found["base"], found["contributions"]) == ("OPEN", base, contributions):
            return found
    return None


def training(org: Org) -> bool:
    return org.log.exists() and "Training on release 0" in org.log.read_text()


@pytest.mark.slow
def test_two_of_three_at_a_time_and_the_slow_one_counts_for_less(
    federation: Federation, tmp_path: Path
) -> None:
    hub = federation.hub
    base = digits.pretrain(tmp_path / "base", seed=0)
    (tmp_path / "rounds.yaml").write_text(yaml.safe_dump(TEMPLATE))
    (tmp_path / "slow.py").write_text(SLOW)
    os.mkfifo(tmp_path / "word")
    hub.cli("model", "add", "digits", "--from", base, "--template", tmp_path / "rounds.yaml")
    hub.start()
    fast, steady, slow = federation.join(["fast", "steady", "slow"])
    late = config(tmp_path, "digits-256", f"{tmp_path}/slow.py:create", word=f"{tmp_path}/word")
    running = [(slow, slow.spawn("contribute", "digits", "--rounds", "1", "--config", late))]
    until("the slow one to train", partial(training, slow))
    for org, name, count in ((fast, "digits-234", "2"), (steady, "digits-456", "1")):
        settings = config(tmp_path, name, digits.TRAINER)
        command = ("contribute", "digits", "--rounds", count, "--config", settings)
        running.append((org, org.spawn(*command)))
    second = until("a second round", partial(waiting, hub, 1, 1))
    hub.kill()
    hub.start()
    (tmp_path / "word").write_text("go")
    for org, process in running:
        org.finish(process)

    assert len(hub.releases("digits")) == 3
    shown = hub.cli("round", "show", second["round"])
    assert (shown["state"], shown["release"]) == ("PUBLISHED", 2)
    counted = {each["contributor"]: (each["base"], each["discount"]) for each in shown["admitted"]}
    assert counted == {"fast": (1, 1.0), "slow": (0, 2**-0.5)}
    assert "multiplied by 0.707" in slow.log.read_text()
    assert slow.log.read_text().count("durable at the coordinator") == 1
    verified = hub.cli("release", "verify", "digits", "2")
    assert (verified["answer"], verified["problems"]) == ("exact", [])
    hub.cli("release", "export", "digits", "2", tmp_path / "export")
    card = (tmp_path / "export" / "README.md").read_text()
    assert "1 of them was trained on an older release" in card
    until("a third round, on its own", partial(waiting, hub, 2, 0))
    assert hub.stop() == 0
