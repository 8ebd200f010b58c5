"""From a signed manifest to a counted contribution: begin, find, commit, withdraw.

Everything here blocks; handlers call it on threads.
"""

from __future__ import annotations

import threading

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from coldmerge.core.clock import Clock
from coldmerge.core.documents import Manifest, Receipt, Signed, verify
from coldmerge.core.errors import (
    ColdmergeError,
    ConfigError,
    ConflictError,
    ResourceError,
    TaskVectorError,
    UnavailableError,
)
from coldmerge.rounds import state
from coldmerge.rounds.state import State
from coldmerge.rounds.statistics import statistics_for, trim_density
from coldmerge_coordinator.admission import Target, check_manifest
from coldmerge_coordinator.auth import Caller, refuse_revoked
from coldmerge_coordinator.service.leaving import withdraw
from coldmerge_coordinator.service.rules import (
    check_asked,
    check_nonce,
    check_open,
    check_second,
    replayed,
    unknown,
)
from coldmerge_coordinator.service.screens import quarantine, reason_to_wait
from coldmerge_coordinator.service.uploads import (
    LiveUpload,
    contribution_id,
    forget,
    header_of,
    payload_name,
    upload_id,
)
from coldmerge_coordinator.store import (
    Store,
    continuous,
    contribution_log,
    contributions,
    people,
    releases,
    rounds,
    usage,
)
from coldmerge_coordinator.store.models import Contribution, Round, Upload
from coldmerge_coordinator.store.room import check_room

Counted = tuple[Contribution, list[Contribution]]
"""A contribution that was counted, or waits, and those that it takes the place of."""


class Intake:
    """The open uploads of one coordinator, and what becomes of them."""

    def __init__(self, store: Store, clock: Clock) -> None:
        self._store = store
        self._clock = clock
        self._live: dict[str, LiveUpload] = {}
        self._turns: dict[str, threading.Lock] = {}
        self._room = threading.Lock()

    def _turn(self, contributor: str) -> threading.Lock:
        """A contributor's calls wait for each other, and not for those of others: to open
        an upload again reads all of it.
        """
        return self._turns.setdefault(contributor, threading.Lock())

    def begin(self, who: Caller, signed: Signed) -> Contribution | LiveUpload:
        """Admit a manifest: its upload, or the contribution that it became already.

        Raises:
            ColdmergeError: it is not admitted; `admission.check_manifest` and the rules
                of the round say why.
        """
        manifest = verify(signed, Manifest, who.identity)
        identifier = upload_id(manifest.digest())
        with self._turn(who.contributor):
            known = self._known(who, manifest)
            if known is not None:
                return known
            self._admit(who, manifest)
            self._forget_stale(who)
            with self._room:
                self._check_room(who, manifest)
                if not self._insert(who, manifest, signed):
                    # Another replica has begun it this instant, or even counted it.
                    return self._known(who, manifest) or self._open(who, identifier)
                try:
                    return self._open(who, identifier)
                except BaseException:
                    self._drop(identifier)
                    raise

    def _known(self, who: Caller, manifest: Manifest) -> Contribution | LiveUpload | None:
        digest = manifest.digest()
        with self._store.database.read() as session:
            done = contributions.by_manifest(session, digest)
            begun = session.get(Upload, upload_id(digest))
        if done is not None and done.contributor == who.contributor:
            if done.state == contributions.WITHDRAWN:
                raise replayed(manifest, "was taken back")
            return done
        if begun is None or begun.contributor != who.contributor:
            return None
        try:
            return self._open(who, begun.id)
        except ConflictError:  # its bytes were lost: begin again
            return None

    def _admit(self, who: Caller, manifest: Manifest) -> None:
        with self._store.database.read() as session:
            row = rounds.get(session, manifest.round)
            check_open(row)
            check_asked(row, who.contributor)
            check_manifest(manifest, self._target(session, who, row))
            check_second(session, row, who.contributor)
            check_nonce(session, manifest)

    def _target(self, session: Session, who: Caller, row: Round) -> Target:
        merge = rounds.get_policy(row).merge
        return Target(
            federation=self._store.federation,
            contributor=who.contributor,
            model=row.model,
            round=row.id,
            bases=continuous.bases_of(session, row),
            tensors=releases.get_listing(session, row.base_digest).by_name,
            private=tuple(releases.get_model(session, row.model).private_patterns),
            max_payload_bytes=self._store.config.limits.max_payload_bytes,
            statistics=statistics_for(merge),
            density=trim_density(merge),
        )

    def _forget_stale(self, who: Caller) -> None:
        """Drop everybody's uploads to rounds that no longer admit anything: they hold disk."""
        with self._store.database.read() as session:
            query = select(Upload.id, Upload.contributor).join(Round, Round.id == Upload.round)
            stale = session.execute(query.where(Round.state != State.OPEN)).all()
        for identifier in [known for known, live in list(self._live.items()) if live.closed]:
            self._live.pop(identifier, None)
        for identifier, contributor in stale:
            turn = self._turn(contributor)
            if contributor == who.contributor:
                self._drop(identifier)
            elif turn.acquire(blocking=False):
                try:
                    self._drop(identifier)
                finally:
                    turn.release()

    def _drop(self, identifier: str) -> None:
        live = self._live.pop(identifier, None)
        if live is not None:
            live.close()
        with self._store.database.write() as session:
            row = session.get(Upload, identifier)
            if row is not None:
                session.delete(row)
        forget(self._store, identifier)

    def _check_count(self, session: Session, who: Caller) -> None:
        most = self._store.config.limits.max_open_uploads
        counted = select(func.count()).where(Upload.contributor == who.contributor)
        count = session.scalar(counted) or 0
        if count >= most:
            raise ResourceError(
                "upload.too_many",
                f"{who.contributor} has too many open uploads.",
                expected=f"at most {most}",
                got=count,
                hint="Finish them with `coldmerge push`; old ones end with their round.",
            )

    def _check_room(self, who: Caller, manifest: Manifest) -> None:
        limits = self._store.config.limits
        with self._store.database.read() as session:
            self._check_count(session, who)
        needed = manifest.payload_bytes + len(header_of(manifest)) + limits.keep_free_bytes
        check_room(self._store.uploads, needed, "this task vector")

    def _insert(self, who: Caller, manifest: Manifest, signed: Signed) -> bool:
        """Whether the upload is new; False: another replica has the manifest already."""
        digest = manifest.digest()
        with self._store.database.write() as session:
            people.hold(session, who.contributor)  # so that replicas count one after the other
            check_open(rounds.get(session, manifest.round, lock=True))
            if session.get(Upload, upload_id(digest)) or contributions.by_manifest(session, digest):
                return False
            self._check_count(session, who)
            check_nonce(session, manifest)
            most = self._store.config.limits.bytes_per_day
            usage.charge(session, who.contributor, manifest.payload_bytes, most, self._clock.now())
            session.add(
                Upload(
                    id=upload_id(manifest.digest()),
                    manifest_digest=manifest.digest(),
                    contributor=who.contributor,
                    machine=who.machine,
                    round=manifest.round,
                    manifest=signed.document,
                    signature=signed.signature,
                    total_size=manifest.payload_bytes,
                    committed_size=0,
                    created_at=self._clock.now(),
                )
            )
            return True

    def find(self, who: Caller, identifier: str) -> LiveUpload:
        """One of the caller's open uploads.

        Raises:
            NotFoundError: there is none of that id, or it is somebody else's.
            ConflictError: its bytes were lost: it must begin again.
        """
        with self._turn(who.contributor):
            return self._open(who, identifier)

    def _open(self, who: Caller, identifier: str) -> LiveUpload:
        live = self._live.get(identifier)
        if live is not None and live.contributor == who.contributor and live.is_current():
            return live
        if live is not None:
            live.close()
        with self._store.database.read() as session:
            row = session.get(Upload, identifier)
        if row is None or row.contributor != who.contributor:
            raise unknown(identifier)
        try:
            live = LiveUpload(self._store, self._clock, row)
        except (UnavailableError, ResourceError, ConfigError):  # what is durable is still there
            raise
        except ColdmergeError as error:
            self._drop(identifier)
            raise ConflictError(
                "upload.lost",
                "The bytes of this upload were lost or damaged on the coordinator's disk.",
                hint="Begin again: `coldmerge push` does so by itself.",
                upload=identifier,
            ) from error
        self._live[identifier] = live
        return live

    def check_admissible(self, live: LiveUpload) -> None:
        """Look again, in the middle of a stream, whether the upload may go on.

        Raises:
            ConflictError: the round was sealed meanwhile.
        """
        with self._store.database.read() as session:
            check_open(rounds.get(session, live.round))

    def commit(self, who: Caller, identifier: str) -> Contribution:
        """Count a complete upload: durable file, row, signed receipt. Idempotent.

        Raises:
            ConflictError: bytes are missing, the round is sealed, or the round refuses
                a second contribution.
            NotFoundError: there is no such upload.
        """
        done = self._committed(who, identifier)
        if done is not None:
            return done
        live = self.find(who, identifier)
        with live.lock, live.exclusive():
            done = self._committed(who, identifier)
            if done is not None:
                return done
            row, replaced = self._finish(who, live)
            live.close()
        self._live.pop(identifier, None)
        self._store.payloads.forget(identifier)
        self._store.payloads.remove([older.payload for older in replaced])
        return row

    def _finish(self, who: Caller, live: LiveUpload) -> Counted:
        norm = live.finish()
        try:
            return self._count(live, norm)
        except Exception as error:
            # The answer of a commit can be lost: a row that is there must keep its file.
            done = self._decided(who, live)
            if done is None:
                live.unfinish()
                if isinstance(error, TaskVectorError):
                    live.discard()
                    counted = contribution_id(live.manifest_digest)
                    self._store.payloads.remove([payload_name(counted)])
                raise
            return done, []

    def _decided(self, who: Caller, live: LiveUpload) -> Contribution | None:
        """What came of a commit without an answer: while it goes on, it has the round locked."""
        with self._store.database.write() as session:
            rounds.get(session, live.round, lock=True)
        return self._committed(who, live.id)

    def _committed(self, who: Caller, identifier: str) -> Contribution | None:
        counted = contribution_id(identifier.removeprefix("upload-"))
        with self._store.database.read() as session:
            row = session.get(Contribution, counted)
        return row if row is not None and row.contributor == who.contributor else None

    def _count(self, live: LiveUpload, norm: float) -> Counted:
        now, signer = self._clock.now(), self._store.signer
        with self._store.database.write() as session:
            refuse_revoked(*people.share(session, live.contributor, live.machine))
            row = rounds.get(session, live.round, lock=True)
            check_open(row)
            older = check_second(session, row, live.contributor)
            waits = reason_to_wait(session, row, live.manifest, norm)
            if waits is not None:  # what is admitted stays, until an admin accepts this one
                older = [each for each in older if each.state == contributions.QUARANTINED]
            for each in older:
                each.state = contributions.REPLACED
            session.flush()
            upload = session.get_one(Upload, live.id)
            counted = self._contribution(live, upload, norm, row.model)
            if waits is not None:
                counted.state = contributions.QUARANTINED
            session.add(counted)
            session.delete(upload)
            session.flush()
            contribution_log.received(session, counted, older, live.actor, now)
            if waits is None:
                rounds.apply(session, row, state.Contributed(), now, signer, actor=live.actor)
            else:
                quarantine(session, row, counted, waits, live.actor, now)
            return counted, older

    def _contribution(
        self, live: LiveUpload, upload: Upload, norm: float, model: str
    ) -> Contribution:
        identifier, now = contribution_id(live.manifest_digest), self._clock.now()
        receipt = self._store.signer.sign(
            Receipt(
                federation=self._store.federation,
                model=model,
                round=live.round,
                contributor=live.contributor,
                contribution=identifier,
                manifest_digest=live.manifest_digest,
                payload_bytes=live.total,
                accepted_at=now,
            )
        )
        return Contribution(
            id=identifier,
            model=model,
            round=live.round,
            contributor=live.contributor,
            manifest_digest=live.manifest_digest,
            nonce=live.manifest.nonce,
            manifest=upload.manifest,
            signature=upload.signature,
            payload=payload_name(identifier),
            payload_bytes=live.total,
            examples=live.manifest.examples,
            norm=norm,
            state=contributions.ADMITTED,
            receipt=receipt.document,
            receipt_signature=receipt.signature,
            accepted_at=now,
        )

    def withdraw(self, who: Caller, identifier: str) -> Contribution:
        """Take a contribution back: its bytes are removed. See `leaving.withdraw`.

        Raises:
            NotFoundError: the caller has no such contribution.
            ConflictError: a round that merges it is going on.
        """
        row = withdraw(self._store, who, identifier, self._clock.now())
        if row.state == contributions.WITHDRAWN:
            self._store.payloads.remove([row.payload])
        return row

    def close(self) -> None:
        """Make what came durable, and give the files back."""
        for live in list(self._live.values()):
            try:
                live.flush()
            except ConflictError:  # another process has gone on with it
                continue
            finally:
                live.close()
        self._live.clear()
