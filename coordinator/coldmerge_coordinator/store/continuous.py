"""Continuous rounds in the database: which releases one admits, and when the next one opens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime

from sqlalchemy import select
from sqlalchemy.orm import Session

from coldmerge.core.documents import Manifest
from coldmerge.rounds.continuous import AdmittedBase, Ended, discount, reopens_at
from coldmerge.rounds.policy import RoundPolicy, RoundTemplate, parse_template
from coldmerge.rounds.view import State
from coldmerge_coordinator.store import contributions, releases
from coldmerge_coordinator.store.lineage import ancestors
from coldmerge_coordinator.store.models import Contribution, Model, Round
from coldmerge_coordinator.store.releases import Recipe

LOOKED_BACK = 32
"""Rounds in which failures in a row are counted: long before, the pause is as long as it gets."""


def bases_of(session: Session, row: Round) -> tuple[AdmittedBase, ...]:
    """The releases whose task vectors a round takes, the one it is on first."""
    policy = RoundPolicy.model_validate(row.policy).continuous
    if policy is None:
        return (AdmittedBase(row.base_number, row.base_digest),)
    found = ancestors(session, row.model, row.base_number, policy.max_staleness)
    return tuple(
        AdmittedBase(release.number, release.content_digest, merges, discount(merges, policy))
        for release, merges in found
    )


def merged_into(session: Session, row: Round) -> set[str]:
    """Manifest digests of what was merged into the round's base, as far back as it admits bases."""
    policy = RoundPolicy.model_validate(row.policy).continuous
    if policy is None:
        return set()
    found = ancestors(session, row.model, row.base_number, policy.max_staleness)
    return {digest for one, _ in found for digest in releases.get_record(one).contributions}


def base_in(bases: Sequence[AdmittedBase], manifest: Manifest) -> AdmittedBase | None:
    """The one of `bases` that a manifest names by number and digest."""
    named = (manifest.base_number, manifest.base_digest)
    return next((base for base in bases if (base.number, base.digest) == named), None)


def stale_inputs(
    session: Session, row: Round, inputs: Sequence[Contribution]
) -> dict[str, AdmittedBase]:
    """Manifest digest → base, of those inputs that were trained before the round's base."""
    bases = bases_of(session, row)
    if not any(base.staleness for base in bases):
        return {}
    found = {
        item.manifest_digest: base_in(bases, contributions.get_manifest(item)) for item in inputs
    }
    return {key: base for key, base in sorted(found.items()) if base and base.staleness}


def sealing(
    session: Session, row: Round, inputs: Sequence[Contribution]
) -> dict[str, dict[str, float]]:
    """What a round that seals writes down of its stale inputs: see `frozen`."""
    return {key: _facts(base) for key, base in stale_inputs(session, row, inputs).items()}


def _facts(base: AdmittedBase) -> dict[str, float]:
    return {"staleness": base.staleness, "discount": base.discount}


def frozen(row: Round) -> Mapping[str, Mapping[str, float]]:
    """What a sealed round wrote down of each stale input: `staleness` and `discount`."""
    known: Mapping[str, Mapping[str, float]] = (row.screening or {}).get("stale", {})
    return known


def discounts(session: Session, row: Round, rows: Sequence[Contribution]) -> dict[str, float]:
    """Contribution id → what it is multiplied by for its staleness: frozen, or as it will be."""
    known = frozen(row)
    if row.sealed_inputs is not None:
        return {item.id: known.get(item.manifest_digest, {}).get("discount", 1.0) for item in rows}
    stale = stale_inputs(session, row, rows)
    return {
        item.id: stale[item.manifest_digest].discount if item.manifest_digest in stale else 1.0
        for item in rows
    }


def recipe_of(
    session: Session, row: Round, policy: RoundPolicy, inputs: Sequence[Contribution]
) -> Recipe:
    """`in_recipe`, made anew from the inputs' signed manifests."""
    stale = stale_inputs(session, row, inputs)
    return _rule(policy) | _entries({key: _facts(base) for key, base in stale.items()})


def in_recipe(row: Round, policy: RoundPolicy) -> Recipe:
    """What a release record says about a continuous round: its rule, and each stale input."""
    return _rule(policy) | stale_entries(row, contributions.kept(row))


def stale_entries(row: Round, digests: Sequence[str]) -> Recipe:
    """The recipe's entries for those of the round's inputs that were stale."""
    return _entries({key: frozen(row)[key] for key in {*digests} & {*frozen(row)}})


def _rule(policy: RoundPolicy) -> Recipe:
    if policy.continuous is None:
        return {}
    return {
        "continuous.max_staleness": policy.continuous.max_staleness,
        "continuous.discount": policy.continuous.discount,
    }


def _entries(stale: Mapping[str, Mapping[str, float]]) -> Recipe:
    entries: Recipe = {}
    for digest in sorted(stale):
        entries[f"continuous.staleness.{digest}"] = int(stale[digest]["staleness"])
        entries[f"continuous.factor.{digest}"] = stale[digest]["discount"]
    return entries


def next_opening(session: Session, model: Model, template: RoundTemplate) -> datetime | None:
    """When the model's next round opens by itself; None: it does not, or one goes on."""
    if template.continuous is None:
        return None
    columns = select(Round.state, Round.opened_at, Round.ended_at, Round.active)
    query = columns.where(Round.model == model.name).order_by(Round.opened_at.desc(), Round.id)
    newest = session.execute(query.limit(LOOKED_BACK)).all()
    if any(row.active for row in newest):
        return None
    ended = [Ended(State(row.state), row.ended_at or row.opened_at) for row in newest]
    return reopens_at(template.continuous, ended) or model.created_at


def outlook(session: Session, row: Round) -> str:
    """What to add to a notice of a round that made no release: when the next one opens."""
    if row.state not in {State.REJECTED, State.ABANDONED}:
        return ""
    model = releases.get_model(session, row.model)
    opens = next_opening(session, model, parse_template(model.template, f"of model {model.name}"))
    return "" if opens is None else f"; the next round opens at {opens:%Y-%m-%d %H:%M:%S} UTC"
