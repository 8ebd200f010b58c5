"""A contributor's authenticated connection: one method per thing to ask.

Unary calls are retried while the coordinator is away, at most `timeout` seconds, and
then end with UnavailableError. The certificate is renewed by itself, also when it has
expired, and the channel rebuilt with it; while the old one holds, a renewal that fails stops
nothing.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing
from datetime import UTC, datetime, timedelta
from typing import Any, Self, TypeVar

import grpc

from coldmerge.core.clock import Clock, SystemClock
from coldmerge.core.documents import Document, Signed
from coldmerge.core.errors import (
    ColdmergeError,
    ConfigError,
    NotFoundError,
    UnauthenticatedError,
    UnavailableError,
)
from coldmerge.core.memory import keep_freed_memory
from coldmerge.wire.calls import OnRetry, call, client_stream, server_stream, with_patience
from coldmerge.wire.channel import secure_channel
from coldmerge.wire.convert import signed_from_proto, signed_to_proto
from coldmerge.wire.v1 import (
    audit_pb2,
    audit_pb2_grpc,
    common_pb2,
    contributions_pb2,
    contributions_pb2_grpc,
    models_pb2,
    models_pb2_grpc,
    rounds_pb2,
    rounds_pb2_grpc,
)
from coldmerge_client.files import exclusive
from coldmerge_client.home import Home, Membership
from coldmerge_client.renewal import renew, renewal_due, settle, still_holds

TIMEOUT = 60.0
RENEWAL_PATIENCE = 5.0
RENEW_AGAIN = timedelta(minutes=5)
HISTORY_SECONDS = 120.0
LOG_SECONDS = 3600.0
SLOWEST_BYTES_PER_SECOND = 16 * 1024
_BETWEEN_WATCHES = 0.5

_Answer = TypeVar("_Answer")
_Document = TypeVar("_Document", bound=Document)


def transfer_deadline(nbytes: int) -> float:
    """Seconds that sending or receiving `nbytes` may take on the slowest line we accept."""
    return 300 + nbytes / SLOWEST_BYTES_PER_SECOND


class Session:
    """One home's connection to its coordinator. Threads may share it."""

    def __init__(self, home: Home, member: Membership, timeout: float, clock: Clock) -> None:
        self.home = home
        self.member = member
        self.timeout = timeout
        self.clock = clock
        self.on_retry: OnRetry | None = None
        self.on_warning: Callable[[ColdmergeError], None] | None = None
        self._renew_after = datetime.min.replace(tzinfo=UTC)
        self._lock = threading.RLock()
        self._channel: grpc.Channel | None = None
        self._chain = b""

    @classmethod
    def open(
        cls,
        home: Home,
        *,
        timeout: float = TIMEOUT,
        clock: Clock | None = None,
        on_retry: OnRetry | None = None,
    ) -> Self:
        """A session for a home that has joined. Nothing is sent before the first question.

        Raises:
            ConfigError: the home has not joined a federation.
        """
        keep_freed_memory()
        session = cls(home, home.membership(), timeout, clock or SystemClock())
        settle(home, session.clock)
        session.on_retry = on_retry
        return session

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Hang up."""
        with self._lock:
            if self._channel is not None:
                self._channel.close()
            self._channel = None

    def channel(self) -> grpc.Channel:
        """The connection itself, for services that have no method here."""
        return self._connected()

    def _connected(self) -> grpc.Channel:
        with self._lock:
            if renewal_due(self.home, self.clock.now()):
                self._renew_if_due()
            if self._channel is None or self._on_disk() != self._chain:
                self._rebuild()
            return self._channel

    def _renew_if_due(self) -> None:
        """Renew. While the old certificate holds, work goes on if that fails; and later, again."""
        with exclusive(self.home.lock("certificate"), "the certificate", wait=True):
            now = self.clock.now()
            if not renewal_due(self.home, now):
                return
            holds = still_holds(self.home, now)
            if holds and now < self._renew_after:
                return
            patience = min(self.timeout, RENEWAL_PATIENCE) if holds else self.timeout
            try:
                renew(self.home, clock=self.clock, patience=patience, on_retry=self.on_retry)
            except ColdmergeError as error:
                if not holds:
                    raise
                self._renew_after = now + RENEW_AGAIN
                if self.on_warning is not None:
                    self.on_warning(error)

    def _rebuild(self) -> None:
        """A new channel. Calls of other threads end on the old one, which is closed with them."""
        self._chain = self._on_disk()
        self._channel = secure_channel(
            self.member.address,
            self.home.root(),
            self._chain,
            self.home.tls_key.read_bytes(),
        )

    def _fresh_certificate(self, error: UnauthenticatedError) -> bool:
        """Whether there is another certificate to try after `error`; the next call uses it.

        Another process may have renewed it, or the coordinator's clock may be ahead.
        """
        with self._lock:
            stale = error.code == "auth.expired" or (
                error.code == "auth.unknown_machine" and self.home.next_keys.exists()
            )
            if stale and self._on_disk() == self._chain:
                renew(self.home, clock=self.clock)
            changed = self._on_disk() != self._chain
            if changed:
                self._channel = None
            return changed

    def _on_disk(self) -> bytes:
        return self.home.certificate.read_bytes()

    def _trying(self, action: Callable[[], _Answer]) -> _Answer:
        try:
            return action()
        except UnauthenticatedError as error:
            if not self._fresh_certificate(error):
                raise
            return action()

    def _models(self) -> Any:
        return models_pb2_grpc.ModelsStub(self._connected())  # type: ignore[no-untyped-call]

    def _rounds(self) -> Any:
        return rounds_pb2_grpc.RoundsStub(self._connected())  # type: ignore[no-untyped-call]

    def _contributions(self) -> Any:
        return contributions_pb2_grpc.ContributionsStub(  # type: ignore[no-untyped-call]
            self._connected()
        )

    def _audit(self) -> Any:
        return audit_pb2_grpc.AuditStub(self._connected())  # type: ignore[no-untyped-call]

    def _ask(self, stubs: Callable[[], Any], method: str, request: object) -> Any:
        return self._trying(
            lambda: call(
                getattr(stubs(), method),
                request,
                patience=self.timeout,
                on_retry=self.on_retry,
            )
        )

    def verify(self, signed: Signed, kind: type[_Document]) -> _Document:
        """Check the coordinator's signature, with a key that it announced since if need be.

        Raises:
            ManifestError: no key that is believed here signed it.
            IntegrityError: the coordinator's keys contradict each other.
        """
        keyring = self.home.keyring(self.member)
        if keyring.signer_of(signed) is None:
            answer = self._ask(self._models, "ListKeys", models_pb2.ListKeysRequest())
            keyring.extend(signed_from_proto(said) for said in answer.keys)
            self.home.save_keyring(keyring)
        return keyring.verify(signed, kind)

    def models(self) -> tuple[models_pb2.Model, ...]:
        """The models of the federation."""
        answer = self._ask(self._models, "ListModels", models_pb2.ListModelsRequest())
        return tuple(answer.models)

    def model(self, name: str | None = None) -> models_pb2.Model:
        """One model; without a name, the only one there is.

        Raises:
            NotFoundError: there is none of that name.
            ConfigError: no name was given and there are several models.
        """
        models = self.models()
        fitting = [model for model in models if name is None or model.name == name]
        if not fitting:
            raise NotFoundError(
                "session.no_such_model",
                f"The federation has no model {name or 'yet'}.",
                expected=", ".join(model.name for model in models) or None,
                got=name,
                hint="List them with `coldmerge status`.",
            )
        if len(fitting) > 1:
            raise ConfigError(
                "session.which_model",
                "The federation has several models.",
                expected=", ".join(model.name for model in models),
                hint="Name one, such as `coldmerge pull MODEL`.",
            )
        return fitting[0]

    def release(
        self, model: str, number: int | None = None, *, digest: str | None = None
    ) -> models_pb2.Release:
        """A release by number, a release or candidate by content digest, or the latest."""
        request = models_pb2.GetReleaseRequest(model=model)
        if digest is not None:
            request.content_digest = digest
        elif number is not None:
            request.number = number
        else:
            request.latest = True
        answer: models_pb2.Release = self._ask(self._models, "GetRelease", request)
        return answer

    def releases_between(
        self, model: str, after: int, before: int
    ) -> tuple[models_pb2.Release, ...]:
        """The published releases with a number between the two, without their content.

        They come one by one: a long history fits into no single message.
        """
        request = models_pb2.WatchReleasesRequest(model=model, after_number=after)

        def collect() -> tuple[models_pb2.Release, ...]:
            found: list[models_pb2.Release] = []
            stream = server_stream(self._models().WatchReleases, request, deadline=HISTORY_SECONDS)
            with closing(stream):
                for release in stream:
                    if release.number >= before:
                        break
                    found.append(release)
            return tuple(found)

        return self._trying(
            lambda: with_patience(collect, patience=self.timeout, on_retry=self.on_retry)
        )

    def checkpoint(self, from_size: int) -> audit_pb2.CheckpointResponse:
        """The audit log's signed head, with the proof that it extends that of `from_size`."""
        request = audit_pb2.CheckpointRequest(from_size=from_size)
        answer: audit_pb2.CheckpointResponse = self._ask(self._audit, "Checkpoint", request)
        return answer

    def prove(self, leaf: bytes, size: int) -> audit_pb2.ProveResponse:
        """That the leaf of that hash is in the audit log of `size` entries."""
        request = audit_pb2.ProveRequest(leaf_hash=leaf, size=size)
        answer: audit_pb2.ProveResponse = self._ask(self._audit, "Prove", request)
        return answer

    def audit_entries(self, start: int = 0, limit: int = 0) -> Iterator[audit_pb2.AuditLeaf]:
        """The audit log's entries, for an auditor or admin; no retry here."""
        request = audit_pb2.ReadAuditRequest(start=start, limit=limit)
        return server_stream(self._audit().Read, request, deadline=LOG_SECONDS)

    def read_blob(self, sha256: str, offset: int, nbytes: int) -> Iterator[common_pb2.Chunk]:
        """The bytes of a tensor or file from `offset`; no retry here."""
        request = models_pb2.ReadBlobRequest(sha256=sha256, offset=offset)
        return server_stream(
            self._models().ReadBlob, request, deadline=transfer_deadline(nbytes - offset)
        )

    def rounds(self, model: str, limit: int = 0) -> tuple[common_pb2.Round, ...]:
        """Rounds, newest first."""
        request = rounds_pb2.ListRoundsRequest(model=model, limit=limit)
        return tuple(self._ask(self._rounds, "List", request).rounds)

    def round(self, round_id: str) -> common_pb2.Round:
        """One round."""
        answer: common_pb2.Round = self._ask(
            self._rounds, "Get", rounds_pb2.GetRoundRequest(id=round_id)
        )
        return answer

    def newest_round(self, model: str) -> common_pb2.Round | None:
        """The model's newest round, if there ever was one."""
        found = self.rounds(model, 1)
        return found[0] if found else None

    def watch_round(self, model: str) -> Generator[common_pb2.Round, None, None]:
        """The newest round now, then at every change; reconnects when the link breaks.

        Raises:
            UnavailableError: the coordinator stayed away for the session's timeout.
        """
        request = rounds_pb2.WatchRoundsRequest(model=model)
        probe = rounds_pb2.ListRoundsRequest(model=model, limit=1)
        while True:
            self._ask(self._rounds, "List", probe)
            opened = time.monotonic()
            try:
                yield from server_stream(self._rounds().Watch, request)
            except UnavailableError:
                pass
            except UnauthenticatedError as error:
                if not self._fresh_certificate(error):
                    raise
            time.sleep(max(0.0, _BETWEEN_WATCHES - (time.monotonic() - opened)))

    def report_evaluation(self, signed: Signed) -> common_pb2.Round:
        """Hand in a signed evaluation."""
        request = rounds_pb2.ReportEvaluationRequest(evaluation=signed_to_proto(signed))
        answer: common_pb2.Round = self._ask(self._rounds, "ReportEvaluation", request)
        return answer

    def begin(self, manifest: Signed) -> contributions_pb2.BeginResponse:
        """Announce a contribution, or find the upload that was begun with it."""
        request = contributions_pb2.BeginRequest(manifest=signed_to_proto(manifest))
        answer: contributions_pb2.BeginResponse = self._ask(self._contributions, "Begin", request)
        return answer

    def write(self, requests: Iterable[contributions_pb2.WriteRequest], nbytes: int) -> int:
        """Send payload bytes; no retry here. The size that is durable now."""
        answer: contributions_pb2.WriteResponse = client_stream(
            self._contributions().Write, requests, deadline=transfer_deadline(nbytes)
        )
        return answer.committed_size

    def commit(self, upload_id: str) -> common_pb2.SignedDocument:
        """Ask for the receipt of a complete upload."""
        request = contributions_pb2.CommitRequest(upload_id=upload_id)
        answer: contributions_pb2.CommitResponse = self._ask(self._contributions, "Commit", request)
        return answer.receipt

    def contributions(
        self, model: str = "", round_id: str = ""
    ) -> tuple[contributions_pb2.Contribution, ...]:
        """Our organization's contributions, newest first."""
        request = contributions_pb2.ListContributionsRequest(model=model, round=round_id)
        return tuple(self._ask(self._contributions, "List", request).contributions)

    def contribution(self, identifier: str) -> contributions_pb2.Contribution:
        """One of our organization's contributions."""
        answer: contributions_pb2.Contribution = self._ask(
            self._contributions, "Get", contributions_pb2.GetContributionRequest(id=identifier)
        )
        return answer

    def withdraw(self, contribution: str) -> contributions_pb2.Contribution:
        """Take a contribution back while its round is open."""
        answer: contributions_pb2.Contribution = self._ask(
            self._contributions, "Withdraw", contributions_pb2.WithdrawRequest(id=contribution)
        )
        return answer
