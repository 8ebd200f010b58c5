"""Running the product: `coldmerge simulate` and `coldmerge merge`, each as a process of its own.

What a simulation leaves behind is turned into model folders and lines of `runs.jsonl`; the
rest of its folder, gigabytes of it, is removed.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from benchmarks.cold.outcome import Run
from coldmerge.core.errors import KINDS, DataError
from coldmerge.demo import child

ROOT = Path(__file__).parents[2]
SHOWN = 1000


def coldmerge(*words: str | Path) -> dict[str, Any]:
    """Run a command of the product, with one thread for torch; what it prints as JSON.

    Raises:
        ColdmergeError: what the command says.
    """
    one = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    command = [sys.executable, "-m", "coldmerge", *map(str, words), "--format", "json"]
    tied = [sys.executable, child.__file__, str(os.getpid()), "0"]  # it ends when we end
    done = subprocess.run(
        [*tied, *command],
        cwd=ROOT,
        env={**os.environ, **one, "PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
        check=False,
    )
    try:
        said = json.loads(done.stdout)
    except ValueError:
        said = {}
    if done.returncode == 0 and isinstance(said, dict) and said:
        return said
    error = said.get("error") if isinstance(said, dict) else None
    if isinstance(error, dict):
        kept = {key: error.get(key) for key in ("expected", "got")}
        raise KINDS[error["kind"]](error["code"], error["message"], hint=error["hint"], **kept)
    raise DataError(
        "cold.command_failed",
        f"The command `coldmerge {words[0]}` failed.",
        expected="JSON on standard output",
        got=f"exit status {done.returncode}: {done.stderr[-SHOWN:]}",
        hint="Run it by itself to see more.",
        command=" ".join(command),
    )


@dataclass(frozen=True)
class Simulated:
    """What came of a simulation.

    Attributes:
        runs: one for each release after the base, in order.
        folders: digest → model folder of those releases, and of the base.
        sent: task → what its contributor sent in the first round, a task vector's file.
        spent: task → seconds, steps and examples of it.

    """

    runs: tuple[Run, ...]
    base: str
    folders: Mapping[str, Path]
    sent: Mapping[str, Path]
    spent: Mapping[str, Run]


def simulate(
    variant: str, settings: Mapping[str, Any], work: Path, *, keep_sent: bool = False
) -> Simulated:
    """Run a simulation to its end, or go on with it, below `work`.

    The file it was run from stays, as `work/simulations/<variant>-<seed>.yaml`: it can be run
    by hand.

    Raises:
        ColdmergeError: what `coldmerge simulate` says.
    """
    seed = int(settings["seed"])
    place = work / "simulations" / f"{variant}-{seed}"
    place.parent.mkdir(parents=True, exist_ok=True)
    file = place.with_suffix(".yaml")
    file.write_text(yaml.safe_dump(dict(settings), sort_keys=False))
    resume = ["--resume"] if place.exists() else []
    result = coldmerge("simulate", file, "--engine", "local", "--out", place, *resume)
    found = _collect(variant, result, place, work, keep_sent=keep_sent)
    (work / "simulations" / f"{variant}-{seed}.json").write_text(json.dumps(result))
    return found


def tidy(variant: str, seed: int, work: Path) -> None:
    """Remove the folder of a simulation: all that is needed of it was taken out."""
    shutil.rmtree(work / "simulations" / f"{variant}-{seed}", ignore_errors=True)


def simulate_and_keep(variant: str, settings: Mapping[str, Any], work: Path) -> Simulated:
    """The same; what contributors sent in the first round is kept."""
    return simulate(variant, settings, work, keep_sent=True)


def remember(found: Simulated, file: Path) -> None:
    """Write down that a simulation was run, and what it left."""
    said = {
        "runs": [asdict(run) for run in found.runs],
        "base": found.base,
        "folders": {digest: str(path) for digest, path in found.folders.items()},
        "sent": {task: str(path) for task, path in found.sent.items()},
        "spent": {task: asdict(run) for task, run in found.spent.items()},
    }
    partial = file.with_name(f".{file.name}")
    partial.write_text(json.dumps(said))
    partial.rename(file)


def recall(file: Path) -> Simulated | None:
    """What `remember` wrote; None if there is nothing, or what was left is not there any more."""
    try:
        said = json.loads(file.read_text())
    except FileNotFoundError:
        return None
    folders = {digest: Path(path) for digest, path in said["folders"].items()}
    sent = {task: Path(path) for task, path in said["sent"].items()}
    runs = tuple(Run(**run) for run in said["runs"])
    needed = [folders[run.digest] for run in runs]
    if not all(path.exists() for path in (*needed, *sent.values())):
        return None
    spent = {task: Run(**run) for task, run in said["spent"].items()}
    return Simulated(runs, said["base"], folders, sent, spent)


def _collect(
    variant: str, result: Mapping[str, Any], place: Path, work: Path, *, keep_sent: bool
) -> Simulated:
    from coldmerge_coordinator import exporting
    from coldmerge_coordinator.store import Store, contributions

    seed, tasks = int(result["seed"]), _tasks(place)
    rounds = {line["round"]: line for line in result["rounds"]}
    runs: list[Run] = []
    folders: dict[str, Path] = {}
    sent: dict[str, Path] = {}
    spent: dict[str, Run] = {}
    total = Run(variant, seed, 0, "")
    with ExitStack() as stack:
        store = stack.enter_context(Store.open(place / "hub"))
        session = stack.enter_context(store.database.read())
        for release in result["releases"]:
            digest = str(release["digest"])
            folders[digest] = work / "releases" / digest[:32]
            if not folders[digest].exists():
                folders[digest].parent.mkdir(exist_ok=True)
                exporting.lay_out(store, digest, folders[digest])
            line = rounds.get(release["round"])
            if line is None:
                continue
            rows = contributions.of_round(session, line["id"])
            came = [row for row in rows if row.contributor in line["accepted"]]
            part = [_one(variant, seed, row, tasks[row.contributor]) for row in came]
            total = Run(
                variant,
                seed,
                int(release["number"]),
                digest,
                total.bytes + sum(one.bytes for one in part),
                round(total.train_seconds + line["seconds"], 2),
                total.steps + sum(one.steps for one in part),
                total.examples + sum(one.examples for one in part),
            )
            runs.append(total)
            if keep_sent and release["number"] == 1:
                for row, one in zip(came, part, strict=True):
                    task = tasks[row.contributor]
                    target = work / "sent" / f"{variant}-{seed}" / f"{task}.safetensors"
                    target.parent.mkdir(parents=True, exist_ok=True)
                    shutil.copyfile(store.payloads.local(row.payload), target)
                    share = line["seconds"] * one.steps / max(1, total.steps)
                    sent[task] = target
                    spent[task] = Run(
                        **{**vars(one), "train_seconds": round(share, 2), "digest": digest}
                    )
    return Simulated(tuple(runs), str(result["releases"][0]["digest"]), folders, sent, spent)


def _tasks(place: Path) -> dict[str, str]:
    index = json.loads((place / "data" / "shares.json").read_text())
    return {row["name"]: row["task"] for row in index["shares"]}


def _one(variant: str, seed: int, row: Any, task: str) -> Run:
    from coldmerge_coordinator.store import contributions

    manifest = contributions.get_manifest(row)
    steps, epochs = (manifest.training.get(key, 0.0) for key in ("steps", "epochs"))
    examples = round(manifest.examples * epochs)
    return Run(variant, seed, 1, "", row.payload_bytes, 0.0, round(steps), examples, task)


def merge(
    method: str,
    parameters: Mapping[str, Any],
    base: Path,
    vectors: Sequence[Path],
    work: Path,
    name: str,
) -> tuple[str, Path]:
    """Merge task vectors with `coldmerge merge`; digest and folder of the new model.

    Raises:
        ColdmergeError: what `coldmerge merge` says.
    """
    plan = {
        "merge_method": method,
        "base_model": str(base),
        "models": [{"model": str(path)} for path in vectors],
        "parameters": dict(parameters),
    }
    file = work / "merges" / f"{name}.yaml"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(yaml.safe_dump({k: v for k, v in plan.items() if v}, sort_keys=False))
    out = work / "merges" / name
    shutil.rmtree(out, ignore_errors=True)
    said = coldmerge("merge", file, out)
    return str(said["digest"]), out
