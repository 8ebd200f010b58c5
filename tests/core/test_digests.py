from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from coldmerge.core.checkpoint import Checkpoint
from coldmerge.core.checkpoint_writer import CheckpointWriter
from coldmerge.core.digests import (
    Content,
    content_digest,
    content_entries,
    master_digest,
)
from coldmerge.core.errors import IntegrityError


@pytest.fixture
def folder(save: Callable[..., Checkpoint]) -> Checkpoint:
    tensors = {
        "b.weight": torch.randn(40, 30),
        "a.weight": torch.randn(7, dtype=torch.bfloat16),
        "c.ids": torch.arange(9),
    }
    return save("model", tensors)


def test_entries_are_the_hashes_of_the_bytes(folder: Checkpoint) -> None:
    content = content_entries(folder)
    assert [entry.name for entry in content.tensors] == ["a.weight", "b.weight", "c.ids"]
    for entry in content.tensors:
        raw = folder.array(entry.name).tobytes()
        assert entry.sha256 == hashlib.sha256(raw).hexdigest()
        assert entry.nbytes == len(raw)
    (config,) = content.files
    assert config.path == "config.json"
    raw = (folder.folder / "config.json").read_bytes()
    assert (config.size, config.sha256) == (len(raw), hashlib.sha256(raw).hexdigest())


def test_sharding_and_the_model_card_are_not_in_the_digest(
    folder: Checkpoint, tmp_path: Path
) -> None:
    with CheckpointWriter(tmp_path / "sharded", max_shard_bytes=80) as writer:
        writer.declare([folder.tensors[name] for name in ("c.ids", "a.weight", "b.weight")])
        for name in folder.tensors:
            writer.write(name, folder.raw(name))
        writer.copy_file(folder.folder / "config.json", "config.json")
        writer.write_file("README.md", b"# card")
    other = Checkpoint.open(tmp_path / "sharded")
    assert len(list(other.folder.glob("*.safetensors"))) == 3
    assert content_entries(other).digest == content_entries(folder).digest


def test_one_changed_bit_changes_the_digest(folder: Checkpoint) -> None:
    before = content_entries(folder).digest
    path = folder.folder / "model.safetensors"
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
    assert content_entries(Checkpoint.open(folder.folder)).digest != before


def test_the_digest_does_not_depend_on_the_order_given(folder: Checkpoint) -> None:
    content = content_entries(folder)
    assert content_digest(content.tensors[::-1], content.files) == content.digest


def test_content_survives_json_and_refuses_disorder(folder: Checkpoint) -> None:
    content = content_entries(folder)
    body = content.to_json()
    assert Content.from_json(body) == content
    with pytest.raises(IntegrityError) as caught:
        Content.from_json(body | {"tensors": body["tensors"][::-1]})
    assert caught.value.code == "content.not_sorted"
    with pytest.raises(IntegrityError) as caught:
        Content.from_json({"tensors": [{"name": 3}], "files": []})
    assert caught.value.code == "content.malformed"


def test_progress_counts_every_byte(folder: Checkpoint) -> None:
    seen: list[int] = []
    content_entries(folder, seen.append)
    assert sum(seen) == sum(spec.nbytes for spec in folder.tensors.values())


def test_master_digest_depends_on_names_and_hashes() -> None:
    a, b = "0" * 64, "1" * 64
    assert master_digest({"x": a, "y": b}) == master_digest({"y": b, "x": a})
    assert master_digest({"x": a, "y": b}) != master_digest({"x": b, "y": a})


def test_scalars_and_empty_tensors_have_digests(save: Callable[..., Checkpoint]) -> None:
    folder = save("odd", {"scalar": torch.tensor(2.0), "empty": torch.zeros(0, 4)})
    empty, scalar = content_entries(folder).tensors
    assert empty.sha256 == hashlib.sha256(b"").hexdigest()
    assert scalar.sha256 == hashlib.sha256(np.float32(2).tobytes()).hexdigest()
