"""Fine-tuning a release on a set, as a contributor would, and predicting the set's test part."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import transformers
from numpy.typing import NDArray

from benchmarks.cold.costs import EPOCHS
from benchmarks.cold.measuring import Ruler, Subject, score
from benchmarks.cold.outcome import Group, Protocol, Score
from benchmarks.cold.sets import Item, TaskSet, draw
from coldmerge_client.training import batches, heads, models, pooled
from coldmerge_client.training.config import TrainConfig
from coldmerge_client.training.huggingface import predict_labels
from coldmerge_client.training.trainer import Trained, TrainJob, load_trainer


def tuned(
    subject: Subject, ruler: Ruler, task: TaskSet, group: Group, protocol: Protocol, number: int
) -> list[Score]:
    """Fine-tune on a draw (`ft100`) or the whole pool (`full`), and measure: one score per seed.

    The draw, the order of the examples and the head's first values are the same for every
    release.
    """
    pool, train, test = ruler.items(task)
    if protocol == "ft100":
        used = draw(task, pool, ruler.shots, 0, number)
        train = [task.train[place] for place in used]
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        _write(place / "data" / "train.jsonl", task, train)
        _write(place / "data" / "validation.jsonl", task, train[:2])
        settings = {
            **ruler.tune,
            "epochs": EPOCHS[protocol],
            "max_examples": None,
            "data": {"train": str(place / "data"), "labels": list(task.labels)},
            "seed": number,
            "threads": 1,
        }
        config = TrainConfig.parse(settings)
        job = TrainJob(subject.folder, place / "run", None, config, number, digest=subject.digest)
        predicted = predict(load_trainer(config).train(job), config, task, test)
    labels = np.array([item.label for item in test])
    return [score(subject, subject.seeds[0], task, group, protocol, number, labels, predicted)]


def predict(
    trained: Trained, config: TrainConfig, task: TaskSet, items: Sequence[Item]
) -> NDArray[np.int64]:
    """The labels that a fine-tune gives with its own head, as positions: int64 [n]."""
    head = heads.Head.load(trained.head or trained.folder / "head")
    body = models.load(transformers.AutoModel, trained.folder, dtype=torch.float32)
    model = pooled.MeanPooled(body, head.labels)
    head.fill(dict(model.named_parameters()), head.labels)
    tokenizer = models.load_tokenizer(trained.folder)
    texts, pairs = [item.text for item in items], [item.pair for item in items]
    examples = batches.tokenize(tokenizer, texts, pairs, config.max_length)
    labelled = [{**example, "labels": 0} for example in examples]
    order = sorted(range(len(labelled)), key=lambda place: len(labelled[place]["input_ids"]))
    collate = batches.Collator(tokenizer)
    quick = config.model_copy(update={"batch_size": 64})
    sorted_examples = [labelled[place] for place in order]
    found = predict_labels(model, sorted_examples, collate, quick, len(order)).predicted
    place = {label: position for position, label in enumerate(task.labels)}
    predicted = np.zeros(len(order), np.int64)
    predicted[order] = [place[head.labels[best]] for best in found.tolist()]
    return predicted


def for_all(scores: Sequence[Score], seeds: Sequence[int]) -> list[Score]:
    """The same measurements under every seed: of a base, which no seed has trained."""
    return [replace(one, seed=seed) for one in scores for seed in seeds]


def _write(path: Path, task: TaskSet, items: Sequence[Item]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        for item in items:
            pair = {} if item.pair is None else {"text_pair": item.pair}
            row = {"text": item.text, **pair, "label": task.labels[item.label]}
            file.write(json.dumps(row) + "\n")
