"""An honest upload beside 500 idle connections and a contributor that uses all of its quotas.

`python -m benchmarks.load --bytes 256000000 --idle 500 --repeats 5 --format json`

The honest contributor uploads the same number of bytes alone and beside the others, in
turns. The others: connections that never speak and connections that only shake hands, half
and half; uploads that trickle, as many as one contributor may have open; readers that take
nothing; and manifests that are refused, twenty a second.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from benchmarks import hostile, synthetic
from benchmarks.memory import Sampler
from coldmerge.cli.output import Format, print_rows
from coldmerge.wire.channel import secure_channel
from coldmerge_client.home import Home
from coldmerge_client.prepare import Facts, prepare
from coldmerge_client.push import send
from coldmerge_client.session import Session
from tests.federation import Federation, Org, environment

MODEL = "large"
PING_EVERY = 0.02


@dataclass(frozen=True)
class Run:
    """One upload: with or without the others, how fast, and how health answered meanwhile."""

    beside: bool
    seconds: float
    health_p99_ms: float


@dataclass(frozen=True)
class Figures:
    """All that was measured; `speed_kept` is the median of the paired ratios."""

    bytes: int
    idle: int
    runs: list[Run]
    speed_kept: float
    health_p99_ms: float
    coordinator_peak_bytes: int


class Pinger:
    """Asks for health again and again, on a connection of its own."""

    def __init__(self, home: Home) -> None:
        self._channel = connect(home)
        self._times: list[float] = []
        self._failed: grpc.RpcError | None = None
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        stub = health_pb2_grpc.HealthStub(self._channel)
        while not self._end.wait(PING_EVERY):
            started = time.monotonic()
            try:
                stub.Check(health_pb2.HealthCheckRequest(), timeout=30)
            except grpc.RpcError as error:
                self._failed = error
                return
            self._times.append(time.monotonic() - started)

    def take(self) -> float:
        """The 99th percentile since the last call, in milliseconds.

        Raises:
            SystemExit: an answer did not come.
        """
        if self._failed is not None:
            raise SystemExit(f"no answer about health: {self._failed}")
        times, self._times = self._times, []
        return 1000 * statistics.quantiles(times, n=100)[98] if len(times) > 1 else 0.0

    def close(self) -> None:
        """Stop asking."""
        self._end.set()
        self._thread.join()
        self._channel.close()


def connect(home: Home) -> grpc.Channel:
    """An mTLS channel with a home's certificate."""
    return secure_channel(
        home.membership().address,
        home.root(),
        home.certificate.read_bytes(),
        home.tls_key.read_bytes(),
    )


def uploader(home: Path, tuned: Path, round_id: str) -> None:
    """A process of its own: prepares, says so, waits for a line, sends, says how long it took."""
    with Session.open(Home(home)) as session:
        entry = prepare(session, session.round(round_id), tuned, Facts(examples=10))
        print("ready", flush=True)
        sys.stdin.readline()
        started = time.monotonic()
        send(session, entry)
        print(time.monotonic() - started, flush=True)


def upload(org: Org, tuned: Path, round_id: str, pinger: Pinger) -> tuple[float, float]:
    """Seconds of one upload, and the 99th percentile of health meanwhile."""
    command = [sys.executable, "-m", "benchmarks.load", "--uploader"]
    with subprocess.Popen(
        [*command, str(org.home), str(tuned), round_id],
        env=environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        if process.stdin is None or process.stdout is None or not process.stdout.readline():
            raise SystemExit("the uploader ended")
        pinger.take()
        process.stdin.write("go\n")
        process.stdin.flush()
        seconds = float(process.stdout.readline())
        return seconds, pinger.take()


@contextmanager
def crowd(home: Path, round_id: str, idle: int) -> Iterator[None]:
    """The others, in a process of their own, once all of them are there."""
    command = [sys.executable, "-m", "benchmarks.hostile", str(home), round_id, str(idle)]
    with subprocess.Popen(
        command, env=environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        if process.stdout is None or process.stdout.readline().strip() != hostile.READY:
            raise SystemExit("the others ended")
        try:
            yield
        finally:
            process.communicate("end\n", timeout=60)


def measure(federation: Federation, nbytes: int, idle: int, repeats: int) -> Figures:
    """Set the scene; then alone and beside the others, in turns."""
    folder, hub = federation.folder, federation.hub
    base = synthetic.write(folder / "base", nbytes)
    tuned = synthetic.write(folder / "tuned", nbytes, 1)
    hub.cli("model", "add", MODEL, "--from", base)
    hub.start()
    honest, *others = federation.join(["honest", *(f"other-{n}" for n in range(repeats))])
    honest.cli("pull", MODEL)
    round_id = hub.cli("round", "open", MODEL, "--min", "2")["round"]
    if hub.process is None:
        raise SystemExit("the coordinator is not running")
    runs: list[Run] = []
    pinger = Pinger(Home(honest.home))
    with Sampler() as sampler:
        sampler.watch("coordinator", hub.process.pid)
        upload(honest, tuned, round_id, pinger)  # the first one warms up
        for other in others:  # another one each time: uploads stay open until their round ends
            runs.append(Run(False, *upload(honest, tuned, round_id, pinger)))
            with crowd(other.home, round_id, idle):
                runs.append(Run(True, *upload(honest, tuned, round_id, pinger)))
        peak = sampler.take()["coordinator"]
    pinger.close()
    pairs = zip(runs[::2], runs[1::2], strict=True)
    return Figures(
        bytes=nbytes,
        idle=idle,
        runs=runs,
        speed_kept=statistics.median(alone.seconds / beside.seconds for alone, beside in pairs),
        health_p99_ms=statistics.median(run.health_p99_ms for run in runs if run.beside),
        coordinator_peak_bytes=peak,
    )


def benchmark(nbytes: int, idle: int, repeats: int, within: Path | None) -> Figures:
    """All figures. Files are removed at the end."""
    with tempfile.TemporaryDirectory(prefix="coldmerge-load-", dir=within) as name:
        federation = Federation.make(Path(name))
        try:
            return measure(federation, nbytes, idle, repeats)
        finally:
            federation.close()


def print_table(figures: Figures) -> None:
    """One row per upload, then the promises."""
    rows: list[dict[str, Any]] = [
        {
            "upload": "beside the others" if run.beside else "alone",
            "seconds": round(run.seconds, 2),
            "health p99 ms": round(run.health_p99_ms, 1),
        }
        for run in figures.runs
    ]
    print_rows(rows, Format.TABLE, empty="")
    print(
        f"{figures.bytes} bytes beside {figures.idle} idle connections: "
        f"{100 * figures.speed_kept:.0f} % of the speed kept (median of paired runs), "
        f"health p99 {figures.health_p99_ms:.0f} ms, "
        f"coordinator at most {figures.coordinator_peak_bytes / 1e6:.0f} MB private"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run and print."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.load", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--bytes", type=int, default=256_000_000, help="size of the upload")
    parser.add_argument("--idle", type=int, default=500, help="idle connections")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--format", choices=("table", "json"), default="table")
    parser.add_argument("--in", dest="within", type=Path, help="folder for temporary files")
    parser.add_argument("--uploader", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.uploader:
        home, tuned, round_id = options.uploader
        uploader(Path(home), Path(tuned), round_id)
        return 0
    figures = benchmark(options.bytes, options.idle, options.repeats, options.within)
    if options.format == "json":
        print(json.dumps(asdict(figures), indent=2))
    else:
        print_table(figures)
    return 0


if __name__ == "__main__":
    sys.exit(main())
