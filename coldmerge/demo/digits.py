"""The tiny demo: handwritten digits (scikit-learn's 8x8 images) and a 21,000-parameter CNN.

The network is pretrained to tell 0 from 1. Each organization holds images of some of the
digits 2 to 6; nobody holds 7, 8 or 9. It runs in seconds, through the same processes as
the large demo, and is an example of a trainer of one's own (`trainer: module:function`).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from numpy.typing import NDArray
from torch.nn import functional

from coldmerge.core.errors import DataError
from coldmerge.core.progress import Progress, silent
from coldmerge.demo import folders
from coldmerge.demo.folders import Example, Task
from coldmerge_client.training import implicit
from coldmerge_client.training.config import SamConfig, TrainConfig
from coldmerge_client.training.probe import fitted_probe
from coldmerge_client.training.sam import ahead
from coldmerge_client.training.trainer import EvaluateJob, Predictions, Trained, TrainJob

TRAINER = "coldmerge.demo.digits:create"
PRETRAINED_ON = (0, 1)
SEEN = ("digits-234", "digits-456", "digits-256")
UNSEEN = ("digits-789",)
HEAD = "head.safetensors"
MAX_VALUE = 16.0
BATCH = 32
FEATURES = 32

Floats = NDArray[np.float32]


class Network(torch.nn.Module):
    """8x8 images to 32 features: float32 [n, 64] to [n, 32]."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = torch.nn.Conv2d(1, 16, 3, padding=1)
        self.conv2 = torch.nn.Conv2d(16, 32, 3, padding=1)
        self.dense = torch.nn.Linear(32 * 4 * 4, FEATURES)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """The features. Not rectified: a unit that is off for 0 and 1 would stay off."""
        found = functional.relu(self.conv1(pixels.view(-1, 1, 8, 8)))
        found = functional.max_pool2d(functional.relu(self.conv2(found)), 2)
        features: torch.Tensor = self.dense(found.flatten(1))
        return features


def task(name: str, seed: int = 0) -> Task:
    """The task of a name such as `digits-234`: which of its digits is it?

    Organizations that share a digit share its kind, not its images.

    Raises:
        DataError: another name, or fewer than two digits.

    """
    prefix, _, listed = name.partition("-")
    digits = sorted({int(character) for character in listed if character.isdecimal()})
    if prefix != "digits" or len(digits) < 2 or len(digits) != len(listed):
        raise DataError(
            "demo.unknown_digits",
            f"The tiny demo has no task called {name}.",
            expected="digits- and two or more different digits, such as digits-234",
            got=name,
            hint=f"Leave --seen and --unseen out for {', '.join(SEEN)} and {', '.join(UNSEEN)}.",
        )
    examples = [
        Example(tuple(int(value) for value in image), label)
        for label, digit in enumerate(digits)
        for image in _images(digit, _share(name, digit))
    ]
    return folders.split(name, examples, [str(digit) for digit in digits], seed)


def _share(name: str, digit: int) -> tuple[int, int]:
    """Which part of a digit's images an organization holds: (position, number of parts)."""
    holders = [other for other in SEEN if str(digit) in other]
    return (holders.index(name), len(holders)) if name in holders else (0, 1)


@cache
def _scans() -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    return pixels, labels


def _images(digit: int, share: tuple[int, int]) -> NDArray[np.float64]:
    pixels, labels = _scans()
    found: NDArray[np.float64] = pixels[labels == digit][share[0] :: share[1]]
    return found


def pretrain(folder: Path, seed: int) -> Path:
    """Write the model folder of release 0: the network, trained to tell 0 from 1."""
    base = folders.split(
        "digits-01",
        [
            Example(tuple(int(value) for value in image), label)
            for label, digit in enumerate(PRETRAINED_ON)
            for image in _images(digit, (0, 1))
        ],
        [str(digit) for digit in PRETRAINED_ON],
        seed,
    )
    torch.manual_seed(seed)
    network, head = Network(), torch.nn.Linear(FEATURES, len(base.labels))
    _fit(network, head, base.train, epochs=2, rate=1e-3, seed=seed)
    folder.mkdir(parents=True, exist_ok=True)
    safetensors.torch.save_file(network.state_dict(), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"architectures": ["Network"]}) + "\n")
    return folder


def features(release: Path, examples: Sequence[Example]) -> Floats:
    """Features of images under a release: float32 [n, 32]."""
    with torch.inference_mode():
        found: Floats = _load(release)(_pixels(examples)).numpy()
    return found


class Digits:
    """A trainer for `module:function`: the whole network, and a linear head that stays home."""

    def __init__(self, config: TrainConfig) -> None:
        self.config = config

    def train(self, job: TrainJob, progress: Progress = silent) -> Trained:
        """Fine-tune at home. It takes a second, so an interrupted job simply starts again."""
        train, _ = folders.load_training(self.config.data.train)
        kinds = {label: place for place, label in enumerate(sorted({e.label for e in train}))}
        train = [replace(example, label=kinds[example.label]) for example in train]
        torch.manual_seed(job.seed)
        network = _load(job.release)
        head = torch.nn.Linear(FEATURES, len(kinds))
        if job.head is not None:
            head.load_state_dict(safetensors.torch.load_file(job.head / HEAD))
        loss = _fit(
            network,
            head,
            train,
            epochs=round(self.config.epochs),
            rate=self.config.lr,
            seed=job.seed,
            sam=self.config.sam,
            progress=progress,
        )
        tuned, kept = job.out / "model", job.out / "head"
        for folder in (tuned, kept):
            folder.mkdir(parents=True, exist_ok=True)
        safetensors.torch.save_file(network.state_dict(), tuned / "model.safetensors")
        safetensors.torch.save_file(head.state_dict(), kept / HEAD)
        return Trained(tuned, kept, len(train), {"train_loss": loss})

    def predict(self, job: EvaluateJob, progress: Progress = silent) -> Predictions:
        """A probe on the features, refitted on the training part."""
        train, validation = folders.load_training(self.config.data.train)
        progress("probe", 0, 1)
        labels = np.array([example.label for example in validation], np.int64)
        predicted = fitted_probe(
            features(job.release, train),
            np.array([example.label for example in train]),
            features(job.release, validation),
            labels,
            job.seed,
        )
        progress("probe", 1, 1)
        return predicted

    def gradient(
        self, job: EvaluateJob, objective: str, progress: Progress = silent
    ) -> dict[str, Floats]:
        """How the probe's loss or entropy changes with the network's tensors."""
        train, validation = folders.load_training(self.config.data.train)
        network = _load(job.release)
        progress("slopes", 0, 1)
        found = network(_pixels([*train, *validation]))
        known, new = np.split(found.detach().numpy(), [len(train)])
        labels = [np.array([e.label for e in part], np.int64) for part in (train, validation)]
        pulls = implicit.pulls(known, labels[0], new, labels[1], job.seed, objective)
        found.backward(torch.from_numpy(np.concatenate(pulls).astype(np.float32)))
        progress("slopes", 1, 1)
        return {
            name: part.grad.numpy()
            for name, part in network.named_parameters()
            if part.grad is not None
        }


def create(config: TrainConfig) -> Digits:
    """What `trainer: coldmerge.demo.digits:create` calls."""
    torch.set_num_threads(config.threads or 1)
    return Digits(config)


def _load(release: Path) -> Network:
    network = Network()
    network.load_state_dict(safetensors.torch.load_file(release / "model.safetensors"))
    return network


def _pixels(examples: Sequence[Example]) -> torch.Tensor:
    return torch.tensor([example.content for example in examples], dtype=torch.float32) / MAX_VALUE


def _fit(
    network: Network,
    head: torch.nn.Linear,
    examples: Sequence[Example],
    *,
    epochs: int,
    rate: float,
    seed: int,
    sam: SamConfig | None = None,
    progress: Progress = silent,
) -> float:
    """Train in place with Adam; the last loss."""
    pixels = _pixels(examples)
    labels = torch.tensor([example.label for example in examples])
    trained = [*network.parameters(), *head.parameters()]
    optimizer = torch.optim.Adam(trained, lr=rate)
    generator = torch.Generator().manual_seed(seed)
    loss = torch.zeros(())
    for epoch in range(epochs):
        for batch in torch.randperm(len(labels), generator=generator).split(BATCH):
            loss = functional.cross_entropy(head(network(pixels[batch])), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            if sam is not None:
                with ahead(trained, sam.rho):
                    functional.cross_entropy(head(network(pixels[batch])), labels[batch]).backward()
            optimizer.step()
        progress("train", epoch + 1, epochs)
    return float(loss.detach())
