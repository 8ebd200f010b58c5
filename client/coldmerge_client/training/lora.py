"""PEFT's LoRA around a model: which layers get an adapter, and how the head is trained."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from coldmerge.core.adapters import Adapter
from coldmerge.core.checkpoint import Checkpoint
from coldmerge.core.errors import ConfigError
from coldmerge_client.training import models
from coldmerge_client.training.config import TrainConfig

_KEPT = ".modules_to_save.default."


def base_dtype(release: Path) -> torch.dtype:
    """The release's own dtype where adapters can sit on it; float16 is widened."""
    checkpoint = Checkpoint.open(release)
    found = {checkpoint.dtype(name) for name in checkpoint.tensors}
    return torch.bfloat16 if "BF16" in found and "F32" not in found else torch.float32


def wrap(model: Any, config: TrainConfig, names: models.Names, head: Sequence[str]) -> Any:
    """Freeze the model and put adapters on it; the head's modules train as they are.

    Raises:
        ConfigError: the target modules are unknown for this architecture or match nothing.
    """
    import peft

    lora = config.lora
    frozen = names.frozen(config.freeze)
    modules = sorted({name.rpartition(".")[0] for name in head})
    settings = peft.LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=list(lora.target_modules) if lora.target_modules else None,
        exclude_modules=sorted({name.rpartition(".")[0] for name in frozen} | set(modules)) or None,
        modules_to_save=modules or None,
        use_rslora=lora.rslora,
        bias="none",
    )
    try:
        with warnings.catch_warnings():
            # PEFT asks transformers by a name that transformers has given up.
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is dep", FutureWarning)
            return peft.get_peft_model(model, settings)
    except ValueError as error:
        raise ConfigError(
            "training.bad_lora_targets",
            f"LoRA cannot be put on this model: {str(error).splitlines()[0]}",
            got=", ".join(lora.target_modules or ()) or "no `lora.target_modules`",
            hint="Name the linear layers in `lora.target_modules`, for example [query, value].",
        ) from error


def merged(model: Any, adapter: Path) -> Any:
    """`model` with the trained adapter, and the modules saved with it, merged into it."""
    import peft

    with models.quiet(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is dep", FutureWarning)
        return peft.PeftModel.from_pretrained(model, str(adapter)).merge_and_unload()


def targets(adapter: Path) -> set[str]:
    """The weights that an adapter changes, by the model's own names."""
    return {target.weight for target in Adapter(adapter).targets.values()}


def trained_copies(model: Any, head: Sequence[str]) -> dict[str, torch.Tensor]:
    """The head's parameters under their plain names; of wrapped modules the trained copy."""
    found: dict[str, torch.Tensor] = {}
    for name, parameter in model.named_parameters():
        if ".original_module." not in name:
            plain = name.removeprefix("base_model.model.").replace(_KEPT, ".")
            found[plain] = parameter
    return {name: found[name] for name in head if name in found}
