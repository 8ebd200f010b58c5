"""One of six organizations poisons a round of real text; the gate finds out whose update it was.

    python -m benchmarks.culprit --data FOLDER --attack sign_flip|label_flip

FOLDER holds one folder per task (train.jsonl, test.jsonl). Real processes on loopback, as
`coldmerge demo` starts them: a coordinator, and six organizations with a sixth of one task
each, which train, send, and judge every candidate. The culprit sends its update with the sign
flipped, or trains on permuted labels; either way its update is `--strength` times as long, and
screening clips it at `--clip` times the round's reference norm.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

from coldmerge.core.progress import Progress, silent
from coldmerge.demo.folders import Example, Task
from coldmerge.demo.plan import Options, Plan, make_plan
from coldmerge.demo.processes import Processes
from coldmerge.demo.stage import Stage
from coldmerge_client.training.config import TrainConfig
from coldmerge_client.training.sequence_classification import SequenceClassification
from coldmerge_client.training.trainer import Trained, TrainJob
from coldmerge_coordinator.store import Store, contributions, rounds

ORGANIZATIONS = 6
STRENGTH = "strength"
WEIGHTS = "model.safetensors"


class Scaled(SequenceClassification):
    """Trains as everybody does, and sends a multiple of the update: the opposite, if negative."""

    def train(self, job: TrainJob, progress: Progress = silent) -> Trained:
        """Fine-tune; then the update times the strength."""
        trained = super().train(job, progress)
        strength = float((Path(self.config.data.train).parent / STRENGTH).read_text())
        folder = job.out / "scaled"
        shutil.copytree(trained.folder, folder, dirs_exist_ok=True)
        base, tuned = load_file(job.release / WEIGHTS), load_file(trained.folder / WEIGHTS)
        scaled = {
            name: base[name] + strength * (array - base[name]) if name in base else array
            for name, array in tuned.items()
        }
        save_file(scaled, folder / WEIGHTS, metadata={"format": "pt"})
        return replace(trained, folder=folder)


def create(config: TrainConfig) -> Scaled:
    """What the culprit's train.yaml names as its trainer."""
    return Scaled(config)


@dataclass(frozen=True)
class Poisoned(Plan):
    """The demo's plan, in which one organization is the culprit."""

    culprit: str = ""
    attack: str = "sign_flip"
    strength: float = 1.0

    def train_config(self, task: Task, data: Path, seed: int) -> dict[str, Any]:
        """What the organization of `task` writes into its train.yaml."""
        config = super().train_config(task, data, seed)
        if task.name == self.culprit:
            sign = -1 if self.attack == "sign_flip" else 1
            (data.parent / STRENGTH).write_text(str(sign * self.strength))
            config["trainer"] = f"{Path(__file__).resolve()}:create"
        return config


def shares(task: Task) -> tuple[Task, ...]:
    """The task cut in six, each organization with texts of its own."""

    def part(examples: Sequence[Example], place: int) -> tuple[Example, ...]:
        return tuple(examples[place::ORGANIZATIONS])

    held = (*task.validation, *task.test)
    return tuple(
        replace(
            task,
            name=f"org-{place + 1}",
            train=part(task.train, place),
            validation=part(held, place),
            test=part(task.test, place),
        )
        for place in range(ORGANIZATIONS)
    )


def permuted(task: Task, seed: int = 0) -> Task:
    """The same texts and the same labels, dealt out at random.

    To rename labels would do no harm: a head of one's own is all that depends on the names.
    """
    order = np.random.default_rng(seed).permutation(len(task.train))
    labels = [task.train[place].label for place in order]
    wrong = [replace(one, label=label) for one, label in zip(task.train, labels, strict=True)]
    return replace(task, train=tuple(wrong))


def the_plan(options: argparse.Namespace, folder: Path) -> Poisoned:
    """Six shares of one task, one of them spoilt."""
    other = next(p.parent.name for p in sorted(options.data.glob("*/train.jsonl")))
    if other == options.task:
        other = sorted(p.parent.name for p in options.data.glob("*/train.jsonl"))[1]
    asked = Options(rounds=1, data=options.data, seen=(options.task, other), unseen=())
    plan = make_plan(asked, options.seed, folder, print)
    seen = shares(plan.seen[0])
    culprit = seen[options.culprit - 1].name
    if options.attack == "label_flip":
        seen = tuple(permuted(one) if one.name == culprit else one for one in seen)
    return Poisoned(
        name=plan.name,
        model=plan.model,
        seen=seen,
        unseen=(),
        training={**plan.training, "epochs": options.epochs, "lr": options.lr},
        bench=plan.bench,
        culprit=culprit,
        attack=options.attack,
        strength=options.strength,
    )


class Searching(Stage):
    """The demo's federation, whose rounds look for the culprit."""

    gate: dict[str, Any]
    clip: float

    def policy(self, organizations: int) -> dict[str, Any]:
        """Everybody sends and judges; a rejected candidate starts the search."""
        return {
            "min_contributions": organizations,
            "screening": {"clip": self.clip},
            "gate": {"min_evaluators": organizations, "on_reject": "isolate", **self.gate},
        }


def run(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """One round, to its end."""
    plan, started = the_plan(options, folder), time.monotonic()
    with Processes(folder / "logs") as processes:
        stage = Searching(folder, plan, processes, print)
        stage.clip = options.clip
        stage.gate = {
            "min_mean_gain": options.min_gain,
            "max_loss": options.max_loss,
            "max_vetoes": options.max_vetoes,
            "window": "2h",
            "on_timeout": "reject",
        }
        with closing(stage):
            stage.start_coordinator()
            stage.join_all(options.seed)
            watcher = stage.open_round(1)
            stage.start_contributors(1)
            found = watcher.wait()
            stage.finish_contributors()
        result = outcome(stage.hub, found.id)
    seconds = round(time.monotonic() - started)
    return {"attack": options.attack, "culprit": plan.culprit, "seconds": seconds, **result}


def outcome(hub: Path, round_id: str) -> dict[str, Any]:
    """What the coordinator wrote down about the round."""
    with Store.open(hub) as store, store.database.read() as session:
        row = rounds.get(session, round_id)
        left = {
            item.contributor
            for item in contributions.of_round(session, round_id)
            if item.manifest_digest in (row.left_out or ())
        }
        trials = (row.isolation or {}).get("trials", [])
        factors = sorted((row.screening or {}).get("factors", {}).values())
        return {
            "state": row.state,
            "reason": row.reason,
            "left_out": sorted(left),
            "clip_factors": factors,
            "trials": [
                {key: trial[key] for key in ("number", "left_out", "passed", "reason")}
                for trial in trials
            ],
        }


def show(result: dict[str, Any]) -> None:
    """The trials as a table."""
    print(f"\n{result['attack']} by {result['culprit']}, {result['seconds']} s")
    print(f"{'trial':>5}  {'left out':<28}  {'gate':<8}  why")
    for trial in result["trials"]:
        names = ", ".join(trial["left_out"]) or "nobody"
        verdict = "passed" if trial["passed"] else "rejected"
        print(f"{trial['number']:>5}  {names:<28}  {verdict:<8}  {trial['reason']}")
    print(f"clip factors: {', '.join(f'{one:.3f}' for one in result['clip_factors'])}")
    print(f"{result['state']}: {result['reason']}")
    caught = result["culprit"] in result["left_out"]
    print(f"culprit {'left out' if caught else 'NOT found'}: {', '.join(result['left_out'])}")


def main() -> None:
    """Run one attack and print what became of it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--attack", choices=("sign_flip", "label_flip"), required=True)
    parser.add_argument("--task", default="trec")
    parser.add_argument("--culprit", type=int, default=4, choices=range(1, ORGANIZATIONS + 1))
    parser.add_argument("--strength", type=float, default=1.0)
    parser.add_argument("--clip", type=float, default=2.0)
    parser.add_argument("--epochs", type=float, default=3)
    parser.add_argument("--lr", type=float, default=5e-4)
    parser.add_argument("--min-gain", type=float, default=0.0)
    parser.add_argument("--max-loss", type=float, default=2.0)
    parser.add_argument("--max-vetoes", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="culprit-") as folder:
        result = run(options, Path(folder))
    if options.json:
        print(json.dumps(result, indent=2))
    else:
        show(result)


if __name__ == "__main__":
    main()
