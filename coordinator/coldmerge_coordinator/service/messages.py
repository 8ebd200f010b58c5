"""Rows of the database as messages of the wire."""

from __future__ import annotations

import json
from collections.abc import Mapping

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from coldmerge.core.documents import Signed
from coldmerge.rounds import coefficients, slopes
from coldmerge.rounds.isolation import Trial
from coldmerge.rounds.policy import RoundPolicy
from coldmerge.rounds.state import State
from coldmerge.wire.convert import put_content, signed_to_proto, timestamp
from coldmerge.wire.v1 import admin_pb2, common_pb2, contributions_pb2, models_pb2
from coldmerge_coordinator.auth import Caller
from coldmerge_coordinator.service.admin import machines_of
from coldmerge_coordinator.service.screens import told
from coldmerge_coordinator.store import (
    continuous,
    contributions,
    learned,
    releases,
    rounds,
    trials,
)
from coldmerge_coordinator.store.models import (
    Contribution,
    Contributor,
    Machine,
    Model,
    Release,
    Round,
)


def model_message(session: Session, model: Model) -> models_pb2.Model:
    """A model with its latest release."""
    latest = releases.latest_release(session, model.name)
    return models_pb2.Model(
        name=model.name,
        private_patterns=list(model.private_patterns),
        latest_number=latest.number,
        latest_digest=latest.content_digest,
    )


def release_message(
    session: Session, release: Release, *, content: bool = True
) -> models_pb2.Release:
    """A release with its signed record, and its listing if asked for."""
    message = models_pb2.Release(
        model=release.model,
        number=release.number,
        content_digest=release.content_digest,
        record=signed_to_proto(releases.signed_record(release)),
        published_at=timestamp(release.published_at),
        private_patterns=list(releases.get_model(session, release.model).private_patterns),
    )
    if content:
        put_content(releases.get_listing(session, release.content_digest), message)
    return message


def candidate_message(session: Session, model: str, digest: str) -> models_pb2.Release:
    """A candidate: content without number and record."""
    message = models_pb2.Release(
        model=model, private_patterns=list(releases.get_model(session, model).private_patterns)
    )
    put_content(releases.get_listing(session, digest), message)
    return message


def round_message(session: Session, row: Round, who: Caller) -> common_pb2.Round:
    """A round as `who` may see it: without the webhook, whose URL is a secret.

    Of those whom it asks, a contributor sees no name but his own.
    """
    policy = rounds.get_policy(row)
    visible = {key: value for key, value in row.policy.items() if key != "webhook"}
    if policy.contributors is not None and not who.sees_all:
        visible["contributors"] = [who.contributor] if policy.asks(who.contributor) else []
    message = common_pb2.Round(
        id=row.id,
        model=row.model,
        state=row.state,
        mode=common_pb2.Round.SCREENED,
        base_number=row.base_number,
        base_digest=row.base_digest,
        opened_at=timestamp(row.opened_at),
        min_contributions=policy.min_contributions,
        max_contributions=policy.max_contributions or 0,
        contributions=len(contributions.admitted(session, row.id)),
        candidate_digest=row.candidate_digest or "",
        min_evaluators=policy.gate.min_evaluators if policy.gate else 0,
        evaluations=rounds.count_evaluations(session, row),
        release_number=row.release_number or 0,
        reason=row.reason or "",
        held=row.held,
        policy_json=json.dumps(visible, sort_keys=True),
        probe_seed=row.probe_seed,
        trial=row.trial,
        left_out=len(row.left_out or ()),
        trials=[_trial_message(trial) for trial in trials.of(row)],
        remerge=row.replay is not None,
        bases=_bases(session, row, policy),
    )
    _put_probes(message, row, policy, who)
    if row.closes_at is not None:
        message.closes_at.CopyFrom(timestamp(row.closes_at))
    if row.evaluation_closes_at is not None:
        message.evaluation_closes_at.CopyFrom(timestamp(row.evaluation_closes_at))
    return message


def _bases(session: Session, row: Round, policy: RoundPolicy) -> list[common_pb2.AdmittedBase]:
    if policy.continuous is None or row.state != State.OPEN:
        return []
    return [common_pb2.AdmittedBase(**vars(base)) for base in continuous.bases_of(session, row)]


def _put_probes(message: common_pb2.Round, row: Round, policy: RoundPolicy, who: Caller) -> None:
    """What the candidate at hand is asked, and for who may see it what the ones before gave."""
    rules, search = policy.merge.coefficients, learned.search_of(row)
    if rules is None or search is None:
        return
    if not search.done and State(row.state).active:
        message.probe.CopyFrom(
            common_pb2.Probe(
                number=len(search.probes) + 1,
                most=rules.probes,
                objective=rules.objective,
                directions=slopes.directions(search, rules),
                slopes=slopes.asked(search, rules),
            )
        )
    if who.sees_all:
        found = coefficients.values([one.reports for one in search.probes], rules.clip)
        message.probes.extend(
            common_pb2.MeasuredProbe(
                number=place, evaluators=len(one.reports), value=value, point=one.point
            )
            for place, (one, value) in enumerate(zip(search.probes, found, strict=True), 1)
        )


def _trial_message(trial: Trial) -> common_pb2.Trial:
    """Without names: a suspect may be innocent."""
    return common_pb2.Trial(
        number=trial.number,
        left_out=len(trial.left_out),
        passed=trial.passed,
        reason=trial.reason,
    )


def contribution_message(row: Contribution) -> contributions_pb2.Contribution:
    """A contribution as its owner sees it."""
    return contributions_pb2.Contribution(
        id=row.id,
        model=row.model,
        round=row.round,
        contributor=row.contributor,
        manifest_digest=row.manifest_digest,
        state=row.state,
        payload_bytes=row.payload_bytes,
        examples=row.examples,
        accepted_at=timestamp(row.accepted_at),
        reason=told(row),
    )


def receipt_message(row: Contribution) -> common_pb2.SignedDocument:
    """The receipt of a contribution."""
    return signed_to_proto(Signed(row.receipt, row.receipt_signature))


def admitted_message(
    row: Contribution, discount: float, coefficients: Mapping[str, float] | None = None
) -> admin_pb2.AdmittedContribution:
    """A contribution as the admin sees it; `discount` is what its staleness costs it, and
    `coefficients` what its round multiplies it by.
    """
    return admin_pb2.AdmittedContribution(
        id=row.id,
        contributor=row.contributor,
        manifest_digest=row.manifest_digest,
        payload_bytes=row.payload_bytes,
        examples=row.examples,
        norm=row.norm,
        accepted_at=timestamp(row.accepted_at),
        state=row.state,
        reason=row.reason or "",
        base_number=contributions.get_manifest(row).base_number,
        discount=discount,
        coefficients=coefficients or {},
    )


def contributor_message(session: Session, row: Contributor) -> admin_pb2.Contributor:
    """An organization with its machines."""
    sent = session.scalar(
        select(func.count()).select_from(Contribution).where(Contribution.contributor == row.name)
    )
    return admin_pb2.Contributor(
        name=row.name,
        role=row.role,
        revoked=row.revoked_at is not None,
        machines=[_machine_message(machine) for machine in machines_of(session, row.name)],
        contributions=sent or 0,
        revoked_reason=row.revoked_reason or "",
    )


def _machine_message(row: Machine) -> admin_pb2.Machine:
    message = admin_pb2.Machine(
        name=row.name,
        enrolled_at=timestamp(row.enrolled_at),
        client_version=row.client_version or "",
        revoked=row.revoked_at is not None,
        revoked_reason=row.revoked_reason or "",
    )
    if row.last_seen_at is not None:
        message.last_seen_at.CopyFrom(timestamp(row.last_seen_at))
    return message
