"""One large upload over a link that is cut again and again: what has to be sent twice.

`python -m benchmarks.cuts --bytes 2000000000 --cuts 100`

A relay on loopback stands between `coldmerge push` and the coordinator and counts every byte,
TLS and all. It cuts the link each time another share of the payload has gone up; the client
comes back by itself. What was sent beyond the payload is divided by cut: from the bytes that had
gone up at a cut to those that the coordinator had made durable when it was asked again.
"""

from __future__ import annotations

import argparse
import json
import sqlite3
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks import synthetic
from benchmarks.memory import Sampler
from coldmerge_client.home import Home
from tests.client.conftest import Relay, through
from tests.federation import Federation, Hub, Org

MODEL = "large"
MB = 10**6
ALLOWED = 64 * 2**20
SETTLED = 2**18
"""Bytes on a new connection after which the client has been told where to go on."""


@dataclass(frozen=True)
class Figures:
    """All bytes are counted on the line; memory is private, at its peak."""

    payload: int
    cuts: int
    sent: int
    again: int
    worst: int
    seconds: float
    peak: dict[str, int]

    def line(self) -> str:
        """One line for a person."""
        peaks = ", ".join(f"{name} {used / MB:.0f} MB" for name, used in self.peak.items())
        return (
            f"{self.payload} bytes through {self.cuts} cuts: {self.sent} sent, "
            f"{self.again / MB:.1f} MB beyond the payload ({self.again / self.payload:.1%}), "
            f"at most {self.worst / MB:.2f} MB per cut (allowed {ALLOWED / MB:.1f}); "
            f"{self.seconds:.0f} s; peak memory: {peaks}"
        )


class Cutter:
    """Cuts a relay's line at equal shares of a payload, on a thread, and keeps account."""

    def __init__(self, folder: Path, relay: Relay, payload: int, cuts: int) -> None:
        self._database, self._relay = folder / "coldmerge.db", relay
        self._every, self._cuts = payload // (cuts + 1), cuts
        self.waste: list[int] = []
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Cutter:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()

    def _run(self) -> None:
        while len(self.waste) < self._cuts and self._wait(self._durable() + self._sent_twice()):
            up, connections = self._relay.up, self._relay.connections
            self._relay.cut()
            while not self._end.wait(0.002) and self._relay.connections == connections:
                pass
            arrived = self._relay.up
            while not self._end.wait(0.002) and self._relay.up < arrived + SETTLED:
                pass
            self.waste.append(up - self._sent_twice() - self._durable())

    def _sent_twice(self) -> int:
        return sum(self.waste)

    def _wait(self, start: int) -> bool:
        """Until another share has gone up; False at the end of the upload."""
        while self._relay.up < start + self._every:
            if self._end.wait(0.001):
                return False
        return True

    def _durable(self) -> int:
        with closing(sqlite3.connect(self._database)) as database:
            row = database.execute("SELECT committed_size FROM upload").fetchone()
        return int(row[0]) if row else 0


def measure(hub: Hub, org: Org, relay: Relay, push: Sequence[str | Path], cuts: int) -> Figures:
    """Push once over the relay, cut so many times. The payload is what the receipt says."""
    payload = payload_of(push)
    started = time.monotonic()
    with Sampler() as sampler, Cutter(hub.folder, relay, payload, cuts) as cutter:
        if hub.process is not None:
            sampler.watch("coordinator", hub.process.pid)
        process = org.spawn(*push)
        sampler.watch("client", process.pid)
        org.finish(process, patience=3600)
        seconds, peak = time.monotonic() - started, sampler.take()
    again = relay.up - payload
    worst = max(cutter.waste, default=0)
    return Figures(payload, len(cutter.waste), relay.up, again, worst, round(seconds, 1), peak)


def payload_of(push: Sequence[str | Path]) -> int:
    """Bytes of the fine-tune that a push command names: every value of it has moved."""
    from coldmerge.core.checkpoint import Checkpoint

    folder = Path(push[push.index("--from") + 1])
    return sum(spec.nbytes for spec in Checkpoint.open(folder).tensors.values())


def benchmark(nbytes: int, cuts: int, within: Path | None) -> Figures:
    """All of one run. Files are removed at the end."""
    with tempfile.TemporaryDirectory(prefix="coldmerge-cuts-", dir=within) as name:
        federation = Federation.make(Path(name))
        hub = federation.hub
        try:
            base = synthetic.write(Path(name) / "base", nbytes)
            hub.cli("model", "add", MODEL, "--from", base)
            hub.start()
            (org,) = federation.join(["org-1"])
            rules = Path(name) / "rules.yaml"
            rules.write_text("min_contributions: 3\ngate: null\n")
            hub.cli("round", "open", MODEL, "--policy", rules)
            org.cli("pull", MODEL)
            tuned = synthetic.write(Path(name) / "tuned", nbytes, seed=1)
            with closing(Relay(Home(org.home).membership().address)) as relay:
                through(Home(org.home), relay)
                push = ("push", MODEL, "--from", tuned, "--base", "0", "--examples", "10")
                return measure(hub, org, relay, push, cuts)
        finally:
            federation.close()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run and print; 1 if more was sent again than allowed."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.cuts", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--bytes", type=int, default=200 * MB, help="size of the payload")
    parser.add_argument("--cuts", type=int, default=10)
    parser.add_argument("--format", choices=("text", "json"), default="text")
    parser.add_argument("--in", dest="within", type=Path, help="folder for temporary files")
    options = parser.parse_args(arguments)
    figures = benchmark(options.bytes, options.cuts, options.within)
    if options.format == "json":
        print(json.dumps(asdict(figures), indent=2))
    else:
        print(figures.line())
    return int(figures.worst > ALLOWED or figures.cuts < options.cuts)


if __name__ == "__main__":
    sys.exit(main())
