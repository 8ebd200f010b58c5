"""`serve` as a process: ready, healthy, supervised, alone in its folder, gone at SIGTERM."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from coldmerge.core.clock import SystemClock
from coldmerge.core.errors import ConfigError, ConflictError
from coldmerge.wire.calls import call, server_stream
from coldmerge.wire.channel import local_channel, secure_channel
from coldmerge.wire.v1 import admin_pb2, admin_pb2_grpc, models_pb2, models_pb2_grpc
from coldmerge_coordinator import setup
from coldmerge_coordinator.identity import Authority
from coldmerge_coordinator.servers import ServerCertificate
from tests.harness import MODEL, Live, ShiftedClock, make_coordinator
from tests.support import until

SERVE = (
    "import sys; from pathlib import Path; from coldmerge_coordinator.serve import serve;"
    "serve(Path(sys.argv[1]))"
)


@contextmanager
def _serving(folder: Path, code: str = SERVE) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, "-W", "error", "-c", code, str(folder)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        until("run.json", lambda: (folder / "run.json").exists() or process.poll() is not None)
        yield process
    finally:
        process.kill()
        process.communicate()


def _run(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "run.json").read_text())
    return found


def _children(pid: int) -> list[int]:
    text = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    return [int(child) for child in text.split()]


def test_ready_then_clean_at_sigterm(tmp_path: Path) -> None:
    folder = make_coordinator(tmp_path / "hub")
    with _serving(folder) as process:
        state = _run(folder)
        assert state["pid"] == process.pid
        until("one worker", lambda: len(_children(process.pid)) == 1)
        with local_channel(Path(state["socket"])) as channel:
            models = models_pb2_grpc.ModelsStub(channel)  # type: ignore[no-untyped-call]
            found = call(models.ListModels, models_pb2.ListModelsRequest())
            assert [model.name for model in found.models] == [MODEL]
            request = models_pb2.WatchReleasesRequest(model=MODEL, after_number=-1)
            stream = server_stream(models.WatchReleases, request)
            next(stream)
            (worker,) = _children(process.pid)
            started = time.monotonic()
            process.send_signal(signal.SIGTERM)
            out, err = process.communicate(timeout=10)
            assert time.monotonic() - started < 10
            stream.close()
    assert process.returncode == 0, err
    assert out.count("\n") == 1
    assert state["api"] in out
    events = [json.loads(line) for line in err.splitlines()]
    assert {event["level"] for event in events} <= {"info"}, err
    assert not (folder / "run.json").exists()
    assert not (folder / "admin.sock").exists()
    assert not Path(f"/proc/{worker}").exists()


def test_health_on_both_ports(tmp_path: Path) -> None:
    folder = make_coordinator(tmp_path / "hub")
    with _serving(folder):
        root = (folder / "ca" / "root.pem").read_bytes()
        with secure_channel(_run(folder)["enrol"], root) as channel:
            health = health_pb2_grpc.HealthStub(channel)
            answer = health.Check(health_pb2.HealthCheckRequest(), timeout=10)
            assert answer.status == health_pb2.HealthCheckResponse.SERVING
        with secure_channel(_run(folder)["api"], root) as channel:
            health = health_pb2_grpc.HealthStub(channel)
            with pytest.raises(grpc.RpcError):
                health.Check(health_pb2.HealthCheckRequest(), timeout=10)


def test_health_with_a_certificate(live: Live) -> None:
    health = health_pb2_grpc.HealthStub(live.machine("a").channel)
    answer = health.Check(health_pb2.HealthCheckRequest(), timeout=10)
    assert answer.status == health_pb2.HealthCheckResponse.SERVING


def test_a_second_serve_is_refused_and_the_first_goes_on(tmp_path: Path) -> None:
    folder = make_coordinator(tmp_path / "hub")
    with _serving(folder):
        second = subprocess.run(
            [sys.executable, "-c", SERVE, str(folder)], capture_output=True, text=True, timeout=60
        )
        assert second.returncode != 0
        assert "serve.already_running" in second.stderr
        with local_channel(folder / "admin.sock") as channel:
            admin = admin_pb2_grpc.AdminStub(channel)  # type: ignore[no-untyped-call]
            call(admin.ListContributors, admin_pb2.ListContributorsRequest())


def test_a_killed_worker_comes_back_and_a_killed_coordinator_leaves_none(tmp_path: Path) -> None:
    folder = make_coordinator(tmp_path / "hub")
    with _serving(folder) as process:
        until("one worker", lambda: len(_children(process.pid)) == 1)
        (first,) = _children(process.pid)
        os.kill(first, signal.SIGKILL)
        until("another worker", lambda: _children(process.pid) not in ([], [first]))
        (second,) = _children(process.pid)
        process.kill()
        process.wait()
        until("the worker to end", lambda: not Path(f"/proc/{second}").exists())
    (folder / "run.json").unlink()
    with _serving(folder) as again:
        assert _run(folder)["pid"] == again.pid


def test_a_taken_port_is_said_so(tmp_path: Path, live: Live) -> None:
    port = live.servers.addresses.api.rsplit(":", 1)[1]
    folder = tmp_path / "other"
    setup.init(folder, listen=f"127.0.0.1:{port}", enrol_listen="127.0.0.1:0")
    run = subprocess.run(
        [sys.executable, "-c", SERVE, str(folder)], capture_output=True, text=True, timeout=60
    )
    assert run.returncode != 0
    assert "serve.cannot_listen" in run.stderr


def test_a_path_too_long_for_a_socket_is_said_so(tmp_path: Path) -> None:
    folder = tmp_path / ("long-" * 20)
    setup.init(folder, federation="test", listen="127.0.0.1:0", enrol_listen="127.0.0.1:0")
    run = subprocess.run(
        [sys.executable, "-c", SERVE, str(folder)], capture_output=True, text=True, timeout=60
    )
    assert "serve.path_too_long" in run.stderr


def test_the_server_certificate_renews_itself(tmp_path: Path) -> None:
    folder = tmp_path / "hub"
    setup.init(folder, federation="test")
    clock = ShiftedClock()
    certificate = ServerCertificate(Authority.open(folder, "test"), ("localhost",), clock)
    assert certificate.fetch() is None
    clock.offset = timedelta(hours=15)
    assert certificate.fetch() is None
    clock.offset = timedelta(hours=17)
    assert certificate.fetch() is not None
    assert certificate.fetch() is None


def test_init_makes_private_keys_private(tmp_path: Path) -> None:
    made = setup.init(tmp_path / "St. Mary hub", clock=SystemClock())
    assert made.federation == "St.-Mary-hub"
    assert len(made.fingerprint) == 64
    for path in (tmp_path / "St. Mary hub").rglob("*.key"):
        assert path.stat().st_mode & 0o777 == 0o600
        assert path.parent.stat().st_mode & 0o777 == 0o700
    assert made.offline_key.is_file()


def test_init_refuses_what_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(ConflictError):
        setup.init(tmp_path / "full")
    with pytest.raises(ConfigError):
        setup.init(tmp_path / "a", federation="no spaces")
    with pytest.raises(ConfigError):
        setup.init(tmp_path / "b", listen="nowhere")
    assert not (tmp_path / "a").exists()


def test_a_worker_that_cannot_be_started_is_tried_again(tmp_path: Path) -> None:
    folder, python = make_coordinator(tmp_path / "hub"), tmp_path / "python"
    code = f"import sys; sys.executable = {str(python)!r}; {SERVE}"
    with _serving(folder, code) as process:
        assert process.poll() is None
        python.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
        python.chmod(0o755)
        until("a worker", lambda: _children(process.pid), 30)
