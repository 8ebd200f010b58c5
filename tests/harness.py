"""A real coordinator on loopback, inside the test's process, and machines that call it."""

from __future__ import annotations

import asyncio
import hashlib
import secrets
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
)

from coldmerge.core.documents import Manifest, Signed, TensorEntry, sign
from coldmerge.core.dtypes import NUMPY, as_bytes
from coldmerge.rounds.policy import RoundPolicy
from coldmerge.wire.calls import call, client_stream, server_stream
from coldmerge.wire.channel import local_channel, secure_channel
from coldmerge.wire.convert import signed_to_proto
from coldmerge.wire.proofs import enrol_message
from coldmerge.wire.v1 import (
    admin_pb2_grpc,
    audit_pb2_grpc,
    common_pb2,
    contributions_pb2,
    contributions_pb2_grpc,
    enrolment_pb2,
    enrolment_pb2_grpc,
    models_pb2_grpc,
    rounds_pb2_grpc,
    screening_pb2_grpc,
)
from coldmerge_coordinator import config as settings
from coldmerge_coordinator import setup
from coldmerge_coordinator.config import Limits
from coldmerge_coordinator.identity import Authority
from coldmerge_coordinator.importing import add_model
from coldmerge_coordinator.servers import Servers
from coldmerge_coordinator.service import admin
from coldmerge_coordinator.store import Store
from coldmerge_coordinator.store.models import Round, Upload
from tests.backends import coordinator_config
from tests.support import DTYPES, write_model

Array = npt.NDArray[np.generic]
MODEL = "triage"
BF16 = NUMPY["BF16"]


def model_tensors() -> dict[str, Array]:
    """A model with everything that admission looks at: floats, a buffer, a private head."""
    generator = np.random.default_rng(7)
    draw = generator.standard_normal
    return {
        "classifier.weight": draw((2, 4)).astype(np.float32),
        "embeddings.weight": draw((16, 4)).astype(np.float32),
        "layer.bias": draw(4).astype(np.float32),
        "layer.weight": draw((4, 4)).astype(np.float32),
        "norm.weight": draw(4).astype(BF16),
        "position_ids": np.arange(16, dtype=np.int64),
    }


class ShiftedClock:
    """The machine's clock, plus what a test adds."""

    def __init__(self) -> None:
        self.offset = timedelta(0)

    def now(self) -> datetime:
        return datetime.now(UTC) + self.offset


class Live:
    """A coordinator's three listeners on an event loop of their own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.clock = ShiftedClock()
        self.store = Store.open(folder)
        self.authority = Authority.open(folder, self.store.federation)
        self._channels: list[Any] = []
        self.start()

    def start(self) -> None:
        self.servers = Servers(self.store, self.clock)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._thread.start()
        self.run(self.servers.start())

    def run(self, coroutine: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(30)

    def stop(self) -> None:
        for channel in self._channels:
            channel.close()
        self._channels.clear()
        vars(self).pop("enrolment", None)
        self.run(self.servers.stop(grace=0.5))
        self.run(self._loop.shutdown_asyncgens())
        self.run(self._loop.shutdown_default_executor())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()

    def close(self) -> None:
        self.stop()
        self.store.close()

    def keep(self, channel: Any) -> Any:
        self._channels.append(channel)
        return channel

    def drop_uploads(self) -> None:
        """Forget all open uploads."""
        with self.store.database.read() as session:
            found = [row.id for row in session.query(Upload)]
        for identifier in found:
            self.servers._intake._drop(identifier)

    @cached_property
    def enrolment(self) -> Any:
        channel = self.keep(secure_channel(self.servers.addresses.enrol, self.authority.root_pem))
        return enrolment_pb2_grpc.EnrolmentStub(channel)  # type: ignore[no-untyped-call]

    @property
    def local_admin(self) -> Any:
        channel = self.keep(local_channel(self.servers.socket))
        return admin_pb2_grpc.AdminStub(channel)  # type: ignore[no-untyped-call]

    def token(
        self, contributor: str, role: str = "contributor", ttl: timedelta = timedelta(hours=1)
    ) -> str:
        return admin.invite(self.store, contributor, role, ttl, self.clock.now()).token

    def machine(
        self, contributor: str, role: str = "contributor", name: str = "box"
    ) -> MachineClient:
        """Invite, enrol over the wire, and connect."""
        keys = Keys.make()
        request = keys.enrol_request(self.token(contributor, role), name)
        answer = call(self.enrolment.Enrol, request)
        return MachineClient(self, contributor, name, keys, answer.certificate_chain_pem)

    def open_round(self, **policy: object) -> Round:
        values = {"min_contributions": 2, "gate": None, **policy}
        chosen = RoundPolicy.model_validate(values)
        return admin.open_round(self.store, MODEL, chosen.model_dump_json(), self.clock.now())


@dataclass(frozen=True)
class Keys:
    """The two keys of a machine."""

    tls: ec.EllipticCurvePrivateKey
    identity: Ed25519PrivateKey

    @classmethod
    def make(cls) -> Keys:
        return cls(ec.generate_private_key(ec.SECP256R1()), Ed25519PrivateKey.generate())

    @property
    def tls_pem(self) -> bytes:
        return self.tls.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())

    @property
    def public(self) -> bytes:
        return self.identity.public_key().public_bytes_raw()

    def csr(self) -> x509.CertificateSigningRequest:
        subject = x509.Name([])
        return x509.CertificateSigningRequestBuilder(subject).sign(self.tls, hashes.SHA256())

    def enrol_request(self, token: str, machine: str = "box") -> enrolment_pb2.EnrolRequest:
        csr = self.csr().public_bytes(Encoding.DER)
        return enrolment_pb2.EnrolRequest(
            token=token,
            machine=machine,
            csr_der=csr,
            identity_public_key=self.public,
            proof=self.identity.sign(enrol_message(token, csr)),
        )


class MachineClient:
    """An enrolled machine with stubs for every service."""

    def __init__(
        self, live: Live, contributor: str, name: str, keys: Keys, chain_pem: bytes
    ) -> None:
        self.live, self.contributor, self.name, self.keys = live, contributor, name, keys
        self.chain_pem = chain_pem
        self.connect()

    def connect(self) -> None:
        self.channel = self.live.keep(
            secure_channel(
                self.live.servers.addresses.api,
                self.live.authority.root_pem,
                self.chain_pem,
                self.keys.tls_pem,
            )
        )
        self.models: Any = models_pb2_grpc.ModelsStub(self.channel)  # type: ignore[no-untyped-call]
        self.rounds: Any = rounds_pb2_grpc.RoundsStub(self.channel)  # type: ignore[no-untyped-call]
        self.admin: Any = admin_pb2_grpc.AdminStub(self.channel)  # type: ignore[no-untyped-call]
        self.audit: Any = audit_pb2_grpc.AuditStub(self.channel)  # type: ignore[no-untyped-call]
        self.screening: Any = screening_pb2_grpc.ScreeningStub(self.channel)  # type: ignore[no-untyped-call]
        self.contributions: Any = contributions_pb2_grpc.ContributionsStub(  # type: ignore[no-untyped-call]
            self.channel
        )

    def manifest(
        self, round_: Round, deltas: Mapping[str, Array], **changes: Any
    ) -> tuple[Manifest, bytes]:
        """A manifest over `deltas` and the payload that goes with it."""
        whose = {"federation": self.live.store.federation, "contributor": self.contributor}
        return make_manifest(round_, deltas, self.live.clock.now(), **{**whose, **changes})

    def sign(self, manifest: Manifest) -> Signed:
        return sign(manifest, self.keys.identity)

    def begin(self, manifest: Manifest | Signed) -> contributions_pb2.BeginResponse:
        signed = self.sign(manifest) if isinstance(manifest, Manifest) else manifest
        request = contributions_pb2.BeginRequest(manifest=signed_to_proto(signed))
        answer: contributions_pb2.BeginResponse = call(
            self.contributions.Begin, request, patience=0
        )
        return answer

    def write(self, upload_id: str, payload: bytes, offset: int = 0, step: int = 2**20) -> int:
        def requests() -> Iterator[contributions_pb2.WriteRequest]:
            for start in range(0, len(payload), step):
                yield chunk(upload_id, offset + start, payload[start : start + step])

        return self.stream(requests())

    def stream(self, requests: Iterable[contributions_pb2.WriteRequest]) -> int:
        answer = client_stream(self.contributions.Write, requests, deadline=60)
        return int(answer.committed_size)

    def status(self, upload_id: str) -> contributions_pb2.WriteStatus:
        request = contributions_pb2.QueryWriteStatusRequest(upload_id=upload_id)
        answer: contributions_pb2.WriteStatus = call(self.contributions.QueryWriteStatus, request)
        return answer

    def commit(self, upload_id: str) -> common_pb2.SignedDocument:
        request = contributions_pb2.CommitRequest(upload_id=upload_id)
        answer = call(self.contributions.Commit, request, patience=0)
        receipt: common_pb2.SignedDocument = answer.receipt
        return receipt

    def contribute(
        self, round_: Round, deltas: Mapping[str, Array], **changes: Any
    ) -> common_pb2.SignedDocument:
        """All steps: the receipt."""
        manifest, payload = self.manifest(round_, deltas, **changes)
        begun = self.begin(manifest)
        self.write(begun.upload_id, payload)
        return self.commit(begun.upload_id)

    def collect(self, method: Any, request: object) -> list[Any]:
        return list(server_stream(method, request, deadline=30))


def make_manifest(
    round_: Round, deltas: Mapping[str, Array], now: datetime, **changes: Any
) -> tuple[Manifest, bytes]:
    """A manifest over `deltas` and its payload; `changes` name federation and contributor."""
    arrays = {name: np.ascontiguousarray(deltas[name]) for name in sorted(deltas)}
    parts = {name: bytes(as_bytes(array)) for name, array in arrays.items()}
    fields: dict[str, Any] = {
        "model": round_.model,
        "round": round_.id,
        "base_digest": round_.base_digest,
        "base_number": round_.base_number,
        "nonce": secrets.token_hex(16),
        "created_at": now,
        "kind": "full",
        "encoding": "fp32",
        "tensors": tuple(
            TensorEntry(
                name=name,
                dtype=DTYPES[array.dtype],
                shape=array.shape,
                sha256=hashlib.sha256(parts[name]).hexdigest(),
                nbytes=array.nbytes,
            )
            for name, array in arrays.items()
        ),
        "examples": 100,
        "norm": 1.0,
    }
    return Manifest(**{**fields, **changes}), b"".join(parts.values())


def chunk(upload_id: str, offset: int, data: bytes) -> contributions_pb2.WriteRequest:
    """One message of an upload."""
    return contributions_pb2.WriteRequest(
        upload_id=upload_id, chunk=common_pb2.Chunk(offset=offset, data=data)
    )


def deltas(seed: int = 1) -> dict[str, Array]:
    """Small changes of two tensors of the model."""
    generator = np.random.default_rng(seed)
    return {
        "embeddings.weight": generator.standard_normal((16, 4)).astype(np.float32),
        "layer.weight": generator.standard_normal((4, 4)).astype(np.float32),
    }


def make_coordinator(folder: Path, tensors: Mapping[str, Array] | None = None) -> Path:
    """A coordinator's folder with one model, on free ports."""
    listen: dict[str, Any] = {"listen": "127.0.0.1:0", "enrol_listen": "127.0.0.1:0"}
    setup.init(folder, federation="test", **listen, **coordinator_config())
    source = write_model(folder.parent / f"{folder.name}-source", tensors or model_tensors())
    with Store.open(folder) as store:
        add_model(store, MODEL, source, ("classifier.*",))
    return folder


@contextmanager
def coordinator(
    folder: Path, tensors: Mapping[str, Array] | None = None, limits: Limits | None = None
) -> Iterator[Live]:
    """A running coordinator with one model."""
    make_coordinator(folder, tensors)
    if limits is not None:
        changed = settings.load(folder).model_copy(update={"limits": limits})
        settings.save(changed, folder)
    live = Live(folder)
    try:
        yield live
    finally:
        live.close()
