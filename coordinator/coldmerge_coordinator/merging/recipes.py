"""How a round's policy names a merge, and what that is: the method and the outer optimizer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from coldmerge.core.digests import Content
from coldmerge.core.dtypes import FLOATS, size
from coldmerge.core.errors import ConfigError
from coldmerge.merging import Recipe, Setting, Uniform, merger_class, uniform
from coldmerge.merging.merger import Scope
from coldmerge.merging.outer import Outer, outer
from coldmerge.rounds.coefficients import SMALLEST, Weights, group_of
from coldmerge.rounds.policy import CoefficientsPolicy, MergePolicy, Parameters, RoundPolicy
from coldmerge.rounds.statistics import statistics_for


def recipe_of(policy: MergePolicy, weights: Sequence[float]) -> Uniform:
    """The merge of inputs with these weights.

    Raises:
        ConfigError: no such method, or not with these parameters or of so many inputs.
    """
    recipe = uniform(merger_class(policy.method), policy.parameters, weights)
    recipe.merger.check_inputs(len(weights))
    return recipe


@dataclass(frozen=True)
class ByGroup:
    """A setting for each group of tensors; `other` for tensors of none, which no input touches."""

    settings: Mapping[str, Uniform]
    other: Uniform

    def setting(self, name: str) -> Setting:
        """How tensor `name` is merged."""
        return self.settings.get(group_of(name), self.other).setting(name)


def recipe_with(
    policy: MergePolicy, learned: Weights | None, inputs: Sequence[tuple[float, str]]
) -> Recipe:
    """The merge of inputs (weight, contributor), with what was learned of their coefficients.

    Raises:
        ConfigError: as `recipe_of`.
    """
    if learned is None or not learned.groups:
        return recipe_of(policy, [weight for weight, _ in inputs])
    found = {
        group: recipe_of(policy, [w * learned.weight(name, group) for w, name in inputs])
        for group in learned.groups
    }
    return found[""] if "" in found else ByGroup(found, next(iter(found.values())))


def check_size(policy: RoundPolicy, content: Content) -> None:
    """Check that the merge of a round on this release fits into what the method may take.

    Raises:
        ConfigError: it does not, with as many contributions as the round waits for; or slopes
            shall be learned from, and the release is rounded.
    """
    _check_precision(policy.merge, content)
    elements = sum(size(entry.shape) for entry in content.tensors if entry.dtype in FLOATS)
    count = policy.seals_at or policy.min_contributions
    recipe_of(policy.merge, [1.0] * count).merger.check_size(elements, count)


def _check_precision(policy: MergePolicy, content: Content) -> None:
    rounded = sorted({e.dtype for e in content.tensors if e.dtype in FLOATS} - {"F32"})
    if policy.coefficients is None or policy.coefficients.method != "gradient" or not rounded:
        return
    raise ConfigError(
        "policy.coefficients_rounded",
        "Slopes are told along differences of candidates, and those of this model are published "
        f"in {', '.join(rounded)}: what they differ by would mostly be rounding.",
        expected="a model published in F32",
        got=", ".join(rounded),
        hint="Set `merge.coefficients.method` to spsa or quadratic, or add the model in float32.",
    )


def outer_of(policy: MergePolicy) -> Outer:
    """The outer optimizer.

    Raises:
        ConfigError: there is no such one, or not with these parameters.
    """
    parameters = {key: value for key, value in policy.outer.items() if key != "method"}
    return outer(str(policy.outer["method"]), parameters)


P = TypeVar("P", bound=RoundPolicy)


def resolved(policy: P) -> P:
    """The policy with every parameter of its merge in it, defaults too, as a round freezes it.

    Raises:
        ConfigError: no such method or optimizer, or not with these parameters, or the
            method cannot merge as many contributions as the round may seal with, or needs
            statistics that contributors do not know of.
    """
    for count in {policy.min_contributions, policy.seals_at or policy.min_contributions}:
        _check_asked(policy.merge, recipe_of(policy.merge, [1.0] * count))
    _check_coefficients(policy.merge)
    return policy.model_copy(update={"merge": _resolved(policy.merge)})


def _check_asked(policy: MergePolicy, recipe: Uniform) -> None:
    """Contributors read in the policy what to measure; a method of one's own is not in there."""
    unknown = sorted(recipe.merger.needs - statistics_for(policy))
    if unknown:
        raise ConfigError(
            "policy.needs_statistics",
            f"Merging by {policy.method} needs {unknown[0]} statistics, which contributors would "
            "not know to send.",
            expected="fisher, regmean or mats where statistics are needed",
            got=policy.method,
            hint="Merge with it at home, from a plan: `coldmerge merge`.",
        )


def _check_coefficients(policy: MergePolicy) -> None:
    """Whether the method takes the weights that may be learned."""
    rules = policy.coefficients
    if rules is None:
        return
    _check_linear(policy, rules)
    bounds = [each if abs(each) >= SMALLEST else SMALLEST for each in (rules.lower, rules.upper)]
    recipe = uniform(merger_class(policy.method), policy.parameters, bounds)
    if rules.granularity == "layer" and recipe.merger.scope is Scope.GLOBAL:
        raise ConfigError(
            "policy.coefficients_by_layer",
            f"Merging by {policy.method} looks at the whole model at once: its coefficients cannot "
            "differ from layer to layer.",
            expected="granularity: task",
            got="granularity: layer",
            hint="Set `merge.coefficients.granularity` to task, or take another method.",
        )


def _check_linear(policy: MergePolicy, rules: CoefficientsPolicy) -> None:
    """Whether candidates differ by task vectors, where slopes are told along them."""
    if rules.method != "gradient":
        return
    merger = uniform(merger_class(policy.method), policy.parameters, [1.0]).merger
    optimizer = outer_of(policy)
    if merger.linear and optimizer.linear:
        return
    bent = policy.method if not merger.linear else f"the outer optimizer {optimizer.name}"
    raise ConfigError(
        "policy.coefficients_not_linear",
        f"What {bent} makes of the inputs is not linear in their coefficients: candidates do not "
        "differ by what slopes are told along.",
        expected="a sum, such as task_arithmetic, that no sum of weights divides",
        got=bent,
        hint="Set `merge.coefficients.method` to quadratic or spsa, or `merge.method` to "
        "task_arithmetic.",
    )


def _resolved(policy: MergePolicy) -> MergePolicy:
    recipe = uniform(merger_class(policy.method), policy.parameters, [1.0])
    optimizer = outer_of(policy)
    found = {
        **policy.parameters,
        **recipe.each[0].model_dump(mode="json", by_alias=True, exclude={"weight"}),
        **recipe.merger.model_dump(mode="json", by_alias=True),
    }
    return policy.model_copy(
        update={
            "parameters": _plain(found),
            "outer": _plain({"method": optimizer.name, **optimizer.model_dump(mode="json")}),
        }
    )


def _plain(values: Mapping[str, object]) -> Parameters:
    return {key: value for key, value in values.items() if isinstance(value, str | int | float)}


def cautions(policy: MergePolicy) -> tuple[str, ...]:
    """What an admin should know before rounds merge by this policy, a sentence each.

    Raises:
        ConfigError: there is no such method.
    """
    caution = merger_class(policy.method).caution
    return (f"{policy.method}: {caution}",) if caution else ()
