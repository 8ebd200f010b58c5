"""Signed documents and manifests, and the payloads they promise."""

from __future__ import annotations

import hashlib
import json
import math
import struct
from functools import cache
from random import Random
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from coldmerge.core.documents import (
    Document,
    Evaluation,
    Manifest,
    Receipt,
    ReleaseRecord,
    Scores,
    Signed,
    TensorEntry,
    sign,
    verify,
)
from coldmerge.core.errors import (
    ConflictError,
    IntegrityError,
    ManifestError,
    ResourceError,
    TaskVectorError,
)
from coldmerge.rounds.continuous import AdmittedBase
from coldmerge_coordinator.admission import Target as RoundTarget
from coldmerge_coordinator.admission import check_manifest
from coldmerge_coordinator.payload import PayloadCheck
from tests.fuzz.engine import Verdict, demand
from tests.support import START

KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
DIGEST = "ab" * 32
SHAPES: dict[str, tuple[int, ...]] = {"bias": (3,), "layer.weight": (4, 3), "table": (2, 3, 5)}
KINDS: dict[str, type[Document]] = {
    kind.schema_name: kind for kind in (Manifest, Receipt, Evaluation, ReleaseRecord)
}
TOKENS = (
    *(b'"layer.weight"', b".lora_A", b".lora_B", b'"kind":"lora"', b'"encoding":"bf16"'),
    *(b'"scaling":{"layer.weight":1.0}', b'"statistics":{"fisher":1.0}', b'"head.weight"'),
    *(b'"type":"coldmerge.manifest/1"', b'"type":"coldmerge.release/1"', b"1e-400", b"F32"),
)


def entry(name: str, shape: tuple[int, ...], data: bytes, dtype: str = "F32") -> TensorEntry:
    """A tensor's entry in a manifest."""
    digest = hashlib.sha256(data).hexdigest()
    return TensorEntry(name=name, dtype=dtype, shape=shape, sha256=digest, nbytes=len(data))


def manifest(tensors: tuple[TensorEntry, ...], **changes: Any) -> Manifest:
    """A manifest for the round that `ROUND` describes."""
    values: dict[str, Any] = {
        "federation": "hub",
        "model": "m",
        "round": "round-1",
        "contributor": "org-a",
        "base_digest": DIGEST,
        "base_number": 3,
        "nonce": "0" * 32,
        "created_at": START,
        "kind": "full",
        "encoding": "fp32",
        "tensors": tensors,
        "examples": 10,
        "norm": 1.5,
        "metrics": {"loss": 0.25},
        "training": {"epochs": 1.0},
    }
    return Manifest(**{**values, **changes})


ROUND = RoundTarget(
    federation="hub",
    contributor="org-a",
    model="m",
    round="round-1",
    bases=(AdmittedBase(3, DIGEST),),
    tensors={
        **{name: entry(name, shape, bytes(4 * math.prod(shape))) for name, shape in SHAPES.items()},
        "head.weight": entry("head.weight", (2,), bytes(8)),
        "position_ids": entry("position_ids", (2,), bytes(16), "I64"),
    },
    private=("head.*",),
    max_payload_bytes=4096,
)


def genuine() -> dict[str, Signed]:
    """Every kind of document, truly signed."""
    whole = tuple(entry(n, s, bytes(4 * math.prod(s))) for n, s in sorted(SHAPES.items()))
    factors = (
        entry("layer.weight.lora_A", (2, 3), bytes(12), "BF16"),
        entry("layer.weight.lora_B", (4, 2), bytes(16), "BF16"),
    )
    common: dict[str, Any] = {
        "federation": "hub",
        "model": "m",
        "round": "round-1",
        "contributor": "org-a",
    }
    scores = Scores(accuracy=0.5, macro_f1=0.25)
    documents: dict[str, Document] = {
        "manifest-full": manifest(whole),
        "manifest-lora": manifest(
            factors, kind="lora", encoding="bf16", scaling={"layer.weight": 0.5}
        ),
        "receipt": Receipt(
            **common,
            contribution="contribution-1",
            manifest_digest=DIGEST,
            payload_bytes=12,
            accepted_at=START,
        ),
        "evaluation": Evaluation(
            **common,
            base_digest=DIGEST,
            candidate_digest="cd" * 32,
            n=10,
            base=scores,
            candidate=scores,
            gained=1,
            lost=2,
            probe_seed=7,
            created_at=START,
        ),
        "release": ReleaseRecord(
            federation="hub",
            model="m",
            number=1,
            content_digest=DIGEST,
            master_digest=DIGEST,
            previous_record=None,
            parents=(),
            round="round-1",
            recipe={"method": "mean", "rate": 0.5, "on": True, "none": None},
            contributions=(DIGEST,),
            created_at=START,
        ),
    }
    return {name: sign(document, KEY) for name, document in documents.items()}


@cache
def _signatures() -> dict[bytes, bytes]:
    return {signed.document: signed.signature for signed in genuine().values()}


def signed_document(data: bytes) -> Verdict:
    """64 bytes of signature, then a document of any kind: only what was signed may pass."""
    signed = Signed(data[64:], data[:64])
    passed = False
    for kind in KINDS.values():
        try:
            verify(signed, kind, KEY.public_key())
        except ManifestError as error:
            if error.code == "document.bad_signature":
                break
        else:
            passed = True
    if not passed:
        return Verdict.REFUSED
    demand(_signatures().get(signed.document) == signed.signature, "nobody signed this")
    return Verdict.ACCEPTED


def document(data: bytes) -> Verdict:
    """A document of any kind that its sender signed, whatever is in it."""
    accepted = 0
    for name, kind in KINDS.items():
        try:
            found = kind.parse(data)
        except ManifestError:
            continue
        demand(json.loads(data)["type"] == name, "a document of another type")
        demand(_canonical(data) == data and found.canonical() == data, "two renderings")
        accepted += 1
    demand(accepted < 2, "two types at once")
    return Verdict.ACCEPTED if accepted else Verdict.REFUSED


def _canonical(data: bytes) -> bytes:
    return json.dumps(
        json.loads(data), sort_keys=True, separators=(",", ":"), allow_nan=False
    ).encode("ascii")


def repair_document(data: bytearray, random: Random) -> bytes:
    """Render the JSON canonically again, most of the time."""
    if random.random() < 0.7:
        try:
            return _canonical(bytes(data))
        except (ValueError, RecursionError):
            return bytes(data)
    return bytes(data)


def admission(data: bytes) -> Verdict:
    """A manifest that its contributor signed, and the round it is for."""
    try:
        found = Manifest.parse(data)
        check_manifest(found, ROUND)
    except (ManifestError, TaskVectorError, ResourceError):
        return Verdict.REFUSED
    body = json.loads(data)
    said = [body[key] for key in ("federation", "model", "round", "contributor", "base_digest")]
    demand(said == ["hub", "m", "round-1", "org-a", DIGEST], "for somebody else")
    listed = {e["name"]: (e["dtype"], tuple(e["shape"]), e["nbytes"]) for e in body["tensors"]}
    names = [e["name"] for e in body["tensors"]]
    demand(names == sorted(set(names)) and not body.get("statistics"), "order, or statistics")
    demand(sum(size for _, _, size in listed.values()) <= ROUND.max_payload_bytes, "too much")
    for name, (dtype, shape, size) in listed.items():
        width = {"F32": 4, "BF16": 2}[dtype]
        demand((dtype == "F32") == (body["encoding"] == "fp32"), "another encoding")
        demand(size == width * math.prod(shape) and size > 0, "a size")
        stem, dot, factor = name.rpartition(".lora_")
        if body["kind"] == "full" or not dot:
            demand(SHAPES.get(name) == shape and name not in body["scaling"], "another tensor")
        else:
            _check_factor(listed, body["scaling"], stem, factor)
    return Verdict.ACCEPTED


def _check_factor(listed: dict[str, Any], scaling: dict[str, float], stem: str, part: str) -> None:
    (_, a, _), (_, b, _) = listed[f"{stem}.lora_A"], listed[f"{stem}.lora_B"]
    demand(part in ("A", "B") and stem in scaling and stem not in listed, "half a pair")
    rows, *rest = SHAPES[stem]
    demand(a[0] == b[1] >= 1 and (b[0], *a[1:]) == (rows, *rest) and len(b) == 2, "factors")


GENUINE_PAYLOAD = struct.pack("<22f", *(0.5 * i - 3 for i in range(15)), *([0.25] * 7))


def _payload_manifest(payload: bytes) -> Manifest:
    """Tensors of 3 and 12 elements and a Fisher diagonal of 7, whatever their bytes are."""
    parts = (("bias", (3,), 0, 12), ("layer.weight", (4, 3), 12, 60))
    tensors = [entry(name, shape, payload[a:b]) for name, shape, a, b in parts]
    tensors.append(entry("zeta.fisher", (7,), payload[60:88]))
    return manifest(tuple(tensors), statistics={"fisher": 1.0})


@cache
def _promised() -> Manifest:
    return _payload_manifest(GENUINE_PAYLOAD)


def payload(data: bytes) -> Verdict:
    """How to cut (8 bytes, the first says who lies), then a payload, fed in pieces.

    Even: the manifest promises `GENUINE_PAYLOAD`. Odd: it promises these very bytes, if
    they are as many, so that only what they mean can be wrong.
    """
    cuts, sent = data[:8], data[8:]
    own = bool(cuts) and cuts[0] % 2 == 1 and len(sent) == len(GENUINE_PAYLOAD)
    check = PayloadCheck(_payload_manifest(sent) if own else _promised())
    try:
        at = 0
        for number in range(1, 1 + len(sent)):
            step = cuts[1 + number % 7] % 48 if len(cuts) == 8 else 16
            check.feed(sent[at : at + step])
            at += step
        check.feed(sent[at:])
        check.check_complete()
    except (ManifestError, IntegrityError, TaskVectorError, ConflictError):
        return Verdict.REFUSED
    demand(own or sent == GENUINE_PAYLOAD, "other bytes than those promised")
    values = struct.unpack("<22f", sent)
    demand(all(map(math.isfinite, values)), "a NaN or an infinity")
    demand(all(value >= 0 for value in values[15:]), "a negative Fisher information")
    norm = math.sqrt(math.fsum(value * value for value in values[:15]))
    demand(math.isclose(check.norm, norm, rel_tol=1e-12), "another norm")
    return Verdict.ACCEPTED


def repair_payload(data: bytearray, random: Random) -> bytes:
    """The right length, half of the time."""
    wanted = 8 + len(GENUINE_PAYLOAD)
    if random.random() < 0.5:
        del data[wanted:]
        data.extend(bytes(wanted - len(data)))
    return bytes(data)
