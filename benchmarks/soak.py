"""Memory and descriptors over many small rounds, with real processes.

`python -m benchmarks.soak --rounds 2000 --models 4 --format json`

Several models go on side by side; in each round every contributor pulls the release, sends
a small change of every tensor and waits for the next release (no gate).
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks import synthetic
from benchmarks.memory import children, private_bytes
from coldmerge.cli.output import Format, print_rows
from coldmerge.wire.calls import call
from coldmerge.wire.channel import local_channel
from coldmerge.wire.v1 import admin_pb2, admin_pb2_grpc, common_pb2
from coldmerge_client.home import Home
from coldmerge_client.prepare import Facts, prepare
from coldmerge_client.pull import prune, pull
from coldmerge_client.push import send
from coldmerge_client.session import Session
from tests.federation import Federation, until

CONTRIBUTORS = 2
MODEL_BYTES = 64 * 2**10
WARM = 100
"""Rounds before the first figures: caches fill and pools grow by then."""
SAMPLES = 20


@dataclass(frozen=True)
class Sample:
    """Private bytes and open descriptors of each process after so many rounds."""

    rounds: int
    seconds: float
    private: dict[str, int]
    descriptors: dict[str, int]


class Lineage:
    """One model, and the contributors that improve it."""

    def __init__(self, federation: Federation, model: str, tuned: Sequence[Path]) -> None:
        self._model, self._tuned = model, tuned
        self._sessions = [Session.open(Home(org.home)) for org in federation.orgs]
        self._admin = local_channel(federation.hub.folder / "admin.sock")
        self._rounds = 0

    def round(self) -> None:
        """Open one, contribute, and wait for the next release."""
        stub = admin_pb2_grpc.AdminStub(self._admin)  # type: ignore[no-untyped-call]
        opened = call(stub.OpenRound, admin_pb2.OpenRoundRequest(model=self._model))
        for index, session in enumerate(self._sessions):
            pull(session, self._model)
            tuned = self._tuned[(self._rounds + index) % len(self._tuned)]
            send(session, prepare(session, opened, tuned, Facts(examples=1)))
            prune(session.home, self._model, keep=1)
        self._rounds += 1
        until("the release", lambda: self._published(opened.id), 120)

    def _published(self, round_id: str) -> bool:
        found = self._sessions[0].round(round_id)
        if found.state in (common_pb2.Round.REJECTED, common_pb2.Round.ABANDONED):
            raise SystemExit(f"{round_id} ended: {found.reason}")
        return bool(found.state == common_pb2.Round.PUBLISHED)

    def close(self) -> None:
        """Hang up."""
        for session in self._sessions:
            session.close()
        self._admin.close()


def sample(processes: dict[str, int], rounds: int, seconds: float) -> Sample:
    """Measure now."""
    descriptors = {
        name: len(list(Path(f"/proc/{pid}/fd").iterdir())) for name, pid in processes.items()
    }
    private = {name: private_bytes(pid) for name, pid in processes.items()}
    return Sample(rounds, round(seconds, 1), private, descriptors)


def soak(lineages: Sequence[Lineage], processes: dict[str, int], rounds: int) -> list[Sample]:
    """Samples from the end of the warm-up to the last round."""
    started = time.monotonic()
    step = max(1, (rounds - WARM) // SAMPLES)
    samples: list[Sample] = []
    with ThreadPoolExecutor(len(lineages)) as pool:
        for done in range(0, rounds + len(lineages), len(lineages)):
            if done >= min(WARM + step * len(samples), rounds):
                samples.append(sample(processes, done, time.monotonic() - started))
            if done >= rounds:
                break
            list(pool.map(Lineage.round, lineages))
    return samples


def measure(federation: Federation, rounds: int, models: int) -> list[Sample]:
    """Set the scene, and soak."""
    folder, hub = federation.folder, federation.hub
    base = synthetic.write(folder / "base", MODEL_BYTES)
    tuned = [synthetic.write(folder / f"tuned-{seed}", MODEL_BYTES, seed) for seed in (1, 2, 3)]
    names = [f"model-{number}" for number in range(models)]
    rules = folder / "rules.yaml"
    rules.write_text(f"min_contributions: {CONTRIBUTORS}\ngate: null\n")
    for name in names:
        hub.cli("model", "add", name, "--from", base, "--template", rules)
    hub.start()
    if hub.process is None:
        raise SystemExit("the coordinator is not running")
    pid = hub.process.pid
    (worker,) = until("the worker", lambda: children(pid))
    federation.join([f"org-{number}" for number in range(CONTRIBUTORS)])
    lineages = [Lineage(federation, name, tuned) for name in names]
    try:
        return soak(lineages, {"api": pid, "worker": worker, "clients": os.getpid()}, rounds)
    finally:
        for lineage in lineages:
            lineage.close()


def benchmark(rounds: int, models: int, within: Path | None) -> list[Sample]:
    """All samples. Files are removed at the end."""
    with tempfile.TemporaryDirectory(prefix="coldmerge-soak-", dir=within) as name:
        federation = Federation.make(Path(name))
        try:
            return measure(federation, rounds, models)
        finally:
            federation.close()


def print_table(samples: Sequence[Sample]) -> None:
    """One row per sample, then what grew."""
    rows: list[dict[str, Any]] = [
        {
            "rounds": found.rounds,
            "seconds": found.seconds,
            **{f"{name} MB": round(used / 1e6, 1) for name, used in found.private.items()},
            **{f"{name} files": used for name, used in found.descriptors.items()},
        }
        for found in samples
    ]
    print_rows(rows, Format.TABLE, empty="")
    first, last = samples[0], samples[-1]
    for name in first.private:
        grown = 100 * (last.private[name] / first.private[name] - 1)
        print(
            f"{name}: memory {grown:+.1f} %, descriptors {first.descriptors[name]} to "
            f"{last.descriptors[name]}, rounds {first.rounds} to {last.rounds}"
        )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run and print."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.soak", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--rounds", type=int, default=2000)
    parser.add_argument("--models", type=int, default=4, help="lineages that go on side by side")
    parser.add_argument("--format", choices=("table", "json"), default="table")
    parser.add_argument("--in", dest="within", type=Path, help="folder for temporary files")
    options = parser.parse_args(arguments)
    samples = benchmark(options.rounds, options.models, options.within)
    if options.format == "json":
        print(json.dumps([asdict(found) for found in samples], indent=2))
    else:
        print_table(samples)
    return 0


if __name__ == "__main__":
    sys.exit(main())
