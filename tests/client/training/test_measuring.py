"""Fisher information and Gram matrices of the trainers, against plain torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
import transformers

from coldmerge.core.checkpoint import Checkpoint
from coldmerge.core.documents import Statistic
from coldmerge.core.errors import ConfigError, DataError
from coldmerge.core.extraction import extract
from coldmerge.core.statistics import Measured, Wanted
from coldmerge.core.task_vector import TaskVector
from coldmerge_client.training import TrainConfig, Trained, TrainJob, load_trainer, measuring
from coldmerge_client.training import data as private
from coldmerge_client.training.models import quiet
from coldmerge_client.training.trainer import measuring as able
from tests.tiny import VOCABULARY, sentences

Configure = Callable[..., TrainConfig]
Job = Callable[..., TrainJob]
BOTH: frozenset[Statistic] = frozenset({"fisher", "gram"})


def run(
    config: TrainConfig, job: TrainJob, kinds: frozenset[Statistic] = BOTH
) -> tuple[Trained, Measured]:
    trainer = load_trainer(config)
    trained = trainer.train(job)
    able(trainer, config).measure(job, trained, kinds)
    return trained, Measured.open(trained.folder / "statistics", kinds)


def value(found: Measured, name: str, kind: Statistic) -> torch.Tensor:
    spec = found.tensors.tensors[f"{name}.{kind}"]
    return torch.from_numpy(found.block(name, kind, 0, spec.size)).reshape(spec.shape)


def encoded(release: Path, rows: list[dict[str, str]]) -> list[dict[str, torch.Tensor]]:
    tokenizer = transformers.AutoTokenizer.from_pretrained(release)
    return [dict(tokenizer(row["text"], return_tensors="pt")) for row in rows]


def classifier(folder: Path) -> Any:
    with quiet():
        return transformers.AutoModelForSequenceClassification.from_pretrained(folder).eval()


def test_fisher_of_a_classifier_is_the_expected_squared_gradient(
    bert: Path, configure: Configure, job: Job
) -> None:
    config = configure()
    trained, found = run(config, job(config))
    assert found.counts == {"fisher": 40, "gram": pytest.approx(found.counts["gram"])}
    model = classifier(trained.folder)
    names = ["bert.encoder.layer.1.output.dense.weight", "bert.embeddings.word_embeddings.weight"]
    parameters = dict(model.named_parameters())
    sums = {name: torch.zeros_like(parameters[name], dtype=torch.float64) for name in names}
    for inputs in encoded(bert, sentences(40, 1)):
        for label in range(2):
            model.zero_grad()
            scores = model(**inputs).logits.log_softmax(-1)[0, label]
            scores.backward()
            for name in names:
                gradient = parameters[name].grad.double()
                sums[name] += scores.exp().item() * gradient.square() / 40
    for name in names:
        measured = value(found, name.removeprefix("bert."), "fisher")
        expected = sums[name].clamp(min=1e-8).float()
        torch.testing.assert_close(measured, expected, rtol=1e-4, atol=1e-9)
        assert measured.min() >= measuring.FLOOR
    unused = value(found, "embeddings.word_embeddings.weight", "fisher")[1]  # [UNK]
    assert torch.equal(unused, torch.full((32,), measuring.FLOOR))


def test_gram_is_over_the_tokens_that_are_no_padding(
    bert: Path, configure: Configure, job: Job
) -> None:
    config = configure(batch_size=7)
    trained, found = run(config, job(config), frozenset({"gram"}))
    model = classifier(trained.folder)
    layers = {
        "encoder.layer.0.attention.self.query.weight": model.bert.encoder.layer[0].attention.self,
        "encoder.layer.2.output.dense.weight": model.bert.encoder.layer[2].output,
    }
    sums: dict[str, torch.Tensor] = {}
    tokens = 0

    def hook(name: str) -> Any:
        def look(_: Any, args: Any) -> None:
            rows = args[0][0].double()
            sums[name] = sums.get(name, 0) + rows.T @ rows

        return look

    for name, part in layers.items():
        linear = part.query if "query" in name else part.dense
        linear.register_forward_pre_hook(hook(name))
    with torch.no_grad():
        for inputs in encoded(bert, sentences(40, 1)):
            tokens += inputs["input_ids"].numel()
            model(**inputs)
    assert found.counts == {"gram": tokens}
    for name, expected in sums.items():
        measured = value(found, name, "gram")
        scale = float(expected.diagonal().max())
        torch.testing.assert_close(measured.double(), expected, rtol=1e-4, atol=1e-6 * scale)
        assert torch.equal(measured, measured.T)
    keys = set(found.tensors.tensors)
    assert "pooler.dense.weight.gram" in keys
    assert not [k for k in keys if "embeddings" in k or "bias" in k or "classifier" in k]


def test_fisher_of_sentences_is_of_the_tokens_they_have(
    llama: Path, configure: Configure, job: Job
) -> None:
    config = configure(trainer="causal-lm")
    trained, found = run(config, job(config, release=llama))
    model = transformers.AutoModelForCausalLM.from_pretrained(trained.folder).eval()
    weight = model.model.layers[1].mlp.up_proj.weight
    total = torch.zeros_like(weight, dtype=torch.float64)
    end = torch.tensor([[VOCABULARY["</s>"]]])
    for inputs in encoded(llama, sentences(40, 1)):
        ids = torch.cat([inputs["input_ids"], end], 1)
        model.zero_grad()
        scores = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
        scores.gather(-1, ids[0, 1:, None]).sum().backward()
        total += weight.grad.double().square() / 40
    measured = value(found, "model.layers.1.mlp.up_proj.weight", "fisher")
    torch.testing.assert_close(measured, total.float().clamp(min=1e-8), rtol=1e-3, atol=1e-9)
    assert not any("lm_head" in key for key in found.tensors.tensors)


def test_less_room_takes_more_passes_and_gives_the_same(
    configure: Configure, job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = configure(max_examples=10)
    trained, found = run(config, job(config))
    steps: list[int] = []
    monkeypatch.setattr(measuring, "ROOM", 20_000)
    able(load_trainer(config), config).measure(
        job(config), trained, BOTH, lambda _name, _done, total: steps.append(total)
    )
    again = Measured.open(trained.folder / "statistics", BOTH)
    assert steps[0] > 10
    for key, spec in found.tensors.tensors.items():
        one, two = (m.tensors.block(key, 0, spec.size) for m in (found, again))
        np.testing.assert_allclose(one, two, rtol=1e-5, atol=1e-7)


def test_at_most_a_thousand_examples_from_all_of_them() -> None:
    examples = [{"input_ids": [number]} for number in range(2500)]
    chosen = [example["input_ids"][0] for example in measuring.spread(examples)]
    assert len(set(chosen)) == 1000
    assert (chosen[0], chosen[-1]) == (0, 2497)
    assert measuring.spread(examples[:3]) == examples[:3]


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"method": "lora", "lora": {"r": 4, "target_modules": ["query", "dense"]}},
        {"pooling": "mean", "freeze": ["embeddings.*", "encoder.layer.[0-1].*"]},
        {"method": "lora", "pooling": "mean", "lora": {"r": 4, "target_modules": ["value"]}},
    ],
    ids=["full", "lora", "frozen and pooled", "lora and pooled"],
)
def test_what_is_shipped_has_its_statistics_and_the_head_has_none(
    bert: Path, configure: Configure, job: Job, tmp_path: Path, settings: dict[str, Any]
) -> None:
    config = configure(max_examples=16, **settings)
    trained, found = run(config, job(config))
    wanted = Wanted(0.1, found)
    base = Checkpoint.open(bert)
    out = tmp_path / "v.safetensors"
    extract(base, trained.folder, out, base_digest="0" * 64, statistics=wanted)
    vector = TaskVector.open(out)
    assert set(vector.statistics) == {"fisher", "gram", "trim"}
    for name in vector.names:
        assert vector.has_statistic(name, "fisher")
        assert vector.has_statistic(name, "trim")
        dense = name.endswith(".weight") and base.shape(name)[1:] and "embeddings" not in name
        assert vector.has_statistic(name, "gram") == bool(dense)
    assert not any("classifier" in key for key in found.tensors.tensors)
    frozen = "encoder.layer.1.attention.self.key.weight.fisher"
    assert (frozen in found.tensors.tensors) == (not settings)


def test_the_adapter_is_merged_before_it_is_measured(
    bert: Path, configure: Configure, job: Job
) -> None:
    """With an adapter whose product is zero, the Gram matrices are those of the release."""
    settings = {"method": "lora", "lora": {"r": 2, "target_modules": ["query", "key"]}}
    frozen = configure(**settings, lr=1e-12, head_lr=1e-12, max_examples=8)
    moved = configure(**settings, lr=0.5, max_examples=8)
    name = "encoder.layer.2.attention.self.query.weight"
    _, still = run(frozen, job(frozen, "still"))
    _, other = run(moved, job(moved, "moved"))
    with quiet():
        body = transformers.AutoModel.from_pretrained(bert).eval()
    total = torch.zeros(32, 32)
    seen: list[torch.Tensor] = []
    body.encoder.layer[2].attention.self.query.register_forward_pre_hook(
        lambda _, args: seen.append(args[0][0])
    )
    rows = private.classification(frozen.data)
    chosen = private.subset(rows.train, 8, 3)
    with torch.no_grad():
        for inputs in encoded(bert, [{"text": str(example.text)} for example in chosen]):
            body(**inputs)
    for states in seen:
        total += states.T @ states
    torch.testing.assert_close(value(still, name, "gram"), total, rtol=1e-3, atol=1e-3)
    assert not torch.allclose(value(other, name, "gram"), total, rtol=0.05)


def test_a_model_that_diverged_is_not_measured(configure: Configure, job: Job) -> None:
    config = configure(max_examples=8)
    trained, _ = run(config, job(config))
    weights = trained.folder / "model.safetensors"
    tensors = safetensors.torch.load_file(weights)
    tensors["bert.encoder.layer.1.output.dense.bias"][3] = np.nan
    safetensors.torch.save_file(tensors, weights, {"format": "pt"})
    before = sorted(path.name for path in (trained.folder / "statistics").iterdir())
    assert "statistics.json" in before
    with pytest.raises(DataError) as caught:
        able(load_trainer(config), config).measure(job(config), trained, BOTH)
    assert caught.value.code == "training.statistic_not_finite"
    assert not (trained.folder / "statistics").exists()


def test_a_trainer_of_ones_own_need_not_measure(configure: Configure) -> None:
    class Plain:
        def train(self, job: Any, progress: Any = None) -> Any: ...

        def predict(self, job: Any, progress: Any = None) -> Any: ...

    with pytest.raises(ConfigError) as caught:
        able(Plain(), configure())
    assert caught.value.code == "training.cannot_measure"


def test_measuring_again_draws_the_same_examples(configure: Configure, job: Job) -> None:
    config = configure(max_examples=10)
    trained, first = run(config, job(config), frozenset({"gram"}))
    other = replace(job(config), head=trained.head)
    able(load_trainer(config), config).measure(other, trained, frozenset({"gram"}))
    second = Measured.open(trained.folder / "statistics", {"gram"})
    assert first.counts == second.counts
    for key, spec in first.tensors.tensors.items():
        one, two = (m.tensors.block(key, 0, spec.size) for m in (first, second))
        np.testing.assert_array_equal(one, two)
