"""Time and private memory of one round on a large model, with real processes.

`python -m benchmarks.loop --bytes 2000000000 --contributions 4 --format json`

Imports a synthetic fp32 model, lets each organization pull it and push a fine-tune that
touches every tensor, waits for merge and publication (no gate), and exports the release.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import Any, TypedDict

from benchmarks import synthetic
from benchmarks.memory import Sampler, children
from coldmerge.cli.output import Format, print_rows
from tests.federation import COLDMERGE, Federation, Hub, Org, environment, until

MODEL = "large"
MERGE = "merge and publish"
MERGE_PATIENCE = 3600.0
MB = 10**6


@dataclass(frozen=True)
class Phase:
    """One step of the round; `private` is the peak of each process in bytes."""

    phase: str
    seconds: float
    private: dict[str, int]


@dataclass
class Loop:
    """A benchmark in the making."""

    federation: Federation
    sampler: Sampler
    nbytes: int
    phases: list[Phase] = field(default_factory=list)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Measure what happens inside; a phase that comes again is added to the first."""
        self.sampler.take()
        started = time.monotonic()
        yield
        seconds, private = time.monotonic() - started, self.sampler.take()
        before = [phase for phase in self.phases if phase.phase == name]
        for other in before:
            self.phases.remove(other)
            seconds += other.seconds
            private = {
                key: max(private.get(key, 0), other.private.get(key, 0))
                for key in sorted({*private, *other.private})
            }
        self.phases.append(Phase(name, round(seconds, 2), private))

    def run(self, name: str, *command: str | Path, **env: str) -> None:
        """A command, watched under `name` until it has succeeded."""
        arguments = [*COLDMERGE, *map(str, command), "--format", "json"]
        process = subprocess.Popen(
            arguments, env=environment(**env), stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        self.sampler.watch(name, process.pid)
        output, errors = process.communicate()
        if process.returncode != 0:
            raise SystemExit(f"{' '.join(arguments)}\n{(output + errors).decode()}")

    def admin(self, name: str, *command: str | Path) -> None:
        """An admin's command."""
        self.run(name, *command, COLDMERGE_DIR=str(self.federation.hub.folder))

    def contributor(self, org: Org, *command: str | Path) -> None:
        """A contributor's command."""
        self.run("client", *command, COLDMERGE_HOME=str(org.home))

    def watch_coordinator(self) -> None:
        """The API with the driver in it, and the worker that it has started."""
        process = self.federation.hub.process
        if process is None:
            raise SystemExit("the coordinator is not running")
        self.sampler.watch("coordinator", process.pid)
        (worker,) = until("the worker", lambda: children(process.pid))
        self.sampler.watch("worker", worker)


def published(hub: Hub) -> bool:
    """Whether the round has made release 1."""
    with closing(sqlite3.connect(hub.folder / "coldmerge.db")) as database:
        (state,) = database.execute("SELECT state FROM round").fetchone()
    if state in ("REJECTED", "ABANDONED"):
        raise SystemExit(f"The round ended {state}:\n{hub.log.read_text()[-4000:]}")
    return bool(state == "PUBLISHED")


def merge_seconds(hub: Hub) -> float:
    """From the last receipt, which sealed the round, to the release, by the coordinator's clock.

    The client that sent it was still ending when the merge began.
    """
    with closing(sqlite3.connect(hub.folder / "coldmerge.db")) as database:
        query = "SELECT (SELECT max(accepted_at) FROM contribution), ended_at FROM round"
        sealed, ended = map(datetime.fromisoformat, database.execute(query).fetchone())
    return round((ended - sealed).total_seconds(), 2)


def run_loop(loop: Loop, contributions: int) -> list[Phase]:
    """The whole round, from a folder with weights to one."""
    folder, hub = loop.federation.folder, loop.federation.hub
    base = synthetic.write(folder / "base", loop.nbytes)
    rules = folder / "rules.yaml"
    rules.write_text(f"min_contributions: {contributions}\ngate: null\n")
    with loop.phase("import"):
        loop.admin("import", "model", "add", MODEL, "--from", base, "--template", rules)
    shutil.rmtree(base)
    hub.start()
    loop.watch_coordinator()
    loop.federation.join([f"org-{number}" for number in range(1, contributions + 1)])
    hub.cli("round", "open", MODEL)
    for seed, org in enumerate(loop.federation.orgs, 1):
        with loop.phase("pull"):
            loop.contributor(org, "pull", MODEL)
        tuned = synthetic.write(folder / "tuned", loop.nbytes, seed)
        with loop.phase("extract and push"):
            loop.contributor(org, "push", MODEL, "--from", tuned, "--base", "0")
        if seed < contributions:
            shutil.rmtree(org.home)
            shutil.rmtree(tuned)
    with loop.phase(MERGE):
        until("release 1", lambda: published(hub), MERGE_PATIENCE)
    loop.phases[-1] = replace(loop.phases[-1], seconds=merge_seconds(hub))
    with loop.phase("export"):
        loop.admin("export", "release", "export", MODEL, "1", folder / "export")
    return loop.phases


class Figures(TypedDict):
    """All figures of one run, JSON-ready: peaks in bytes, by process."""

    bytes: int
    tensors: int
    contributions: int
    phases: list[dict[str, Any]]
    peak_private_bytes: dict[str, int]


def benchmark(nbytes: int, contributions: int, within: Path | None) -> Figures:
    """All figures of one run. Files are removed at the end."""
    with tempfile.TemporaryDirectory(prefix="coldmerge-bench-", dir=within) as name:
        federation = Federation.make(Path(name))
        try:
            with Sampler() as sampler:
                phases = run_loop(Loop(federation, sampler, nbytes), contributions)
        finally:
            federation.close()
    peaks: dict[str, int] = {}
    for phase in phases:
        for process, used in phase.private.items():
            peaks[process] = max(used, peaks.get(process, 0))
    sizes = [4 * rows * columns for rows, columns in synthetic.shapes(nbytes).values()]
    return {
        "bytes": sum(sizes),
        "tensors": len(sizes),
        "contributions": contributions,
        "phases": [asdict(phase) for phase in phases],
        "peak_private_bytes": dict(sorted(peaks.items())),
    }


def print_table(figures: Figures) -> None:
    """One row per phase: seconds, and the peak of each process in MB."""
    phases, peaks = figures["phases"], figures["peak_private_bytes"]
    rows: list[dict[str, object]] = [
        {
            "phase": phase["phase"],
            "seconds": phase["seconds"],
            **{f"{name} MB": _megabytes(phase["private"].get(name)) for name in peaks},
        }
        for phase in phases
    ]
    rows.append(
        {"phase": "peak", "seconds": None, **{f"{k} MB": _megabytes(v) for k, v in peaks.items()}}
    )
    print(f"{figures['bytes']} bytes, {figures['contributions']} contributions; private memory:")
    print_rows(rows, Format.TABLE, empty="")


def _megabytes(nbytes: int | None) -> int | None:
    return None if nbytes is None else round(nbytes / MB)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run and print."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.loop", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--bytes", type=int, default=500 * MB, help="size of the fp32 model")
    parser.add_argument("--contributions", type=int, default=4)
    parser.add_argument("--format", choices=("table", "json"), default="table")
    parser.add_argument("--in", dest="within", type=Path, help="folder for temporary files")
    options = parser.parse_args(arguments)
    if not Path("/proc/self/smaps_rollup").is_file():
        parser.error("private memory is read from /proc/PID/smaps_rollup: Linux only")
    figures = benchmark(options.bytes, options.contributions, options.within)
    if options.format == "json":
        print(json.dumps(figures, indent=2))
    else:
        print_table(figures)
    return 0


if __name__ == "__main__":
    sys.exit(main())
