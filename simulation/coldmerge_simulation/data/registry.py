"""Partitioners by name: ours, and those of other packages by entry point.

A package of a user's own registers a `Partitioner` in its pyproject.toml:

    [project.entry-points."coldmerge.partitioners"]
    my_way = "my_package.my_module:MyWay"
"""

from __future__ import annotations

import inspect
from difflib import get_close_matches
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from pydantic import ValidationError

from coldmerge.core.errors import ConfigError
from coldmerge.core.validation import first_problem
from coldmerge_simulation.data.partition import GROUP, Partitioner
from coldmerge_simulation.data.partitioners import PARTITIONERS


def partitioner_names() -> list[str]:
    """Every partitioner there is, sorted."""
    return sorted({*PARTITIONERS, *(entry.name for entry in entry_points(group=GROUP))})


def partitioner(by: str, parameters: dict[str, Any]) -> Partitioner:
    """The partitioner called `by`, with its parameters.

    Raises:
        ConfigError: there is none, a package's entry point for it is broken, or a parameter
            is unknown or out of range.
    """
    kind = PARTITIONERS.get(by) or _plugin(by)
    if kind is None:
        close = get_close_matches(by, partitioner_names(), 1)
        raise ConfigError(
            "simulation.unknown_partitioner",
            f"There is no partitioner {by}.",
            expected=" | ".join(partitioner_names()),
            got=by,
            hint=(f"Did you mean `{close[0]}`? " if close else "")
            + "Correct data.partition.by in the simulation's file.",
        )
    try:
        return kind.model_validate(parameters)
    except ValidationError as error:
        problem = first_problem(error)
        raise ConfigError(
            "simulation.bad_partition",
            f"data.partition of a simulation is wrong at {problem.key}: {problem.text}.",
            expected=", ".join(["by", *kind.model_fields]),
            got=problem.got,
            hint=f"Correct the parameters of `{by}`.",
        ) from error


def _plugin(by: str) -> type[Partitioner] | None:
    entries: list[EntryPoint] = list(entry_points(group=GROUP, name=by))
    if not entries:
        return None
    target = entries[-1].value
    try:
        loaded = entries[-1].load()
        sound = issubclass(loaded, Partitioner) and loaded.name == by
        sound = sound and not inspect.isabstract(loaded)
    except Exception as error:
        raise _broken(by, target, f"{type(error).__name__}: {error}") from error
    if not sound:
        raise _broken(by, target, "not a Partitioner of that name")
    found: type[Partitioner] = loaded
    return found


def _broken(by: str, target: str, got: str) -> ConfigError:
    return ConfigError(
        "simulation.broken_partitioner",
        f"The partitioner {by} of another package cannot be used.",
        expected=f"a subclass of coldmerge_simulation.data.Partitioner at {target}",
        got=got,
        hint="Ask the package's author, or uninstall it.",
    )
