"""A round that makes the latest release again, without some of what it was made of.

What was taken out is not unlearned: later updates were trained on releases that held it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime

from sqlalchemy import select
from sqlalchemy.orm import Session

from coldmerge.core.errors import ConfigError, ConflictError
from coldmerge.core.ids import new_id
from coldmerge.rounds.state import RoundView, State
from coldmerge_coordinator.actors import LOCAL_ADMIN
from coldmerge_coordinator.merging.recipes import recipe_of
from coldmerge_coordinator.store import lineage, rounds
from coldmerge_coordinator.store.lineage import Replay
from coldmerge_coordinator.store.models import Contribution, Round


def open_remerge(
    session: Session,
    model: str,
    named: Sequence[str],
    reason: str,
    now: datetime,
    *,
    actor: str = LOCAL_ADMIN,
) -> Round:
    """Open a round that is SEALED at once, on the latest release, without those `named`.

    It has the policy of the model's last round. Those judge it whose updates that round merged.

    Raises:
        NotFoundError: no such model, contribution or contributor.
        ConflictError: a round is going on, the latest release has none of their updates, or
            other inputs were erased.
        ConfigError: a round's method cannot merge as few inputs as are left.
    """
    if not named:
        raise ConfigError(
            "remerge.nobody",
            "A re-merge needs to know whose updates it leaves out.",
            hint="Give --without with an organization or the id of a contribution.",
            model=model,
        )
    base = rounds.base_of_next(session, model)
    removed = lineage.digests_of(session, model, named)
    whole = lineage.lineage(session, model, base.number)
    plan = lineage.without(whole, removed, model)
    _check_inputs(session, model, plan)
    last = session.get_one(Round, whole.steps[-1].round)
    judges = _contributors(session, (plan.steps or whole.steps)[-1].inputs)
    plan = replace(plan, evaluators=tuple(judges), reason=reason)
    text = f"re-merge of {len(plan.steps)} rounds from release {plan.start} on"
    policy = rounds.get_policy(last)
    sealed = RoundView(new_id("round"), model, State.SEALED, policy, opened_at=now, reason=text)
    return rounds.insert(
        session, base, sealed, actor, sealed_inputs=plan.inputs, replay=plan.to_json()
    )


def _contributors(session: Session, digests: Sequence[str]) -> list[str]:
    query = select(Contribution.contributor).where(Contribution.manifest_digest.in_(digests))
    return sorted(set(session.scalars(query)))


def _check_inputs(session: Session, model: str, plan: Replay) -> None:
    """Refuse what the worker could not merge.

    Raises:
        ConflictError: inputs that stay were erased.
        ConfigError: a method takes more inputs than are left.
    """
    query = select(Contribution).where(Contribution.manifest_digest.in_(plan.inputs))
    erased = sorted(row.id for row in session.scalars(query) if row.payload_erased_at is not None)
    if erased:
        raise ConflictError(
            "remerge.inputs_erased",
            "Updates that would stay in the release were erased: it cannot be merged again.",
            expected="all other contributions since are stored",
            got=", ".join(erased[:5]) + (f" and {len(erased) - 5} more" if erased[5:] else ""),
            hint=f"Name them too in `coldmerge round remerge {model} --without`.",
            model=model,
        )
    for step in plan.steps:
        policy = rounds.get_policy(session.get_one(Round, step.round))
        recipe_of(policy.merge, [1.0] * len(step.inputs))
