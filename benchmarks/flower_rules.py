"""Flower's rules through a coordinator, and ours, beside Flower's classes run by themselves.

    python -m benchmarks.flower_rules --elements 200000

Differences are in units of the last place of float32 (ulp) of the largest operand. The program
ends with 1 if a row is beyond its bound. docs/flower.md says what each rule means.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from coldmerge.core.dtypes import Floats32
from coldmerge_coordinator.store import contributions
from coldmerge_coordinator.worker import run_once
from coldmerge_simulation.flower.compat import strategy
from tests.coordinator.conftest import Bench, make_store
from tests.simulation.flower.direct import aggregated, told, ulps
from tests.support import FixedClock

NAME = "w"
Arrays = dict[str, Any]


@dataclass(frozen=True)
class Row:
    """One comparison: what with what, on how many inputs, and how far they may be apart."""

    rule: str
    ours: str
    beside: str
    inputs: int
    ulp: float
    equal: float
    bound: float = 1.0

    def line(self) -> str:
        """The row as text."""
        verdict = "" if self.ulp <= self.bound else f"  beyond {self.bound:g}"
        return (
            f"{self.rule:<14} {self.ours:<68} {self.beside:<29} {self.inputs:>3} "
            f"{self.ulp:>6.2f} {100 * self.equal:>7.2f}%{verdict}"
        )


def draw(seed: int, elements: int, scale: float) -> Floats32:
    """Normal values."""
    return np.random.default_rng(seed).normal(0, scale, elements).astype(np.float32)


def clients(seed: int, count: int, elements: int) -> list[Arrays]:
    """Task vectors; the last is far from the others."""
    found = [{NAME: draw(100 * seed + number, elements, 1e-2)} for number in range(1, count + 1)]
    found[-1][NAME] *= np.float32(-8)
    return found


def rounds(
    merges: Sequence[dict[str, Any]], base: Floats32, sent: list[list[Arrays]]
) -> tuple[Floats32, list[int]]:
    """The fp32 weights after rounds of a coordinator, and the order of the last one's inputs."""
    with (
        tempfile.TemporaryDirectory() as folder,
        contextlib.redirect_stdout(io.StringIO()),
    ):
        bench = Bench(make_store(Path(folder) / "hub"), FixedClock(), Path(folder))
        bench.add_model({NAME: base})
        for merge, each in zip(merges, sent, strict=True):
            opened = bench.open_round(
                min_contributions=len(each), merge=merge, screening={"clip": None}
            )
            for number, deltas in enumerate(each):
                bench.contribute(opened, f"org-{number}", deltas)
            if not run_once(bench.store, bench.clock):
                sys.exit("the coordinator did not merge")
        found = bench.masters(bench.release())[NAME]
        with bench.store.database.read() as session:
            rows = contributions.sealed(session, bench.round(opened))
        keys = {contributions.get_manifest(row).content_key(): row.contributor for row in rows}
        bench.store.close()
    return found, [int(keys[key].removeprefix("org-")) for key in sorted(keys)]


def compared(
    rule: str, ours: str, beside: str, found: Any, expected: Any, operands: list[Any]
) -> Row:
    """A row from two results; `operands` are the inputs, and whatever they are added to."""
    wanted = expected.astype(np.float32)
    return Row(
        rule,
        ours,
        beside,
        len(operands) - 1,
        ulps(found, expected, operands),
        float(np.mean(found == wanted)),
    )


MERGES: list[tuple[str, dict[str, Any], Callable[[], Any]]] = [
    ("FedAvg", {"method": "flower"}, strategy.FedAvg),
    ("FedAvg", {"method": "mean"}, strategy.FedAvg),
    ("FedMedian", {"method": "flower"}, strategy.FedMedian),
    ("FedMedian", {"method": "median"}, strategy.FedMedian),
    (
        "FedTrimmedAvg",
        {"method": "flower", "parameters": {"beta": 0.2}},
        lambda: strategy.FedTrimmedAvg(beta=0.2),
    ),
    (
        "FedTrimmedAvg",
        {"method": "trimmed_mean", "parameters": {"trim": 0.2}},
        lambda: strategy.FedTrimmedAvg(beta=0.2),
    ),
    (
        "Krum",
        {"method": "flower", "parameters": {"num_malicious_nodes": 2}},
        lambda: strategy.Krum(num_malicious_nodes=2),
    ),
    (
        "Krum",
        {"method": "krum", "parameters": {"attackers": 2}},
        lambda: strategy.Krum(num_malicious_nodes=2),
    ),
    (
        "MultiKrum",
        {"method": "flower", "parameters": {"num_malicious_nodes": 2, "num_nodes_to_select": 5}},
        lambda: strategy.MultiKrum(num_malicious_nodes=2, num_nodes_to_select=5),
    ),
    (
        "MultiKrum",
        {"method": "krum", "parameters": {"attackers": 2, "keep": 5}},
        lambda: strategy.MultiKrum(num_malicious_nodes=2, num_nodes_to_select=5),
    ),
    (
        "Bulyan",
        {"method": "flower", "parameters": {"num_malicious_nodes": 1}},
        lambda: strategy.Bulyan(num_malicious_nodes=1),
    ),
]


def merges(elements: int, count: int) -> list[Row]:
    """One round each, beside the class on the same task vectors."""
    base, sent = draw(1, elements, 1.0), clients(2, count, elements)
    rows = []
    for rule, merge, make in MERGES:
        own = dict(merge.get("parameters", {}))
        if merge["method"] == "flower":
            merge = {**merge, "parameters": {"strategy": rule, **own}}
        found, order = rounds([merge], base, [sent])
        tau = aggregated(make(), [sent[number] for number in order])[NAME]
        expected = (base.astype(np.float64) + tau).astype(np.float32)
        operands = [base, *(one[NAME] for one in sent)]
        ours = " ".join([merge["method"], *(f"{key}={value}" for key, value in own.items())])
        rows.append(compared(rule, ours, "on task vectors", found, expected, operands))
    return rows


OUTERS: list[tuple[str, dict[str, Any], Callable[[], Any]]] = [
    ("FedAdam", {"method": "flower", "eta": 0.01}, lambda: strategy.FedAdam(eta=0.01)),
    ("FedYogi", {"method": "flower"}, strategy.FedYogi),
    ("FedAdagrad", {"method": "flower"}, strategy.FedAdagrad),
    (
        "FedAvgM",
        {"method": "flower", "server_momentum": 0.9, "server_learning_rate": 0.5},
        lambda: strategy.FedAvgM(server_momentum=0.9, server_learning_rate=0.5),
    ),
    (
        "FedAvgM",
        {"method": "momentum", "momentum": 0.9, "lr": 0.5},
        lambda: strategy.FedAvgM(server_momentum=0.9, server_learning_rate=0.5),
    ),
]


def outers(elements: int, count: int, number: int) -> list[Row]:
    """Some rounds with an outer optimizer, beside the class on weights in float64."""
    base = draw(1, elements, 1.0)
    sent = [clients(3 + n, count, elements) for n in range(number)]
    rows = []
    for rule, outer, make in OUTERS:
        own = [f"{key}={value}" for key, value in outer.items() if key != "method"]
        given = {**outer, "strategy": rule} if outer["method"] == "flower" else outer
        found, _ = rounds([{"outer": given}] * number, base, sent)
        made, weights = make(), {NAME: base.astype(np.float64)}
        passed = [base, *(one[NAME] for each in sent for one in each)]
        for n, each in enumerate(sent, 1):
            told(made, weights)
            trained = [{NAME: weights[NAME] + one[NAME]} for one in each]
            weights = aggregated(made, trained, number=n)
            passed.append(weights[NAME])
        row = compared(
            rule,
            " ".join(["outer", outer["method"], *own]),
            f"{number} rounds on float64 weights",
            found,
            weights[NAME],
            passed,
        )
        rows.append(replace(row, inputs=count, bound=float(number)))
    return rows


def on_weights(elements: int, count: int) -> list[str]:
    """What float32 costs Flower on weights, where a coordinator has task vectors."""
    base, sent = draw(1, elements, 1.0), clients(2, count, elements)
    weights = [{NAME: base + one[NAME]} for one in sent]
    wide = [{NAME: one[NAME].astype(np.float64)} for one in weights]
    operands = [one[NAME] for one in weights]
    exact = aggregated(strategy.FedAvg(), wide)[NAME]
    flowers = aggregated(strategy.FedAvg(), weights)[NAME]
    ours, _ = rounds([{"method": "mean"}], base, [sent])
    lines = [
        "On weights, beside the mean in float64: "
        f"Flower's FedAvg {ulps(flowers, exact, operands):.2f} ulp, "
        f"a round by mean {ulps(ours, exact, operands):.2f} ulp."
    ]
    for scale in (1e-2, 1e-4):
        moves = [one[NAME] * np.float32(scale / 1e-2) for one in sent]
        lines.append(f"Krum's scores, moves of {scale:g}: {_scores(base, moves)}")
    return lines


def _scores(base: Floats32, moves: list[Floats32]) -> str:
    """How wrong squared distances are that are found as Flower finds them."""

    def squared(rows: Any) -> Any:
        norms = np.square(rows).sum(axis=1)
        return norms[:, None] + norms[None, :] - 2 * rows @ rows.T

    deltas = np.stack(moves)
    exact = squared(deltas.astype(np.float64))
    off = ~np.eye(len(moves), dtype=bool)
    worst = [
        np.abs(squared(rows) - exact)[off].max() / exact[off].min()
        for rows in (deltas, deltas + base)
    ]
    return f"distances off by {worst[0]:.1e} on task vectors, by {worst[1]:.1e} on weights"


def main() -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--elements", type=int, default=200_000)
    parser.add_argument("--inputs", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    print(f"{'rule':<14} {'in a coordinator':<68} {'beside its class':<29}   N    ulp   equal")
    rows = merges(options.elements, options.inputs)
    rows += outers(options.elements, options.inputs, options.rounds)
    for row in rows:
        print(row.line())
    print("\n".join(on_weights(options.elements, options.inputs)))
    return int(any(row.ulp > row.bound for row in rows))


if __name__ == "__main__":
    sys.exit(main())
