"""Statements about the coordinator's signing keys."""

from __future__ import annotations

from datetime import datetime

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from sqlalchemy import select
from sqlalchemy.orm import Session

from coldmerge.core.documents import Signed
from coldmerge.core.keys import Keyring, KeyStatement
from coldmerge_coordinator.store.models import SigningKey
from coldmerge_coordinator.store.releases import Signer


def statements(session: Session) -> list[Signed]:
    """All of them, oldest first, each signed by the key it replaces."""
    rows = session.scalars(select(SigningKey).order_by(SigningKey.number))
    return [Signed(row.document, row.signature) for row in rows]


def latest(session: Session) -> SigningKey | None:
    """The row of the newest key; None while the first one is in use."""
    query = select(SigningKey).order_by(SigningKey.number.desc()).limit(1)
    return session.scalars(query.with_for_update()).one_or_none()


def number_of(session: Session, signer: Signer) -> int:
    """The number of the key of `signer`: a replica may not have the newest one yet."""
    key = bytes.fromhex(signer.public_key)
    found = session.scalars(select(SigningKey.number).where(SigningKey.public_key == key))
    return found.one_or_none() or 0


def announced(session: Session, signer: Signer) -> list[Signed]:
    """What clients are told: the statements, then all of them again under the newest key."""
    found = statements(session)
    return found + [Signed(said.document, signer.key.sign(said.document)) for said in found]


def keyring(session: Session, signer: Signer) -> Keyring:
    """All keys this coordinator ever signed with."""
    pinned = signer.public_key
    return Keyring(signer.federation, pinned, announced(session, signer))


def announce(session: Session, signer: Signer, new: Ed25519PublicKey, now: datetime) -> SigningKey:
    """Store the statement that `new` takes the place of the key of `signer`."""
    before = latest(session)
    statement = KeyStatement(
        federation=signer.federation,
        number=before.number + 1 if before else 1,
        public_key=new.public_bytes_raw().hex(),
        previous=signer.public_key,
        created_at=now,
    )
    signed = signer.sign(statement)
    row = SigningKey(
        number=statement.number,
        public_key=new.public_bytes_raw(),
        document=signed.document,
        signature=signed.signature,
        created_at=now,
    )
    session.add(row)
    return row
