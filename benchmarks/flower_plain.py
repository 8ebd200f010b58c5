"""Plain Flower on loopback: a SuperLink with TLS, and SuperNodes that prove who they are."""

from __future__ import annotations

import ipaddress
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)
from cryptography.x509.oid import NameOID

from tests.federation import environment
from tests.support import free_ports, until

APP = Path(__file__).parent / "flower_app"
NAME = "benchmark"
PATIENCE = 120.0
ROUND_PATIENCE = 1800.0
GRACE = 20.0
LIFE = timedelta(days=1)


@dataclass
class Plain:
    """A SuperLink and its SuperNodes. Leaving the context ends all of them."""

    folder: Path
    clients: int
    durable: bool = True
    processes: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def __enter__(self) -> Plain:
        self.home.mkdir(parents=True)
        _write_server_keys(self.folder)
        link, *nodes = free_ports(1 + self.clients)
        root = self.folder / "ca.pem"
        (self.home / "config.toml").write_text(
            f'[superlink]\ndefault = "{NAME}"\n\n[superlink.{NAME}]\n'
            f'address = "127.0.0.1:{link}"\nroot-certificates = "{root}"\n'
        )
        try:
            self._start_link(link)
            for number, port in enumerate(nodes):
                self._start_node(number, port, link)
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def home(self) -> Path:
        """Where Flower's commands find their configuration, and keep apps."""
        return self.folder / "home"

    @property
    def server(self) -> int:
        """The SuperLink's process: the ServerApp runs below it."""
        return self.processes[0].pid

    def rounds(self, nbytes: int, count: int) -> list[float]:
        """One run of the app: seconds of each of its rounds.

        Raises:
            SystemExit: the result is not the mean of the clients' constants.
        """
        out = self.folder / "seconds.json"
        out.unlink(missing_ok=True)
        config = f'bytes={nbytes} clients={self.clients} rounds={count} out="{out}"'
        self.cli("run", str(APP), NAME, "--stream", "--run-config", config)
        found = until("the run to end", lambda: _read(out), PATIENCE)
        expected = 1e-3 * count * (1 + self.clients) / 2
        if abs(found["moved"] - expected) > 1e-6:
            raise SystemExit(f"Flower moved the weights by {found['moved']}, not by {expected}")
        return [float(seconds) for seconds in found["seconds"]]

    def cli(self, *arguments: str) -> None:
        """A command of `flwr`, to its end."""
        command = [_program("flwr"), *arguments]
        done = subprocess.run(
            command,
            env=self._environment(),
            capture_output=True,
            text=True,
            check=False,
            timeout=ROUND_PATIENCE,
        )
        if done.returncode != 0:
            raise SystemExit(f"{' '.join(command)}\n{done.stdout}{done.stderr}")

    def close(self) -> None:
        """End everything that was started, by its handle: nodes first."""
        for process in reversed(self.processes):
            process.terminate()
            try:
                process.wait(GRACE)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self.processes.clear()

    def _environment(self) -> dict[str, str]:
        quiet = {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1"}
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
        return environment(FLWR_HOME=str(self.home), PATH=path, **quiet)

    def _spawn(self, log: str, arguments: Sequence[str | Path]) -> Path:
        path = self.folder / f"{log}.log"
        with path.open("wb") as out:
            self.processes.append(
                subprocess.Popen(
                    list(map(str, arguments)),
                    env=self._environment(),
                    stdin=subprocess.DEVNULL,
                    stdout=out,
                    stderr=out,
                    start_new_session=True,
                )
            )
        return path

    def _start_link(self, port: int) -> None:
        kept: list[str | Path] = ["--database", self.folder / "state.db"] if self.durable else []
        log = self._spawn(
            "superlink",
            [
                *(_program("flower-superlink"), "--host", "127.0.0.1", "--port", str(port)),
                *("--ssl-certfile", self.folder / "server.pem"),
                *("--ssl-keyfile", self.folder / "server.key"),
                *("--ssl-ca-certfile", self.folder / "ca.pem"),
                *("--enable-supernode-auth", "--disable-runtime-dependency-installation"),
                *kept,
            ],
        )
        self._until_said(log, "Uvicorn running")

    def _start_node(self, number: int, port: int, link: int) -> None:
        key = self.folder / f"node-{number}"
        public = _write_node_key(key)
        self.cli("supernode", "register", str(public), NAME)
        log = self._spawn(
            key.name,
            [
                *(_program("flower-supernode"), "--superlink", f"127.0.0.1:{link}"),
                *("--root-certificates", self.folder / "ca.pem"),
                *("--auth-supernode-private-key", key),
                *("--host", "127.0.0.1", "--port", str(port)),
                *("--node-config", f"partition-id={number}"),
            ],
        )
        self._until_said(log, "SuperNode ID")

    def _until_said(self, log: Path, words: str) -> None:
        process = self.processes[-1]

        def said() -> bool:
            if process.poll() is not None:
                raise SystemExit(f"A process of Flower ended:\n{log.read_text()[-4000:]}")
            return words in log.read_text(errors="replace")

        until(f"{log.name} to say {words!r}", said, PATIENCE)


def _program(name: str) -> str:
    return str(Path(sys.executable).parent / name)


def _read(path: Path) -> dict[str, Any] | None:
    try:
        found: dict[str, Any] = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return found


def _private_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def _write_server_keys(folder: Path) -> None:
    """`ca.pem`, `server.pem` and `server.key` for 127.0.0.1."""
    root_key, key = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
    issuer = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "benchmark")])
    root = _certificate(issuer, issuer, root_key)
    root = root.add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "127.0.0.1")])
    hosts = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
    leaf = _certificate(subject, issuer, key).add_extension(hosts, critical=False)
    for name, builder in (("ca.pem", root), ("server.pem", leaf)):
        signed = builder.sign(root_key, hashes.SHA256())
        (folder / name).write_bytes(signed.public_bytes(Encoding.PEM))
    (folder / "server.key").write_bytes(_private_pem(key))


def _certificate(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePrivateKey
) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - LIFE)
        .not_valid_after(now + LIFE)
    )


def _write_node_key(path: Path) -> Path:
    """A SuperNode's private key at `path`; the path of its public key."""
    key = ec.generate_private_key(ec.SECP384R1())
    path.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()))
    public = path.with_suffix(".pub")
    public.write_bytes(key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH))
    return public
