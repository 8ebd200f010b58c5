"""A simulation, as a researcher writes it in YAML; docs/simulation.md lists every key.

name: digits
rounds: 10
model: digits                     # minilm, or a Hugging Face folder
contributors: 20
data: {source: digits, partition: {by: dirichlet, alpha: 0.5}}
train: {epochs: 2}                # a training configuration without `data`
overrides: {org-03: {epochs: 1}}  # what is otherwise for one contributor
round: {min_contributions: 3, merge: {method: mean}}
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any, Self

import yaml
from pydantic import Field, ValidationError, ValidationInfo, field_validator, model_validator

from coldmerge.core import yaml_file
from coldmerge.core.documents import Consent, Identifier
from coldmerge.core.errors import ColdmergeError, ConfigError
from coldmerge.core.validation import first_problem
from coldmerge.rounds.policy import Duration, RoundTemplate
from coldmerge_client.training.config import Settings, TrainConfig
from coldmerge_simulation.contributors.conduct import Attacker, Participation
from coldmerge_simulation.data import DataConfig, names

MODELS = ("digits", "minilm")
"""Models that need no folder."""
ENGINES = ("local", "ray", "federation")
"""What can run a simulation: see `coldmerge_simulation.engines`."""

_FORCED = {"data", "seed", "threads"}


class Measuring(Settings):
    """How often releases are measured: every this many rounds, and the last; 0: never."""

    every: int = Field(default=1, ge=0, le=10_000)


class SimulationConfig(Settings):
    """What is simulated. All but the last three decide the result.

    `train` is a training configuration; data, seed and threads are the simulation's.
    `overrides` are keys of it that are otherwise for the contributor of that name. `round` is
    a round template; without a `duration` a round takes whoever comes within a simulated day.
    `consents` are what everybody agrees to, where a round asks. `at_a_time` bounds how many
    contributors are asked and not heard of yet, and `patience` how long one answer may take, in
    real time. `supernodes` is how many the engine `federation` starts: they share the contributors.
    """

    name: Identifier = "simulation"
    seed: int = Field(default=0, ge=0, lt=2**31)
    rounds: int = Field(default=10, ge=1, le=100_000)
    model: str = "digits"
    private: tuple[str, ...] = ()
    contributors: int = Field(default=20, ge=1, le=10_000)
    data: DataConfig = DataConfig()
    train: dict[str, Any] = Field(default_factory=dict)
    overrides: dict[str, dict[str, Any]] = Field(default_factory=dict)
    participation: Participation = Participation()
    attackers: tuple[Attacker, ...] = ()
    round: RoundTemplate = RoundTemplate()
    consents: tuple[Consent, ...] = Field(default=(), max_length=2)
    evaluate: Measuring = Measuring()
    at_a_time: int = Field(default=8, ge=1, le=1000)
    patience: Duration = timedelta(hours=1)
    supernodes: int = Field(default=2, ge=1, le=1000)

    @field_validator("model")
    @classmethod
    def _known_model(cls, value: str, info: ValidationInfo) -> str:
        if value in MODELS:
            return value
        folder = Path((info.context or {}).get("folder", Path.cwd())) / Path(value).expanduser()
        if not folder.is_dir():
            raise ValueError(f"is neither {' nor '.join(MODELS)} nor a folder: {value}")
        return str(folder.resolve())

    @field_validator("train")
    @classmethod
    def _trains(cls, value: dict[str, Any], info: ValidationInfo) -> dict[str, Any]:
        """Checked here, so that it is not each contributor who finds the mistake."""
        return _checked(value, {}, info)

    @field_validator("overrides")
    @classmethod
    def _trains_otherwise(
        cls, value: dict[str, dict[str, Any]], info: ValidationInfo
    ) -> dict[str, dict[str, Any]]:
        common = info.data.get("train", {})
        return {name: _checked(settings, common, info) for name, settings in value.items()}

    @model_validator(mode="after")
    def _known_names(self) -> Self:
        known = names(self.contributors)
        for key, named in (("overrides", self.overrides), ("data.keeps", self.data.keeps)):
            unknown = sorted(set(named) - set(known))
            if unknown:
                raise ValueError(
                    f"{unknown[0]} in {key} is no contributor; they are {known[0]} to {known[-1]}"
                )
        return self

    @model_validator(mode="after")
    def _enough(self) -> Self:
        least = self.round.min_contributions
        if least > self.contributors:
            raise ValueError(
                f"round.min_contributions is {least}, and there are {self.contributors} "
                "contributors: no round would ever have enough"
            )
        return self

    @classmethod
    def parse(cls, raw: object, folder: Path | None = None) -> Self:
        """Check settings that came as plain values; paths are relative to `folder`.

        Raises:
            ConfigError: naming the first key that is wrong.
        """
        try:
            return cls.model_validate(raw, context={"folder": folder or Path.cwd()})
        except ValidationError as error:
            problem = first_problem(error, "the file")
            raise ConfigError(
                "simulation.bad_config",
                f"The simulation is wrong at {problem.key}: {problem.text}.",
                got=problem.got,
                hint=_hint(problem.key),
                folder=folder,
            ) from error

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read a YAML file.

        Raises:
            ConfigError: the file is missing, not YAML, or has a wrong key.
        """
        try:
            raw = yaml_file.load(path)
        except (OSError, yaml.YAMLError) as error:
            raise ConfigError(
                "simulation.unreadable",
                f"The simulation {path} cannot be read: {str(error).splitlines()[0]}.",
                hint="Check the path and the indentation; examples/simulate.yaml is a sample.",
            ) from error
        return cls.parse({} if raw is None else raw, path.resolve().parent)

    def to_json(self) -> dict[str, Any]:
        """JSON-ready values that `parse` reads back."""
        return self.model_dump(mode="json")


def merged(settings: Mapping[str, Any], otherwise: Mapping[str, Any]) -> dict[str, Any]:
    """`settings` with the values of `otherwise`, section by section."""
    found = dict(settings)
    for key, value in otherwise.items():
        known = found.get(key)
        if isinstance(value, Mapping) and isinstance(known, Mapping):
            value = merged(known, value)
        found[key] = value
    return found


def _checked(value: dict[str, Any], common: dict[str, Any], info: ValidationInfo) -> dict[str, Any]:
    """A training configuration, or what is otherwise than in `common`; files made absolute."""
    forced = sorted(_FORCED & value.keys())
    if forced:
        raise ValueError(f"{forced[0]} is the simulation's own; leave it out")
    folder = (info.context or {}).get("folder", Path.cwd())
    try:
        checked = TrainConfig.parse({**merged(common, value), "data": "."}, folder)
    except ColdmergeError as error:
        raise ValueError(f"{error.message}") from error
    return {**value, "trainer": checked.trainer} if "trainer" in value else value


def _hint(key: str) -> str:
    if "." not in key and key not in SimulationConfig.model_fields:
        return f"The keys are {', '.join(SimulationConfig.model_fields)}."
    return "docs/simulation.md lists every key with its default."


def difference(one: Any, other: Any, key: str = "") -> str | None:
    """The first key, with dots, in which two JSON values differ; None: they are equal."""
    if isinstance(one, dict) and isinstance(other, dict):
        for name in sorted({*one, *other}):
            where = f"{key}.{name}" if key else name
            if name not in one or name not in other:
                return where
            found = difference(one[name], other[name], where)
            if found is not None:
                return found
        return None
    return None if one == other else key
