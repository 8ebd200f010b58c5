"""What screening writes down about a round, in `round.screening`.

    {"reference_norm": 1.5, "reference_from": "release 3",   when the round opens
     "factors": {manifest digest: factor},                    when it seals
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
from coldmerge_coordinator.store import contributions
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
    """Norms as they were merged: a clipped one counts as what was left of it."""
    rows = list(
        session.scalars(select(Contribution).where(Contribution.manifest_digest.in_(digests)))
    )
    factors = factors_of(session, rows)
    return [row.norm * factors[row.manifest_digest] for row in rows]


def sealing(row: Round, inputs: Sequence[Contribution], policy: ScreeningPolicy) -> dict[str, Any]:
    """What the round knows once its inputs are frozen: a reference norm, every clip factor."""
    known = dict(row.screening or {})
    norms = {item.manifest_digest: item.norm for item in inputs}
    if known.get("reference_norm") is None:
        known |= {"reference_norm": reference_norm(norms.values()), "reference_from": "round"}
    known["factors"] = clip_factors(norms, known["reference_norm"], policy.clip)
    return known


def factors_of(session: Session, rows: Sequence[Contribution]) -> Factors:
    """The clip factor of every contribution, as its own round froze it; 1.0 where it has none."""
    names = {row.round for row in rows}
    frozen = {
        found.id: (found.screening or {}).get("factors", {})
        for found in session.scalars(select(Round).where(Round.id.in_(names)))
    }
    return {row.manifest_digest: frozen[row.round].get(row.manifest_digest, 1.0) for row in rows}


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
    return found | _clipped({key: factors.get(key, 1.0) for key in contributions.kept(row)})


def in_replay(session: Session, row: Round) -> Recipe:
    """What a release record says about the inputs that a re-merge clipped, as their rounds did."""
    query = select(Contribution).where(Contribution.manifest_digest.in_(contributions.kept(row)))
    return _clipped(factors_of(session, list(session.scalars(query))))


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
