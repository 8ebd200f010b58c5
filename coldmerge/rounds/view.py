"""A round as the transition sees it, what a transition may ask for, and how rounds end."""

from __future__ import annotations

from dataclasses import dataclass, replace
from datetime import datetime
from enum import StrEnum

from coldmerge.core.documents import Evaluation
from coldmerge.rounds.coefficients import Search
from coldmerge.rounds.isolation import Trial
from coldmerge.rounds.policy import RoundPolicy


class State(StrEnum):
    """Where a round is."""

    OPEN = "OPEN"
    SEALED = "SEALED"
    MERGING = "MERGING"
    CANDIDATE = "CANDIDATE"
    PUBLISHED = "PUBLISHED"
    REJECTED = "REJECTED"
    ABANDONED = "ABANDONED"

    @property
    def active(self) -> bool:
        """Whether the round still goes on: a model has at most one such round."""
        return self in _ACTIVE


_ACTIVE = frozenset({State.OPEN, State.SEALED, State.MERGING, State.CANDIDATE})


@dataclass(frozen=True)
class RoundView:
    """A round as the transition sees it, and what it may change.

    `contributors`: names with an admitted contribution, sorted. `evaluations`: the last
    one of each contributor. `evaluators`: whose evaluation the gate waits for: the
    contributors, less those that were revoked since. `consenting`: who agreed to be left out
    of a trial alone. `left_out`: whom the candidate of `trial` at hand leaves out, after the
    `trials` before it; see `coldmerge.rounds.isolation`. `search`: where the round, once it is
    sealed, stands in learning its coefficients; see `coldmerge.rounds.coefficients`.
    """

    id: str
    model: str
    state: State
    policy: RoundPolicy
    opened_at: datetime
    closes_at: datetime | None = None
    contributors: tuple[str, ...] = ()
    evaluators: tuple[str, ...] = ()
    evaluations: tuple[Evaluation, ...] = ()
    candidate_digest: str | None = None
    candidate_master: str | None = None
    candidate_state: str | None = None
    evaluation_closes_at: datetime | None = None
    held: bool = False
    reason: str | None = None
    merge_attempts: int = 0
    probe_seed: int = 0
    consenting: tuple[str, ...] = ()
    trial: int = 0
    left_out: tuple[str, ...] = ()
    trials: tuple[Trial, ...] = ()
    search: Search | None = None

    @property
    def contributions(self) -> int:
        """How many contributions are admitted."""
        return len(self.contributors)

    @property
    def probing(self) -> bool:
        """Whether the candidate at hand is a probe: measured, and not judged by the gate."""
        return self.search is not None and not self.search.done


@dataclass(frozen=True)
class FreezeInputs:
    """Write down the manifest digests of the admitted contributions: the merge reads only those."""


@dataclass(frozen=True)
class Publish:
    """Publish the candidate, in the same database transaction."""

    flags: tuple[str, ...] = ()


@dataclass(frozen=True)
class Notify:
    """Tell the admins, by the policy's webhook."""

    kind: str
    text: str


Effect = FreezeInputs | Publish | Notify
Outcome = tuple[RoundView, tuple[Effect, ...]]


def back_to_sealed(view: RoundView, why: str) -> RoundView:
    """The round without the candidate at hand: another one is to be merged."""
    return replace(
        view,
        state=State.SEALED,
        evaluations=(),
        candidate_digest=None,
        candidate_master=None,
        candidate_state=None,
        evaluation_closes_at=None,
        held=False,
        reason=why,
        merge_attempts=0,
    )


def published(view: RoundView, flags: tuple[str, ...], why: str) -> Outcome:
    """The candidate at hand becomes a release."""
    flags = (*flags, "isolated") if view.left_out else flags
    ended = replace(view, state=State.PUBLISHED, held=False, reason=why)
    return ended, (Publish(flags), Notify("round.published", why))


def rejected(view: RoundView, why: str) -> Outcome:
    """The round ends without a release."""
    ended = replace(view, state=State.REJECTED, held=False, reason=why)
    return ended, (Notify("round.rejected", why),)


def abandoned(view: RoundView, reason: str) -> Outcome:
    """An admin, a missed quorum or a merge that keeps failing ends the round."""
    ended = replace(view, state=State.ABANDONED, held=False, reason=reason)
    return ended, (Notify("round.abandoned", reason),)
