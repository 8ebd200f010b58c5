"""Everything one contributor and many strangers can hold open at once, until told to end.

`python -m benchmarks.hostile HOME ROUND CONNECTIONS`, a part of `benchmarks.load`.
"""

from __future__ import annotations

import secrets
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import grpc

from coldmerge.core.documents import Manifest, Signed, TensorEntry, sign
from coldmerge.core.errors import ColdmergeError
from coldmerge.wire.calls import call, client_stream, server_stream
from coldmerge.wire.channel import secure_channel
from coldmerge.wire.convert import signed_to_proto
from coldmerge.wire.v1 import (
    common_pb2,
    contributions_pb2,
    contributions_pb2_grpc,
    models_pb2,
    models_pb2_grpc,
)
from coldmerge_client.home import Home
from coldmerge_client.session import Session

READY = "ready"
READERS = 16
TRICKLE_SECONDS = 0.2
REFUSED_EVERY = 0.05
RECONNECT_SECONDS = 1.0


class Crowd:
    """Threads that keep connections, uploads and reads open until `end` is set."""

    def __init__(self, session: Session, round_id: str) -> None:
        self.end = threading.Event()
        self._session = session
        self._round = session.round(round_id)
        self._home = session.home
        self._address = session.member.address
        self._open = ExitStack()

    def channel(self) -> grpc.Channel:
        """A connection of its own."""
        return secure_channel(
            self._address,
            self._home.root(),
            self._home.certificate.read_bytes(),
            self._home.tls_key.read_bytes(),
        )

    def connect(self, count: int) -> None:
        """Half of them never say a word; the others shake hands and then do nothing."""
        silent = [self._silent() for _ in range(count // 2)]
        threading.Thread(target=self._keep, args=(silent,), daemon=True).start()
        for _ in range(count - count // 2):
            channel = self.channel()
            grpc.channel_ready_future(channel).result(60)
            self._open.callback(channel.close)

    def _silent(self) -> socket.socket:
        host, port = self._address.rsplit(":", 1)
        return socket.create_connection((host.strip("[]"), int(port)))

    def _keep(self, connections: list[socket.socket]) -> None:
        """Come back whenever the coordinator hangs up."""
        while not self.end.wait(RECONNECT_SECONDS):
            for index, connection in enumerate(connections):
                if self._gone(connection):
                    connection.close()
                    with suppress(OSError):  # it is taken up again the next time
                        connections[index] = self._silent()
        for connection in connections:
            connection.close()

    def _gone(self, connection: socket.socket) -> bool:
        if connection.fileno() < 0:
            return True
        connection.setblocking(False)
        try:
            return connection.recv(1) == b""
        except BlockingIOError:
            return False
        except OSError:
            return True

    def manifest(self) -> Signed:
        """Of a valid contribution that will never come."""
        release = self._session.release(self._round.model, self._round.base_number)
        entries = [
            TensorEntry(
                name=tensor.name,
                dtype="F32",
                shape=tuple(tensor.shape),
                sha256="0" * 64,
                nbytes=tensor.nbytes,
            )
            for tensor in release.tensors
        ]
        manifest = Manifest(
            federation=self._session.member.federation,
            model=self._round.model,
            round=self._round.id,
            contributor=self._session.member.contributor,
            base_digest=self._round.base_digest,
            base_number=self._round.base_number,
            nonce=secrets.token_hex(16),
            created_at=self._session.clock.now(),
            kind="full",
            encoding="fp32",
            tensors=tuple(entries),
            examples=1,
            norm=1.0,
        )
        return sign(manifest, self._home.identity_key())

    def upload(self) -> bool:
        """Begin an upload and trickle into it; False when no more may be open."""
        stub = contributions_pb2_grpc.ContributionsStub(self.channel())  # type: ignore[no-untyped-call]
        request = contributions_pb2.BeginRequest(manifest=signed_to_proto(self.manifest()))
        try:
            upload_id = call(stub.Begin, request, patience=0).upload_id
        except ColdmergeError:
            return False
        threading.Thread(target=self._trickle, args=(stub, upload_id), daemon=True).start()
        return True

    def _trickle(self, stub: contributions_pb2_grpc.ContributionsStub, upload_id: str) -> None:
        def requests() -> Iterator[contributions_pb2.WriteRequest]:
            offset = 0
            while not self.end.wait(TRICKLE_SECONDS):
                data = bytes(1024)
                yield contributions_pb2.WriteRequest(
                    upload_id=upload_id, chunk=common_pb2.Chunk(offset=offset, data=data)
                )
                offset += len(data)

        with suppress(ColdmergeError):
            client_stream(stub.Write, requests())

    def read(self) -> None:
        """Ask for a large tensor and take nothing of it; again when that is ended."""
        release = self._session.release(self._round.model, self._round.base_number)
        largest = max(release.tensors, key=lambda tensor: tensor.nbytes)
        request = models_pb2.ReadBlobRequest(sha256=largest.sha256)
        stub = models_pb2_grpc.ModelsStub(self.channel())  # type: ignore[no-untyped-call]
        for _ in range(READERS):
            with suppress(ColdmergeError):
                stream = server_stream(stub.ReadBlob, request, deadline=600)
                next(stream)
                self._open.callback(stream.close)

    def be_refused(self) -> None:
        """Manifests with a signature that does not fit, twenty a second."""
        good = self.manifest()
        bad = signed_to_proto(Signed(good.document, bytes(64)))
        stub = contributions_pb2_grpc.ContributionsStub(self.channel())  # type: ignore[no-untyped-call]
        while not self.end.wait(REFUSED_EVERY):
            with suppress(ColdmergeError):
                call(stub.Begin, contributions_pb2.BeginRequest(manifest=bad), patience=0)

    def close(self) -> None:
        """Hang up everywhere."""
        self.end.set()
        self._open.close()


def main(arguments: list[str]) -> int:
    """Hold everything, say so, and wait for a line."""
    home, round_id, connections = arguments
    with Session.open(Home(Path(home))) as session:
        crowd = Crowd(session, round_id)
        crowd.connect(int(connections))
        if not crowd.upload():
            raise SystemExit("the first upload was refused")
        while crowd.upload():
            pass
        crowd.read()
        threading.Thread(target=crowd.be_refused, daemon=True).start()
        print(READY, flush=True)
        sys.stdin.readline()
        crowd.close()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
