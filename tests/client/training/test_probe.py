from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from coldmerge.core.errors import DataError, IntegrityError
from coldmerge_client.training import batches, models, trunk
from coldmerge_client.training.heads import Head
from coldmerge_client.training.probe import Encoder, embed, linear_probe

TEXTS = ["the apple", "some more iron and zinc", "cherry", "very very silver of the grape", "a"]


def test_the_probe_does_not_depend_on_the_scale_of_the_features() -> None:
    draw = np.random.default_rng(0)
    labels = draw.integers(0, 3, 90)
    features = (draw.normal(size=(90, 8)) + labels[:, None]).astype(np.float32)
    small = linear_probe(features[:60], labels[:60], features[60:], labels[60:], seed=1)
    large = linear_probe(64 * features[:60], labels[:60], 64 * features[60:], labels[60:], seed=1)
    assert small.tolist() == large.tolist()
    assert np.mean(small == labels[60:]) > 0.6


def test_a_probe_without_classes_is_refused() -> None:
    features = np.zeros((4, 2), np.float32)
    with pytest.raises(DataError) as caught:
        linear_probe(features, np.zeros(4, int), features, np.zeros(4, int), seed=0)
    assert caught.value.code == "probe.one_class"
    with pytest.raises(DataError) as caught:
        linear_probe(features, np.arange(3), features, np.arange(4), seed=0)
    assert caught.value.code == "probe.unpaired"


def test_features_do_not_depend_on_the_batch(bert: Path) -> None:
    together = embed(bert, TEXTS, max_length=16, batch_size=5)
    alone = embed(bert, TEXTS, max_length=16, batch_size=1)
    assert together.dtype == np.float32
    assert together.shape == (5, 32)
    np.testing.assert_allclose(together, alone, atol=1e-5)


def test_features_through_the_kept_trunk_are_the_same(bert: Path, tmp_path: Path) -> None:
    freeze, cache = ("embeddings.*", "encoder.layer.[0-1].*"), tmp_path / "cache"
    whole = embed(bert, TEXTS, max_length=16)
    for _ in range(2):
        cut = embed(bert, TEXTS, max_length=16, freeze=freeze, cache=cache)
        np.testing.assert_allclose(whole, cut, atol=1e-5)
    (kept,) = cache.iterdir()
    kept.write_bytes(b"damaged")
    again = embed(bert, TEXTS, max_length=16, freeze=freeze, cache=cache)
    np.testing.assert_allclose(whole, again, atol=1e-5)


def test_another_trunk_is_not_mistaken_for_this_one(bert: Path, tmp_path: Path) -> None:
    other, cache = tmp_path / "other", tmp_path / "cache"
    shutil.copytree(bert, other)
    model = models.load(transformers.AutoModel, bert)
    with torch.no_grad():
        model.encoder.layer[0].output.dense.weight.mul_(2)
    with models.quiet():
        model.save_pretrained(other)
    freeze = ("embeddings.*", "encoder.layer.0.*")
    embed(bert, TEXTS, freeze=freeze, cache=cache)
    found = embed(other, TEXTS, freeze=freeze, cache=cache)
    np.testing.assert_allclose(found, embed(other, TEXTS), atol=1e-5)
    assert len(list(cache.iterdir())) == 2


def test_a_decoder_is_cut_too_or_left_whole(llama: Path) -> None:
    encoder = Encoder(llama, 16)
    examples = encoder.tokenize(TEXTS, [None] * len(TEXTS))
    whole = encoder.pooled(examples)
    names = models.Names(encoder.body, llama)
    for name in names.frozen(["model.embed_tokens.*", "model.layers.0.*"]):
        names.parameters[name].requires_grad_(False)
    cut = trunk.cut(encoder.body, examples, batches.Collator(encoder.tokenizer))
    assert cut is not None
    found = encoder.pooled(cut.examples)
    np.testing.assert_allclose(whole, found, atol=1e-5)
    cut.restore()
    np.testing.assert_allclose(whole, encoder.pooled(examples), atol=1e-6)


def test_nothing_is_cut_where_something_below_is_trained(bert: Path) -> None:
    encoder = Encoder(bert, 16)
    examples = encoder.tokenize(TEXTS, [None] * len(TEXTS))
    names = models.Names(encoder.body, bert)
    for name in names.frozen(["encoder.layer.[0-1].*", "embeddings.word_embeddings.*"]):
        names.parameters[name].requires_grad_(False)
    assert trunk.cut(encoder.body, examples, batches.Collator(encoder.tokenizer)) is None


def test_a_head_survives_the_disk_and_damage_is_noticed(tmp_path: Path) -> None:
    head = Head("task", ("a", "b"), {"w": torch.arange(6.0).reshape(2, 3), "p": torch.ones(2)})
    head.save(tmp_path / "head")
    found = Head.load(tmp_path / "head")
    assert found.labels == head.labels
    assert all(found.tensors[name].equal(head.tensors[name]) for name in head.tensors)
    model = {"w": torch.zeros(3, 3), "p": torch.zeros(5)}
    assert found.fill(model, ("b", "c", "a")) == 1
    assert model["w"].tolist() == [[3, 4, 5], [0, 0, 0], [0, 1, 2]]
    (tmp_path / "head" / "head.safetensors").write_bytes(b"{}")
    with pytest.raises(IntegrityError) as caught:
        Head.load(tmp_path / "head")
    assert caught.value.code == "head.damaged"


def test_the_package_is_light_to_import() -> None:
    code = (
        "import sys, coldmerge_client.training, coldmerge_client.personal, coldmerge.evaluation;"
        "assert not {'torch', 'transformers', 'datasets', 'sklearn'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
