"""The gate: whether a candidate becomes a release, decided from paired evaluations."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum

from coldmerge.core.documents import Evaluation
from coldmerge.core.errors import ManifestError
from coldmerge.rounds.policy import GatePolicy

_SLACK = 1e-9  # points: the rounding of sums must not decide


class Verdict(StrEnum):
    """What the gate says."""

    WAIT = "wait"
    PUBLISH = "publish"
    REJECT = "reject"
    HOLD = "hold"
    PUBLISH_FLAGGED = "publish_flagged"


@dataclass(frozen=True)
class Decision:
    """A verdict and, in sentences, why."""

    verdict: Verdict
    reasons: tuple[str, ...]


def gain(evaluation: Evaluation, policy: GatePolicy) -> float:
    """Candidate minus base in points of the policy's metric."""
    if policy.metric == "accuracy":
        return 100 * (evaluation.candidate.accuracy - evaluation.base.accuracy)
    return 100 * (evaluation.candidate.macro_f1 - evaluation.base.macro_f1)


def decide(
    evaluations: Sequence[Evaluation],
    policy: GatePolicy,
    now: datetime,
    closes_at: datetime,
    expected: Collection[str] = (),
) -> Decision:
    """Judge a candidate by the evaluations reported so far, one per contributor.

    Decides once every one of `expected` (the round's contributors) has reported and
    `min_evaluators` are in; at `closes_at` with `min_evaluators` alone; with fewer by
    then, as `on_timeout` says.
    """
    reported = {evaluation.contributor for evaluation in evaluations}
    enough = len(reported) >= policy.min_evaluators
    missing = sorted(set(expected) - reported)
    if now < closes_at and not (enough and expected and not missing):
        awaited = f", waiting for {', '.join(missing)}" if missing else ""
        return Decision(
            Verdict.WAIT,
            (f"{len(reported)} of at least {policy.min_evaluators} evaluators reported{awaited}",),
        )
    if not enough:
        return Decision(
            Verdict(policy.on_timeout),
            (
                f"only {len(reported)} of at least {policy.min_evaluators} evaluators reported "
                "before the evaluation window closed",
            ),
        )
    return weigh({item.contributor: gain(item, policy) for item in evaluations}, policy)


def weigh(gains: Mapping[str, float], policy: GatePolicy) -> Decision:
    """Judge a candidate by gains in points, one per evaluator, of whom there are enough."""
    vetoes = sorted(name for name, points in gains.items() if points < -policy.max_loss - _SLACK)
    reasons = []
    if vetoes:
        reasons.append(
            f"{len(vetoes)} of at most {policy.max_vetoes} vetoes (a loss of more than "
            f"{policy.max_loss:g} points of {policy.metric}): {', '.join(vetoes)}"
        )
    if len(vetoes) > policy.max_vetoes:
        return Decision(Verdict.REJECT, tuple(reasons))
    counted = gains
    if 2 * len(vetoes) < len(gains):
        counted = {name: points for name, points in gains.items() if name not in vetoes}
    mean = sum(counted[name] for name in sorted(counted)) / len(counted)
    reached = mean >= policy.min_mean_gain - _SLACK
    reasons.append(
        f"mean gain {mean:+.2f} points of {policy.metric} over {len(counted)} evaluators, "
        f"{'at least' if reached else 'below'} {policy.min_mean_gain:+g}"
    )
    return Decision(Verdict.PUBLISH if reached else Verdict.REJECT, tuple(reasons))


def check_evaluation(
    evaluation: Evaluation, *, base_digest: str, candidate_digest: str, probe_seed: int
) -> None:
    """Refuse an evaluation of something else, or whose numbers contradict each other.

    Raises:
        ManifestError: other digests, another probe seed, or impossible counts.
    """
    for what, expected, got in (
        ("base", base_digest, evaluation.base_digest),
        ("candidate", candidate_digest, evaluation.candidate_digest),
        ("probe seed", str(probe_seed), str(evaluation.probe_seed)),
    ):
        if expected != got:
            raise ManifestError(
                "evaluation.mismatch",
                f"The evaluation by {evaluation.contributor} names another {what}.",
                expected=expected,
                got=got,
                hint="Run `coldmerge evaluate` again: it takes both from the round.",
                round=evaluation.round,
            )
    difference = (evaluation.candidate.accuracy - evaluation.base.accuracy) * evaluation.n
    net = evaluation.gained - evaluation.lost
    if evaluation.gained + evaluation.lost > evaluation.n or abs(difference - net) > 0.5:
        raise ManifestError(
            "evaluation.impossible",
            f"The counts in the evaluation by {evaluation.contributor} contradict its scores.",
            expected=f"gained - lost = {difference:.1f} of {evaluation.n} items",
            got=f"gained {evaluation.gained}, lost {evaluation.lost}",
            hint="A custom trainer must return labels and predictions item by item.",
            round=evaluation.round,
        )
