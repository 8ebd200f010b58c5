"""Models and their releases: contents, signed records, publishing, rolling back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from sqlalchemy import select, update
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.orm import Session

from coldmerge.core import dtypes
from coldmerge.core.digests import Content, master_digest
from coldmerge.core.documents import Document, ReleaseRecord, Signed, sign
from coldmerge.core.errors import ConflictError, NotFoundError
from coldmerge_coordinator import audit
from coldmerge_coordinator.actors import LOCAL_ADMIN
from coldmerge_coordinator.store import collection, models
from coldmerge_coordinator.store.models import Base, Blob, Master, Model, Release, Round

Recipe = dict[str, str | int | float | bool | None]
AT_ONCE = 1000
"""Values in one statement: databases have limits."""


@dataclass(frozen=True)
class Signer:
    """The coordinator's name and the Ed25519 key behind its receipts and release records."""

    federation: str
    key: Ed25519PrivateKey

    @property
    def public_key(self) -> str:
        """The half of the key that everybody may know, in hexadecimal."""
        return self.key.public_key().public_bytes_raw().hex()

    def sign(self, document: Document) -> Signed:
        """Put the coordinator's name to `document`."""
        return sign(document, self.key)


def list_models(session: Session) -> list[Model]:
    """All models, by name."""
    return list(session.scalars(select(Model).order_by(Model.name)))


def get_model(session: Session, name: str, *, lock: bool = False) -> Model:
    """A model.

    Raises:
        NotFoundError: there is none of that name.
    """
    query = select(Model).where(Model.name == name)
    model = session.scalars(query.with_for_update() if lock else query).one_or_none()
    if model is None:
        raise NotFoundError(
            "model.unknown",
            f"There is no model {name}.",
            hint="List the models with `coldmerge model list`.",
            model=name,
        )
    return model


def latest_release(session: Session, model: str) -> Release:
    """The model's newest release.

    Raises:
        NotFoundError: no such model, or none of it is published.
    """
    release = _latest(session, model)
    if release is None:
        get_model(session, model)
        raise _no_release(model, "any")
    return release


def _latest(session: Session, model: str) -> Release | None:
    return session.scalars(
        select(Release).where(Release.model == model).order_by(Release.number.desc()).limit(1)
    ).one_or_none()


def get_release(session: Session, model: str, number: int) -> Release:
    """The release of that number.

    Raises:
        NotFoundError: no such model or number.
    """
    release = session.get(Release, (model, number))
    if release is None:
        get_model(session, model)
        raise _no_release(model, number)
    return release


def find_release(session: Session, model: str, content_digest: str) -> Release | None:
    """The newest release with that content, or None (a candidate has no release yet)."""
    return session.scalars(
        select(Release)
        .where(Release.model == model, Release.content_digest == content_digest)
        .order_by(Release.number.desc())
        .limit(1)
    ).one_or_none()


def is_candidate(session: Session, model: str, content_digest: str) -> bool:
    """Whether some round of the model made, or is judging, a candidate of that content."""
    found = session.scalars(
        select(Round.id)
        .where(Round.model == model, Round.candidate_digest == content_digest)
        .limit(1)
    )
    return found.one_or_none() is not None


def list_releases(session: Session, model: str, after_number: int = -1) -> list[Release]:
    """Releases numbered above `after_number`, oldest first."""
    return list(
        session.scalars(
            select(Release)
            .where(Release.model == model, Release.number > after_number)
            .order_by(Release.number)
        )
    )


def _no_release(model: str, got: object) -> NotFoundError:
    return NotFoundError(
        "release.unknown",
        f"Model {model} has no such release.",
        got=got,
        hint=f"List them with `coldmerge release list {model}`.",
        model=model,
    )


def signed_record(release: Release) -> Signed:
    """The record's bytes and signature."""
    return Signed(release.record, release.signature)


def get_record(release: Release) -> ReleaseRecord:
    """The record, parsed."""
    return ReleaseRecord.parse(release.record)


def get_content(session: Session, digest: str) -> models.Content:
    """The row behind a content digest.

    Raises:
        NotFoundError: nothing here has that digest.
    """
    row = session.get(models.Content, digest)
    if row is None:
        raise NotFoundError(
            "content.unknown",
            "Nothing here has that content digest.",
            got=digest,
            hint="List releases with `coldmerge release list`.",
        )
    return row


def get_listing(session: Session, digest: str) -> Content:
    """Tensors and files behind a content digest.

    Raises:
        NotFoundError: nothing here has that digest.
    """
    return Content.from_json(get_content(session, digest).listing)


def get_blob(session: Session, sha256: str) -> Blob:
    """A blob that may be read: part of a release or candidate.

    Raises:
        NotFoundError: there is none, or it is not public (the same answer for both).
    """
    blob = session.get(Blob, sha256) if sha256.isalnum() else None
    if blob is None or not blob.public:
        raise NotFoundError(
            "blob.not_public",
            "No release or candidate has that tensor or file.",
            got=sha256[:80],
            hint="Take digests from a release's listing.",
        )
    return blob


def get_masters(session: Session, master_digest: str) -> dict[str, str]:
    """The fp32 masters behind a release or candidate: tensor name → sha256 of its blob.

    Raises:
        NotFoundError: nothing here has that digest.
    """
    row = session.get(Master, master_digest)
    if row is None:
        raise NotFoundError(
            "master.unknown",
            "Nothing here has that master digest.",
            got=master_digest,
            hint="The database is incomplete: restore it from a backup.",
        )
    return dict(row.tensors)


def add_content(
    session: Session, content: Content, masters: Mapping[str, str], now: datetime
) -> tuple[str, str]:
    """Write down a content, its masters and their blobs, which must be durable already.

    `masters`: name of each float tensor → sha256 of its fp32 bytes. What is known stays
    as it is. Returns the content digest and the master digest.
    """
    sizes = {entry.sha256: entry.nbytes for entry in content.tensors}
    sizes |= {entry.sha256: entry.size for entry in content.files}
    register(session, sizes, public=True, now=now)
    private = {
        sha256: dtypes.nbytes("F32", content.by_name[name].shape)
        for name, sha256 in masters.items()
        if sha256 not in sizes
    }
    register(session, private, public=False, now=now)
    row = {"digest": content.digest, "listing": content.to_json(), "created_at": now}
    insert_missing(session, models.Content, [row])
    digest = master_digest(masters)
    tensors = dict(sorted(masters.items()))
    insert_missing(session, Master, [{"digest": digest, "tensors": tensors, "created_at": now}])
    return content.digest, digest


def register(session: Session, sizes: Mapping[str, int], *, public: bool, now: datetime) -> None:
    """Write down blobs that are durable: sha256 → length. What is public stays public.

    What is known is as good as new: it is not collected as the rest of an old candidate.
    """
    collection.lock(session)
    digests = sorted(sizes)
    new = {"public": public, "created_at": now}
    for start in range(0, len(digests), AT_ONCE):
        part = digests[start : start + AT_ONCE]
        collection.named(session, part)
        insert_missing(session, Blob, [{"sha256": d, "nbytes": sizes[d], **new} for d in part])
        these = update(Blob).where(Blob.sha256.in_(part))
        session.execute(these.where(Blob.created_at < now).values(created_at=now))
        if public:
            session.execute(these.where(Blob.public.is_(False)).values(public=True))


def insert_missing(session: Session, table: type[Base], rows: list[dict[str, Any]]) -> None:
    """Insert the rows whose primary key is not there yet, whoever inserts them meanwhile."""
    if rows:
        dialect = session.get_bind().dialect.name
        insert = postgresql.insert if dialect == "postgresql" else sqlite.insert
        session.execute(insert(table).on_conflict_do_nothing(), rows)


def publish(
    session: Session,
    signer: Signer,
    model: str,
    content_digest: str,
    master_digest: str,
    now: datetime,
    *,
    recipe: Recipe,
    state_digest: str | None = None,
    parents: Sequence[str] = (),
    round_id: str | None = None,
    contributions: Sequence[str] = (),
    flags: Sequence[str] = (),
) -> Release:
    """Write the model's next release: number, signed record, chained to the one before.

    `parents`: content digests it was made from; `contributions`: manifest digests;
    `state_digest`: what the outer optimizer of the next round starts from.

    Raises:
        NotFoundError: no such model, content or master.
    """
    get_model(session, model, lock=True)
    get_content(session, content_digest)
    get_masters(session, master_digest)
    previous = _latest(session, model)
    return _store(
        session,
        signer,
        ReleaseRecord(
            federation=signer.federation,
            model=model,
            number=0 if previous is None else previous.number + 1,
            content_digest=content_digest,
            master_digest=master_digest,
            state_digest=state_digest,
            previous_record=None if previous is None else get_record(previous).digest(),
            parents=tuple(parents),
            round=round_id,
            recipe=recipe,
            contributions=tuple(sorted(contributions)),
            flags=tuple(sorted(flags)),
            created_at=now,
        ),
    )


def _store(session: Session, signer: Signer, record: ReleaseRecord) -> Release:
    """Sign a record, and write it down as the release that it is about."""
    signed = signer.sign(record)
    release = Release(
        model=record.model,
        number=record.number,
        content_digest=record.content_digest,
        master_digest=record.master_digest,
        state_digest=record.state_digest,
        record=signed.document,
        signature=signed.signature,
        published_at=record.created_at,
    )
    session.add(release)
    session.flush()
    audit.append_record(session, record)
    return release


def rollback(
    session: Session,
    signer: Signer,
    model: str,
    number: int,
    reason: str,
    now: datetime,
    *,
    actor: str = LOCAL_ADMIN,
) -> Release:
    """Publish the content of release `number` again, under the next number.

    What the outer optimizer remembered then, it remembers again.

    Raises:
        NotFoundError: no such model or release.
        ConflictError: a round is going on, or that content is the latest already.
    """
    get_model(session, model, lock=True)
    old, latest = get_release(session, model, number), latest_release(session, model)
    _refuse_while_round_active(session, model)
    if _substance(old) == _substance(latest):
        raise ConflictError(
            "release.already_latest",
            f"Release {number} of {model} has the content of the latest release.",
            expected="an older content",
            got=f"release {latest.number} is the same",
            hint=f"List them with `coldmerge release list {model}`.",
            model=model,
        )
    detail: dict[str, audit.Scalar] = {"to": number, "from": latest.number, "reason": reason}
    audit.append(session, "release.rolled_back", actor, now, ids={"model": model}, detail=detail)
    recipe: Recipe = {"method": "rollback", "number": number, "reason": reason}
    return publish(
        session,
        signer,
        model,
        old.content_digest,
        old.master_digest,
        now,
        recipe=recipe,
        state_digest=old.state_digest,
        parents=(old.content_digest,),
        flags=("rollback",),
    )


def _refuse_while_round_active(session: Session, model: str) -> None:
    active = session.scalars(select(Round).where(Round.model == model, Round.active)).one_or_none()
    if active is not None:
        raise ConflictError(
            "release.round_active",
            f"Round {active.id} of {model} is going on, from release {active.base_number}.",
            hint=f"End it first with `coldmerge round abandon {active.id}`.",
            model=model,
            round=active.id,
        )


def _substance(release: Release) -> tuple[str, str, str | None]:
    return release.content_digest, release.master_digest, release.state_digest
