"""Payloads that are not what their manifest promises: refused, and nothing is counted."""

from __future__ import annotations

import random
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from coldmerge.core.errors import (
    ColdmergeError,
    ConflictError,
    IntegrityError,
    ManifestError,
    NotFoundError,
    TaskVectorError,
)
from coldmerge.wire.v1 import contributions_pb2
from coldmerge_coordinator.config import Limits
from coldmerge_coordinator.store.models import Contribution, Round, Upload
from tests.backends import needs_disk
from tests.harness import BF16, Array, Live, MachineClient, chunk, coordinator, deltas


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[MachineClient, Round]]:
    with coordinator(tmp_path_factory.mktemp("payloads") / "hub") as live:
        yield live.machine("a"), live.open_round(min_contributions=5)


def _nothing_left(live: Live) -> None:
    with live.store.database.read() as session:
        assert session.query(Upload).count() == session.query(Contribution).count() == 0
    assert list(live.store.uploads.iterdir()) == []
    assert list(live.store.payloads.listed()) == []


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.dtype(np.float32), BF16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("step", [3, 2**20])
def test_a_single_nan_or_infinity(
    shared: tuple[MachineClient, Round], value: float, dtype: np.dtype[np.generic], step: int
) -> None:
    org, round_ = shared
    changes: dict[str, Array] = {name: array.astype(dtype) for name, array in deltas().items()}
    changes["layer.weight"][2, 3] = value
    encoding = "bf16" if dtype == BF16 else "fp32"
    manifest, payload = org.manifest(round_, changes, encoding=encoding)
    begun = org.begin(manifest)
    with pytest.raises(TaskVectorError) as caught:
        org.write(begun.upload_id, payload, step=step)
    assert caught.value.code == "payload.not_finite"
    assert "layer.weight" in caught.value.message
    _nothing_left(org.live)


def test_values_whose_squares_overflow_are_not_taken_for_infinite(
    shared: tuple[MachineClient, Round],
) -> None:
    org, round_ = shared
    largest = np.full((4, 4), np.finfo(np.float32).max, np.float32)
    manifest, payload = org.manifest(round_, {"layer.weight": largest})
    begun = org.begin(manifest)
    assert org.write(begun.upload_id, payload) == len(payload)
    org.live.drop_uploads()


def test_a_nan_in_lora_factors(shared: tuple[MachineClient, Round]) -> None:
    org, round_ = shared
    changes = {
        "layer.weight.lora_A": np.full((1, 4), np.nan, np.float32),
        "layer.weight.lora_B": np.ones((4, 1), np.float32),
    }
    manifest, payload = org.manifest(round_, changes, kind="lora", scaling={"layer.weight": 1.0})
    begun = org.begin(manifest)
    with pytest.raises(TaskVectorError):
        org.write(begun.upload_id, payload)
    _nothing_left(org.live)


def test_lora_factors_whose_product_overflows(shared: tuple[MachineClient, Round]) -> None:
    org, round_ = shared
    huge = np.float32(3e38)
    changes = {
        "layer.weight.lora_A": np.full((1, 4), huge, np.float32),
        "layer.weight.lora_B": np.full((4, 1), huge, np.float32),
    }
    manifest, payload = org.manifest(round_, changes, kind="lora", scaling={"layer.weight": 1e30})
    begun = org.begin(manifest)
    org.write(begun.upload_id, payload)
    with pytest.raises(TaskVectorError) as caught:
        org.commit(begun.upload_id)
    assert caught.value.code == "payload.product_not_finite"
    _nothing_left(org.live)


def test_every_flipped_byte_is_found(shared: tuple[MachineClient, Round]) -> None:
    org, round_ = shared
    generator = random.Random(5)
    manifest, payload = org.manifest(round_, deltas())
    signed = org.sign(manifest)
    for _ in range(25):
        raw = bytearray(payload)
        raw[generator.randrange(len(raw))] ^= 1 << generator.randrange(8)
        begun = org.begin(signed)
        with pytest.raises((IntegrityError, TaskVectorError)) as caught:
            org.write(begun.upload_id, bytes(raw))
        assert caught.value.code in {"payload.wrong_hash", "payload.not_finite"}
        _nothing_left(org.live)


def test_a_truncated_stream(shared: tuple[MachineClient, Round]) -> None:
    org, round_ = shared
    manifest, payload = org.manifest(round_, deltas())
    begun = org.begin(manifest)
    org.write(begun.upload_id, payload[:-1])
    with pytest.raises(ConflictError) as caught:
        org.commit(begun.upload_id)
    assert (caught.value.code, caught.value.got) == (
        "upload.incomplete",
        f"{len(payload) - 1} bytes",
    )
    assert org.status(begun.upload_id).committed_size == len(payload) - 1
    org.live.drop_uploads()
    _nothing_left(org.live)


def test_a_tensor_listed_but_not_sent(shared: tuple[MachineClient, Round]) -> None:
    org, round_ = shared
    manifest, payload = org.manifest(round_, deltas())
    begun = org.begin(manifest)
    org.write(begun.upload_id, payload[: manifest.tensors[0].nbytes])
    with pytest.raises(ConflictError):
        org.commit(begun.upload_id)
    org.live.drop_uploads()


def test_nothing_sent_at_all(shared: tuple[MachineClient, Round]) -> None:
    org, round_ = shared
    begun = org.begin(org.manifest(round_, deltas())[0])
    assert org.stream([]) == 0
    with pytest.raises(ConflictError):
        org.commit(begun.upload_id)
    org.live.drop_uploads()


@pytest.mark.parametrize("extra", [1, 4096])
@needs_disk
def test_a_padded_stream(shared: tuple[MachineClient, Round], extra: int) -> None:
    org, round_ = shared
    manifest, payload = org.manifest(round_, deltas())
    begun = org.begin(manifest)
    with pytest.raises(ManifestError) as caught:
        org.write(begun.upload_id, payload + b"\0" * extra)
    assert caught.value.code == "payload.too_long"
    org.write(begun.upload_id, payload, offset=org.status(begun.upload_id).committed_size)
    with pytest.raises(ManifestError):
        org.write(begun.upload_id, b"\0", offset=len(payload))
    part = org.live.store.uploads / f"{begun.upload_id}.part"
    assert part.read_bytes()[:-8].endswith(payload), "8 bytes behind it name the writer"
    org.live.drop_uploads()


def _too_large(upload: str, _payload: bytes) -> contributions_pb2.WriteRequest:
    return chunk(upload, 0, b"\0" * (2**20 + 1))


def _unnamed(_upload: str, payload: bytes) -> contributions_pb2.WriteRequest:
    return chunk("", 0, payload)


def _path(_upload: str, payload: bytes) -> contributions_pb2.WriteRequest:
    return chunk("../coldmerge.db", 0, payload)


def _after_the_end(upload: str, payload: bytes) -> contributions_pb2.WriteRequest:
    return chunk(upload, 2**62, payload)


@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (_too_large, ManifestError),
        (_unnamed, NotFoundError),
        (_path, NotFoundError),
        (_after_the_end, ConflictError),
    ],
)
def test_odd_messages(
    shared: tuple[MachineClient, Round],
    make: Callable[[str, bytes], contributions_pb2.WriteRequest],
    kind: type[ColdmergeError],
) -> None:
    org, round_ = shared
    manifest, payload = org.manifest(round_, deltas())
    begun = org.begin(manifest)
    with pytest.raises(kind):
        org.stream([make(begun.upload_id, payload)])
    org.write(begun.upload_id, payload)
    org.live.drop_uploads()
    _nothing_left(org.live)


def test_two_uploads_in_one_stream(shared: tuple[MachineClient, Round]) -> None:
    org, round_ = shared
    first, payload = org.manifest(round_, deltas(1))
    second, _ = org.manifest(round_, deltas(2))
    one, two = org.begin(first), org.begin(second)
    with pytest.raises(ManifestError) as caught:
        org.stream([chunk(one.upload_id, 0, payload[:8]), chunk(two.upload_id, 8, payload[8:])])
    assert caught.value.code == "upload.bad_chunk"
    org.live.drop_uploads()


def test_the_client_side_of_a_broken_stream_keeps_its_cause(
    shared: tuple[MachineClient, Round],
) -> None:
    org, round_ = shared
    manifest, payload = org.manifest(round_, deltas())
    begun = org.begin(manifest)

    def breaks() -> Iterator[contributions_pb2.WriteRequest]:
        yield chunk(begun.upload_id, 0, payload[:8])
        raise FileNotFoundError("the outbox is gone")

    with pytest.raises(FileNotFoundError, match="outbox"):
        org.stream(breaks())
    org.live.drop_uploads()


def test_a_full_disk_in_mid_upload_loses_nothing(tmp_path: Path) -> None:
    """A real full file system, where one may be mounted."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(disk)], capture_output=True
    )
    if mounted.returncode:
        pytest.skip("no file system may be mounted here")
    try:
        _fill(disk)
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def _fill(disk: Path) -> None:
    size = 2 * 2**20
    with coordinator(disk / "hub", {"w": np.zeros(size, np.float32)}) as live:
        live.store.config = live.store.config.model_copy(
            update={"limits": Limits(keep_free_bytes=0)}
        )
        org = live.machine("a")
        round_ = live.open_round(min_contributions=1)
        filler = disk / "filler"
        filler.write_bytes(b"\0" * (4 * 2**20))
        manifest, payload = org.manifest(round_, {"w": np.ones(size, np.float32)})
        with pytest.raises(ColdmergeError) as caught:
            org.begin(manifest)
        assert caught.value.grpc_status == "RESOURCE_EXHAUSTED"
        filler.unlink()
        (disk / "hub-source" / "model.safetensors").unlink()
        begun = org.begin(manifest)
        org.write(begun.upload_id, payload)
        org.commit(begun.upload_id)
