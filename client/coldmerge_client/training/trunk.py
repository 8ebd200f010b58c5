"""The frozen bottom of a model is the same in every round: run each text through it once.

Layers whose parameters are all frozen, and that nothing trained feeds, give the same
hidden states each time. They are computed once, kept in the home (they are as private as
the texts), and fed to the rest of the model as `inputs_embeds`. Whether that works for an
architecture is not assumed but tried: the cut model must give what the whole one gives.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch

from coldmerge_client.training.batches import Collator, Features, by_length

MAX_BYTES = 2**29
"""States larger than this are not kept in memory: the model then runs whole."""

KEEP_BYTES = 2**31
"""What the cache folder may hold; the files used longest ago go first."""

_BATCH = 64
_TOLERANCE = 1e-4


@dataclass(frozen=True)
class Cut:
    """A body without its frozen bottom, and the examples that fit it."""

    body: Any
    examples: list[Features]
    _owner: Any
    _name: str
    _layers: Any
    _embeddings: Any

    def restore(self) -> None:
        """Put the bottom back; what was trained stays."""
        setattr(self._owner, self._name, self._layers)
        if self._embeddings is not None:
            self.body.embeddings = self._embeddings


def cut(
    body: Any,
    examples: Sequence[Features],
    collate: Collator,
    cache: Path | None = None,
    passing: int = 0,
) -> Cut | None:
    """Cut the frozen bottom off `body`, in place; None where there is none or it does not work.

    The states of the first `passing` examples, which come together only once, are not kept
    in `cache`: nobody would find them again.
    """
    place = _layers(body)
    size = 4 * body.config.hidden_size * sum(len(example["input_ids"]) for example in examples)
    if place is None or not examples or size > MAX_BYTES:
        return None
    owner, name, layers = place
    sample = collate([_inputs(example) for example in examples[:4]])
    depth = _frozen_depth(body, layers, sample)
    if depth == 0:
        return None
    once, often = examples[:passing], examples[passing:]
    states = [
        *_states(body, layers, depth, once, collate, None),
        *_states(body, layers, depth, often, collate, cache),
    ]
    fed = [
        {
            "attention_mask": example["attention_mask"],
            "inputs_embeds": state,
            **({"labels": example["labels"]} if "labels" in example else {}),
        }
        for example, state in zip(examples, states, strict=True)
    ]
    whole = _run(body, sample)
    embeddings = getattr(body, "embeddings", None)
    found = Cut(body, fed, owner, name, layers, embeddings)
    setattr(owner, name, torch.nn.ModuleList(layers[depth:]))
    if embeddings is not None:
        body.embeddings = _Through()
    if not _same(whole, body, collate([_inputs(example) for example in fed[:4]])):
        found.restore()
        return None
    return found


class _Through(torch.nn.Module):
    """Stands where the embeddings were: what comes in is already embedded."""

    def forward(self, *args: Any, **named: Any) -> Any:
        """The `inputs_embeds` it was called with."""
        return named["inputs_embeds"] if "inputs_embeds" in named else args[-1]


class _Enough(Exception):  # noqa: N818 - not an error: it ends a forward pass early
    """Raised by a hook when the wanted hidden states are there."""


def _layers(body: Any) -> tuple[Any, str, Any] | None:
    """The list of the body's layers, and where it hangs."""
    depth = getattr(body.config, "num_hidden_layers", None)
    for owner in body.modules():
        for name, child in owner.named_children():
            if isinstance(child, torch.nn.ModuleList) and len(child) == depth:
                return owner, name, child
    return None


def _inputs(example: Features) -> Features:
    return {name: value for name, value in example.items() if name != "labels"}


def _hidden(args: Any, named: Any) -> Any:
    return args[0] if args else named["hidden_states"]


def _frozen_depth(body: Any, layers: Any, sample: dict[str, torch.Tensor]) -> int:
    """How many leading layers autograd finds nothing to train in or below."""
    trained: list[bool] = []
    hooks = [
        layer.register_forward_pre_hook(
            lambda _, args, named: trained.append(bool(_hidden(args, named).requires_grad)),
            with_kwargs=True,
        )
        for layer in layers
    ]
    try:
        _run(body, sample, grad=True)
    finally:
        for hook in hooks:
            hook.remove()
    return max((i for i, moved in enumerate(trained) if not moved), default=0)


def _run(body: Any, batch: dict[str, torch.Tensor], grad: bool = False) -> torch.Tensor:
    """The body's last hidden states, without dropout; the mode is put back."""
    training = body.training
    body.eval()
    where = next(body.parameters()).device
    try:
        with torch.set_grad_enabled(grad):
            found = body(**{name: part.to(where) for name, part in batch.items()})
    finally:
        body.train(training)
    states: torch.Tensor = found.last_hidden_state
    return states


def _same(whole: torch.Tensor, body: Any, batch: dict[str, torch.Tensor]) -> bool:
    try:
        found = _run(body, batch)
    except (TypeError, ValueError, RuntimeError, AttributeError):
        return False
    real = batch["attention_mask"].bool()
    return found.shape == whole.shape and bool(
        torch.allclose(found[real], whole[real], atol=_TOLERANCE, rtol=_TOLERANCE)
    )


def _states(
    body: Any,
    layers: Any,
    depth: int,
    examples: Sequence[Features],
    collate: Collator,
    cache: Path | None,
) -> list[torch.Tensor]:
    """The hidden states that enter layer `depth`: float32 [length, hidden] per example."""
    if cache is None or not examples:
        return _compute(body, layers, depth, examples, collate)
    path = cache / f"trunk-{_key(body, layers, depth, examples)}.safetensors"
    lengths = [len(example["input_ids"]) for example in examples]
    try:
        found = safetensors.torch.load_file(path)["states"]
        os.utime(path)
        return list(found.split(lengths))
    except (OSError, KeyError, RuntimeError, safetensors.SafetensorError):
        states = _compute(body, layers, depth, examples, collate)
        store(path, {"states": torch.cat(states)})
        return states


def _compute(
    body: Any, layers: Any, depth: int, examples: Sequence[Features], collate: Collator
) -> list[torch.Tensor]:
    states: list[torch.Tensor] = [torch.empty(0)] * len(examples)
    caught: list[torch.Tensor] = []

    def catch(_: Any, args: Any, named: Any) -> None:
        caught.append(_hidden(args, named))
        raise _Enough

    hook = layers[depth].register_forward_pre_hook(catch, with_kwargs=True)
    try:
        for group in by_length(examples, _BATCH):
            batch = collate([_inputs(examples[position]) for position in group])
            try:
                _run(body, batch)
            except _Enough:
                hidden = caught.pop().float().cpu()
            for row, position in enumerate(group):
                length = len(examples[position]["input_ids"])
                states[position] = hidden[row, :length].clone()
    finally:
        hook.remove()
    return states


def _key(body: Any, layers: Any, depth: int, examples: Sequence[Features]) -> str:
    """sha256 of the frozen weights, the architecture and the token ids."""
    total = hashlib.sha256(f"{depth} {body.config.model_type}".encode())
    above = {id(parameter) for layer in layers[depth:] for parameter in layer.parameters()}
    for name, parameter in sorted(body.named_parameters()):
        if not parameter.requires_grad and id(parameter) not in above:
            total.update(name.encode())
            total.update(parameter.detach().cpu().contiguous().view(torch.uint8).numpy())
    ids = [[list(value) for _, value in sorted(_inputs(e).items())] for e in examples]
    total.update(json.dumps(ids).encode())
    return total.hexdigest()


def store(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Write a cache file whole, for the owner alone, and drop the files used longest ago."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.touch(mode=0o600)
    safetensors.torch.save_file(tensors, temporary)
    temporary.chmod(0o600)
    temporary.replace(path)
    files = sorted(path.parent.glob("*.safetensors"), key=lambda file: -file.stat().st_mtime)
    total = 0
    for file in files:
        total += file.stat().st_size
        if total > KEEP_BYTES:
            file.unlink(missing_ok=True)
