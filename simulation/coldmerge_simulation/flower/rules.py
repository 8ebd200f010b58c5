"""Flower's strategies as coordinators use them: which there are, what each is on task vectors.

Importing this needs no Flower; looking a strategy up does.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, NoReturn

import numpy as np

from coldmerge.core.errors import ConfigError
from coldmerge.core.plugins import BrokenPluginError, plugin, plugin_names
from coldmerge.core.threads import one_blas_thread
from coldmerge.merging.merger import Values

GROUP = "coldmerge.strategies"
"""Entry points of strategies that are not Flower's own."""

Arrays = Mapping[str, Values]


@dataclass(frozen=True)
class Rule:
    """What is known of one of Flower's strategies as a merge of task vectors.

    `whole`: it compares inputs over the whole model. `least`: how many inputs it takes at
    least, given its parameters, to do what it promises.
    """

    whole: bool = True
    least: Callable[[Mapping[str, Any]], int] = lambda _: 1


def _krum(parameters: Mapping[str, Any]) -> int:
    hostile = int(parameters["num_malicious_nodes"])
    return max(2 * hostile + 3, hostile + int(parameters.get("num_nodes_to_select", 1)))


MERGES: Mapping[str, Rule] = {
    "Bulyan": Rule(least=lambda parameters: 4 * int(parameters["num_malicious_nodes"]) + 3),
    "FedAvg": Rule(whole=False),
    "FedMedian": Rule(whole=False),
    "FedTrimmedAvg": Rule(whole=False),
    "Krum": Rule(least=_krum),
    "MultiKrum": Rule(least=_krum),
}
"""Those that merge a round. The mean of columns is the same however the columns are cut."""

SLOTS: Mapping[str, tuple[str, ...]] = {
    "FedAdagrad": ("v",),
    "FedAdam": ("m", "v"),
    "FedAvgM": ("momentum",),
    "FedYogi": ("m", "v"),
}
"""Those that step from release to release, with what each remembers in between."""

_NOISE = (
    "adds noise that nobody can draw again, so that no release could be recomputed and checked",
    "Bound what one contributor can do with `screening: {clip: …}`, or merge by centred_clipping.",
)
_TREES = ("merges trees and not tensors", "coldmerge shares tensors only.")
REFUSED: Mapping[str, tuple[str, str]] = {
    "DifferentialPrivacyClientSideAdaptiveClipping": _NOISE,
    "DifferentialPrivacyClientSideFixedClipping": _NOISE,
    "DifferentialPrivacyServerSideAdaptiveClipping": _NOISE,
    "DifferentialPrivacyServerSideFixedClipping": _NOISE,
    "FedProx": (
        "changes how clients train, and merges as FedAvg does",
        "Merge by FedAvg; a proximal term belongs into a trainer of the contributors.",
    ),
    "FedXgbBagging": _TREES,
    "FedXgbCyclic": _TREES,
    "QFedAvg": (
        "weighs by training losses, which contributions do not carry",
        "Merge by FedAvg, with `weights: examples` if data should count.",
    ),
}
"""Those that make no sense here: why, and what to do instead."""

_HIDDEN = {"eta_l": "is the clients' learning rate, which contributors set for themselves"}


@dataclass(frozen=True)
class Found:
    """A strategy: its name as Flower spells it, its class, and its rule."""

    name: str
    kind: Any
    rule: Rule

    @property
    def defaults(self) -> dict[str, Any]:
        """The plain parameters that are its own, with their defaults (None: it must be given)."""
        from coldmerge_simulation.flower.compat import FedAvg

        shared = inspect.signature(FedAvg.__init__).parameters
        return {
            word: None if parameter.default is parameter.empty else parameter.default
            for word, parameter in inspect.signature(self.kind.__init__).parameters.items()
            if word not in shared and _scalar(parameter) and word not in _HIDDEN
        }

    def checked(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """All of its parameters, defaults too.

        Raises:
            ConfigError: `flower.bad_parameter`: unknown, missing, of another type.
        """
        known = self.defaults
        for word, value in given.items():
            if word not in known:
                self._refuse_word(word, known)
            wanted = type(known[word])
            fits = isinstance(value, int | float) if wanted is float else isinstance(value, wanted)
            if known[word] is not None and (
                not fits or isinstance(value, bool) is not (wanted is bool)
            ):
                self._refuse(word, f"must be of type {wanted.__name__}", value)
        found = {**known, **given}
        for word, value in found.items():
            if value is None:
                self._refuse(word, "must be given", "nothing")
        return found

    def made(self, parameters: Mapping[str, Any]) -> Any:
        """A fresh object of the class.

        Raises:
            ConfigError: `flower.bad_parameter`: it does not take these values.
        """
        from coldmerge_simulation.flower.compat import muted

        try:
            with muted():
                return self.kind(**parameters)
        except Exception as error:
            raise ConfigError(
                "flower.bad_parameter",
                f"Flower's {self.name} does not take its parameters: {error}.",
                expected=", ".join(self.defaults) or "no parameters",
                got=", ".join(f"{word}={value}" for word, value in parameters.items()) or "none",
                hint="Correct the parameters in the round policy.",
            ) from error

    def _refuse_word(self, word: str, known: Mapping[str, Any]) -> NoReturn:
        from coldmerge_simulation.flower.compat import FedAvg

        if word in _HIDDEN:
            self._refuse(word, _HIDDEN[word], "a value")
        if word in inspect.signature(FedAvg.__init__).parameters:
            self._refuse(word, "is about Flower's nodes and messages; the round policy rules", "it")
        close = get_close_matches(word, known, 1)
        hint = f"Did you mean `{close[0]}`? " if close else ""
        self._refuse(word, "is not one of its parameters", word, hint)

    def _refuse(self, word: str, what: str, got: object, hint: str = "") -> NoReturn:
        raise ConfigError(
            "flower.bad_parameter",
            f"Flower's {self.name} cannot take its parameters: {word} {what}.",
            expected=f"parameters of {self.name}: {', '.join(self.defaults) or 'none'}",
            got=got,
            hint=hint + "docs/flower.md lists the strategies with their parameters.",
            parameter=word,
        )


def _scalar(parameter: inspect.Parameter) -> bool:
    plain = parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
    fits = parameter.default is parameter.empty or isinstance(parameter.default, str | int | float)
    return plain and fits and parameter.name != "self"


def merging_strategy(name: str) -> Found:
    """The strategy called `name` (`MultiKrum`, `multi_krum`, `multikrum`) that can merge a round.

    Raises:
        ConfigError: Flower is missing, there is no such strategy, or it cannot merge a round.
    """
    from coldmerge_simulation.flower.compat import strategy

    known = _spelled(name, [*MERGES, *SLOTS, *REFUSED])
    if known is None:
        own = _spelled(name, plugin_names(GROUP))
        if own is None:
            raise _unknown(name, sorted([*MERGES, *plugin_names(GROUP)]))
        return Found(own, _own(own), Rule())
    if known in MERGES:
        return Found(known, getattr(strategy, known), MERGES[known])
    if known in SLOTS:
        raise _refused(
            known,
            "keeps a state from round to round, which a merge of one round has not",
            f"Name it beside the merge: `outer: {{method: flower, strategy: {known}}}`.",
            MERGES,
        )
    raise _refused(known, *REFUSED[known], MERGES)


def stepping_strategy(name: str) -> Found:
    """The strategy called `name` that can be an outer optimizer.

    Raises:
        ConfigError: Flower is missing, there is no such strategy, or it is no optimizer.
    """
    from coldmerge_simulation.flower.compat import strategy

    known = _spelled(name, [*MERGES, *SLOTS, *REFUSED])
    if known is None:
        raise _unknown(name, sorted(SLOTS))
    if known in SLOTS:
        return Found(known, getattr(strategy, known), Rule(whole=False))
    if known in MERGES:
        hint = f"Name it as the merge: `method: flower, parameters: {{strategy: {known}}}`."
        raise _refused(known, "merges task vectors and remembers nothing", hint, SLOTS)
    raise _refused(known, *REFUSED[known], SLOTS)


def aggregate(
    found: Found,
    made: Any,
    replies: Sequence[Any],
    shapes: Mapping[str, tuple[int, ...]],
    number: int = 1,
) -> dict[str, Values]:
    """What a strategy makes of its clients' replies in round `number`, by name.

    Raises:
        ConfigError: `flower.failed`: it raised, or gave other names or `shapes`.
    """
    from coldmerge_simulation.flower.compat import muted

    try:
        with muted(), one_blas_thread():  # a rule that compares inputs must not hang on threads
            arrays, _ = made.aggregate_train(number, replies)
        items = {} if arrays is None else dict(arrays.items())
        result = {name: _floats(item.numpy()) for name, item in items.items()}
    except Exception as error:
        raise _failed(found, f"{type(error).__name__}: {error}") from error
    got = {name: values.shape for name, values in result.items()}
    if got != dict(shapes):
        other = sorted(name for name in {*got, *shapes} if got.get(name) != shapes.get(name))
        raise _failed(found, f"other tensors: {', '.join(other[:3])}" if got else "nothing")
    return result


def reply(number: int, arrays: Arrays, weight: float) -> Any:
    """A message as the client `number` would answer with after its training."""
    from coldmerge_simulation.flower import compat

    examples = int(weight) if float(weight).is_integer() else weight
    content = compat.RecordDict(
        {
            "arrays": compat.ArrayRecord({name: compat.Array(a) for name, a in arrays.items()}),
            "metrics": compat.MetricRecord({"num-examples": examples}),
        }
    )
    return compat.message(content, compat.MessageType.TRAIN, source=number + 2)


def _floats(values: Any) -> Values:
    kept: Values = values if values.dtype == np.float32 else values.astype(np.float64)
    return kept


def _failed(found: Found, got: str) -> ConfigError:
    return ConfigError(
        "flower.failed",
        f"Flower's {found.name} did not merge the contributions.",
        expected="arrays of the names and shapes it was given",
        got=got,
        hint="Choose another strategy in the round policy, or other parameters.",
    )


def _refused(name: str, why: str, hint: str, instead: Mapping[str, Any]) -> ConfigError:
    return ConfigError(
        "flower.not_applicable",
        f"Flower's {name} cannot be used here: it {why}.",
        expected=" | ".join(sorted(instead)),
        got=name,
        hint=hint,
    )


def _unknown(name: str, instead: Sequence[str]) -> ConfigError:
    everything = {_normal(one): one for one in [*instead, *MERGES, *SLOTS, *REFUSED]}
    close = get_close_matches(_normal(name), everything, 1)
    return ConfigError(
        "flower.unknown_strategy",
        f"There is no Flower strategy {name}.",
        expected=" | ".join(instead),
        got=name,
        hint=(f"Did you mean `{everything[close[0]]}`? " if close else "")
        + "docs/flower.md says what each one does.",
    )


def _own(name: str) -> Any:
    from coldmerge_simulation.flower.compat import Strategy

    def fault(item: Any) -> str:
        sound = issubclass(item, Strategy) and not inspect.isabstract(item)
        return "" if sound else "not a Strategy"

    try:
        return plugin(GROUP, name, fault)
    except BrokenPluginError as error:
        raise ConfigError(
            "flower.broken_plugin",
            f"The strategy {name} of another package cannot be used.",
            expected=f"a subclass of flwr.serverapp.strategy.Strategy at {error.target}",
            got=error.got,
            hint="Ask the package's author, or uninstall it.",
        ) from error


def _spelled(name: str, among: Sequence[str]) -> str | None:
    return next((one for one in among if _normal(one) == _normal(name)), None)


def _normal(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())
