"""Continuous rounds: each merges the next few arrivals, stale ones for less, and none is scheduled.

As FedBuff (arXiv 2106.06639) does: a round seals when K contributions are in, whenever they
were begun. One that was trained on a release before the round's base is *stale* by as many
merges as lie between the two, and counts for FedAsync's polynomial (arXiv 1903.03934) of that.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from coldmerge.rounds.policy import ContinuousPolicy
from coldmerge.rounds.view import State

LONGEST_PAUSE = timedelta(days=1)
"""However many rounds failed in a row; a policy may ask for more."""


@dataclass(frozen=True)
class AdmittedBase:
    """A release that a round takes task vectors against, and what those are multiplied by."""

    number: int
    digest: str
    staleness: int = 0
    discount: float = 1.0


def discount(staleness: int, policy: ContinuousPolicy) -> float:
    """(1 + s)^-a, with a the policy's `discount`: exactly 1.0 for what is not stale."""
    return 1.0 if staleness == 0 else (1.0 + staleness) ** -policy.discount


@dataclass(frozen=True)
class Ended:
    """How one round ended, and when."""

    state: State
    at: datetime


def reopens_at(policy: ContinuousPolicy, ended: Sequence[Ended]) -> datetime | None:
    """When the next round may open; None: at once. `ended` are the model's rounds, newest first.

    A round that made no release is followed by a pause, doubled for each one in a row: the same
    contributors with the same task vectors would come to the same end.
    """
    failed = 0
    for one in ended:
        if one.state is State.PUBLISHED:
            break
        failed += 1
    if not failed:
        return None
    pause = policy.pause
    for _ in range(failed - 1):
        if pause >= LONGEST_PAUSE:
            break
        pause = min(2 * pause, LONGEST_PAUSE)
    return ended[0].at + pause
