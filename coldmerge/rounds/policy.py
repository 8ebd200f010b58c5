"""Round policies: how many must contribute, until when, how it merges, what the gate asks.

A policy is frozen into the round when it opens. A template is a policy plus a schedule;
it belongs to the model and is what `round open` and the scheduler start from.
"""

from __future__ import annotations

import re
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Any, Literal, Self
from zoneinfo import ZoneInfo

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    ValidationError,
    field_validator,
    model_validator,
)

from coldmerge.core import yaml_file
from coldmerge.core.documents import Identifier
from coldmerge.core.errors import ConfigError
from coldmerge.core.validation import first_problem
from coldmerge.rounds.statistics import statistics_for
from coldmerge.screening.policy import ScreeningPolicy

_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
_DURATION = re.compile(r"(?:[1-9][0-9]{0,8}[smhd])+")
_LONGEST = 10**9
"""Seconds, 31 years: beyond what anybody waits, within what a timedelta holds."""
_METHOD = re.compile(r"[a-z][a-z0-9_]{0,31}")
_CRON = re.compile(r"\S+(?: +\S+){4,5}")
SMALLEST_COHORT = 2
"""Fewer, round after round and without anybody's doing, would publish single task vectors."""
SHORTEST_DIRECTION = 1e-3
"""How far apart candidates are whose difference is taken for a task vector."""
_HINT = 'Write a number and a unit, such as "90s", "10m", "24h" or "7d".'


def parse_duration(text: str) -> timedelta:
    """Read `90s`, `10m`, `24h`, `7d`, or a sum such as `1h30m`.

    Raises:
        ConfigError: anything else.
    """
    found = _duration(text)
    if found is None:
        raise ConfigError(
            "policy.bad_duration",
            f"A duration cannot be read: {text!r}.",
            expected="a number and one of s, m, h, d",
            got=text,
            hint=_HINT,
        )
    return found


def _duration(text: str) -> timedelta | None:
    if not _DURATION.fullmatch(text):
        return None
    parts = re.findall(r"([0-9]+)([smhd])", text)
    seconds = sum(int(number) * _UNITS[unit] for number, unit in parts)
    return timedelta(seconds=seconds) if seconds <= _LONGEST else None


def format_duration(duration: timedelta) -> str:
    """The shortest text that `parse_duration` reads back as `duration` (whole seconds)."""
    seconds = round(duration.total_seconds())
    text = ""
    for unit in ("d", "h", "m", "s"):
        number, seconds = divmod(seconds, _UNITS[unit])
        text += f"{number}{unit}" if number else ""
    return text or "0s"


def _duration_in(value: object) -> object:
    if isinstance(value, timedelta):
        return value
    found = _duration(value) if isinstance(value, str) else None
    if found is None:
        raise ValueError(f"{value!r} is not a duration. {_HINT}")
    return found


Duration = Annotated[
    timedelta,
    BeforeValidator(_duration_in),
    PlainSerializer(format_duration, return_type=str),
    Field(ge=timedelta(seconds=1), le=timedelta(days=3650)),
]
"""A `timedelta` that YAML and JSON write as `24h`."""


ParameterName = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]{0,63}$")]
Parameters = dict[ParameterName, str | int | float | bool]


class _Frozen(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class GatePolicy(_Frozen):
    """What evaluations must show before a candidate becomes a release.

    Gains are in points (0 to 100) of `metric`, candidate minus base, each evaluator
    counting once. A loss beyond `max_loss` is a veto: more than `max_vetoes` of them
    reject. Up to that many, if they are a minority of the reports, are set aside, so
    that one liar holds no veto. The mean gain of the others must reach `min_mean_gain`.

    With `on_reject: isolate` the round then looks for whose contribution it was: see
    `coldmerge.rounds.isolation`. Groups of fewer than `isolate_least` are left out only with
    `isolate_singles` and the consent of everybody in them.
    """

    min_evaluators: int = Field(default=1, ge=1, le=10_000)
    metric: Literal["accuracy", "macro_f1"] = "accuracy"
    min_mean_gain: float = Field(default=0.0, ge=-100, le=100)
    max_loss: float = Field(default=2.0, ge=0, le=100)
    max_vetoes: int = Field(default=1, ge=0, le=10_000)
    window: Duration = timedelta(hours=1)
    on_timeout: Literal["hold", "reject", "publish_flagged"] = "hold"
    on_reject: Literal["reject", "isolate"] = "reject"
    isolate_least: int = Field(default=2, ge=2, le=1000)
    isolate_singles: bool = False


class CoefficientsPolicy(_Frozen):
    """Weights of the inputs that are learned: contributors judge probes, each by one number.

    A probe is a candidate with other coefficients, between `lower` and `upper`, from `initial`
    on; at most `probes` of them are made, by `method` (see `coldmerge.rounds.descent`), `step` of
    the range apart. Contributors report the `objective` of each on their own validation data
    within `window`; fewer than `min_evaluators` end the search with the best that was measured.
    One evaluator's changes count for at most `clip` times the median evaluator's. With
    `method: gradient` they report its slopes too: see `coldmerge.rounds.slopes`.

    A coefficient is of a task vector, or (`granularity: layer`) of each layer of it. Contributors
    who did not consent to coefficients of their own share them with others: see
    `coldmerge.rounds.coefficients.atoms`; `least` are in such a group.
    """

    method: Literal["quadratic", "spsa", "gradient", "fork"] = "quadratic"
    objective: Literal["loss", "entropy", "accuracy"] = "loss"
    granularity: Literal["task", "layer"] = "task"
    probes: int = Field(default=24, ge=4, le=1000)
    initial: float = Field(default=0.3, ge=-100, le=100)
    lower: float = Field(default=0.0, ge=-100, le=100)
    upper: float = Field(default=1.0, ge=-100, le=100)
    step: float = Field(default=0.2, gt=0, le=0.5)
    branches: Literal["each", "without"] = "each"
    window: Duration = timedelta(minutes=10)
    min_evaluators: int = Field(default=1, ge=1, le=10_000)
    clip: float = Field(default=3.0, ge=1, le=1000)
    least: int = Field(default=2, ge=2, le=1000)

    @model_validator(mode="after")
    def _starts_inside(self) -> Self:
        if not self.lower < self.upper:
            raise ValueError("upper must be above lower")
        if not self.lower <= self.initial <= self.upper:
            raise ValueError("initial must lie between lower and upper")
        return self

    @model_validator(mode="after")
    def _has_slopes(self) -> Self:
        if self.method != "gradient":
            return self
        if self.objective == "accuracy":
            raise ValueError(
                "method: gradient needs an objective that has slopes: take loss or entropy"
            )
        if self.step * (self.upper - self.lower) < SHORTEST_DIRECTION:
            raise ValueError(
                f"method: gradient needs a step of at least {SHORTEST_DIRECTION:g} between lower "
                "and upper: what differs less is rounding"
            )
        return self


class MergePolicy(_Frozen):
    """How the contributions become one task vector, and what it does to the weights.

    `parameters` are the method's own, `outer` the outer optimizer's with its `method`; both
    are checked by whoever opens the round, who knows the methods. What the method needs to
    know about the contributors' data is asked of them: see `coldmerge.rounds.statistics`.
    With `coefficients` the weights of the inputs are learned.
    """

    method: str = Field(default="mean", pattern=f"^{_METHOD.pattern}$")
    weights: Literal["uniform", "examples"] = "uniform"
    parameters: Parameters = Field(default={}, max_length=64)
    outer: Parameters = Field(default={"method": "none"}, max_length=16)
    coefficients: CoefficientsPolicy | None = None

    @field_validator("outer")
    @classmethod
    def _names_its_method(cls, value: Parameters) -> Parameters:
        if not _METHOD.fullmatch(str(value.get("method", ""))):
            raise ValueError("needs a `method`, such as none or nesterov")
        return value

    @model_validator(mode="after")
    def _asks_for_what_there_is(self) -> Self:
        statistics_for(self)
        return self


class ContinuousPolicy(_Frozen):
    """A round that merges the next arrivals, and is followed by the next one.

    It takes task vectors against its base release and the releases of up to `max_staleness`
    merges before; a stale one counts for (1 + staleness)^-`discount`. The next round opens when
    it has ended; after `pause`, if it made no release. See `coldmerge.rounds.continuous`.
    """

    max_staleness: int = Field(default=2, ge=0, le=100)
    discount: float = Field(default=0.5, ge=0, le=10)
    pause: Duration = timedelta(minutes=5)


class RoundPolicy(_Frozen):
    """The rules of one round.

    Without `duration` the round seals as soon as `min_contributions` are in (or
    `max_contributions`, when given). With it, it seals at the deadline, or earlier when
    `max_contributions` is reached; too few at the deadline is a missed quorum.
    With `continuous` it has no deadline, and seals when `min_contributions` are in.
    `contributors` names those who may contribute; None: all.
    """

    min_contributions: int = Field(default=3, ge=1, le=10_000)
    max_contributions: int | None = Field(default=None, ge=1, le=10_000)
    duration: Duration | None = None
    on_quorum_missed: Literal["abandon", "extend"] = "abandon"
    second_contribution: Literal["replace", "refuse"] = "replace"
    contributors: tuple[Identifier, ...] | None = Field(
        default=None, min_length=1, max_length=10_000
    )
    merge: MergePolicy = MergePolicy()
    screening: ScreeningPolicy = ScreeningPolicy()
    gate: GatePolicy | None = GatePolicy()
    webhook: str | None = Field(default=None, pattern=r"^https?://\S+$", max_length=2000)
    mode: Literal["screened"] = "screened"
    continuous: ContinuousPolicy | None = None

    @model_validator(mode="after")
    def _max_not_below_min(self) -> Self:
        if self.max_contributions is not None and self.max_contributions < self.min_contributions:
            raise ValueError("max_contributions is below min_contributions")
        if self.contributors is not None and len(set(self.contributors)) < self.min_contributions:
            raise ValueError("contributors names fewer than min_contributions")
        return self

    @model_validator(mode="after")
    def _one_search(self) -> Self:
        learns = self.merge.coefficients is not None
        if learns and self.gate is not None and self.gate.on_reject == "isolate":
            raise ValueError(
                "merge.coefficients and gate.on_reject: isolate would together show more than "
                "either: leave one out"
            )
        return self

    @model_validator(mode="after")
    def _continuous_seals_by_count(self) -> Self:
        if self.continuous is None:
            return self
        if self.min_contributions < SMALLEST_COHORT:
            raise ValueError(
                f"a continuous round merges at least {SMALLEST_COHORT}: with min_contributions 1 "
                "every release would show one contributor's task vector"
            )
        if self.max_contributions not in (None, self.min_contributions):
            raise ValueError(
                "a continuous round seals when min_contributions are in: leave "
                "max_contributions out"
            )
        if self.duration is not None:
            raise ValueError("a continuous round has no deadline: leave duration out")
        return self

    def asks(self, contributor: str) -> bool:
        """Whether `contributor` may contribute."""
        return self.contributors is None or contributor in self.contributors

    @property
    def seals_at(self) -> int | None:
        """How many contributions close the round at once; None: only the deadline does."""
        if self.max_contributions is None and self.duration is None:
            return self.min_contributions
        return self.max_contributions

    def to_json(self) -> dict[str, Any]:
        """JSON-ready values that `model_validate` reads back."""
        return self.model_dump(mode="json")


class Schedule(_Frozen):
    """When the next round opens by itself: five cron fields, read in a named time zone."""

    cron: str = Field(max_length=120)
    timezone: str = "UTC"

    @field_validator("cron")
    @classmethod
    def _fields(cls, value: str) -> str:
        if not _CRON.fullmatch(value.strip()):
            raise ValueError(f"{value!r} is not a cron line; an example: 0 2 * * 1-5")
        return value.strip()

    @field_validator("timezone")
    @classmethod
    def _known(cls, value: str) -> str:
        try:
            ZoneInfo(value)
        except (OSError, ValueError) as error:  # ZoneInfoNotFoundError is a KeyError
            raise ValueError(f"{value!r} is not a time zone") from error
        except KeyError as error:
            raise ValueError(f"{value!r} is not a time zone; an example: Europe/Paris") from error
        return value


class RoundTemplate(RoundPolicy):
    """A model's standing round policy, with the schedule that opens rounds by itself."""

    schedule: Schedule | None = None

    @model_validator(mode="after")
    def _opens_one_way(self) -> Self:
        if self.continuous is not None and self.schedule is not None:
            raise ValueError("continuous rounds follow each other: leave schedule out")
        return self

    def policy(self) -> RoundPolicy:
        """The policy of one round opened from this template."""
        return RoundPolicy.model_validate(self.model_dump(mode="json", exclude={"schedule"}))


def parse_template(values: object, source: str) -> RoundTemplate:
    """Check values read from `source` (a file name, for the message).

    Raises:
        ConfigError: `policy.invalid`, naming the first wrong key.
    """
    try:
        return RoundTemplate.model_validate({} if values is None else values)
    except ValidationError as error:
        problem = first_problem(error)
        raise ConfigError(
            "policy.invalid",
            f"The round policy {source} is wrong at {problem.key}: {problem.text}.",
            hint="docs/rounds.md lists every key with its default.",
            key=problem.key,
        ) from error


def load_yaml(path: Path) -> RoundTemplate:
    """Read a round template, or a policy, from a YAML file.

    Raises:
        ConfigError: unreadable file, bad YAML, or a wrong key.
    """
    try:
        values = yaml_file.load(path)
    except (OSError, yaml.YAMLError) as error:
        raise ConfigError(
            "policy.unreadable",
            f"The round policy {path} cannot be read: {error}",
            hint="Check the path, and the file's indentation.",
        ) from error
    return parse_template(values, str(path))
