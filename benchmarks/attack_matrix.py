"""What attackers and dropouts cost, by merge rule: `python -m benchmarks.attack_matrix`.

Ten simulated contributors hold unlike shares (Dirichlet) of handwritten digits and improve a
small network for some rounds; none, one or two of them send their task vector turned round and
four times as long. A cell is the accuracy of the last release on the contributors' task (linear
probes on ten examples, in points), the mean over seeds. Every run is an ordinary simulation.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import ExitStack
from multiprocessing import get_context
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, NamedTuple

OPEN: dict[str, Any] = {"clip": None, "on_outlier": "accept", "statistics": None}
"""A coordinator that screens nothing but what is no number."""

RULES: dict[str, dict[str, Any]] = {
    "mean": {"merge": {"method": "mean"}, "screening": OPEN},
    "clipped mean": {"merge": {"method": "mean"}},
    "geometric median": {"merge": {"method": "geometric_median"}, "screening": OPEN},
    "krum": {
        "merge": {"method": "krum", "parameters": {"attackers": 2}},
        "screening": OPEN,
        "min_contributions": 7,  # fewer it cannot merge
    },
    "ties + gate": {
        "merge": {"method": "ties", "parameters": {"density": 0.5}},
        "screening": OPEN,
        "gate": {"min_evaluators": 3, "max_loss": 10, "max_vetoes": 2},
    },
}
ATTACK = {"kind": "sign_flip", "strength": 4.0}


class Cell(NamedTuple):
    """One run: a rule, so many attackers, a probability of dropping out, a seed."""

    rule: str
    attackers: int
    dropout: float
    seed: int


def settings(cell: Cell, contributors: int, rounds: int) -> dict[str, Any]:
    """The simulation of a cell, as its file would say it."""
    attacks = [{"count": cell.attackers, **ATTACK}] if cell.attackers else []
    return {
        "name": "attacks",
        "seed": cell.seed,
        "rounds": rounds,
        "model": "digits",
        "contributors": contributors,
        "data": {"partition": {"by": "dirichlet", "alpha": 0.5, "minimum": 20}},
        "train": {"epochs": 12, "lr": 3e-3},
        "participation": {"dropout": cell.dropout},
        "attackers": attacks,
        "round": {"min_contributions": 3, "gate": None, **RULES[cell.rule]},
        "evaluate": {"every": 1},
    }


def run(cell: Cell, contributors: int, rounds: int, keep: Path) -> dict[str, Any]:
    """Simulate one cell in a folder below `keep`, or read what is there already."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    from coldmerge_simulation import simulate

    place = keep / "-".join(str(part).replace(" ", "_") for part in cell)
    wanted = settings(cell, contributors, rounds)
    found = simulate(wanted, out=place, resume=place.exists()).values
    first, last = found["releases"][0], found["releases"][-1]
    return {
        **cell._asdict(),
        "before": first["seen"]["mean"],
        "seen": _last(found, "seen"),
        "unseen": _last(found, "unseen"),
        "releases": len(found["releases"]) - 1,
        "refused": sum(len(line["refused"]) for line in found["rounds"]),
        "digest": last["digest"],
        "seconds": found["seconds"],
    }


def _last(found: Mapping[str, Any], group: str) -> float:
    """Accuracy of the last release: where the last rounds published none, of the one before."""
    measured = [row[group]["mean"] for row in found["releases"] if row[group]]
    return float(measured[-1])


def cells(options: argparse.Namespace) -> Iterator[Cell]:
    """All runs, those of one rule and seed beside each other."""
    for seed in range(options.seeds):
        for rule in options.rules:
            for dropout in options.dropouts:
                for attackers in options.attackers:
                    yield Cell(rule, attackers, dropout, seed)


def table(rows: Sequence[dict[str, Any]]) -> str:
    """A line for each rule and dropout, a column for each number of attackers."""
    counts = sorted({row["attackers"] for row in rows})
    head = "".join(f"{f'{count} attackers':>16}" for count in counts)
    lines = [f"{'rule':18}{'dropout':>8}{head}   rounds published"]
    for dropout in sorted({row["dropout"] for row in rows}):
        for rule in dict.fromkeys(row["rule"] for row in rows):
            some = [row for row in rows if (row["rule"], row["dropout"]) == (rule, dropout)]
            shown = "".join(
                f"{_spread([row['seen'] for row in some if row['attackers'] == count]):>16}"
                for count in counts
            )
            published = "/".join(
                f"{fmean(row['releases'] for row in some if row['attackers'] == count):.3g}"
                for count in counts
            )
            lines.append(f"{rule:18}{dropout:8g}{shown}   {published}")
    return "\n".join(lines)


def _spread(values: Sequence[float]) -> str:
    more = f" ± {stdev(values):.1f}" if len(values) > 1 else ""
    return f"{fmean(values):.1f}{more}"


def main(arguments: list[str] | None = None) -> int:
    """Run the matrix and print it."""
    options = _options(arguments)
    started, rows = time.monotonic(), []
    todo = list(cells(options))
    with ExitStack() as stack:
        keep = options.keep or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        spawn = get_context("spawn")
        pool = stack.enter_context(ProcessPoolExecutor(options.jobs, mp_context=spawn))
        size = (options.contributors, options.rounds, keep.absolute())
        jobs = [pool.submit(run, cell, *size) for cell in todo]
        for job in as_completed(jobs):
            rows.append(job.result())
            print(f"\r{len(rows)} of {len(todo)} runs", end="", flush=True, file=sys.stderr)
    print(file=sys.stderr)
    rows.sort(key=lambda row: todo.index(Cell(*(row[key] for key in Cell._fields))))
    seconds = round(time.monotonic() - started, 1)
    about = {key: getattr(options, key) for key in ("contributors", "rounds", "seeds")}
    if options.format == "json":
        print(json.dumps({**about, "attack": ATTACK, "seconds": seconds, "rows": rows}, indent=1))
        return 0
    before = _spread([row["before"] for row in rows if row["rule"] == rows[0]["rule"]])
    print(f"{options.contributors} contributors, {options.rounds} rounds, {options.seeds} seeds, ")
    print(f"attack {ATTACK['kind']} × {ATTACK['strength']:g}; release 0: {before}; {seconds} s")
    print(table(rows))
    return 0


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.attack_matrix", description=__doc__)
    parser.add_argument("--contributors", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--attackers", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--dropouts", type=float, nargs="+", default=[0.0, 0.3])
    parser.add_argument("--rules", nargs="+", choices=RULES, default=list(RULES))
    parser.add_argument("--keep", type=Path, help="keep the runs here; go on with those that are")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    parser.add_argument("--format", choices=("text", "json"), default="text")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    raise SystemExit(main())
