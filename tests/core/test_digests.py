from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from coldmerge.core.checkpoint import Checkpoint
from coldmerge.core.checkpoint_writer import CheckpointWriter
from coldmerge.core.digests import (
    Content,
    content_digest,
    content_entries,
    master_digest,
)
from coldmerge.core.errors import IntegrityError
from coldmerge.core.merkle import merkle_root

# The tree heads of RFC 6962's reference implementation over its test leaves.
LEAVES = [
    bytes.fromhex(leaf)
    for leaf in (
        "",
        "00",
        "10",
        "2021",
        "3031",
        "40414243",
        "5051525354555657",
        "606162636465666768696a6b6c6d6e6f",
    )
]
ROOTS = [
    "6e340b9cffb37a989ca544e6bb780a2c78901d3fb33738768511a30617afa01d",
    "fac54203e7cc696cf0dfcb42c92a1d9dbaf70ad9e621f4bd8d98662f00e3c125",
    "aeb6bcfe274b70a14fb067a5e5578264db0fa9b51af5e0ba159158f329e06e77",
    "d37ee418976dd95753c1c73862b9398fa2a2cf9b4ff0fdfe8b30cd95209614b7",
    "4e3bbb1f7b478dcfe71fb631631519a3bca12c9aefca1612bfce4c13a86264d4",
    "76e67dadbcdf1e10e1b74ddc608abd2f98dfb16fbce75277b5232a127f2087ef",
    "ddb89be403809e325750d3d263cd78929c2942b7942a34b77e122c9594a74c8c",
    "5dc9da79a70659a9ad559cb701ded9a2ab9d823aad2f4960cfe370eff4604328",
]


def test_the_roots_are_those_of_rfc_6962() -> None:
    assert merkle_root([]) == hashlib.sha256(b"").hexdigest()
    for size, root in enumerate(ROOTS, 1):
        assert merkle_root(LEAVES[:size]) == root


def recursive_root(leaves: list[bytes]) -> bytes:
    if len(leaves) == 1:
        return hashlib.sha256(b"\0" + leaves[0]).digest()
    split = 1 << ((len(leaves) - 1).bit_length() - 1)
    pair = recursive_root(leaves[:split]) + recursive_root(leaves[split:])
    return hashlib.sha256(b"\1" + pair).digest()


@given(st.lists(st.binary(max_size=4), min_size=1, max_size=70))
def test_the_root_is_the_recursive_definition(leaves: list[bytes]) -> None:
    assert merkle_root(leaves) == recursive_root(leaves).hex()


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
