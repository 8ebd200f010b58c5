"""The audit log of a coordinator's folder as a file, and a look at what the folder stores."""

from __future__ import annotations

from datetime import datetime

from sqlalchemy import select
from sqlalchemy.orm import Session

from coldmerge.core.audit_file import AuditFile
from coldmerge.core.audit_log import Checked, check_log
from coldmerge.core.documents import Signed
from coldmerge.core.errors import IntegrityError
from coldmerge.core.merkle import Frontier, leaf_hash
from coldmerge_coordinator import audit
from coldmerge_coordinator.audit import checkpoints
from coldmerge_coordinator.store import Store, keys
from coldmerge_coordinator.store.models import AuditCheckpoint, AuditHead, AuditNode

_HINT = "Compare with an earlier export and with the checkpoints that contributors keep."


def export(store: Store, now: datetime) -> AuditFile:
    """The whole log, its head signed now, with every checkpoint that was handed out."""
    with store.database.write() as session:
        lifetime = store.config.audit.checkpoint_lifetime
        checkpoints.checkpoint(session, store.signer, now, lifetime)
        session.flush()
        return AuditFile(
            store.federation,
            store.signer.public_key,
            keys.announced(session, store.signer),
            _signed(session),
            [document for _, document in checkpoints.entries(session)],
        )


def _signed(session: Session) -> list[Signed]:
    query = select(AuditCheckpoint).order_by(AuditCheckpoint.size)
    return [Signed(row.document, row.signature) for row in session.scalars(query)]


def check_stored(store: Store, *more: Signed) -> Checked:
    """Check the log of a folder: entries, tree, checkpoints, and `more` that others kept.

    The stored hash of each entry tells at which position it was changed.

    Raises:
        IntegrityError: the first difference, with its position.
        ManifestError: a checkpoint's signature is not by the coordinator's key.
    """
    with store.database.read(patient=True) as session:
        stored = checkpoints.entries(session)
        hashes = select(AuditNode.index.label("at"), AuditNode.hash).where(AuditNode.level == 0)
        leaves = {row.at: row.hash for row in session.execute(hashes)}
        documents = []
        for number, (position, document) in enumerate(stored):
            if position != number or leaves.get(number) != leaf_hash(document):
                raise _differs(number, f"an entry of hash {leaves.get(number, b'').hex()}")
            documents.append(document)
        size = session.scalar(select(AuditHead.size))
        if size != len(documents):
            raise _differs(len(documents), f"{size} entries")
        believed = keys.keyring(session, store.signer)
        checked = check_log(store.federation, documents, [*_signed(session), *more], believed)
        root = Frontier.of(checked.size, audit.subtree_of(session)).root().hex()
    if root != checked.root:
        raise _differs(0, f"root {checked.root}")
    return checked


def _differs(position: int, expected: str) -> IntegrityError:
    return IntegrityError(
        "audit.stored_differs",
        f"The stored audit log differs from its own tree at position {position}.",
        expected=expected,
        got="another entry, or none",
        hint=_HINT,
        position=position,
    )
