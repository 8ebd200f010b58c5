"""The trials of a round that looks for whose contribution spoils its candidate."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sqlalchemy.orm import Session

from coldmerge.core.documents import LEAVE_ONE_OUT
from coldmerge.rounds.isolation import Trial
from coldmerge.rounds.policy import RoundPolicy
from coldmerge.rounds.view import RoundView
from coldmerge_coordinator.store import contributions, learned
from coldmerge_coordinator.store.models import Contribution, Round


def of(row: Round) -> tuple[Trial, ...]:
    """The candidates that were judged so far, where the gate's verdict started a search."""
    return tuple(Trial.from_json(values) for values in (row.isolation or {}).get("trials", ()))


def read(session: Session, row: Round) -> dict[str, Any]:
    """The fields of the round's view that speak of trials."""
    inputs = contributions.of_round(session, row.id) if row.left_out else []
    names = {item.manifest_digest: item.contributor for item in inputs}
    return {
        "search": learned.search_of(row),
        "probe_seed": row.probe_seed,
        "trial": row.trial,
        "left_out": tuple(sorted(names[digest] for digest in row.left_out or ())),
        "trials": of(row),
    }


def consenting(policy: RoundPolicy, inputs: Sequence[Contribution]) -> tuple[str, ...]:
    """Who agreed to be left out of a candidate alone, where the round's policy asks for it."""
    if policy.gate is None or not policy.gate.isolate_singles:
        return ()
    agreed = [
        item.contributor
        for item in inputs
        if LEAVE_ONE_OUT in contributions.get_manifest(item).consents
    ]
    return tuple(sorted(agreed))


def columns(session: Session, row: Round, after: RoundView) -> dict[str, Any]:
    """The same fields as columns of the round."""
    inputs = contributions.of_round(session, row.id) if after.left_out else []
    digests = [
        item.manifest_digest
        for item in inputs
        if item.contributor in after.left_out and item.manifest_digest in (row.sealed_inputs or ())
    ]
    return {
        "coefficients": after.search.to_json() if after.search else None,
        "trial": after.trial,
        "left_out": sorted(digests) or None,
        "isolation": {"trials": [trial.to_json() for trial in after.trials]}
        if after.trials
        else None,
    }


def mark(session: Session, row: Round) -> None:
    """Write down, with each contribution that the release leaves out, that it was left out."""
    for digest in row.left_out or ():
        item = contributions.by_manifest(session, digest)
        if item is not None:
            item.reason = "left out by the gate's search"


def note(row: Round) -> dict[str, int]:
    """What a release record says about inputs that the search left out, and how long it took."""
    if not row.left_out:
        return {}
    searched = max(row.trial, *(trial.number for trial in of(row)))
    return {"isolation.left_out": len(row.left_out), "isolation.trials": searched}
