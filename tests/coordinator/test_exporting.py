"""A release as a folder: the same bytes, a card, a record anyone can check, loadable."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from coldmerge.core.checkpoint import Checkpoint
from coldmerge.core.digests import Content, content_entries
from coldmerge.core.documents import ReleaseRecord, Signed, verify
from coldmerge.core.errors import ConflictError, IntegrityError, NotFoundError
from coldmerge_coordinator.exporting import export
from coldmerge_coordinator.importing import add_model
from coldmerge_coordinator.store import releases
from coldmerge_coordinator.worker import run_once

if TYPE_CHECKING:
    from tests.coordinator.conftest import Bench

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


def two_releases(bench: Bench) -> None:
    rng = np.random.default_rng(1)
    bench.add_model(
        {
            "body.weight": rng.normal(size=(300, 1000)).astype(BFLOAT16),
            "body.bias": rng.normal(size=1000).astype(np.float32),
            "ids": np.arange(9),
        },
        private=("head.*",),
    )
    round_id = bench.open_round()
    bench.contribute(round_id, "a", {"body.bias": np.ones(1000, np.float32)})
    run_once(bench.store, bench.clock)


def test_the_folder_has_the_content_that_the_release_names(bench: Bench, tmp_path: Path) -> None:
    two_releases(bench)
    for number, max_shard_bytes in ((0, 5 * 10**9), (1, 300_000), (None, 5 * 10**9)):
        out = tmp_path / f"{number}-{max_shard_bytes}"
        done: list[tuple[str, int, int]] = []
        exported = export(
            bench.store,
            "m",
            number,
            out,
            max_shard_bytes=max_shard_bytes,
            progress=lambda *step, done=done: done.append(step),
        )
        release = bench.release(number)
        assert content_entries(Checkpoint.open(out)).digest == release.content_digest
        assert exported.digest == release.content_digest
        assert exported.number == release.number
        assert done[-1] == ("export", exported.nbytes, exported.nbytes)
    sharded = sorted(p.name for p in (tmp_path / "1-300000").glob("*.safetensors*"))
    assert sharded[-1] == "model.safetensors.index.json"
    assert len(sharded) > 2


def test_card_and_record(bench: Bench, tmp_path: Path) -> None:
    two_releases(bench)
    export(bench.store, "m", 1, tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "release 1" in card
    assert "head.*" in card
    body: dict[str, Any] = json.loads((tmp_path / "out" / "coldmerge-release.json").read_text())
    signed = Signed(base64.b64decode(body["document"]), base64.b64decode(body["signature"]))
    key = Ed25519PublicKey.from_public_bytes(bytes.fromhex(body["signing_key"]))
    record = verify(signed, ReleaseRecord, key)
    assert Content.from_json(body["listing"]).digest == record.content_digest
    assert body["record"] == json.loads(signed.document)


def test_exporting_twice_gives_the_same_bytes(bench: Bench, tmp_path: Path) -> None:
    two_releases(bench)
    folders = [tmp_path / name for name in ("one", "two")]
    for folder in folders:
        export(bench.store, "m", 1, folder)
    names = [sorted(path.name for path in folder.iterdir()) for folder in folders]
    assert names[0] == names[1]
    for name in names[0]:
        assert (folders[0] / name).read_bytes() == (folders[1] / name).read_bytes()


def test_what_is_refused(bench: Bench, tmp_path: Path) -> None:
    two_releases(bench)
    with pytest.raises(NotFoundError, match=r"release\.unknown"):
        export(bench.store, "m", 7, tmp_path / "out")
    with pytest.raises(NotFoundError, match=r"model\.unknown"):
        export(bench.store, "x", None, tmp_path / "out")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(ConflictError, match=r"checkpoint\.folder_exists"):
        export(bench.store, "m", 0, tmp_path / "full")
    with bench.store.database.read() as session:
        listing = releases.get_listing(session, bench.release(0).content_digest)
    blob = bench.store.blobs.path(listing.by_name["ids"].sha256)
    raw = bytearray(blob.read_bytes())
    raw[0] ^= 1
    blob.write_bytes(raw)
    with pytest.raises(IntegrityError, match=r"export\.corrupt"):
        export(bench.store, "m", 0, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bench", "full"]


def test_transformers_loads_what_rounds_made(bench: Bench, tmp_path: Path) -> None:
    import torch
    from transformers import AutoModel, BertConfig, BertModel

    torch.manual_seed(0)
    torch.set_num_threads(1)
    config = BertConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        vocab_size=50,
        max_position_embeddings=16,
    )
    BertModel(config).save_pretrained(tmp_path / "hf")
    add_model(bench.store, "m", tmp_path / "hf", clock=bench.clock)
    name = "encoder.layer.0.output.dense.bias"
    round_id = bench.open_round()
    bench.contribute(round_id, "a", {name: np.full(16, 0.5, np.float32)})
    run_once(bench.store, bench.clock)
    loaded = []
    for number in (0, 1):
        export(bench.store, "m", number, tmp_path / str(number), max_shard_bytes=4000)
        model, info = AutoModel.from_pretrained(
            tmp_path / str(number), output_loading_info=True, dtype="auto"
        )
        assert not info["missing_keys"]
        assert not info["unexpected_keys"]
        loaded.append(model.state_dict())
    changed = [key for key in loaded[0] if not torch.equal(loaded[0][key], loaded[1][key])]
    assert changed == [name]
    assert torch.equal(loaded[1][name], loaded[0][name] + 0.5)
