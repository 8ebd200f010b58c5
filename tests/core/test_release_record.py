"""Release records from before outer optimizers, and since."""

from __future__ import annotations

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from coldmerge.core.documents import ReleaseRecord, Signed, verify
from coldmerge.core.errors import ManifestError

KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
OLD = (
    b'{"content_digest":"' + b"ab" * 32 + b'","contributions":["' + b"34" * 32 + b'"],'
    b'"created_at":"2026-03-02T12:00:00Z","federation":"fed","flags":["ungated"],'
    b'"master_digest":"'
    + b"cd" * 32
    + b'","model":"m","number":4,"parents":["'
    + b"12" * 32
    + b'"],"previous_record":"'
    + b"ef" * 32
    + b'","recipe":{"method":"mean","mode":"screened",'
    b'"weights":"uniform"},"round":"round-1","type":"coldmerge.release/1"}'
)
SIGNATURE = bytes.fromhex(
    "7bca4ef1a3c290b334511ce4c608f06b877b863ce3f95f2b90b9f2b370b56968"
    "a9cf8fe2108429f82dce88ab48dd28e2e5b3e15927bb6b18abcbb82c54b3c00f"
)
"""Written and signed by coldmerge 0.1.0 before there was a `state_digest`."""


def test_an_old_record_still_verifies_and_keeps_its_digest() -> None:
    record = verify(Signed(OLD, SIGNATURE), ReleaseRecord, KEY.public_key())
    assert (record.number, record.state_digest) == (4, None)
    assert record.canonical() == OLD
    assert record.digest() == "e94e36a25a98912edf42a9a1798f3010b75bdacd016ab27cf20c1cbe5067f755"


def test_a_state_is_signed_and_its_absence_has_one_rendering() -> None:
    record = ReleaseRecord.parse(OLD).model_copy(update={"state_digest": "56" * 32})
    assert ReleaseRecord.parse(record.canonical()) == record
    assert record.digest() != ReleaseRecord.parse(OLD).digest()
    with pytest.raises(ManifestError) as caught:
        ReleaseRecord.parse(OLD.replace(b'"type"', b'"state_digest":null,"type"'))
    assert caught.value.code == "document.not_canonical"


def test_a_record_of_the_largest_round_is_read_again() -> None:
    digests = tuple(f"{number:064x}" for number in range(10_000))
    clipped = {f"screening.factor.{digest}": 0.5 for digest in digests}
    old = ReleaseRecord.parse(OLD)
    record = old.model_copy(update={"contributions": digests, "recipe": old.recipe | clipped})
    assert ReleaseRecord.parse(record.canonical()) == record
