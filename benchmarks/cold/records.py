"""The records of a folder, ready to be asked."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.cold.choice import Choice, choose
from benchmarks.cold.comparison import (
    PRETRAINED,
    PROTOCOLS,
    Comparison,
    Effort,
    Measurements,
    Place,
    efforts,
)
from benchmarks.cold.outcome import ALONE, BASE, MEAN, MULTITASK, ONESHOT, Outcome, Plan, Run

LP100 = "lp100"
COHORT, EXAMPLES, LORA, COEFFICIENTS = "cohort", "examples", "lora", "coefficients"
_SIZED = re.compile(r"(cohort|examples)-(\d+)")


class Sized(NamedTuple):
    """A variant of a study of sizes, such as `cohort-4`."""

    size: int
    variant: str


@dataclass(frozen=True)
class Records:
    """What was planned, trained and measured."""

    plan: Plan
    runs: Sequence[Run]
    measured: Measurements

    @classmethod
    def read(cls, folder: Path) -> Records:
        """Read a folder, finished or not.

        Raises:
            DataError: it holds no run of this benchmark.
        """
        outcome = Outcome(folder)
        return cls(outcome.plan(), outcome.runs(), Measurements(outcome.scores()))

    @cached_property
    def effort(self) -> Mapping[Place, Effort]:
        """Steps, seconds and bytes of each release."""
        return efforts(self.runs)

    @cached_property
    def protocol(self) -> str | None:
        """What the curves and rows show: LP100, or the first that the mean was measured by."""
        return next((p for p in PROTOCOLS if self.measured.releases(MEAN, p)), None)

    @property
    def protocols(self) -> list[str]:
        """Those that anything but the base was measured by, in their order."""
        others = [variant for variant in self.measured.variants if variant != BASE]
        return [p for p in PROTOCOLS if any(self.measured.releases(v, p) for v in others)]

    def gain(
        self, group: str, variant: str = MEAN, protocol: str = LP100, release: int | None = None
    ) -> Comparison | None:
        """Of a release (the last one) over the pretrained base; None if it was not measured."""
        last = self.measured.last(variant, protocol, group)
        place = last if release is None else Place(variant, release)
        return self.measured.compare(place, PRETRAINED, protocol, group)

    def over_mean(self, group: str, variant: str, protocol: str = LP100) -> Comparison | None:
        """Of a variant's last release over the plain mean after as many steps."""
        last = self.measured.last(variant, protocol, group)
        plain = self.measured.counterpart(last, self.effort, protocol)
        return self.measured.compare(last, plain, protocol, group)

    @property
    def parts(self) -> Mapping[str, Any]:
        """What was planned: `recipes`, `baselines`, `protocols`, `seeds`, `rounds`, `cheap`."""
        found: Mapping[str, Any] = self.plan.settings.get("parts", {})
        return found

    @property
    def oneshots(self) -> list[str]:
        """The one-shot merges."""
        return [name for name in self.measured.variants if name.startswith(ONESHOT)]

    def sized(self, study: str) -> list[Sized]:
        """The variants of a study of sizes, smallest first."""
        found = ((_SIZED.fullmatch(name), name) for name in self.measured.variants)
        return sorted(Sized(int(m[2]), name) for m, name in found if m and m[1] == study)

    def named(self, study: str) -> list[str]:
        """Variants called `study` or `study-…`."""
        return [n for n in self.measured.variants if n == study or n.startswith(f"{study}-")]

    @property
    def others(self) -> list[str]:
        """Variants that change what is trained, or by whom, and not how rounds go."""
        studies = (COHORT, EXAMPLES, LORA, COEFFICIENTS)
        return [name for study in studies for name in self.named(study)]

    @property
    def policies(self) -> list[str]:
        """Round policies other than the plain mean: all that belong to nothing else."""
        known = {BASE, MEAN, MULTITASK, ALONE, *self.oneshots, *self.others}
        return [name for name in self.measured.variants if name not in known]

    @cached_property
    def choice(self) -> Choice | None:
        """The best round policy; the plan's `held` (in its settings) are the sets held out."""
        held = self.plan.settings.get("held", ())
        return choose(self.measured, self.policies, self.effort, held=held)
