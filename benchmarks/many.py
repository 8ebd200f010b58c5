"""Hundreds of contributors on one machine: `python -m benchmarks.many`.

A small real task (all of scikit-learn's handwritten digits, unlike shares) is simulated with
`--contributors` and, for the memory, with fewer of them. Each run is a process of its own;
its peak of resident memory is what the system counted.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

DIGITS = "digits-0123456"


def settings(contributors: int, rounds: int) -> dict[str, Any]:
    """The simulation, as its file would say it."""
    return {
        "name": "many",
        "rounds": rounds,
        "model": "digits",
        "contributors": contributors,
        "data": {
            "tasks": [DIGITS],
            "unseen": ["digits-789"],
            "partition": {"by": "dirichlet", "alpha": 1.0, "minimum": 4},
        },
        "train": {"epochs": 20, "lr": 3e-3},
        "round": {
            "min_contributions": 3,
            "gate": None,
            "screening": {"clip": None, "on_outlier": "accept", "duplicates": "warn"},
        },
        "evaluate": {"every": 1},
    }


_CHILD = """
import json, resource, sys, time
from coldmerge_simulation import simulate
started = time.monotonic()
found = simulate(json.loads(sys.argv[1]), engine=sys.argv[2], out=sys.argv[3]).values
used = resource.getrusage(resource.RUSAGE_SELF)
print(json.dumps({"seconds": time.monotonic() - started, "processor": used.ru_utime + used.ru_stime,
                  "peak_bytes": used.ru_maxrss * 1024, "result": found}))
"""


def run(contributors: int, rounds: int, engine: str, folder: Path) -> dict[str, Any]:
    """Simulate in a process of its own."""
    arguments = [json.dumps(settings(contributors, rounds)), engine, str(folder)]
    done = subprocess.run(
        [sys.executable, "-c", _CHILD, *arguments], stdout=subprocess.PIPE, check=True
    )
    said = json.loads(done.stdout)
    found = said.pop("result")
    return {
        "contributors": contributors,
        "rounds": rounds,
        **{key: round(value, 1) for key, value in said.items()},
        "round_peaks": [line["peak_bytes"] for line in found["rounds"]],
        "accepted": sum(row["accepted"] for row in found["releases"]),
        "seen": [row["seen"]["mean"] for row in found["releases"]],
        "unseen": [row["unseen"]["mean"] for row in found["releases"]],
        "digest": found["releases"][-1]["digest"],
    }


def main(arguments: list[str] | None = None) -> int:
    """Print time, memory and the accuracy of each release."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.many", description=__doc__)
    parser.add_argument("--contributors", type=int, nargs="+", default=[20, 200])
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--engine", default="local")
    parser.add_argument("--format", choices=("text", "json"), default="text")
    options = parser.parse_args(arguments)
    rows = []
    for count in options.contributors:
        with tempfile.TemporaryDirectory(prefix="coldmerge-many-") as folder:
            rows.append(run(count, options.rounds, options.engine, Path(folder) / "run"))
        if options.format == "text":
            print(_text(rows[-1]), flush=True)
    if options.format == "json":
        print(json.dumps(rows, indent=1))
    return 0


def _text(row: dict[str, Any]) -> str:
    curves = [
        f"  {group:6} " + " ".join(f"{value:.1f}" for value in row[group])
        for group in ("seen", "unseen")
    ]
    return "\n".join(
        [
            f"{row['contributors']} contributors × {row['rounds']} rounds: {row['seconds']:.0f} s "
            f"({row['processor']:.0f} s of processor), peak {row['peak_bytes'] / 1e6:.0f} MB, "
            f"{row['accepted']} contributions",
            *curves,
        ]
    )


if __name__ == "__main__":
    raise SystemExit(main())
