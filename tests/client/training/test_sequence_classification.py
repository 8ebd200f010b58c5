from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
import transformers

from coldmerge.core.checkpoint import Checkpoint
from coldmerge.core.errors import ConfigError, ConflictError, NotFoundError
from coldmerge.core.names import match_names
from coldmerge_client import personal
from coldmerge_client.training import EvaluateJob, TrainConfig, TrainJob, load_trainer, trunk
from coldmerge_client.training.heads import Head

Configure = Callable[..., TrainConfig]
Job = Callable[..., TrainJob]


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = safetensors.torch.load_file(folder / "model.safetensors")
    return found


def changed(release: Path, tuned: Path) -> set[str]:
    """Names of the release whose tensors differ in the fine-tune."""
    base, after = tensors(release), tensors(tuned)
    names = match_names(base, after)
    return {known for name, known in names.items() if known and not after[name].equal(base[known])}


def test_trains_a_loadable_model_and_keeps_the_head(
    bert: Path, configure: Configure, job: Job
) -> None:
    seen: list[tuple[str, int, int]] = []
    trained = load_trainer(configure(epochs=2)).train(
        job(configure(epochs=2)), lambda step, done, total: seen.append((step, done, total))
    )
    assert seen[-1] == ("train", 10, 10)
    assert trained.examples == 40
    assert trained.training["steps"] == 10
    assert set(trained.metrics) == {"train_loss", "val_accuracy", "val_macro_f1"}
    transformers.AutoModelForSequenceClassification.from_pretrained(trained.folder)
    names = match_names(Checkpoint.open(bert).tensors, Checkpoint.open(trained.folder).tensors)
    assert {name for name, known in names.items() if known is None} == {
        "classifier.weight",
        "classifier.bias",
    }
    assert set(names.values()) - {None} == set(Checkpoint.open(bert).tensors)
    assert trained.head is not None
    head = Head.load(trained.head)
    assert head.labels == ("fruit", "metal")
    assert head.tensors["classifier.weight"].equal(tensors(trained.folder)["classifier.weight"])
    assert json.loads((trained.head / "labels.json").read_text())["labels"] == ["fruit", "metal"]


def test_the_same_seed_gives_the_same_tensors(bert: Path, configure: Configure, job: Job) -> None:
    config = configure()
    trainer = load_trainer(config)
    first = trainer.train(job(config, "first"))
    torch.manual_seed(99)
    second = trainer.train(job(config, "second"))
    other = trainer.train(job(config, "other", seed=4))
    one, two, three = (tensors(trained.folder) for trained in (first, second, other))
    assert all(one[name].equal(two[name]) for name in one)
    assert not all(one[name].equal(three[name]) for name in one)
    assert first.metrics == second.metrics


@pytest.mark.parametrize("pooling", ["model", "mean"])
def test_frozen_tensors_stay_and_the_rest_learns(
    bert: Path, configure: Configure, job: Job, tmp_path: Path, pooling: str
) -> None:
    config = configure(freeze=["embeddings.*", "encoder.layer.[0-1].*"], pooling=pooling, epochs=2)
    cache = tmp_path / "cache"
    trained = load_trainer(config).train(job(config, cache=cache))
    moved = changed(bert, trained.folder)
    assert moved
    assert {name.split(".")[0] for name in moved} <= {"encoder", "pooler"}
    assert {name.split(".")[2] for name in moved if name.startswith("encoder")} == {"2"}
    (kept,) = cache.glob("trunk-*.safetensors")
    assert kept.stat().st_mode & 0o077 == 0
    again = load_trainer(config).train(job(config, "again", cache=cache))
    one, two = tensors(trained.folder), tensors(again.folder)
    assert all(one[name].equal(two[name]) for name in one)


def test_adapters_learn_past_the_frozen_trunk(
    configure: Configure, job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the names of the whole model, and what training the whole model gives."""
    cache = tmp_path / "cache"
    config = configure(
        method="lora",
        lora={"target_modules": ["query", "value"]},
        freeze=["embeddings.*", "encoder.layer.[0-1].*"],
        pooling="mean",
        epochs=4,
    )
    short = load_trainer(config).train(job(config, "short", cache=cache)).folder
    (_,) = cache.glob("trunk-*.safetensors")
    monkeypatch.setattr(trunk, "cut", lambda *_: None)
    whole = load_trainer(config).train(job(config, "whole")).folder
    one, two = (
        safetensors.torch.load_file(folder / "adapter_model.safetensors")
        for folder in (short, whole)
    )
    assert one.keys() == two.keys()
    assert {name.partition("layer.")[2][0] for name in one if "lora_" in name} == {"2"}
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, two[name], atol=2e-3, rtol=0.02)


def test_only_states_that_come_again_are_kept(
    configure: Configure, job: Job, tmp_path: Path
) -> None:
    """A sample of the training data comes once; the validation data comes in every round."""
    cache = tmp_path / "cache"
    freeze = ["embeddings.*", "encoder.layer.[0-1].*"]
    drawing = configure(freeze=freeze, max_examples=30)
    found = []
    for number in range(3):
        trained = load_trainer(drawing).train(job(drawing, f"{number}", seed=number, cache=cache))
        found.append(tensors(trained.folder))
        (kept,) = cache.glob("trunk-*.safetensors")
    lengths = len(safetensors.torch.load_file(kept)["states"])
    apart = load_trainer(drawing).train(job(drawing, "apart", seed=2))
    assert all(found[2][name].equal(value) for name, value in tensors(apart.folder).items())
    assert 20 * 4 <= lengths <= 20 * 10


def test_a_pattern_that_matches_nothing_is_refused(configure: Configure, job: Job) -> None:
    config = configure(freeze=["encoder.layer.7.*"])
    with pytest.raises(ConfigError) as caught:
        load_trainer(config).train(job(config))
    assert caught.value.code == "training.freezes_nothing"
    config = configure(freeze=["*"], pooling="mean")
    trained = load_trainer(config).train(job(config, "head only"))
    assert trained.head is not None


def test_the_head_goes_on_where_it_was_and_takes_new_labels(
    bert: Path, configure: Configure, job: Job, data: Path
) -> None:
    config = configure(lr=1e-9, head_lr=1e-2, epochs=3)
    first = load_trainer(config).train(job(config, "first"))
    still = configure(lr=1e-9, head_lr=1e-9)
    with (data / "train.jsonl").open("a") as file:
        for number in range(4):
            file.write(json.dumps({"text": f"some more {number}", "label": "alloy"}) + "\n")
    second = load_trainer(still).train(job(still, "second", head=first.head))
    assert first.head is not None
    assert second.head is not None
    before, after = Head.load(first.head), Head.load(second.head)
    assert after.labels == ("fruit", "metal", "alloy")
    torch.testing.assert_close(
        after.tensors["classifier.weight"][:2],
        before.tensors["classifier.weight"],
        atol=1e-6,
        rtol=0,
    )


def test_a_finished_job_is_not_repeated_and_another_starts_afresh(
    configure: Configure, job: Job, data: Path
) -> None:
    config = configure()
    steps: list[int] = []
    trainer = load_trainer(config)

    def count(step: str, done: int, total: int) -> None:
        steps.append(done)

    first = trainer.train(job(config), count)
    assert trainer.train(job(config), count) == first
    assert len(steps) == 5
    assert not (first.folder.parent / "checkpoints").exists()
    with (data / "train.jsonl").open("a") as file:
        file.write(json.dumps({"text": "the very silver", "label": "metal"}) + "\n")
    assert trainer.train(job(config), count).examples == 41
    assert len(steps) > 5


def test_a_folder_with_other_things_in_it_is_left_alone(configure: Configure, job: Job) -> None:
    config = configure()
    wanted = job(config)
    wanted.out.mkdir()
    (wanted.out / "thesis.txt").write_text("mine")
    with pytest.raises(ConfigError) as caught:
        load_trainer(config).train(wanted)
    assert caught.value.code == "training.out_not_empty"
    assert (wanted.out / "thesis.txt").read_text() == "mine"


KILLED = """
import os, signal, sys
from pathlib import Path
import torch
from coldmerge_client.training import TrainConfig, TrainJob, load_trainer
torch.set_num_threads(1)
release, out, data, method, freeze, rho = sys.argv[1:]
config = TrainConfig.parse({
    "data": data, "batch_size": 8, "lr": 1e-3, "max_length": 16, "device": "cpu", "epochs": 2,
    "checkpoint_minutes": 0, "bf16": True, "method": method, "freeze": freeze.split(),
    "lora": {"target_modules": ["query", "value"]}, "sam": {"rho": float(rho)} if rho else None,
})
def die(step, done, total):
    if done == 7:
        os.kill(os.getpid(), signal.SIGKILL)
load_trainer(config).train(TrainJob(Path(release), Path(out), None, config, 3), die)
"""


@pytest.mark.parametrize(
    ("method", "freeze", "rho"),
    [
        ("full", "embeddings.* encoder.layer.0.*", ""),
        pytest.param("full", "embeddings.* encoder.layer.0.*", "0.05", marks=pytest.mark.slow),
        ("lora", "", ""),
        ("lora", "embeddings.* encoder.layer.[0-1].*", "0.05"),
    ],
)
def test_training_killed_in_the_middle_resumes_to_the_same_tensors(
    bert: Path,
    configure: Configure,
    job: Job,
    data: Path,
    tmp_path: Path,
    method: str,
    freeze: str,
    rho: str,
) -> None:
    out = tmp_path / "killed"
    arguments = [str(bert), str(out), str(data), method, freeze, rho]
    ended = subprocess.run([sys.executable, "-c", KILLED, *arguments], check=False)
    assert ended.returncode == -signal.SIGKILL
    half_written = out / "checkpoints" / "checkpoint-99"
    half_written.mkdir()
    (half_written / "model.safetensors").write_bytes(b"half")
    settings: dict[str, Any] = {
        "method": method,
        "freeze": freeze.split(),
        "bf16": True,
        "lora": {"target_modules": ["query", "value"]},
        "sam": {"rho": float(rho)} if rho else None,
        "epochs": 2,
    }
    config = configure(**settings, checkpoint_minutes=0)
    steps: list[int] = []
    resumed = load_trainer(config).train(
        job(config, "killed"), lambda _step, done, _total: steps.append(done)
    )
    assert steps == [7, 8, 9, 10]
    quiet = configure(**settings, checkpoint_minutes=None)
    undisturbed = load_trainer(quiet).train(job(quiet, "undisturbed"))
    name = "adapter_model.safetensors" if method == "lora" else "model.safetensors"
    assert (resumed.folder / name).read_bytes() == (undisturbed.folder / name).read_bytes()
    assert resumed.head is not None
    assert undisturbed.head is not None
    assert (resumed.head / "head.safetensors").read_bytes() == (
        undisturbed.head / "head.safetensors"
    ).read_bytes()


def test_the_probe_predicts_the_same_items_for_any_release(
    bert: Path, configure: Configure, job: Job, tmp_path: Path
) -> None:
    config = configure(epochs=4, freeze=["embeddings.*"])
    trainer = load_trainer(config)
    tuned = trainer.train(job(config)).folder
    cache = tmp_path / "cache"
    base = EvaluateJob(bert, config, seed=7, cache=cache, digest="a" * 64)
    before = trainer.predict(base)
    after = trainer.predict(EvaluateJob(tuned, config, seed=7, cache=cache, digest="b" * 64))
    assert before.labels.dtype == before.predicted.dtype == np.int64
    assert before.labels.tolist() == after.labels.tolist()
    assert len(before.labels) == len(before.predicted) == 20
    assert len(list(cache.glob("features-*"))) == 2
    again = trainer.predict(base)
    assert again.predicted.tolist() == before.predicted.tolist()
    uncached = trainer.predict(EvaluateJob(bert, config, seed=7))
    assert uncached.predicted.tolist() == before.predicted.tolist()


def test_personal_export_loads_as_a_classifier(
    bert: Path, configure: Configure, job: Job, tmp_path: Path
) -> None:
    config = configure(epochs=8, lr=3e-3)
    trained = load_trainer(config).train(job(config))
    assert trained.head is not None
    out = personal.export(bert, trained.head, tmp_path / "personal")
    model = transformers.AutoModelForSequenceClassification.from_pretrained(out)
    assert model.config.id2label == {0: "fruit", 1: "metal"}
    assert model.classifier.weight.equal(Head.load(trained.head).tensors["classifier.weight"])
    assert model.bert.pooler.dense.weight.equal(tensors(bert)["pooler.dense.weight"])
    assert set(personal.classify(out, ["the apple", "some copper of a"])) <= {"fruit", "metal"}


def test_personal_export_of_a_mean_pooled_head(
    bert: Path, configure: Configure, job: Job, data: Path, tmp_path: Path
) -> None:
    config = configure(epochs=20, lr=3e-3, head_lr=3e-3, pooling="mean")
    trained = load_trainer(config).train(job(config))
    assert trained.head is not None
    out = personal.export(trained.folder, trained.head, tmp_path / "personal")
    rows = [json.loads(line) for line in (data / "train.jsonl").read_text().splitlines()]
    found = personal.classify(out, [row["text"] for row in rows])
    assert found == [row["label"] for row in rows]
    assert changed(bert, out)
    transformers.AutoModel.from_pretrained(out)


def test_personal_export_says_what_is_in_the_way(
    bert: Path, llama: Path, configure: Configure, job: Job, tmp_path: Path
) -> None:
    with pytest.raises(NotFoundError) as missing:
        personal.export(bert, tmp_path / "no head", tmp_path / "personal")
    assert missing.value.code == "personal.no_head"
    Head("regression", (), {"w": torch.ones(1)}).save(tmp_path / "other")
    with pytest.raises(ConfigError) as caught:
        personal.export(bert, tmp_path / "other", tmp_path / "personal")
    assert caught.value.code == "personal.no_class"
    Head("sequence-classification", ("a", "b"), {"w": torch.ones(1)}).save(tmp_path / "misfit")
    with pytest.raises(ConfigError) as caught:
        personal.export(llama, tmp_path / "misfit", tmp_path / "personal")
    assert caught.value.code == "personal.head_does_not_fit"
    with pytest.raises(ConflictError) as taken:
        personal.export(bert, tmp_path / "other", tmp_path)
    assert taken.value.code == "personal.out_exists"


def test_pairs_of_texts(configure: Configure, job: Job, data: Path) -> None:
    for name in ("train.jsonl", "validation.jsonl"):
        rows = [json.loads(line) for line in (data / name).read_text().splitlines()]
        lines = [json.dumps({**row, "text_pair": "some zinc"}) + "\n" for row in rows]
        (data / name).write_text("".join(lines))
    config = configure()
    trainer = load_trainer(config)
    trained = trainer.train(job(config))
    assert trained.examples == 40
    assert len(trainer.predict(EvaluateJob(trained.folder, config, 0)).labels) == 20


def test_no_private_text_is_left_on_the_disk(
    configure: Configure, job: Job, data: Path, tmp_path: Path
) -> None:
    lines = (data / "train.jsonl").read_text().replace("apple", "canary")
    (data / "train.jsonl").write_text(lines)
    config = configure(checkpoint_minutes=0)
    out = load_trainer(config).train(job(config)).folder.parent
    for folder, _, names in os.walk(out):
        for name in names:
            assert b"canary" not in (Path(folder) / name).read_bytes()
