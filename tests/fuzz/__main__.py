"""`python -m tests.fuzz [TARGET…]`: feed targets, print a table, fail if a promise broke."""

from __future__ import annotations

import argparse
import json
import multiprocessing
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from tests.fuzz.engine import Result
from tests.fuzz.seeded import mutated
from tests.fuzz.targets import TARGETS

COLUMNS = ("target", "inputs", "accepted", "crashes", "wrongly accepted", "worst", "memory", "time")


def main(arguments: list[str] | None = None) -> int:
    """Run what the command line asks for; 1 when an input broke a promise."""
    asked = _parser().parse_args(arguments)
    if unknown := sorted(set(asked.targets) - set(TARGETS)):
        sys.exit(f"no target {unknown[0]}; there are {', '.join(TARGETS)}")
    results = []
    for name in asked.targets or sorted(TARGETS):
        results.append(_run(name, asked))
        if asked.format == "table":
            _print_rows([results[-1]], header=len(results) == 1)
    if asked.format == "json":
        print(json.dumps([result.as_dict() for result in results], indent=2))
    return 0 if all(result.sound for result in results) else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=", ".join(TARGETS))
    parser.add_argument("--inputs", type=int, help="how many for each target")
    parser.add_argument("--seconds", type=float, help="how long for each target")
    parser.add_argument("--engine", choices=["mutate", "atheris"], default="mutate")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--jobs", type=int, default=1, help="processes, for `mutate`")
    parser.add_argument("--findings", type=Path, default=Path(tempfile.gettempdir()) / "fuzz")
    parser.add_argument("--format", choices=["table", "json"], default="table")
    return parser


def _run(name: str, asked: argparse.Namespace) -> Result:
    if asked.engine == "atheris":
        return _guided(name, asked)
    count, seconds = asked.inputs, asked.seconds
    if count is None and seconds is None:
        count = 10_000
    if asked.jobs == 1:
        return mutated(name, asked.seed, count, seconds, asked.findings)
    share = None if count is None else -(-count // asked.jobs)
    work = [
        (name, asked.seed * 1000 + job, share, seconds, asked.findings) for job in range(asked.jobs)
    ]
    total = Result(name)
    with ProcessPoolExecutor(asked.jobs, multiprocessing.get_context("spawn")) as pool:
        for result in pool.map(mutated, *zip(*work, strict=True)):
            total.add(result)
    return total


def _guided(name: str, asked: argparse.Namespace) -> Result:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "result.json"
        limit = f"{asked.inputs or 0}", f"{asked.seconds or 60}"
        settings = [name, *limit, str(asked.seed), str(asked.findings), str(out)]
        command = [sys.executable, "-m", "tests.fuzz.guided", *settings]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if not out.is_file():
            sys.exit(f"atheris ended without a result: {done.stderr[-2000:]}")
        values = json.loads(out.read_text())
        values.pop("sound")
        return Result(**values)


def _print_rows(results: list[Result], *, header: bool) -> None:
    form = "{:<20}{:>11}{:>11}{:>9}{:>18}{:>11}{:>11}{:>9}"
    if header:
        print(form.format(*COLUMNS))
    for found in results:
        worst, memory = (
            f"{found.worst_seconds * 1000:.1f} ms",
            f"{found.max_memory / 2**20:.1f} MiB",
        )
        counts = found.inputs, found.accepted, found.crashes, found.wrongly_accepted
        print(form.format(found.target, *counts, worst, memory, f"{found.seconds:.0f} s"))
        for finding in found.findings:
            print(f"    {finding}")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
