"""Plans whose result is a LoRA adapter, carried out factor by factor."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from coldmerge.core.errors import ConfigError
from coldmerge.core.progress import Progress, silent
from coldmerge.merging.lora import MergedAdapter, merge_adapters
from coldmerge.merging.plan.adapter_methods import LoraCat, LoraSvd
from coldmerge.merging.plan.inputs import Opened
from coldmerge.merging.plan.parameters import settings
from coldmerge.merging.plan.plan import Plan
from coldmerge.merging.sources import Input

_ENCODINGS = {None: "fp32", "F32": "fp32", "BF16": "bf16"}


def run_adapters(
    plan: Plan, opened: Opened, out: Path | str, *, progress: Progress = silent
) -> MergedAdapter:
    """Merge adapters into the adapter folder `out`.

    Raises:
        ConfigError: an input is no adapter, a parameter differs between tensors, or the type
            is float16.
        TaskVectorError: an input does not fit the base, or holds NaN.
        ConflictError: `out` exists and is not empty.
    """
    method, inputs = _weighted(plan, opened)
    if plan.dtype not in _ENCODINGS:
        raise ConfigError(
            "plan.adapter_dtype",
            f"{plan.method_at}: {plan.method.name} writes adapters in float32 or bfloat16.",
            expected="dtype: float32 or bfloat16",
            got="float16",
            hint="Change `dtype`, or leave it out.",
            at=plan.method_at,
        )
    Path(out).absolute().parent.mkdir(parents=True, exist_ok=True)
    return merge_adapters(
        opened.base,
        inputs,
        out,
        method="lora_svd" if isinstance(method, LoraSvd) else "lora_cat",
        rank=method.rank if isinstance(method, LoraSvd) else None,
        alpha=method.alpha,
        normalize=method.normalize,
        encoding=_ENCODINGS[plan.dtype],
        progress=progress,
    )


def _weighted(plan: Plan, opened: Opened) -> tuple[LoraCat, list[Input]]:
    """The method's parameters, and the inputs with their weights.

    Raises:
        ConfigError: a gradient or filter gives tensors different ones.
    """
    names = sorted(frozenset[str]().union(*(item.source.names for item in opened.inputs)))
    found = set(settings(plan, opened.places, names, covering=opened.base.tensors).table.values())
    if len(found) != 1:
        raise ConfigError(
            "plan.adapter_gradient",
            f"{plan.method_at}: {plan.method.name} has one set of parameters for all tensors.",
            expected="plain numbers",
            got="a gradient or filter over tensors",
            hint="Give each parameter one value, or merge into a model with `task_arithmetic`.",
            at=plan.method_at,
        )
    (setting,) = found
    if not isinstance(setting.merger, LoraCat):
        raise TypeError(f"{plan.method.name} does not make adapters")
    inputs = [
        replace(item, weight=each.weight)
        for item, each in zip(opened.inputs, setting.each, strict=True)
    ]
    return setting.merger, inputs
