"""What is claimed, and whether it holds here: computed from the records, never written down.

Claims R are demands on this software, P are what the ColD Fusion paper says (Don-Yehiya et al.,
ACL 2023, arXiv 2212.01378), O are ours. A demand holds when its figure reaches what it asks. A
claim of a direction holds when its interval over examples lies on the claimed side of zero,
fails when the mean lies on the other side, and is `unclear` in between.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from benchmarks.cold import demands, paper
from benchmarks.cold.answers import UNMEASURED, Answer, direction
from benchmarks.cold.intervals import Interval
from benchmarks.cold.outcome import MEAN, MULTITASK
from benchmarks.cold.records import Records


@dataclass(frozen=True)
class Claim:
    """One claim and what came of it.

    Attributes:
        id: such as `R1`.
        says: the claim.
        demand: what the records must show.
        verdict: `holds`, `fails`, `unclear` or `not measured`.
        mean: the figure, in points; None where there is none.
        interval: over examples within the sets, 95 %.
        figure: the same in words.
        note: what is missing, or how it was measured.
    """

    id: str
    says: str
    demand: str
    verdict: str = UNMEASURED
    mean: float | None = None
    interval: Interval | None = None
    figure: str = "–"
    note: str = ""

    def as_json(self) -> dict[str, Any]:
        """JSON-ready values."""
        return asdict(self)


Ask = Callable[[Records], Answer]

CLAIMS: Sequence[tuple[str, str, str, Ask]] = (
    (
        "R1",
        "Seen sets gain under a linear probe",
        "at least +5 after 3 rounds, interval above 0",
        demands.seen_probe,
    ),
    (
        "R2",
        "Unseen sets gain under a linear probe",
        "at least +1 after 3 rounds, every seed and the interval above 0",
        demands.unseen_probe,
    ),
    (
        "R3",
        "Unseen sets gain in 100-shot fine-tuning",
        "at least +0.5, interval above 0",
        demands.unseen_few_shot,
    ),
    (
        "R4",
        "Iterating beats one shot at equal compute",
        "at least +1 on seen sets, not below 0 on unseen ones",
        demands.iterating,
    ),
    ("R5", "Seen sets keep rising", "release 5 above release 3 above release 1", demands.shape),
    (
        "P1",
        "The fused model is a better base than the pretrained one (§5.1: +2.33)",
        "mean over base on seen sets, fine-tuned, above 0",
        lambda records: paper.on_seen(records, MEAN, None, paper.TUNED),
    ),
    (
        "P2",
        "Multitask training gives a better base too (§5.1: +1.62)",
        "multitask over base on seen sets above 0",
        lambda records: paper.on_seen(records, MULTITASK, None),
    ),
    (
        "P3",
        "ColD Fusion beats multitask training (§5.1)",
        "mean over multitask on seen sets above 0",
        lambda records: paper.on_seen(records, MEAN, MULTITASK),
    ),
    (
        "P4",
        "ColD Fusion beats fusing once (§5.1: +0.92)",
        "mean over one-shot mean on seen sets above 0",
        paper.over_one_shot,
    ),
    (
        "P5",
        "Body frozen: seen sets gain far more than unseen ones (§5.2)",
        "seen gain minus unseen gain above 0",
        paper.frozen_apart,
    ),
    (
        "P6",
        "Fine-tuned: seen and unseen sets gain alike (§5.2)",
        "seen gain minus unseen gain within 1 point of 0",
        paper.tuned_alike,
    ),
    (
        "P7",
        "The unseen curve reaches a plateau, then dips (§5.2)",
        "best release over last release above 0, the best not the last",
        paper.dip,
    ),
    (
        "P8",
        "Unseen sets gain in 100-shot fine-tuning (§5.3: +6.73)",
        "mean over base above 0",
        lambda records: direction(records.gain("unseen", protocol="ft100"), "no ft100 on unseen"),
    ),
    (
        "P9",
        "From 2 contributors on, the size of the cohort hardly matters (§5.4)",
        "largest over smallest cohort within 1 point of 0",
        paper.cohort_size,
    ),
    (
        "P10",
        "More data per contributor comes closer to centralized training (§6)",
        "most over fewest examples above 0",
        paper.more_data,
    ),
    (
        "P11",
        "Each further round of data keeps improving (§6)",
        "last step on seen sets above 0",
        paper.keeps_rising,
    ),
    (
        "O1",
        "The best round policy, chosen on other sets, beats the plain mean",
        "its gain over the mean on sets that did not choose it above 0",
        demands.best_policy,
    ),
    (
        "O2",
        "Learned coefficients beat uniform ones among unequal contributors",
        "learned over uniform on seen sets above 0",
        demands.learned_coefficients,
    ),
    ("O3", "LoRA task vectors improve the base too", "gain on seen sets above 0", demands.lora),
)


def claims(records: Records) -> list[Claim]:
    """Every claim, in order, as far as the records go."""
    found = []
    for id_, says, demand, ask in CLAIMS:
        answer = ask(records)
        found.append(
            Claim(
                id_,
                says,
                demand,
                answer.verdict,
                answer.mean,
                answer.interval,
                answer.figure,
                "; ".join(answer.notes),
            )
        )
    return found
