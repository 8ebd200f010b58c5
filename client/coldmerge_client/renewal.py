"""Keeping the certificate fresh, and, when asked, changing this machine's keys.

New keys are made in `keys/next/` and wait there until the coordinator has answered. The answer
is put beside them, and only then do they move to their places: whatever breaks off in between
is finished by the next renewal, one process at a time.
"""

from __future__ import annotations

import shutil
from contextlib import AbstractContextManager
from datetime import datetime, timedelta
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from coldmerge.core.clock import Clock, SystemClock
from coldmerge.core.errors import ConflictError, IntegrityError, ManifestError
from coldmerge.core.files import fsync_path
from coldmerge.wire.calls import OnRetry
from coldmerge.wire.convert import timestamp
from coldmerge.wire.proofs import rekey_message, renew_message
from coldmerge.wire.v1 import enrolment_pb2
from coldmerge_client import sent_log
from coldmerge_client.enrol import call_enrolment, check_chain, csr_of, private_pem
from coldmerge_client.files import exclusive, write_atomic
from coldmerge_client.home import Home, load_key
from coldmerge_client.outbox import Outbox

_CERTIFICATE = "certificate.pem"


def renew(
    home: Home,
    *,
    new_keys: bool = False,
    clock: Clock | None = None,
    patience: float = 0.0,
    on_retry: OnRetry | None = None,
) -> None:
    """Get a new certificate, proved by the identity key; the old one may have expired.

    With `new_keys` both keys are replaced, and the old ones are refused from then on.

    Raises:
        ConflictError: new keys, while the outbox holds what the old one signed.
        PermissionDeniedError: this machine or its organization is revoked.
        UnavailableError: the coordinator cannot be reached for `patience` seconds.
    """
    clock = clock or SystemClock()
    asking = _Asking(home, clock, patience, on_retry)
    with _only_one(home):
        if new_keys:
            _make_next(home)
        if _waits(home):
            asking.with_next_keys()
            _settle(home, clock)
            return
        tls = home.tls_private_key()
        chain = asking.certificate(home.identity_key(), tls)
        write_atomic(home.certificate, chain, 0o644)


def _only_one(home: Home) -> AbstractContextManager[None]:
    return exclusive(home.lock("keys"), "this machine's keys", wait=True)


def _waits(home: Home) -> bool:
    """Whether new keys wait, both: the second one is written last."""
    return (home.next_keys / "tls.key").exists()


class _Asking:
    """Renew requests of one home."""

    def __init__(self, home: Home, clock: Clock, patience: float, on_retry: OnRetry | None) -> None:
        self._home, self._clock = home, clock
        self._patience, self._on_retry = patience, on_retry

    def certificate(
        self,
        identity: Ed25519PrivateKey,
        tls: ec.EllipticCurvePrivateKey,
        new: Ed25519PrivateKey | None = None,
    ) -> bytes:
        """A chain for `tls`, proved by `identity`; `new` takes the place of that one."""
        member, root = self._home.membership(), self._home.root()
        csr, at = csr_of(tls), timestamp(self._clock.now())
        message = renew_message(at, csr)
        request = enrolment_pb2.RenewRequest(
            contributor=member.contributor, machine=member.machine, csr_der=csr, at=at
        )
        if new is not None:
            request.new_identity_public_key = new.public_key().public_bytes_raw()
            message = rekey_message(at, request.new_identity_public_key, csr)
            request.new_proof = new.sign(message)
        request.proof = identity.sign(message)
        answer: Any = call_enrolment(
            member.enrol,
            root,
            "Renew",
            request,
            patience=self._patience,
            on_retry=self._on_retry,
        )
        check_chain(answer.certificate_chain_pem, root, tls)
        chain: bytes = answer.certificate_chain_pem
        return chain

    def with_next_keys(self) -> None:
        """Have the keys that wait take over; they may have, and the answer was lost."""
        waiting = self._home.next_keys
        if (waiting / _CERTIFICATE).exists():
            return
        new, tls = load_key(waiting / "identity.key"), load_key(waiting / "tls.key")
        if not isinstance(new, Ed25519PrivateKey) or not isinstance(
            tls, ec.EllipticCurvePrivateKey
        ):
            raise IntegrityError(
                "renew.wrong_keys",
                "The new keys that wait in keys/next are of another kind.",
                hint="Remove that folder and run `coldmerge renew --new-keys` again.",
                path=waiting,
            )
        try:
            chain = self.certificate(self._home.identity_key(), tls, new)
        except ManifestError as error:
            if error.code != "enrolment.bad_proof":
                raise
            chain = self.certificate(new, tls)
        write_atomic(waiting / _CERTIFICATE, chain, 0o644)


def _make_next(home: Home) -> None:
    unsent = [entry.id for entry in Outbox(home).pending()]
    if unsent:
        raise ConflictError(
            "renew.outbox_not_empty",
            "The outbox holds contributions that the old key signed.",
            got=", ".join(unsent),
            hint="Send them with `coldmerge push`, or remove them, then change the keys.",
        )
    waiting = home.next_keys
    if not _waits(home):
        write_atomic(waiting / "identity.key", private_pem(Ed25519PrivateKey.generate()))
        write_atomic(waiting / "tls.key", private_pem(ec.generate_private_key(ec.SECP256R1())))


def settle(home: Home, clock: Clock) -> None:
    """Put keys in place that the coordinator has accepted. Does nothing when there are none."""
    if (home.next_keys / _CERTIFICATE).exists():
        with _only_one(home):
            _settle(home, clock)


def _settle(home: Home, clock: Clock) -> None:
    waiting = home.next_keys
    if not (waiting / _CERTIFICATE).exists():
        return
    new = load_key(waiting / "identity.key")
    if isinstance(new, Ed25519PrivateKey) and home.identity_key().public_key() != new.public_key():
        sent_log.record_new_key(home, new, clock.now())
        home.retire_identity()
    for name, target in (
        ("identity.key", home.identity_key_path),
        ("tls.key", home.tls_key),
        (_CERTIFICATE, home.certificate),
    ):
        mode = 0o644 if name == _CERTIFICATE else 0o600
        write_atomic(target, (waiting / name).read_bytes(), mode)
    # In one step: what a removal that is cut short leaves would be taken for keys that wait.
    settled = waiting.with_name("settled")
    shutil.rmtree(settled, ignore_errors=True)
    waiting.rename(settled)
    fsync_path(settled.parent)
    shutil.rmtree(settled, ignore_errors=True)


def validity(home: Home) -> tuple[datetime, datetime]:
    """From when until when our certificate holds.

    Raises:
        IntegrityError: the file holds no certificate.
    """
    try:
        leaf = x509.load_pem_x509_certificate(home.certificate.read_bytes())
    except (ValueError, FileNotFoundError) as error:
        raise IntegrityError(
            "enrol.no_certificate",
            "The certificate of this machine cannot be read.",
            hint="Remove certificate.pem and run `coldmerge doctor`: it is renewed by itself.",
            path=home.certificate,
        ) from error
    return leaf.not_valid_before_utc, leaf.not_valid_after_utc


def renewal_due(home: Home, now: datetime) -> bool:
    """Whether less than a third of the certificate's life is left, or there is none."""
    if not home.certificate.exists():
        return True
    start, end = validity(home)
    return end - now < max((end - start) / 3, timedelta(0))


def still_holds(home: Home, now: datetime) -> bool:
    """Whether there is a certificate, and it has not expired."""
    return home.certificate.exists() and now < validity(home)[1]
