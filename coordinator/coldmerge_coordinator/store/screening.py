"""What screening writes down about a round, in `round.screening`.

    {"reference_norm": 1.5, "reference_from": "release 3",   when the round opens
     "factors": {manifest digest: factor},                    when it seals
     "stale": {manifest digest: {"staleness": 1, "discount": 0.7}},   if continuous
     "report": {…}}                                           when it is merged

The reference norm of a round that finds none when it opens (the first one of a model, with
none in its policy) is the median of its own contributions, written down when it seals.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from coldmerge.core.documents import ReleaseRecord
from coldmerge.rounds.policy import RoundPolicy
from coldmerge.rounds.statistics import statistics_for
from coldmerge.screening.bounds import Factors, clip_factors, reference_norm
from coldmerge.screening.policy import ScreeningPolicy
from coldmerge.screening.report import Inner, Screened, report
from coldmerge.screening.shares import BOUNDED
from coldmerge_coordinator.store import continuous, contributions
from coldmerge_coordinator.store.models import Contribution, Release, Round
from coldmerge_coordinator.store.releases import Recipe


def opening(session: Session, base: Release, policy: ScreeningPolicy) -> dict[str, Any]:
    """The reference norm of a round on `base`: of what was merged into it, or the policy's."""
    origin = _origin(session, base)
    digests = ReleaseRecord.parse(origin.record).contributions
    found = reference_norm(_merged_norms(session, digests))
    if found is not None:
        return {"reference_norm": found, "reference_from": f"release {origin.number}"}
    said = policy.reference_norm
    return {"reference_norm": said, "reference_from": None if said is None else "policy"}


def _origin(session: Session, release: Release) -> Release:
    """The release that first had this content: a rollback repeats an older one's."""
    return session.scalars(
        select(Release)
        .where(
            Release.model == release.model,
            Release.content_digest == release.content_digest,
            Release.master_digest == release.master_digest,
        )
        .order_by(Release.number)
        .limit(1)
    ).one()


def _merged_norms(session: Session, digests: Sequence[str]) -> list[float]:
    """Norms as they were clipped. A discount for staleness is left out: with it, the reference
    of round after round would shrink, and the clip with it.
    """
    rows = list(
        session.scalars(select(Contribution).where(Contribution.manifest_digest.in_(digests)))
    )
    factors = clips_of(session, rows)
    return [row.norm * factors[row.manifest_digest] for row in rows]


def sealing(
    session: Session, row: Round, inputs: Sequence[Contribution], policy: RoundPolicy
) -> dict[str, Any]:
    """What the round knows once its inputs are frozen: a reference norm, every clip factor, and
    how stale each is. The clip is of the norm as it was sent, whatever release it is against.
    """
    known = dict(row.screening or {})
    norms = {item.manifest_digest: item.norm for item in inputs}
    if known.get("reference_norm") is None:
        known |= {"reference_norm": reference_norm(norms.values()), "reference_from": "round"}
    known["factors"] = clip_factors(norms, known["reference_norm"], policy.screening.clip)
    stale = continuous.sealing(session, row, inputs)
    return known | ({"stale": stale} if stale else {})


def clips_of(session: Session, rows: Sequence[Contribution]) -> Factors:
    """The clip factor of every contribution, as its own round froze it; 1.0 where it has none."""
    rounds = _rounds_of(session, rows)
    return {row.manifest_digest: _clip(rounds[row.round], row.manifest_digest) for row in rows}


def factors_of(session: Session, rows: Sequence[Contribution]) -> Factors:
    """What every task vector is multiplied by: its clip factor times its discount."""
    rounds = _rounds_of(session, rows)
    return {row.manifest_digest: factor_in(rounds[row.round], row.manifest_digest) for row in rows}


def factor_in(row: Round, digest: str) -> float:
    """What a sealed round multiplies one of its inputs by; 1.0 for what is none."""
    discounts = continuous.frozen(row)
    return _clip(row, digest) * (discounts[digest]["discount"] if digest in discounts else 1.0)


def _clip(row: Round, digest: str) -> float:
    found: float = (row.screening or {}).get("factors", {}).get(digest, 1.0)
    return found


def _rounds_of(session: Session, rows: Sequence[Contribution]) -> dict[str, Round]:
    names = {row.round for row in rows}
    return {found.id: found for found in session.scalars(select(Round).where(Round.id.in_(names)))}


def in_recipe(row: Round, policy: RoundPolicy) -> Recipe:
    """What a release record says about the bounds a round merged within."""
    known = row.screening or {}
    found: Recipe = {
        "screening.clip": policy.screening.clip,
        "screening.reference_norm": known.get("reference_norm"),
    }
    if statistics_for(policy.merge) & BOUNDED:
        found["screening.statistics"] = policy.screening.statistics
    factors = known.get("factors", {})
    found |= _clipped({key: factors.get(key, 1.0) for key in contributions.kept(row)})
    return found | continuous.in_recipe(row, policy)


def in_replay(session: Session, row: Round) -> Recipe:
    """What a release record says about inputs that a re-merge clips and discounts, as their rounds
    did.
    """
    digests = contributions.kept(row)
    query = select(Contribution).where(Contribution.manifest_digest.in_(digests))
    inputs = list(session.scalars(query))
    found = _clipped(clips_of(session, inputs))
    for own in _rounds_of(session, inputs).values():
        found |= continuous.stale_entries(own, digests)
    return found


def _clipped(factors: Factors) -> Recipe:
    return {
        f"screening.factor.{digest}": factor
        for digest, factor in sorted(factors.items())
        if factor != 1.0
    }


def note_likeness(session: Session, row: Round, inner: Inner | None) -> None:
    """Keep the report of a merge of all the round's inputs; that of a trial is not kept."""
    if row.left_out or row.replay is not None:
        return
    inputs = contributions.sealed(session, row)  # and now in the order in which they were merged
    inputs.sort(key=lambda item: contributions.get_manifest(item).content_key())
    factors = factors_of(session, inputs)
    screened = [
        Screened(item.manifest_digest, item.contributor, item.norm, factors[item.manifest_digest])
        for item in inputs
    ]
    policy = RoundPolicy.model_validate(row.policy).screening
    row.screening = {**(row.screening or {}), "report": report(screened, inner, policy)}
