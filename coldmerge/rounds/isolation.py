"""The search for whose contribution spoils a candidate: which group is left out next.

When the gate rejects the candidate of all inputs, candidates without some of them are merged
and judged in turn. Whoever has several candidates can subtract them: what the contributors of
one *atom* sent (those that every candidate has together or lacks together) comes out as a sum.
So every atom keeps at least `least` contributors, unless all in a smaller one agreed to that.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, Self

SMALLEST_GROUP = 2
"""An atom of one is that contributor's task vector."""


@dataclass(frozen=True)
class Trial:
    """A candidate that was judged: without whom, whether the gate let it pass, and why.

    The digests are of its content, fp32 master and outer optimizer's state.
    """

    number: int
    left_out: tuple[str, ...]
    passed: bool
    reason: str
    digest: str | None = None
    master: str | None = None
    state: str | None = None

    def to_json(self) -> dict[str, Any]:
        """JSON-ready values that `from_json` reads back."""
        return {**vars(self), "left_out": list(self.left_out)}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Self:
        """What `to_json` wrote."""
        return cls(**{**values, "left_out": tuple(values["left_out"])})


@dataclass(frozen=True)
class Rules:
    """What groups may be left out.

    `seed` decides the order in which contributors are split, so that no name is always in
    the same half. `alone`: who agreed to be left out in a group smaller than `least`.
    """

    everyone: tuple[str, ...]
    seed: int
    least: int = SMALLEST_GROUP
    alone: frozenset[str] = frozenset()


def next_group(rules: Rules, trials: Sequence[Trial]) -> tuple[str, ...] | None:
    """Whom the next candidate leaves out; None when the search has ended.

    The suspects are split in two, and each half is left out until a candidate passes: then
    those are the suspects. Where neither half is enough, the search ends with what passed last.
    """
    if len(rules.everyone) < 2 * rules.least:
        return None
    passed = {frozenset(trial.left_out): trial.passed for trial in trials if trial.left_out}
    suspects = sorted(rules.everyone, key=lambda name: _lot(rules.seed, name))
    tried: list[frozenset[str]] = []
    while halves := _halves(suspects, rules, tried):
        tried += [frozenset(half) for half in halves]
        for half in halves:
            found = passed.get(frozenset(half))
            if found is None:
                return tuple(sorted(half))
            if found:
                suspects = half
                break
        else:
            return None
    return None


def best(trials: Sequence[Trial]) -> Trial | None:
    """The trial that passed last: the one that leaves the fewest out."""
    return next((trial for trial in reversed(trials) if trial.passed), None)


def exposed(everyone: Collection[str], groups: Collection[frozenset[str]], least: int) -> set[str]:
    """Who is in an atom of fewer than `least`, once candidates leave out each of `groups`."""
    atoms: dict[frozenset[int], set[str]] = {}
    for name in everyone:
        inside = frozenset(at for at, group in enumerate(groups) if name in group)
        atoms.setdefault(inside, set()).add(name)
    return {name for atom in atoms.values() if len(atom) < least for name in atom}


def _lot(seed: int, name: str) -> bytes:
    return hashlib.sha256(f"{seed} {name}".encode()).digest()


def _halves(
    suspects: list[str], rules: Rules, tried: list[frozenset[str]]
) -> tuple[list[str], list[str]] | None:
    """The suspects in two groups, the first not the larger; None if they stay together."""
    count, least = len(suspects), rules.least
    if count >= 2 * least:
        size = least * (count // least // 2)
    elif count > 1 and rules.alone:
        suspects = sorted(suspects, key=lambda name: name not in rules.alone)
        size = count // 2
    else:
        return None
    halves = suspects[:size], suspects[size:]
    groups = [*tried, *map(frozenset, halves)]
    return halves if exposed(rules.everyone, groups, least) <= rules.alone else None
