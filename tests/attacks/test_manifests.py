"""Forged, replayed and ill-fitting manifests: none is admitted, nothing is stored."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from coldmerge.core.documents import Manifest, Signed, sign
from coldmerge.core.errors import (
    ColdmergeError,
    ConflictError,
    ManifestError,
    NotFoundError,
    ResourceError,
    TaskVectorError,
)
from coldmerge_coordinator.config import CoordinatorConfig, Limits, save
from coldmerge_coordinator.store.models import Contribution, Round, Upload
from tests.harness import BF16, Array, Live, MachineClient, coordinator, deltas
from tests.support import evaluation

FLIPS = 300


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[MachineClient, Round]]:
    with coordinator(tmp_path_factory.mktemp("manifests") / "hub") as live:
        yield live.machine("a"), live.open_round(min_contributions=5)


@pytest.fixture(autouse=True)
def nothing_stored(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    if "shared" in request.fixturenames:
        org, _ = request.getfixturevalue("shared")
        with org.live.store.database.read() as session:
            assert session.query(Upload).count() == session.query(Contribution).count() == 0
        assert list(org.live.store.uploads.iterdir()) == []


def _refused(org: MachineClient, manifest: Manifest | Signed) -> ColdmergeError:
    with pytest.raises(ColdmergeError) as caught:
        org.begin(manifest)
    return caught.value


WRONG_FIELDS: dict[str, tuple[dict[str, Any], type[ColdmergeError], str]] = {
    "federation": ({"federation": "other"}, ManifestError, "manifest.wrong_addressee"),
    "contributor": ({"contributor": "b"}, ManifestError, "manifest.wrong_addressee"),
    "model": ({"model": "other"}, ManifestError, "manifest.wrong_addressee"),
    "round": ({"round": "round-0"}, NotFoundError, "round.unknown"),
    "base": ({"base_digest": "0" * 64}, TaskVectorError, "manifest.wrong_base"),
    "number": ({"base_number": 7}, TaskVectorError, "manifest.wrong_base"),
    "encoding": ({"encoding": "bf16"}, TaskVectorError, "manifest.wrong_dtype"),
    "scaling": ({"scaling": {"layer.weight": 1.0}}, ManifestError, "manifest.wrong_scaling"),
}


@pytest.mark.parametrize("field", sorted(WRONG_FIELDS))
def test_a_manifest_for_something_else(shared: tuple[MachineClient, Round], field: str) -> None:
    org, round_ = shared
    changes, kind, code = WRONG_FIELDS[field]
    error = _refused(org, org.manifest(round_, deltas(), **changes)[0])
    assert (type(error), error.code) == (kind, code)


def test_a_wrong_base_names_the_right_one(shared: tuple[MachineClient, Round]) -> None:
    org, round_ = shared
    error = _refused(org, org.manifest(round_, deltas(), base_digest="0" * 64)[0])
    assert error.expected == f"release 0, {round_.base_digest}"
    assert "coldmerge pull" in error.hint


F4 = np.zeros((4, 4), np.float32)
CHANGES: dict[str, tuple[dict[str, Array], str]] = {
    "unknown": ({"encoder.weight": F4}, "manifest.unknown_tensor"),
    "extra": ({"layer.weight": F4, "layer.weight2": F4}, "manifest.unknown_tensor"),
    "private": ({"classifier.weight": np.zeros((2, 4), np.float32)}, "manifest.private_tensor"),
    "private, wrapped": (
        {"base_model.model.classifier.weight": np.zeros((2, 4), np.float32)},
        "manifest.private_tensor",
    ),
    "private, new": ({"classifier.bias": np.zeros(2, np.float32)}, "manifest.private_tensor"),
    "private, prefixed": (
        {"bert.classifier.bias": np.zeros(2, np.float32)},
        "manifest.private_tensor",
    ),
    "buffer": ({"position_ids": np.zeros(16, np.float32)}, "manifest.buffer"),
    "transposed": ({"embeddings.weight": np.zeros((4, 16), np.float32)}, "manifest.wrong_shape"),
    "flat": ({"layer.weight": np.zeros(16, np.float32)}, "manifest.wrong_shape"),
    "deeper": ({"layer.weight": np.zeros((1, 4, 4), np.float32)}, "manifest.wrong_shape"),
    "empty": ({"layer.weight": np.zeros((0, 4), np.float32)}, "manifest.wrong_length"),
    "float64": ({"layer.weight": np.zeros((4, 4))}, "manifest.wrong_dtype"),
    "integers": ({"layer.weight": np.zeros((4, 4), np.int32)}, "manifest.wrong_dtype"),
    "bfloat": ({"layer.weight": np.zeros((4, 4), BF16)}, "manifest.wrong_dtype"),
    "factor": ({"layer.weight.lora_A": F4}, "manifest.unknown_tensor"),
}


@pytest.mark.parametrize("case", sorted(CHANGES))
def test_tensors_that_do_not_fit(shared: tuple[MachineClient, Round], case: str) -> None:
    org, round_ = shared
    changes, code = CHANGES[case]
    assert _refused(org, org.manifest(round_, changes)[0]).code == code


A, B = "layer.weight.lora_A", "layer.weight.lora_B"
R2 = np.zeros((2, 4), np.float32)
LORA: dict[str, tuple[dict[str, Array], dict[str, float], str]] = {
    "half": ({A: R2}, {"layer.weight": 1.0}, "manifest.missing_tensor"),
    "other half": ({B: R2.T}, {"layer.weight": 1.0}, "manifest.missing_tensor"),
    "no scaling": ({A: R2, B: R2.T}, {}, "manifest.wrong_scaling"),
    "odd scaling": ({A: R2, B: R2.T}, {"layer.bias": 1.0}, "manifest.wrong_scaling"),
    "ranks differ": (
        {A: R2, B: np.zeros((4, 3), np.float32)},
        {"layer.weight": 1.0},
        "manifest.wrong_shape",
    ),
    "swapped": ({A: R2.T, B: R2}, {"layer.weight": 1.0}, "manifest.wrong_shape"),
    "of a vector": (
        {"layer.bias.lora_A": R2, "layer.bias.lora_B": R2.T},
        {"layer.bias": 1.0},
        "manifest.wrong_shape",
    ),
    "twice": ({A: R2, B: R2.T, "layer.weight": F4}, {"layer.weight": 1.0}, "manifest.tensor_twice"),
    "private": (
        {"classifier.weight.lora_A": R2, "classifier.weight.lora_B": R2},
        {"classifier.weight": 1.0},
        "manifest.private_tensor",
    ),
    "buffer": (
        {"position_ids.lora_A": R2, "position_ids.lora_B": R2.T},
        {"position_ids": 1.0},
        "manifest.buffer",
    ),
}


@pytest.mark.parametrize("case", sorted(LORA))
def test_lora_factors_that_do_not_fit(shared: tuple[MachineClient, Round], case: str) -> None:
    org, round_ = shared
    changes, scaling, code = LORA[case]
    manifest = org.manifest(round_, changes, kind="lora", scaling=scaling)[0]
    assert _refused(org, manifest).code == code


def test_a_length_that_the_shape_does_not_have(shared: tuple[MachineClient, Round]) -> None:
    org, round_ = shared
    manifest, _ = org.manifest(round_, deltas())
    first = manifest.tensors[0].model_copy(update={"nbytes": 2**40})
    lying = manifest.model_copy(update={"tensors": (first, *manifest.tensors[1:])})
    assert _refused(org, lying).code == "manifest.wrong_length"


@pytest.mark.parametrize("order", ["reversed", "twice"])
def test_tensors_out_of_order(shared: tuple[MachineClient, Round], order: str) -> None:
    org, round_ = shared
    manifest, _ = org.manifest(round_, deltas())
    tensors = manifest.tensors[::-1] if order == "reversed" else manifest.tensors[:1] * 2
    lying = manifest.model_copy(update={"tensors": tensors})
    assert _refused(org, lying).code == "manifest.not_sorted"


def test_signatures_by_others(shared: tuple[MachineClient, Round]) -> None:
    org, round_ = shared
    other = org.live.machine("b", name=f"box-{round_.id[-6:]}")
    manifest, _ = org.manifest(round_, deltas())
    theirs = other.sign(manifest)
    assert _refused(org, theirs).code == "document.bad_signature"
    for signature in (b"", b"\0" * 64, org.sign(manifest).signature[:63]):
        forged = Signed(manifest.canonical(), signature)
        assert _refused(org, forged).code == "document.bad_signature"
    assert _refused(other, org.sign(manifest)).code == "document.bad_signature"
    mine = other.manifest(round_, deltas(), contributor="a")[0]
    assert _refused(other, mine).code == "manifest.wrong_addressee"


def test_no_flipped_bit_is_admitted(shared: tuple[MachineClient, Round]) -> None:
    org, round_ = shared
    signed = org.sign(org.manifest(round_, deltas())[0])
    generator = random.Random(3)
    for _ in range(FLIPS):
        raw = bytearray(signed.document + signed.signature)
        bit = generator.randrange(8 * len(raw))
        raw[bit // 8] ^= 1 << bit % 8
        flipped = Signed(bytes(raw[: len(signed.document)]), bytes(raw[len(signed.document) :]))
        assert _refused(org, flipped).code == "document.bad_signature"


REWRITES: dict[str, Callable[[dict[str, Any]], object]] = {
    "unknown key": lambda body: body.update(text="a private sentence"),
    "no tensors": lambda body: body.update(tensors=[]),
    "no nonce": lambda body: body.pop("nonce"),
    "NaN norm": lambda body: body.update(norm=float("nan")),
    "negative examples": lambda body: body.update(examples=-1),
    "text in metrics": lambda body: body.update(metrics={"accuracy": "a private sentence"}),
    "odd tensor name": lambda body: body["tensors"][0].update(name="../../etc/passwd"),
    "odd metric name": lambda body: body.update(metrics={"A private sentence.": 1.0}),
    "other type": lambda body: body.update(type="coldmerge.receipt/1"),
    "wide integer": lambda body: body.update(base_number=10**400),
}


@pytest.mark.parametrize("case", sorted(REWRITES))
def test_documents_that_break_the_schema(shared: tuple[MachineClient, Round], case: str) -> None:
    org, round_ = shared
    body = json.loads(org.manifest(round_, deltas())[0].canonical())
    REWRITES[case](body)
    raw = json.dumps(body, sort_keys=True, separators=(",", ":")).encode()
    error = _refused(org, Signed(raw, org.keys.identity.sign(raw)))
    assert error.code in {"document.malformed", "document.wrong_type", "manifest.wrong_base"}


@pytest.mark.parametrize(
    "raw",
    [b"", b"{}", b"null", b"[" * 100_000, b'{"type":"coldmerge.manifest/1"}', b"\xff" * 100],
    ids=["nothing", "object", "null", "deep", "bare", "binary"],
)
def test_bytes_that_are_no_document(shared: tuple[MachineClient, Round], raw: bytes) -> None:
    org, _ = shared
    assert _refused(org, Signed(raw, org.keys.identity.sign(raw))).code.startswith("document.")


def test_another_rendering_of_the_same_content(shared: tuple[MachineClient, Round]) -> None:
    org, round_ = shared
    body = json.loads(org.manifest(round_, deltas())[0].canonical())
    raw = json.dumps(body).encode()
    error = _refused(org, Signed(raw, org.keys.identity.sign(raw)))
    assert error.code == "document.not_canonical"


def test_another_signed_document_is_no_manifest(shared: tuple[MachineClient, Round]) -> None:
    org, round_ = shared
    judged = evaluation(round_, "a", org.live.clock.now())
    assert _refused(org, sign(judged, org.keys.identity)).code == "document.wrong_type"


def test_a_nonce_is_used_once(live: Live) -> None:
    org = live.machine("a")
    round_ = live.open_round(min_contributions=3)
    manifest, payload = org.manifest(round_, deltas(1))
    begun = org.begin(manifest)
    other, _ = org.manifest(round_, deltas(2), nonce=manifest.nonce)
    assert _refused(org, other).code == "manifest.replayed"
    org.write(begun.upload_id, payload)
    org.commit(begun.upload_id)
    assert _refused(org, other).code == "manifest.replayed"
    again = manifest.model_copy(update={"created_at": manifest.created_at + timedelta(seconds=1)})
    assert _refused(org, again).code == "manifest.replayed"


def test_a_committed_manifest_replayed_counts_once(live: Live) -> None:
    org = live.machine("a")
    round_ = live.open_round(min_contributions=2)
    manifest, payload = org.manifest(round_, deltas(1))
    signed = org.sign(manifest)
    begun = org.begin(signed)
    org.write(begun.upload_id, payload)
    receipt = org.commit(begun.upload_id)
    for _ in range(5):
        assert org.begin(signed).receipt == receipt
    with live.store.database.read() as session:
        assert session.query(Contribution).count() == 1
        assert session.get_one(Round, round_.id).state == "OPEN"


def test_a_manifest_of_the_last_round_is_refused_in_the_next(live: Live) -> None:
    org = live.machine("a")
    first = live.open_round(min_contributions=1)
    late, payload = org.manifest(first, deltas(2))
    begun = org.begin(late)
    fresh, _ = org.manifest(first, deltas(3))
    live.machine("b").contribute(first, deltas(1))
    error = _refused(org, fresh)
    assert (type(error), error.code) == (ConflictError, "round.not_open")
    with pytest.raises(ConflictError) as caught:
        org.write(begun.upload_id, payload)
    assert caught.value.code == "round.not_open"
    with pytest.raises(ConflictError):
        org.commit(begun.upload_id)
    with live.store.database.read() as session:
        assert session.query(Contribution).count() == 1


def test_a_round_sealed_in_mid_stream_takes_no_more(live: Live) -> None:
    org = live.machine("a")
    round_ = live.open_round(min_contributions=1)
    manifest, payload = org.manifest(round_, deltas(2))
    begun = org.begin(manifest)
    org.write(begun.upload_id, payload)
    live.machine("b").contribute(round_, deltas(1))
    with pytest.raises(ConflictError) as caught:
        org.commit(begun.upload_id)
    assert caught.value.code == "round.not_open"
    with live.store.database.read() as session:
        sealed = session.get_one(Round, round_.id).sealed_inputs
    assert sealed is not None
    assert manifest.digest() not in sealed


@pytest.mark.parametrize(
    ("limits", "code"),
    [
        (Limits(max_payload_bytes=100), "upload.too_large"),
        (Limits(keep_free_bytes=2**60), "disk.too_small"),
    ],
)
def test_no_room(live: Live, limits: Limits, code: str) -> None:
    org = live.machine("a")
    round_ = live.open_round(min_contributions=1)
    _configure(live, limits)
    org.connect()
    error = _refused(org, org.manifest(round_, deltas())[0])
    assert (type(error), error.code) == (ResourceError, code)
    _configure(live, Limits())
    org.connect()
    org.contribute(round_, deltas())


def _configure(live: Live, limits: Limits) -> None:
    config: CoordinatorConfig = live.store.config.model_copy(update={"limits": limits})
    live.stop()
    save(config, Path(live.folder))
    live.store.config = config
    live.start()


def test_a_rank_beyond_the_tensor_would_fill_the_memory(
    shared: tuple[MachineClient, Round],
) -> None:
    org, round_ = shared
    factors = {
        "embeddings.weight.lora_A": np.zeros((65, 4), np.float32),
        "embeddings.weight.lora_B": np.zeros((16, 65), np.float32),
    }
    manifest, _ = org.manifest(round_, factors, kind="lora", scaling={"embeddings.weight": 1.0})
    assert _refused(org, manifest).code == "manifest.rank_too_large"
