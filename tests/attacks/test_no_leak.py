"""Private text appears in no byte of the coordinator's folder, logs, or traffic.

The traffic is read in clear: a recorder stands between contributor and coordinator with
certificates issued by the federation's own authority, which only this test can have.
"""

from __future__ import annotations

import asyncio
import json
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

import pytest
import yaml
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from coldmerge_coordinator.identity import Authority, private_pem
from coldmerge_coordinator.store import Store
from tests.federation import Federation, Org
from tests.support import until
from tests.tiny import write_bert, write_texts

CANARY = "apple zinc cherry copper QX7CANARYTEXT93"
MODEL = "fruit"


class Recorder:
    """A TLS relay that keeps both directions in clear."""

    def __init__(self, folder: Path, federation: Federation, org: Org) -> None:
        hub = federation.hub
        authority = Authority.open(hub.folder, "hub")
        now = datetime.now(UTC)
        key_pem, issued = authority.issue_server(["localhost"], now)
        root = str(hub.folder / "ca" / "root.pem")
        self._server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._server.load_cert_chain(*write(folder, "server", issued.chain_pem, key_pem))
        self._server.load_verify_locations(root)
        self._server.verify_mode = ssl.CERT_REQUIRED
        self._server.set_alpn_protocols(["h2"])
        self._client = ssl.create_default_context(cafile=root)
        self._client.load_cert_chain(*impersonate(folder, authority, org, now))
        self._client.set_alpn_protocols(["h2"])
        self._upstream = hub.ports[0]
        self.bytes = bytearray()
        self.port = 0
        self._ready = threading.Event()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run)

    def start(self) -> None:
        self._thread.start()
        assert self._ready.wait(10)

    def stop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        serving = asyncio.start_server(self._relay, "127.0.0.1", 0, ssl=self._server)
        server = self._loop.run_until_complete(serving)
        self.port = server.sockets[0].getsockname()[1]
        self._ready.set()
        self._loop.run_forever()
        server.close()
        for task in asyncio.all_tasks(self._loop):
            task.cancel()
        self._loop.run_until_complete(asyncio.sleep(0.1))
        self._loop.close()

    async def _relay(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        up_reader, up_writer = await asyncio.open_connection(
            "localhost", self._upstream, ssl=self._client
        )
        await asyncio.gather(self._copy(reader, up_writer), self._copy(up_reader, writer))

    async def _copy(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while data := await reader.read(65536):
                self.bytes += data
                writer.write(data)
                await writer.drain()
        except (ConnectionError, ssl.SSLError):
            return
        finally:
            writer.transport.abort()


def write(folder: Path, name: str, chain: bytes, key: bytes) -> tuple[Path, Path]:
    (folder / f"{name}.pem").write_bytes(chain)
    (folder / f"{name}.key").write_bytes(key)
    return folder / f"{name}.pem", folder / f"{name}.key"


def impersonate(folder: Path, authority: Authority, org: Org, now: datetime) -> tuple[Path, Path]:
    """A certificate for the contributor's machine, with a TLS key of the recorder's own."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "recorder")])
    csr = x509.CertificateSigningRequestBuilder().subject_name(name).sign(key, hashes.SHA256())
    identity = serialization.load_pem_private_key(
        (org.home / "keys" / "identity.key").read_bytes(), None
    ).public_key()
    issued = authority.issue_client(
        csr,
        contributor=org.name,
        machine="m1",
        identity_public_key=identity.public_bytes_raw(),  # type: ignore[union-attr]
        now=now,
    )
    return write(folder, f"client-{org.name}", issued.chain_pem, private_pem(key))


@contextmanager
def recorded(folder: Path, federation: Federation, org: Org) -> Iterator[Recorder]:
    """Send the contributor's traffic through a recorder."""
    recorder = Recorder(folder, federation, org)
    recorder.start()
    place = org.home / "federation.json"
    member = json.loads(place.read_text())
    place.write_text(json.dumps({**member, "address": f"localhost:{recorder.port}"}))
    try:
        yield recorder
    finally:
        recorder.stop()


def needles() -> list[bytes]:
    """The canary, and its words alone where they cannot come from anywhere else."""
    word = CANARY.split()[-1]
    return [form.encode() for form in (CANARY, word, word.lower())]


def test_private_text_stays_home(federation: Federation, tmp_path: Path) -> None:
    hub = federation.hub
    hub.cli("model", "add", MODEL, "--from", write_bert(tmp_path / "base"))
    hub.start()
    (org,) = federation.join(["st-mary"])
    data = write_texts(tmp_path / "private", 1, canary=CANARY)
    config = tmp_path / "train.yaml"
    config.write_text(yaml.safe_dump({"data": str(data), "lr": 1e-2, "batch_size": 8}))
    with recorded(tmp_path, federation, org) as traffic:
        process = org.spawn("contribute", MODEL, "--rounds", "1", "--config", config)
        hub.cli("round", "open", MODEL, "--min", "1")
        until(
            "the round to end", lambda: hub.rounds(MODEL)[0]["state"] in {"PUBLISHED", "REJECTED"}
        )
        org.finish(process)
    assert hub.rounds(MODEL)[0]["evaluations"] == 1
    hub.stop()

    with Store.open(hub.folder) as store:
        (stored,) = store.payloads.listed()
        shipped = store.payloads.local(stored.name).read_bytes()
    seen = bytes(traffic.bytes)
    assert shipped[-512:] in seen, "the recorder saw the task vector in clear"
    assert b'"contributor":"st-mary"' in seen, "and the manifest"
    places = {path: path.read_bytes() for path in hub.folder.rglob("*") if path.is_file()}
    places |= {hub.log: hub.log.read_bytes(), Path("traffic"): seen}
    found = [
        (str(path), needle) for path, raw in places.items() for needle in needles() if needle in raw
    ]
    assert found == []


@pytest.mark.parametrize("needle", needles())
def test_the_needles_are_in_the_private_data(needle: bytes, tmp_path: Path) -> None:
    data = write_texts(tmp_path / "private", 1, canary=CANARY)
    raw = (data / "train.jsonl").read_bytes()
    assert needle in raw or needle in raw.lower()
