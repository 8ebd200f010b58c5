"""How simulated contributors behave: who takes part, who drops out, who is late, who attacks.

    participation: {share: 0.5, dropout: 0.1, stragglers: {share: 0.2, slowdown: 5},
                    duration: {distribution: lognormal, seconds: 60, spread: 0.25}}
    attackers: [{count: 2, kind: sign_flip, strength: 1}, {names: [org-07], kind: nan}]

Everything is drawn by hashing (seed, purpose, round, contributor): it does not depend on who
else there is asked first, nor on the engine. Who is slow and who attacks holds for the whole
simulation.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Literal, Self

from pydantic import Field, model_validator

from coldmerge.core.documents import Identifier
from coldmerge.core.errors import ConfigError
from coldmerge_client.training.config import Settings

Kind = Literal["sign_flip", "scale", "noise", "label_flip", "nan"]
STRENGTH: dict[Kind, float] = {
    "sign_flip": 1.0,
    "scale": 10.0,
    "noise": 1.0,
    "label_flip": 1.0,
    "nan": 1.0,
}
"""What `strength` is where it is left out."""


class Stragglers(Settings):
    """A share of the contributors, always the same ones, takes `slowdown` times as long."""

    share: float = Field(default=0.0, ge=0, le=1)
    slowdown: float = Field(default=3.0, ge=1, le=1e6)


class Durations(Settings):
    """How long a contribution takes, in simulated seconds; `seconds` is the median.

    `spread`: of `uniform` half the width, as a share of the median (at most 1); of `lognormal`
    the deviation of the logarithm; `fixed` and `exponential` have none.
    """

    distribution: Literal["fixed", "uniform", "lognormal", "exponential"] = "lognormal"
    seconds: float = Field(default=60.0, gt=0, le=1e8)
    spread: float = Field(default=0.25, ge=0, le=3)

    @model_validator(mode="after")
    def _no_time_below_zero(self) -> Self:
        if self.distribution == "uniform" and self.spread > 1:
            raise ValueError("spread of a uniform duration is at most 1")
        return self

    def at(self, chance: float) -> float:
        """The duration below which a share `chance`, in (0, 1), of all durations are."""
        match self.distribution:
            case "fixed":
                factor = 1.0
            case "uniform":
                factor = 1 + self.spread * (2 * chance - 1)
            case "lognormal":
                factor = math.exp(self.spread * NormalDist().inv_cdf(chance))
            case "exponential":
                factor = -math.log2(1 - chance)
        return self.seconds * factor


class Participation(Settings):
    """Who of the contributors takes part in a round, and how.

    `share` of them, or `count`, are asked in each round; each drops out with a probability
    of `dropout`: it starts and never delivers.
    """

    share: float = Field(default=1.0, gt=0, le=1)
    count: int | None = Field(default=None, ge=1)
    dropout: float = Field(default=0.0, ge=0, le=1)
    stragglers: Stragglers = Stragglers()
    duration: Durations = Durations()

    @model_validator(mode="after")
    def _one_of_the_two(self) -> Self:
        if self.count is not None and self.share < 1:
            raise ValueError("share and count say the same thing; leave one out")
        return self


class Attack(Settings):
    """What an attacker sends instead of its task vector τ.

    `sign_flip`: −strength·τ. `scale`: strength·τ. `noise`: τ and normal noise, in each tensor
    strength times as large as τ there. `label_flip`: what it learns when a share `strength`
    of its training examples has another label, drawn at random. `nan`: τ with a NaN in each tensor.
    """

    kind: Kind
    strength: float | None = Field(default=None, gt=0, le=1e30)

    @model_validator(mode="after")
    def _a_share(self) -> Self:
        if self.kind == "label_flip" and self.amount > 1:
            raise ValueError("strength of label_flip is a share of the examples: at most 1")
        return self

    @property
    def amount(self) -> float:
        """`strength`, or what it is for this kind where it is left out."""
        return STRENGTH[self.kind] if self.strength is None else self.strength

    @property
    def on_data(self) -> bool:
        """Whether the training data is attacked, and not the task vector."""
        return self.kind == "label_flip"


class Attacker(Attack):
    """Some contributors that attack from round `from_round` on: those named, or `count` of them."""

    count: int | None = Field(default=None, ge=1)
    names: tuple[Identifier, ...] | None = Field(default=None, min_length=1)
    from_round: int = Field(default=1, ge=1)

    @model_validator(mode="after")
    def _one_of_the_two(self) -> Self:
        if (self.count is None) == (self.names is None):
            raise ValueError("needs either count or names")
        return self

    def attack(self) -> Attack:
        """What each of them does."""
        return Attack(kind=self.kind, strength=self.strength)


@dataclass(frozen=True)
class Turn:
    """One contributor's part in a round.

    `seconds` of simulated time pass until its contribution comes; if it `drops`, none does.
    """

    name: str
    seconds: float
    drops: bool
    straggler: bool
    attack: Attack | None


@dataclass(frozen=True)
class Conduct:
    """Who takes part in a round, sorted by name, and how."""

    turns: tuple[Turn, ...]

    @property
    def arrivals(self) -> tuple[Turn, ...]:
        """Those who deliver, in the order in which they do."""
        there = (turn for turn in self.turns if not turn.drops)
        return tuple(sorted(there, key=lambda turn: (turn.seconds, turn.name)))


def plan(
    participation: Participation,
    attackers: Sequence[Attacker],
    seed: int,
    round_number: int,
    names: Sequence[str],
) -> Conduct:
    """What happens in round `round_number` (from 1) among the contributors `names`.

    Raises:
        ConfigError: there are fewer contributors than are to take part or to attack, or an
            attacker has an unknown name.
    """
    attacks = attacking(attackers, seed, names)
    chosen = _asked(participation, seed, round_number, names)
    slow = _slow(participation.stragglers, seed, names)
    turns = []
    for name in chosen:
        seconds = participation.duration.at(_chance(seed, "duration", round_number, name))
        seconds *= participation.stragglers.slowdown if name in slow else 1.0
        attacker = attacks.get(name)
        active = attacker is not None and round_number >= attacker.from_round
        turns.append(
            Turn(
                name=name,
                seconds=round(seconds, 3),
                drops=_chance(seed, "dropout", round_number, name) < participation.dropout,
                straggler=name in slow,
                attack=attacker.attack() if attacker is not None and active else None,
            )
        )
    return Conduct(tuple(turns))


def attacking(
    attackers: Sequence[Attacker], seed: int, names: Sequence[str]
) -> Mapping[str, Attacker]:
    """Which contributors attack, and how. Named ones first; nobody is two attackers.

    Raises:
        ConfigError: as `plan`.
    """
    found: dict[str, Attacker] = {}
    for attacker in attackers:
        for name in attacker.names or ():
            if name not in names or name in found:
                raise ConfigError(
                    "simulation.unknown_attacker",
                    f"The attacker {name} is no contributor."
                    if name not in names
                    else f"The contributor {name} is two attackers.",
                    expected=_shortly(names),
                    got=name,
                    hint="Correct `names` in attackers, or give a `count`.",
                )
            found[name] = attacker
    for place, attacker in enumerate(attackers):
        free = [name for name in names if name not in found]
        wanted = attacker.count or 0
        if wanted > len(free):
            raise _too_few("attackers", len(found) + wanted, len(names))
        for name in _draw(free, wanted, seed, f"attacker/{place}"):
            found[name] = attacker
    return found


def _asked(how: Participation, seed: int, round_number: int, names: Sequence[str]) -> list[str]:
    count = how.count if how.count is not None else max(1, math.floor(how.share * len(names) + 0.5))
    if count > len(names):
        raise _too_few("participants", count, len(names))
    return _draw(names, count, seed, f"participation/{round_number}")


def _slow(stragglers: Stragglers, seed: int, names: Sequence[str]) -> frozenset[str]:
    count = math.floor(stragglers.share * len(names) + 0.5)
    return frozenset(_draw(names, count, seed, "straggler"))


def _draw(names: Iterable[str], count: int, seed: int, purpose: str) -> list[str]:
    """`count` of the names, the same ones in whatever order they come; sorted."""
    return sorted(sorted(names, key=lambda name: _chance(seed, purpose, 0, name))[:count])


def _chance(seed: int, purpose: str, round_number: int, name: str) -> float:
    """A number in (0, 1), of 53 bits."""
    text = "\x1f".join(["conduct", str(seed), purpose, str(round_number), name])
    drawn = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 11
    return min((drawn + 0.5) / 2**53, 1 - 2**-53)


def _too_few(what: str, wanted: int, there: int) -> ConfigError:
    return ConfigError(
        "simulation.too_few_contributors",
        f"There are fewer contributors than {what}.",
        expected=f"at least {wanted} contributors",
        got=there,
        hint="Raise `contributors`, or lower the `count`.",
    )


def _shortly(names: Sequence[str]) -> str:
    more = f", and {len(names) - 10} more" if len(names) > 10 else ""
    return ", ".join(sorted(names)[:10]) + more
