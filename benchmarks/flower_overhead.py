"""What a round costs beside plain Flower: the same bytes, the same number of clients.

`python -m benchmarks.flower_overhead --bytes 100000000 --clients 4 --repeats 5 --format json`

Flower: a SuperLink with TLS, SuperNodes with keys of their own, a FedAvg app. coldmerge: a
coordinator and contributors with mutual TLS, `mean`, no gate. The clients of both return the
model plus a constant. Rounds alternate; both federations stand all the time. A round of Flower
is the second of a run, so that its app is installed and warm, from `configure_train` to the
end of `aggregate_train`. A round of coldmerge is from the call that opens it until the release is
published and every contributor has pulled it: the model travels to the clients in both.
Memory is private memory, the sum over a server and all that it starts, at its peak.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks import synthetic
from benchmarks.flower_plain import Plain
from benchmarks.memory import Sampler
from coldmerge.cli.output import Format, print_rows
from coldmerge.wire.calls import call, server_stream
from coldmerge.wire.channel import local_channel
from coldmerge.wire.v1 import (
    admin_pb2,
    admin_pb2_grpc,
    common_pb2,
    models_pb2,
    models_pb2_grpc,
    rounds_pb2,
    rounds_pb2_grpc,
)
from tests.federation import Federation, environment

MODEL = "large"
FLOWER, OURS = "flower", "coldmerge"
PATIENCE = 1800.0
SAMPLE_SECONDS = 0.25
_ENDED = frozenset(
    {common_pb2.Round.PUBLISHED, common_pb2.Round.REJECTED, common_pb2.Round.ABANDONED}
)


@dataclass(frozen=True)
class Run:
    """One round. `published`: seconds until the new model is there, `seconds`: everywhere."""

    system: str
    seconds: float
    published: float
    server_bytes: int


@dataclass(frozen=True)
class Figures:
    """All that was measured, and medians over pairs of rounds, one of each after the other.

    `faster`: Flower's seconds over ours, `faster_published`: over ours until the release is
    published; `memory`: our peak over Flower's.
    """

    bytes: int
    clients: int
    durable: bool
    runs: list[Run]
    medians: dict[str, dict[str, float]]
    faster: float
    faster_published: float
    memory: float


@dataclass
class Ours:
    """A coordinator and its contributors. Leaving the context ends all of them."""

    folder: Path
    clients: int
    nbytes: int
    members: list[subprocess.Popen[str]] = field(default_factory=list)

    def __enter__(self) -> Ours:
        self.folder.mkdir()
        self.federation = Federation.make(self.folder)
        try:
            self._start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for member in self.members:
            member.kill()
            member.wait()
            if member.stdout is not None:
                member.stdout.close()
        self.federation.close()

    def _start(self) -> None:
        hub = self.federation.hub
        base = synthetic.write(self.folder / "base", self.nbytes)
        rules = self.folder / "rules.yaml"
        rules.write_text(f"min_contributions: {self.clients}\ngate: null\n")
        hub.cli("model", "add", MODEL, "--from", base, "--template", rules)
        hub.start()
        orgs = self.federation.join([f"org-{number + 1}" for number in range(self.clients)])
        for number, org in enumerate(orgs):
            words = (org.home, MODEL, 1e-3 * (1 + number), self.folder)
            with org.log.open("ab") as log:
                self.members.append(
                    subprocess.Popen(
                        [sys.executable, "-m", "benchmarks.flower_member", *map(str, words)],
                        env=environment(),
                        stdout=subprocess.PIPE,
                        stderr=log,
                        text=True,
                    )
                )
        self.channel = local_channel(hub.folder / "admin.sock")

    @property
    def server(self) -> int:
        """The coordinator's process: its worker runs below it."""
        process = self.federation.hub.process
        if process is None:
            raise SystemExit("the coordinator is not running")
        return process.pid

    def round(self) -> tuple[float, float]:
        """Seconds until the release is published, and until every contributor has it.

        Raises:
            SystemExit: the round ended otherwise, or a contributor ended.
        """
        admin = admin_pb2_grpc.AdminStub(self.channel)  # type: ignore[no-untyped-call]
        rounds = rounds_pb2_grpc.RoundsStub(self.channel)  # type: ignore[no-untyped-call]
        started = time.monotonic()
        opened = call(admin.OpenRound, admin_pb2.OpenRoundRequest(model=MODEL)).id

        watch = server_stream(
            rounds.Watch, rounds_pb2.WatchRoundsRequest(model=MODEL), deadline=PATIENCE
        )
        with closing(watch):  # asking again and again would itself cost the coordinator time
            found = next(seen for seen in watch if seen.id == opened and seen.state in _ENDED)
        published = time.monotonic() - started
        if found.state != common_pb2.Round.PUBLISHED:
            raise SystemExit(f"the round was not published: {found.reason}")
        for member in self.members:
            if member.stdout is None or member.stdout.readline().strip() != opened:
                raise SystemExit("a contributor ended; see its log")
        return published, time.monotonic() - started

    def check(self, rounds: int) -> None:
        """The release is the first one plus the mean of the constants, `rounds` times.

        Raises:
            SystemExit: it is not.
        """
        models = models_pb2_grpc.ModelsStub(self.channel)  # type: ignore[no-untyped-call]
        latest = call(models.GetRelease, models_pb2.GetReleaseRequest(model=MODEL, latest=True))
        if latest.number != rounds:
            raise SystemExit(f"release {latest.number}, not {rounds}")


def measure(folder: Path, nbytes: int, clients: int, repeats: int, *, durable: bool) -> list[Run]:
    """Warm both up, then take turns."""
    runs: list[Run] = []
    with (
        Plain(folder / "flower", clients, durable) as plain,
        Ours(folder / "ours", clients, nbytes) as ours,
    ):
        plain.rounds(nbytes, 1)
        ours.round()
        for _ in range(repeats):
            with _turn(FLOWER, plain.server) as sampler:
                seconds = plain.rounds(nbytes, 2)[-1]
                runs.append(Run(FLOWER, seconds, seconds, sampler.take()[FLOWER]))
            with _turn(OURS, ours.server) as sampler:
                published, everywhere = ours.round()
                runs.append(Run(OURS, everywhere, published, sampler.take()[OURS]))
        ours.check(repeats + 1)
    return runs


@contextmanager
def _turn(system: str, server: int) -> Iterator[Sampler]:
    """One system's turn: what the other one wrote is on the disk, and its memory is left alone."""
    os.sync()
    with Sampler(SAMPLE_SECONDS) as sampler:
        sampler.watch_tree(system, server)
        yield sampler


def figures_of(runs: list[Run], nbytes: int, clients: int, *, durable: bool) -> Figures:
    """Medians, and those of the ratios of each pair."""
    pairs = list(zip(runs[::2], runs[1::2], strict=True))
    medians = {
        system: {
            key: statistics.median(getattr(run, key) for run in runs if run.system == system)
            for key in ("seconds", "published", "server_bytes")
        }
        for system in (FLOWER, OURS)
    }
    return Figures(
        bytes=nbytes,
        clients=clients,
        durable=durable,
        runs=runs,
        medians=medians,
        faster=statistics.median(theirs.seconds / our.seconds for theirs, our in pairs),
        faster_published=statistics.median(theirs.seconds / our.published for theirs, our in pairs),
        memory=statistics.median(our.server_bytes / theirs.server_bytes for theirs, our in pairs),
    )


def benchmark(
    nbytes: int, clients: int, repeats: int, within: Path | None, *, durable: bool = True
) -> Figures:
    """All figures. Files are removed at the end."""
    with tempfile.TemporaryDirectory(prefix="coldmerge-flower-", dir=within) as name:
        runs = measure(Path(name), nbytes, clients, repeats, durable=durable)
    return figures_of(runs, nbytes, clients, durable=durable)


def print_table(figures: Figures) -> None:
    """One row per round, then the medians."""
    rows: list[dict[str, Any]] = [
        {
            "round of": run.system,
            "seconds": round(run.seconds, 2),
            "of them until published": round(run.published, 2),
            "server MB": round(run.server_bytes / 1e6),
        }
        for run in figures.runs
    ]
    print_rows(rows, Format.TABLE, empty="")
    flower, ours = figures.medians[FLOWER], figures.medians[OURS]
    print(
        f"{figures.bytes} bytes x {figures.clients} clients, medians: Flower "
        f"{flower['seconds']:.1f} s and {flower['server_bytes'] / 1e6:.0f} MB, coldmerge "
        f"{ours['seconds']:.1f} s and {ours['server_bytes'] / 1e6:.0f} MB; of each pair: "
        f"{figures.faster:.1f} times as fast, {figures.faster_published:.1f} times until "
        f"published, with {100 * figures.memory:.0f} % of the memory"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run and print."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.flower_overhead", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--bytes", type=int, default=100_000_000, help="size of the model")
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--in-memory", action="store_true", help="a SuperLink whose state does not survive"
    )
    parser.add_argument("--format", choices=("table", "json"), default="table")
    parser.add_argument("--in", dest="within", type=Path, help="folder for temporary files")
    options = parser.parse_args(arguments)
    figures = benchmark(
        options.bytes,
        options.clients,
        options.repeats,
        options.within,
        durable=not options.in_memory,
    )
    if options.format == "json":
        print(json.dumps(asdict(figures), indent=2))
    else:
        print_table(figures)
    return 0


if __name__ == "__main__":
    sys.exit(main())
