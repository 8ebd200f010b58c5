"""The models that a simulation can start from, and how each is fine-tuned unless told otherwise."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from coldmerge.demo.plan import minilm, text_training
from coldmerge_simulation.config import SimulationConfig, merged

DIGITS = "coldmerge.demo.digits:create"
DIGITS_TRAINING = {"trainer": DIGITS, "epochs": 4, "lr": 1e-3}


def place(config: SimulationConfig, base: Path) -> None:
    """Make the folder of release 0, if it is not there.

    Raises:
        ConfigError: the model is not installed.
    """
    if base.exists():
        return
    partial = base.with_name(".base.partial")
    shutil.rmtree(partial, ignore_errors=True)
    if config.model == "digits":
        from coldmerge.demo import digits

        digits.pretrain(partial, config.seed)
    else:
        source = minilm() if config.model == "minilm" else Path(config.model)
        shutil.copytree(source, partial)
    partial.rename(base)


def train_settings(config: SimulationConfig, name: str | None = None) -> dict[str, Any]:
    """The training configuration, without what the simulation decides: everybody's, or one's."""
    found = dict(config.train)
    if config.model == "digits":
        found = {**DIGITS_TRAINING, **found}
    elif config.model == "minilm":
        found = {**text_training(minilm()), **found}
    return merged(found, config.overrides.get(name, {})) if name else found
