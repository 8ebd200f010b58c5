"""Tensor names: a fine-tune's onto its release's, and which of them stay at home."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from fnmatch import fnmatchcase

_WRAPPERS = ("base_model.model.", "_orig_mod.", "module.")
_INNER = (".base_layer.", ".modules_to_save.default.", ".modules_to_save.", "._orig_mod.")
_LAYER_NORM = {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}
_BODY = "body."
_FACTOR = re.compile(r"(.+)\.lora_(A|B)")


def canonical(name: str) -> str:
    """`name` without the wrappers of PEFT, torch.compile and data-parallel training."""
    stripped = True
    while stripped:
        stripped = False
        for wrapper in _WRAPPERS:
            if name.startswith(wrapper):
                name, stripped = name.removeprefix(wrapper), True
    for inner in _INNER:
        name = name.replace(inner, ".")
    return name


def match_names(base: Collection[str], names: Collection[str]) -> dict[str, str | None]:
    """Map the tensor names of a fine-tune to those of its release; None: not in the release.

    Wrappers are stripped, then one leading component (`base_model_prefix`, such as `bert.`)
    is stripped or added if that makes more names match; `body.`, as a mean-pooled model calls
    what is below its head, may be replaced by one. No two names map to the same one.
    """
    by_key = {_key(name): name for name in sorted(base, reverse=True)}
    plain = {name: _key(canonical(name)) for name in sorted(names)}
    best: dict[str, str | None] = {}
    best_count = -1
    for strip, add in _prefixes(by_key, plain.values()):
        found = _assign(plain, by_key, strip, add)
        count = sum(target is not None for target in found.values())
        if count > best_count:
            best, best_count = found, count
    return best


def _key(name: str) -> str:
    stem = ".".join(name.split(".")[-2:])
    return name[: -len(stem)] + _LAYER_NORM[stem] if stem in _LAYER_NORM else name


def _prefixes(base: Collection[str], names: Collection[str]) -> list[tuple[str, str]]:
    def first(group: Collection[str]) -> list[str]:
        return sorted({name.split(".", 1)[0] + "." for name in group if "." in name})

    strips = [(prefix, "") for prefix in first(names)]
    adds = [("", prefix) for prefix in first(base)]
    both = [(_BODY, prefix) for _, prefix in adds] if (_BODY, "") in strips else []
    return [("", ""), *strips, *adds, *both]


def _assign(
    plain: dict[str, str], by_key: dict[str, str], strip: str, add: str
) -> dict[str, str | None]:
    """Exact matches first, then those by the prefix, each release name at most once."""
    found: dict[str, str | None] = {name: by_key.get(key) for name, key in plain.items()}
    taken: set[str] = set()
    for name, target in found.items():
        if target in taken:
            found[name] = None
        elif target is not None:
            taken.add(target)
    for name, key in plain.items():
        moved = by_key.get(add + key.removeprefix(strip))
        if found[name] is None and moved is not None and moved not in taken:
            found[name] = moved
            taken.add(moved)
    return found


def is_private(name: str, patterns: Sequence[str]) -> bool:
    """Whether `name` matches a pattern (`classifier.*`), with or without its model prefix.

    Case-sensitive, `*`, `?` and `[…]` as in a shell. The name is tried as it is, without
    wrappers, and without its first component: in doubt a tensor stays at home.
    """
    return private_pattern(name, patterns) is not None


def private_pattern(name: str, patterns: Sequence[str]) -> str | None:
    """The first pattern that makes `name` private; None when there is none."""
    plain = canonical(name)
    forms = {name, plain, plain.partition(".")[2] or plain}
    for pattern in patterns:
        if any(fnmatchcase(form, pattern) for form in forms):
            return pattern
    return None


def split_factor(key: str) -> tuple[str, str]:
    """A task vector's key as (release tensor name, "A" | "B" | "" for a full delta)."""
    found = _FACTOR.fullmatch(key)
    return (found[1], found[2]) if found else (key, "")


def split_key(key: str, statistics: Collection[str] = ()) -> tuple[str, str]:
    """A task vector's key as (release tensor name, what of it).

    That is "" for a full delta, "A" or "B" for a factor, or one of `statistics`, the kinds
    that the vector says it ships. Where it ships none, `x.gram` is a tensor of that name.
    """
    name, _, last = key.rpartition(".")
    return (name, last) if name and last in statistics else split_factor(key)
