"""What a round learns of its coefficients, in `round.coefficients`: a search, as JSON.

It is written when the round seals, and moves on with the round's other columns.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from sqlalchemy import select
from sqlalchemy.orm import Session

from coldmerge.core.documents import LEARN_COEFFICIENTS, Evaluation
from coldmerge.core.errors import ManifestError
from coldmerge.core.names import split_key
from coldmerge.merging import merger_class
from coldmerge.merging.merger import Share
from coldmerge.rounds import coefficients, slopes
from coldmerge.rounds.coefficients import Search, Weights
from coldmerge.rounds.descent import Point
from coldmerge.rounds.policy import CoefficientsPolicy, RoundPolicy
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
    method takes shares. Where a record could not name them all, or an evaluation not the slopes
    of them all, layers share their coefficient.
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
    crowded = rules.method == "gradient" and not slopes.fit(found)
    if crowded or len(found.groups) * len(names) > MOST:
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


def directions_of(row: Round) -> tuple[str, ...]:
    """Content digests of candidates that evaluators need while a round asks for slopes."""
    rules = RoundPolicy.model_validate(row.policy).merge.coefficients
    search = search_of(row)
    return slopes.directions(search, rules) if rules and search and not search.done else ()


def is_direction(session: Session, model: str, digest: str) -> bool:
    """Whether slopes are told along the candidate of that content digest."""
    query = select(Round).where(Round.model == model, Round.active)
    return any(digest in directions_of(row) for row in session.scalars(query))


def check_report(row: Round, policy: RoundPolicy, evaluation: Evaluation) -> None:
    """Refuse an evaluation of a probe that does not hold the number that was asked for.

    Raises:
        ManifestError: it does not, or it has slopes of something else.
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
    wanted = slopes.asked(search, rules)
    if evaluation.slopes and not (wanted and slopes.reported(search, evaluation)):
        raise ManifestError(
            "evaluation.other_slopes",
            f"The evaluation by {evaluation.contributor} has slopes along other directions than "
            "the round's.",
            expected=f"{len(search.atoms)} slopes for each of {len(search.groups)} layers"
            if wanted
            else "none",
            got=", ".join(f"{len(v)} of {k or 'all'}" for k, v in evaluation.slopes.items())[:200],
            hint="Run the coordinator's version of coldmerge.",
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
    signed: dict[int, dict[str, Evaluation]] = {}
    for item in session.scalars(query):
        signed.setdefault(item.trial, {})[item.contributor] = Evaluation.parse(item.document)
    for place, probe in enumerate(search.probes):
        said = signed.get(probe.number, {})
        values = {name: coefficients.asked(rules, one) for name, one in said.items()}
        if not probe.reports.items() <= values.items():
            yield f"probe {probe.number + 1} was not measured as its signed evaluations say"
        elif probe.slopes != _slopes(search, rules, place, said):
            yield f"probe {probe.number + 1} has other slopes than its signed evaluations say"
        elif any(probe.candidate not in ("", each.candidate_digest) for each in said.values()):
            yield f"probe {probe.number + 1} was of another candidate than was evaluated"
    if not coefficients.follows(search, rules, row.probe_seed):
        yield "the coefficients do not follow from what was reported of the probes"


def _slopes(
    search: Search, rules: CoefficientsPolicy, place: int, said: Mapping[str, Evaluation]
) -> Point | None:
    """The slopes of the probe at `place`, of what was signed by those who measured it."""
    before = replace(search, probes=search.probes[:place], done=False)
    if not slopes.asked(before, rules):
        return None
    found = {name: slopes.reported(search, said[name]) for name in search.probes[place].reports}
    told = {name: each for name, each in found.items() if each is not None}
    return slopes.combined(search, rules, told)


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
