from __future__ import annotations

import json
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st

from coldmerge.core.clock import SystemClock
from coldmerge.core.documents import (
    MAX_DOCUMENT_BYTES,
    Manifest,
    Scores,
    Signed,
    TensorEntry,
    sign,
    verify,
)
from coldmerge.core.errors import KINDS, ManifestError
from coldmerge.core.ids import new_id

KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
ENTRY = TensorEntry(name="a.weight", dtype="F32", shape=(2, 3), sha256="0" * 64, nbytes=24)


def code_of(raw: bytes) -> str:
    with pytest.raises(ManifestError) as caught:
        TensorEntry.parse(raw)
    return caught.value.code


def test_a_document_survives_signing_and_reading() -> None:
    signed = sign(ENTRY, KEY)
    assert verify(signed, TensorEntry, KEY.public_key()) == ENTRY
    assert TensorEntry.parse(ENTRY.canonical()).digest() == ENTRY.digest()


def body(**changes: Any) -> bytes:
    fields = json.loads(ENTRY.canonical()) | changes
    return json.dumps(fields, sort_keys=True, separators=(",", ":")).encode()


@pytest.mark.parametrize(
    ("code", "raw"),
    [
        ("document.too_large", b" " * (MAX_DOCUMENT_BYTES + 1)),
        ("document.wrong_type", body(type="coldmerge.file/1")),
        ("document.wrong_type", b"[]"),
        ("document.malformed", b"{"),
        ("document.malformed", b"\xff"),
        ("document.malformed", b"[" * 100_000),
        ("document.malformed", body(extra=1)),
        ("document.malformed", body(name="../x")),
        ("document.malformed", body(name="a\n")),
        ("document.malformed", body(nbytes=-1)),
        ("document.not_canonical", ENTRY.canonical() + b" "),
        ("document.not_canonical", body(nbytes="24")),
        ("document.not_canonical", ENTRY.canonical().replace(b"{", b'{"dtype":"F16",', 1)),
    ],
)
def test_another_rendering_is_refused(code: str, raw: bytes) -> None:
    assert code_of(raw) == code


@given(st.integers(0, 10_000), st.integers(0, 7), st.booleans())
def test_any_flipped_bit_breaks_the_signature(at: int, bit: int, in_document: bool) -> None:
    signed = sign(ENTRY, KEY)
    parts = [bytearray(signed.document), bytearray(signed.signature)]
    target = parts[0 if in_document else 1]
    target[at % len(target)] ^= 1 << bit
    with pytest.raises(ManifestError) as caught:
        verify(Signed(bytes(parts[0]), bytes(parts[1])), TensorEntry, KEY.public_key())
    assert caught.value.code == "document.bad_signature"


def test_another_key_or_type_is_refused() -> None:
    signed = sign(Scores(accuracy=0.5, macro_f1=0.25), KEY)
    with pytest.raises(ManifestError) as caught:
        verify(signed, Scores, Ed25519PrivateKey.generate().public_key())
    assert caught.value.code == "document.bad_signature"
    with pytest.raises(ManifestError) as caught:
        verify(signed, TensorEntry, KEY.public_key())
    assert caught.value.code == "document.wrong_type"


def test_errors_carry_code_ids_and_hint() -> None:
    error = ManifestError(
        "a.b", "It broke.", hint="Fix it.", expected=1, got=[2], round="r", x=None
    )
    assert str(error).splitlines() == [
        "It broke. [a.b]",
        "  round: r",
        "  expected: 1",
        "  got: [2]",
        "  hint: Fix it.",
    ]
    assert error.as_dict()["ids"] == {"round": "r"}
    assert KINDS["ManifestError"] is ManifestError


def test_identifiers_are_fresh_and_time_has_its_zone() -> None:
    assert new_id("round").startswith("round-")
    assert new_id("x") != new_id("x")
    assert SystemClock().now().utcoffset() is not None


OLD_MANIFEST = (
    b'{"base_digest":"' + b"ab" * 32 + b'","base_number":3,"contributor":"org-a",'
    b'"created_at":"2026-03-02T12:00:00Z","encoding":"fp32","examples":7,"federation":"fed",'
    b'"kind":"full","metrics":{},"model":"m","nonce":"' + b"0" * 32 + b'","norm":1.5,'
    b'"round":"round-1","scaling":{},"tensors":[{"dtype":"F32","name":"w","nbytes":8,'
    b'"sha256":"' + b"cd" * 32 + b'","shape":[2]}],"training":{},"type":"coldmerge.manifest/1"}'
)
"""As clients signed it before there were statistics."""


def test_a_manifest_from_before_statistics_keeps_its_bytes() -> None:
    manifest = Manifest.parse(OLD_MANIFEST)
    assert manifest.statistics == {}
    assert manifest.canonical() == OLD_MANIFEST
    with_empty = OLD_MANIFEST.replace(b'"tensors"', b'"statistics":{},"tensors"')
    with pytest.raises(ManifestError) as caught:
        Manifest.parse(with_empty)
    assert caught.value.code == "document.not_canonical"


def test_a_manifest_with_statistics() -> None:
    raw = OLD_MANIFEST.replace(b'"tensors"', b'"statistics":{"fisher":12.0},"tensors"')
    manifest = Manifest.parse(raw)
    assert manifest.statistics == {"fisher": 12.0}
    assert manifest.canonical() == raw
    for wrong in (b'{"kfac":1.0}', b'{"fisher":0.0}', b'{"fisher":NaN}'):
        with pytest.raises(ManifestError) as caught:
            Manifest.parse(raw.replace(b'{"fisher":12.0}', wrong))
        assert caught.value.code == "document.malformed"
