"""What a round learns of its coefficients, in `round.coefficients`: a search, as JSON.

It is written when the round seals, and moves on with the round's other columns.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import replace

from sqlalchemy import select
from sqlalchemy.orm import Session

from coldmerge.core.documents import LEARN_COEFFICIENTS, Evaluation
from coldmerge.core.errors import ManifestError
from coldmerge.core.names import split_key
from coldmerge.merging import merger_class
from coldmerge.merging.merger import Share
from coldmerge.rounds import coefficients
from coldmerge.rounds.coefficients import Search, Weights
from coldmerge.rounds.policy import RoundPolicy
from coldmerge_coordinator.store import contributions
from coldmerge_coordinator.store.models import Contribution, Round
from coldmerge_coordinator.store.models import Evaluation as EvaluationRow
from coldmerge_coordinator.store.releases import Recipe

MOST = 8192
"""Coefficients that a release record may name: contributions times groups of tensors."""


def search_of(row: Round) -> Search | None:
    """Where the round stands; None: it learns nothing, or is not sealed."""
    return None if row.coefficients is None else Search.from_json(row.coefficients)


def sealing(
    row: Round, inputs: Sequence[Contribution], policy: RoundPolicy
) -> dict[str, object] | None:
    """The search of a round whose inputs are frozen now.

    It is over before it begins where nothing can be learned: all have one coefficient, and the
    method takes shares. Where a record could not name them all, layers share their coefficient.
    """
    rules = policy.merge.coefficients
    if rules is None:
        return None
    manifests = [contributions.get_manifest(item) for item in inputs]
    tensors = {
        split_key(entry.name, manifest.statistics)[0]
        for manifest in manifests
        for entry in manifest.tensors
    }
    names = [manifest.contributor for manifest in manifests]
    alone = [one.contributor for one in manifests if LEARN_COEFFICIENTS in one.consents]
    found = coefficients.begin(rules, names, alone, tensors, row.probe_seed)
    if len(found.groups) * len(names) > MOST:
        whole = rules.model_copy(update={"granularity": "task"})
        found = coefficients.begin(whole, names, alone, (), row.probe_seed)
    if len(found.atoms) < 2 and issubclass(merger_class(policy.merge.method).Each, Share):
        why = "nothing to learn: all contributors share one coefficient"
        found = replace(found, done=True, why=why)
    return found.to_json()


def weights_of(row: Round) -> Weights | None:
    """What the inputs of a round's candidate at hand are multiplied by; None: nothing learned."""
    search = search_of(row)
    if search is None:
        return None
    return Weights({name: search.of(name) for atom in search.atoms for name in atom})


def check_report(row: Round, policy: RoundPolicy, evaluation: Evaluation) -> None:
    """Refuse an evaluation of a probe that does not hold the number that was asked for.

    Raises:
        ManifestError: it does not.
    """
    rules, search = policy.merge.coefficients, search_of(row)
    if rules is None or search is None or search.done:
        return
    if coefficients.asked(rules, evaluation) is None:
        raise ManifestError(
            "evaluation.no_number",
            f"The evaluation by {evaluation.contributor} lacks the number that the probe is for.",
            expected=f"base_{rules.objective} and candidate_{rules.objective} among its means",
            got=", ".join(sorted(evaluation.means)) or "none",
            hint="Run the coordinator's version of coldmerge; a trainer of one's own must return "
            "`loss` and `entropy` with its predictions.",
            round=row.id,
        )


def digest(row: Round) -> str:
    """sha256 of what was tried and reported so far, for the audit log."""
    raw = json.dumps(row.coefficients, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(raw.encode()).hexdigest()


def problems(session: Session, row: Round, policy: RoundPolicy) -> Iterator[str]:
    """What is wrong with a search that has ended: whether it does what the signed reports say."""
    rules, search = policy.merge.coefficients, search_of(row)
    if rules is None or search is None:
        return
    query = select(EvaluationRow).where(EvaluationRow.round == row.id)
    said: dict[int, dict[str, float | None]] = {}
    for item in session.scalars(query):
        value = coefficients.asked(rules, Evaluation.parse(item.document))
        said.setdefault(item.trial, {})[item.contributor] = value
    for probe in search.probes:
        if not probe.reports.items() <= said.get(probe.number, {}).items():
            yield f"probe {probe.number + 1} was not measured as its signed evaluations say"
    if not coefficients.follows(search, rules, row.probe_seed):
        yield "the coefficients do not follow from what was reported of the probes"


def in_recipe(session: Session, row: Round, policy: RoundPolicy) -> Recipe:
    """What a release record says about the coefficients that a round merged with.

    `coefficient.<manifest digest>`, or `coefficient.<manifest digest>.<layer>`, for each input.
    """
    rules, search = policy.merge.coefficients, search_of(row)
    if rules is None or search is None:
        return {}
    kept = {"method", "objective", "granularity", "probes", "initial", "lower", "upper", "step"}
    kept |= {"clip", "least"} | ({"branches"} if rules.method == "fork" else set())
    said = rules.model_dump(mode="json", include=kept)
    found: Recipe = {f"coefficients.{key}": value for key, value in said.items()}
    found["coefficients.measured"] = len(search.probes)
    return found | _entries(session, contributions.kept(row))


def in_replay(session: Session, row: Round) -> Recipe:
    """What a release record says about coefficients that a re-merge repeats."""
    return _entries(session, contributions.kept(row))


def _entries(session: Session, digests: Sequence[str]) -> Recipe:
    """The coefficients of contributions, as their own rounds learned them."""
    query = select(Contribution).where(Contribution.manifest_digest.in_(digests))
    found: Recipe = {}
    searches: dict[str, Search | None] = {}
    for item in session.scalars(query.order_by(Contribution.manifest_digest)):
        if item.round not in searches:
            searches[item.round] = search_of(session.get_one(Round, item.round))
        search = searches[item.round]
        for group, value in sorted(search.of(item.contributor).items()) if search else ():
            found[f"coefficient.{item.manifest_digest}" + (f".{group}" if group else "")] = value
    return found
