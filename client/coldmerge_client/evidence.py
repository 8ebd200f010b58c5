"""An auditor's copy of the log, and what a contributor can do with the receipts it keeps."""

from __future__ import annotations

from dataclasses import dataclass

from coldmerge.core.audit_file import AuditFile
from coldmerge.core.audit_log import read_leaf
from coldmerge.core.documents import Receipt, Signed
from coldmerge.core.errors import IntegrityError
from coldmerge.core.evidence import AuditCheckpoint
from coldmerge.core.merkle import leaf_hash, verify_inclusion
from coldmerge_client import checkpoints
from coldmerge_client.home import Home
from coldmerge_client.session import Session


def download(session: Session) -> AuditFile:
    """The whole log up to its head now. Auditors and admins only.

    Raises:
        PermissionDeniedError: we are neither.
        IntegrityError: the head does not extend the one this home has verified.
    """
    head = checkpoints.refresh(session)
    kept = session.home.checkpoint()
    if head is None or kept is None:
        raise IntegrityError(
            "audit.no_log",
            "This coordinator has no audit log: it runs an older coldmerge.",
            hint="Ask its admin to upgrade it.",
        )
    entries = [leaf.document for leaf in session.audit_entries(0, head.size)]
    member = session.member
    statements = session.home.keyring(member).statements
    return AuditFile(member.federation, member.signing_key, statements, [kept], entries)


@dataclass(frozen=True)
class Verified:
    """A receipt whose signature holds; `position` is where the log has it, if we looked."""

    receipt: Receipt
    position: int | None


def check_receipt(home: Home, signed: Signed, log: AuditFile | None = None) -> Verified:
    """Check a receipt offline, with a verified export of the log if there is one.

    Raises:
        ManifestError: the signature is not the coordinator's.
        IntegrityError: another federation's, or not in the log.
    """
    receipt = home.keyring().verify(signed, Receipt)
    if receipt.federation != home.membership().federation:
        raise IntegrityError(
            "receipt.other_federation",
            "The receipt is another federation's.",
            expected=home.membership().federation,
            got=receipt.federation,
            hint="Use the home folder of that federation: --home.",
        )
    if log is None:
        return Verified(receipt, None)
    for position, raw in enumerate(log.entries):
        if raw == signed.document:
            read_leaf(raw)
            return Verified(receipt, position)
    raise _not_logged(receipt, f"{len(log.entries)} entries without it")


def prove_receipt(session: Session, head: AuditCheckpoint, signed: Signed) -> Verified:
    """Check a receipt, and have the coordinator prove that its log holds it.

    Raises:
        ManifestError: the signature is not the coordinator's.
        IntegrityError: another federation's, or the proof is wrong.
        NotFoundError: the log does not hold it.
    """
    session.verify(signed, Receipt)  # which fetches a key that we have not heard of
    found = check_receipt(session.home, signed)
    leaf = leaf_hash(signed.document)
    answer = session.prove(leaf, head.size)
    root, proof = bytes.fromhex(head.root), list(answer.inclusion)
    if not verify_inclusion(leaf, int(answer.position), head.size, proof, root):
        raise _not_logged(found.receipt, "a wrong proof")
    return Verified(found.receipt, int(answer.position))


def _not_logged(receipt: Receipt, got: str) -> IntegrityError:
    return IntegrityError(
        "receipt.not_in_the_log",
        "The audit log does not hold this receipt, although the coordinator signed it.",
        expected=f"the receipt of {receipt.contribution}",
        got=got,
        hint="A receipt from before the audit log began is in no log; otherwise tell the "
        "admin and the other contributors.",
        round=receipt.round,
    )
