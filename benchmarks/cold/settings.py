"""How contributors of a plan train, and how its releases are measured."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.cold.planning import Parts
from benchmarks.cold.recipes import COMMON, Federation, load
from benchmarks.cold.sets import Split, held
from coldmerge.core.errors import ConfigError
from coldmerge_simulation.config import merged

POOL, TEST, DRAWS, TUNES = 500, 400, 5, 3


def federation(split: Split, model: Path, parts: Parts, data: Path) -> Federation:
    """What all simulations of a table share.

    Raises:
        ConfigError: the cheap setting is asked for, and the model has no numbered layers.
    """
    changes = merged(_shorter(model), cheap(model) if parts.cheap else {})
    return Federation(
        data.absolute(),
        tuple(task.name for task in split.seen),
        tuple(held(task) for task in split.seen),
        str(model),
        parts.rounds,
        changes,
    )


def cheap(model: Path) -> dict[str, Any]:
    """The cheap setting: only the top third of the layers, whose inputs are computed once."""
    from coldmerge.demo.plan import text_training

    freeze = text_training(model)["freeze"]
    if not freeze:
        raise _no_layers(model, "numbered layers")
    return {"train": {**load("cheap")["train"], "freeze": freeze}}


def _shorter(model: Path) -> dict[str, Any]:
    """Texts are cut to what the model has positions for, where that is less than usual."""
    try:
        said = json.loads((model / "config.json").read_text(encoding="utf-8"))
        room = said.get("max_position_embeddings")
    except (OSError, ValueError, AttributeError):
        return {}
    # Some architectures begin to count behind the padding's place: two fewer.
    usual = load(COMMON)["train"]["max_length"]
    if not isinstance(room, int) or room < 4 or room - 2 >= usual:
        return {}
    return {"train": {"max_length": max(4, room - 2)}}


def settings_of(split: Split, model: Path, parts: Parts, data: Path) -> dict[str, Any]:
    """A plan's `settings`: `train`, `ruler` and `tune` (how it is measured), `tunes`, `parts`.

    Raises:
        ConfigError: the model lacks layers that are to be frozen.
    """
    train = federation(split, model, parts, data).common["train"]
    _check_layers(model, train["freeze"])
    tune = {key: value for key, value in train.items() if key not in ("epochs", "max_examples")}
    ruler = {"max_length": train["max_length"], "test": TEST, "pool": POOL, "draws": DRAWS}
    return {"train": train, "ruler": ruler, "tune": tune, "tunes": TUNES, "parts": asdict(parts)}


def ruler(settings: Mapping[str, Any]) -> Any:
    """The `measuring.Ruler` that a plan's settings describe."""
    from benchmarks.cold.measuring import Ruler

    freeze = tuple(settings["train"]["freeze"]) if settings["parts"]["cheap"] else ()
    return Ruler(freeze=freeze, tune=settings["tune"], **settings["ruler"])


def _check_layers(model: Path, patterns: Sequence[str]) -> None:
    from coldmerge.core.checkpoint import Checkpoint
    from coldmerge.core.names import is_private

    names = sorted(Checkpoint.open(model).tensors)
    for pattern in patterns:
        if not any(is_private(name, [pattern]) for name in names):
            raise _no_layers(model, f"tensors {pattern}")


def _no_layers(model: Path, wanted: str) -> ConfigError:
    from coldmerge.core.checkpoint import Checkpoint

    return ConfigError(
        "cold.no_layers",
        f"The model {model.name} has no {wanted} that could be frozen.",
        expected=wanted,
        got=", ".join(sorted(Checkpoint.open(model).tensors)[:5]),
        hint="Take an encoder with embeddings and, for the cheap setting, numbered layers.",
        model=model,
    )
