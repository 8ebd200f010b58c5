"""Words of mergekit that coldmerge knows and refuses, each with the way out."""

from __future__ import annotations

from collections.abc import Mapping

from coldmerge.core.errors import ConfigError
from coldmerge.merging.plan.document import Node

_STACKING = "Use mergekit to stack layers; coldmerge keeps every layer in its place."
_MOE = "Use mergekit-moe to build a mixture of experts from models."

WORDS: dict[str, str] = {
    "modules": "Use `models:`; all modules of the base are merged with the same parameters.",
    "out_path": "Give the folder on the command line; several plans are several files.",
    "experts": _MOE,
    "gate_mode": _MOE,
    "experts_per_token": _MOE,
    "shared_experts": _MOE,
    "residual_weight": _STACKING,
    "tokens": "Use `tokenizer_source: base`; rows of tokens are taken from the models as they are.",
    "pad_to_multiple_of": "Remove it; the vocabulary of the merged model is that of its base.",
    "union": "Use `tokenizer_source: base`; rows that a model lacks count as unchanged.",
    "genome": "Use mergekit-evolve to search for parameters.",
}
"""Keys, and one value, with what to do instead."""

METHODS: dict[str, str] = {
    "passthrough": _STACKING,
    "nearswap": "Use `slerp` or `linear` with a gradient.",
    "arcee_fusion": "Use `sce`, which selects by variance.",
    "ram": "Use `ties` or `sce`.",
    "ramplus_tl": "Use `ties` or `sce`.",
    "chipalign": "Use `slerp` or `karcher`.",
    "core_space": "Use `lora_svd` on adapters, or `tsv_m`.",
    "cabs": "Use `dare_ties` or `breadcrumbs_ties`.",
    "zipit": "Use `linear`; permutations of neurons are not searched.",
}
"""Merge methods that are not ours, with the nearest that is."""


def refuse(node: Node, words: Mapping[str, str]) -> None:
    """Refuse a text that is one of `words`, or a mapping with one of them as a key.

    Raises:
        ConfigError: it is.
    """
    found = {node.value: node.where} if isinstance(node.value, str) else node.keys
    for word, where in found.items():
        if word in words:
            raise ConfigError(
                "plan.unsupported",
                f"{where}: `{word}` is not supported.",
                expected="a merge of whole models, layer by layer, onto one base",
                got=word,
                hint=words[word],
                at=where,
            )
