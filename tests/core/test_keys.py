from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from coldmerge.core.audit_log import check_log
from coldmerge.core.documents import Signed, sign
from coldmerge.core.errors import IntegrityError, ManifestError
from coldmerge.core.evidence import AuditCheckpoint
from coldmerge.core.keys import Keyring, KeyStatement
from coldmerge.core.merkle import EMPTY_ROOT

NOW = datetime(2026, 3, 2, tzinfo=UTC)
KEYS = [Ed25519PrivateKey.generate() for _ in range(4)]


def public(key: Ed25519PrivateKey) -> str:
    return key.public_key().public_bytes_raw().hex()


def statement(
    number: int, new: Ed25519PrivateKey, old: Ed25519PrivateKey, federation: str = "fed"
) -> KeyStatement:
    return KeyStatement(
        federation=federation,
        number=number,
        public_key=public(new),
        previous=public(old),
        created_at=NOW,
    )


def chain() -> list[Signed]:
    """Three rotations, each signed by the key it replaces."""
    return [sign(statement(n, KEYS[n], KEYS[n - 1]), KEYS[n - 1]) for n in (1, 2, 3)]


def ring(pinned: Ed25519PrivateKey, *said: Signed) -> Keyring:
    return Keyring("fed", public(pinned), said)


def test_the_chain_is_followed_forwards_in_any_order() -> None:
    found = ring(KEYS[0], *reversed(chain()))
    assert found.trusted == tuple(map(public, KEYS))
    probe = sign(statement(9, KEYS[0], KEYS[1]), KEYS[3])
    assert found.signer_of(probe) == public(KEYS[3])
    assert ring(KEYS[0], *found.statements).trusted == found.trusted


def test_who_joined_late_follows_it_backwards_by_the_newest_keys_word() -> None:
    again = [Signed(said.document, KEYS[3].sign(said.document)) for said in chain()]
    assert ring(KEYS[3], *chain()).trusted[0] == public(KEYS[3])
    assert public(KEYS[0]) not in ring(KEYS[3], chain()[0]).trusted
    assert set(ring(KEYS[3], *chain(), *again).trusted) == set(map(public, KEYS))


def test_a_key_that_the_chain_does_not_reach_is_refused() -> None:
    stranger = Ed25519PrivateKey.generate()
    forged = sign(statement(1, stranger, KEYS[0]), stranger)
    gap = chain()[2]
    found = ring(KEYS[0], forged, gap)
    assert found.trusted == (public(KEYS[0]),)
    with pytest.raises(ManifestError, match="believed here"):
        found.verify(sign(statement(5, KEYS[0], KEYS[1]), stranger), KeyStatement)


def test_a_statement_of_another_federation_or_a_changed_one_counts_for_nothing() -> None:
    other = sign(statement(1, KEYS[1], KEYS[0], "elsewhere"), KEYS[0])
    changed = Signed(chain()[0].document.replace(b'"number":1', b'"number":2'), b"0" * 64)
    assert ring(KEYS[0], other, changed).trusted == (public(KEYS[0]),)


def test_two_successors_of_one_key_are_an_alarm() -> None:
    thief = Ed25519PrivateKey.generate()
    known = ring(KEYS[0], *chain())
    with pytest.raises(IntegrityError) as caught:
        known.extend([sign(statement(1, thief, KEYS[0]), KEYS[0])])
    assert caught.value.code == "keys.forked"
    assert public(thief) not in known.trusted


def test_a_key_that_was_replaced_names_nobody_any_more() -> None:
    thief = Ed25519PrivateKey.generate()
    for old in (KEYS[0], KEYS[1]):
        late = sign(statement(4, thief, KEYS[3]), old)
        assert public(thief) not in ring(KEYS[0], *chain(), late).trusted
    known = ring(KEYS[0], *chain())
    assert [known.number_of(public(key)) for key in KEYS] == [0, 1, 2, 3]
    with pytest.raises(IntegrityError) as caught:
        ring(KEYS[0], sign(statement(7, thief, KEYS[0]), KEYS[0]), *chain())
    assert caught.value.code == "keys.forked"


def test_a_checkpoint_names_the_key_that_signed_it() -> None:
    head = AuditCheckpoint(
        federation="fed",
        size=0,
        root=EMPTY_ROOT.hex(),
        releases={},
        key=3,
        issued_at=NOW,
        expires_at=NOW + timedelta(days=1),
    )
    known = ring(KEYS[0], *chain())
    assert check_log("fed", [], [sign(head, KEYS[3])], known).checkpoints == 1
    with pytest.raises(IntegrityError) as caught:
        check_log("fed", [], [sign(head, KEYS[0])], known)
    assert caught.value.code == "checkpoint.wrong_key"
