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
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
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
    command = [sys.executable, "-m", "coldmerge", *map(str, words), "--format", "json"]
    tied = [sys.executable, child.__file__, str(os.getpid()), "0"]  # it ends when we end
    done = subprocess.run(
        [*tied, *command],
        cwd=ROOT,
        env=_environment(),
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


@cache
def starting() -> float:
    """Seconds until a process of the product has loaded what it trains with; measured once."""
    command = [sys.executable, "-c", "import coldmerge_client.training.fit, coldmerge_simulation"]
    started = time.perf_counter()
    subprocess.run(command, cwd=ROOT, env=_environment(), check=True)
    return time.perf_counter() - started


def _environment() -> dict[str, str]:
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    one = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    return {**os.environ, **one, "PYTHONPATH": os.pathsep.join(paths)}


@dataclass(frozen=True)
class Simulated:
    """What came of a simulation.

    Attributes:
        runs: one for each release after the base, in order.
        folders: digest → model folder of those releases; of the base where `sent` needs it.
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

    The file it was run from stays, as `scratch/simulations/<variant>-<seed>.yaml`: it can be run
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


def release_folder(work: Path, run: Run) -> Path:
    """Where a release of a simulation is laid out below `work`."""
    return work / "releases" / f"{run.variant}-{run.seed}-{run.release}"


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


def recall(file: Path, *, last: bool = False) -> Simulated | None:
    """What `remember` wrote; None if there is nothing, or what was left is not there any more.

    With `last` only the last release has to be there.
    """
    try:
        said = json.loads(file.read_text())
    except FileNotFoundError:
        return None
    folders = {digest: Path(path) for digest, path in said["folders"].items()}
    sent = {task: Path(path) for task, path in said["sent"].items()}
    runs = tuple(Run(**run) for run in said["runs"])
    needed = [folders[run.digest] for run in (runs[-1:] if last else runs)]
    if not all(path.exists() for path in (*needed, *sent.values())):
        return None
    spent = {task: Run(**run) for task, run in said["spent"].items()}
    return Simulated(runs, said["base"], folders, sent, spent)


def _collect(
    variant: str, result: Mapping[str, Any], place: Path, work: Path, *, keep_sent: bool
) -> Simulated:
    """Take the releases, their costs and perhaps the first round's contributions out of a run."""
    from coldmerge_coordinator import exporting
    from coldmerge_coordinator.store import Store

    total = Run(variant, int(result["seed"]), 0, "")
    runs: list[Run] = []
    folders: dict[str, Path] = {}
    sent: list[_Sent] = []
    with Store.open(place / "hub") as store:
        for release in result["releases"]:
            digest, number = str(release["digest"]), int(release["number"])
            if number or keep_sent:
                folders[digest] = release_folder(work, replace(total, release=number))
                if not folders[digest].exists():
                    folders[digest].parent.mkdir(exist_ok=True)
                    exporting.lay_out(store, digest, folders[digest])
            for line in result["rounds"]:
                if number and line["round"] == release["round"]:
                    came = _came(store, line, total, _tasks(place))
                    total = _after(total, number, digest, line["seconds"], came)
                    runs.append(total)
                    sent = came if number == 1 else sent
        kept = work / "sent" / f"{variant}-{total.seed}"
        paths = {one.task: _keep(store, one, kept) for one in sent} if keep_sent else {}
    spent = {one.task: one.run for one in sent}
    return Simulated(tuple(runs), str(result["releases"][0]["digest"]), folders, paths, spent)


@dataclass(frozen=True)
class _Sent:
    """A contribution that counted: what it cost, and where the hub has its file."""

    task: str
    payload: str
    run: Run


def _came(store: Any, line: Mapping[str, Any], total: Run, tasks: Mapping[str, str]) -> list[_Sent]:
    """The contributions that a round merged; its seconds are shared out by steps."""
    from coldmerge_coordinator.store import contributions

    found = []
    with store.database.read() as session:
        for row in contributions.of_round(session, line["id"]):
            if row.contributor in line["accepted"]:
                manifest = contributions.get_manifest(row)
                steps, epochs = (manifest.training.get(key, 0.0) for key in ("steps", "epochs"))
                run = Run(
                    total.variant,
                    total.seed,
                    1,
                    "",
                    bytes=row.payload_bytes,
                    steps=round(steps),
                    examples=round(manifest.examples * epochs),
                    task=tasks[row.contributor],
                )
                found.append(_Sent(tasks[row.contributor], row.payload, run))
    share = line["seconds"] / max(1, sum(one.run.steps for one in found))
    return [
        replace(one, run=replace(one.run, train_seconds=round(share * one.run.steps, 2)))
        for one in found
    ]


def _after(total: Run, number: int, digest: str, seconds: float, came: Sequence[_Sent]) -> Run:
    """What it had cost up to a release, and one round more."""
    return replace(
        total,
        release=number,
        digest=digest,
        bytes=total.bytes + sum(one.run.bytes for one in came),
        train_seconds=round(total.train_seconds + seconds, 2),
        steps=total.steps + sum(one.run.steps for one in came),
        examples=total.examples + sum(one.run.examples for one in came),
    )


def _keep(store: Any, one: _Sent, folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / f"{one.task}.safetensors"
    shutil.copyfile(store.payloads.local(one.payload), target)
    return target


def _tasks(place: Path) -> dict[str, str]:
    index = json.loads((place / "data" / "shares.json").read_text())
    return {row["name"]: row["task"] for row in index["shares"]}


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
