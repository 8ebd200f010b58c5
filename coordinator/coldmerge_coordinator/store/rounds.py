"""Rounds in the database: the pure transition, applied by compare-and-set.

Everything that touches a round's children (a contribution admitted, an evaluation
stored) calls `apply` in the same transaction, so `version` covers them too.
"""

from __future__ import annotations

import secrets
from datetime import datetime

from sqlalchemy import func, select, update
from sqlalchemy.orm import Session

from coldmerge.core import documents
from coldmerge.core.documents import Signed
from coldmerge.core.errors import ConflictError, NotFoundError
from coldmerge.core.ids import new_id
from coldmerge.rounds import state
from coldmerge.rounds.gate import check_evaluation
from coldmerge.rounds.policy import RoundPolicy
from coldmerge.rounds.state import Effect, Event, RoundView, State
from coldmerge_coordinator.actors import COORDINATOR
from coldmerge_coordinator.merging.recipes import check_size, resolved
from coldmerge_coordinator.store import (
    continuous,
    contributions,
    learned,
    notices,
    releases,
    round_log,
    screening,
    trials,
)
from coldmerge_coordinator.store.lineage import replay_of
from coldmerge_coordinator.store.models import Contributor, Evaluation, Release, Round
from coldmerge_coordinator.store.recipe import recipe_of
from coldmerge_coordinator.store.releases import Signer


def get(session: Session, round_id: str, *, lock: bool = False) -> Round:
    """A round; with `lock`, nobody else moves it until this transaction ends.

    Raises:
        NotFoundError: there is none of that id.
    """
    query = select(Round).where(Round.id == round_id)
    if lock:
        # As it is once the lock is ours, whatever this transaction has read before.
        query = query.with_for_update().execution_options(populate_existing=True)
    row = session.scalars(query).one_or_none()
    if row is None:
        raise NotFoundError(
            "round.unknown",
            f"There is no round {round_id}.",
            hint="List them with `coldmerge round list`.",
            round=round_id,
        )
    return row


def active_round(session: Session, model: str) -> Round | None:
    """The model's round that goes on, if there is one."""
    return session.scalars(select(Round).where(Round.model == model, Round.active)).one_or_none()


def active_rounds(session: Session) -> list[Round]:
    """All rounds that go on, by model."""
    return list(session.scalars(select(Round).where(Round.active).order_by(Round.model)))


def rounds_to_merge(session: Session) -> list[Round]:
    """Rounds that wait for a worker, or lost theirs: the longest open first."""
    return list(
        session.scalars(
            select(Round)
            .where(Round.state.in_((State.SEALED, State.MERGING)))
            .order_by(Round.opened_at, Round.id)
        )
    )


def list_rounds(session: Session, model: str, limit: int = 50) -> list[Round]:
    """The model's rounds, newest first."""
    return list(
        session.scalars(
            select(Round)
            .where(Round.model == model)
            .order_by(Round.opened_at.desc(), Round.id)
            .limit(limit)
        )
    )


def newest_round(session: Session, model: str) -> Round | None:
    """The model's active round, or else the one opened last."""
    return active_round(session, model) or next(iter(list_rounds(session, model, 1)), None)


def get_policy(row: Round) -> RoundPolicy:
    """The policy frozen into the round."""
    return RoundPolicy.model_validate(row.policy)


def count_evaluations(session: Session, row: Round) -> int:
    """How many contributors have reported on the candidate at hand."""
    reported = (Evaluation.round == row.id) & (Evaluation.trial == row.trial)
    return session.execute(select(func.count()).where(reported)).scalar_one()


def evaluations_of(session: Session, row: Round) -> list[Evaluation]:
    """What was reported on the candidate at hand (or that was decided), by contributor."""
    return list(
        session.scalars(
            select(Evaluation)
            .where(Evaluation.round == row.id, Evaluation.trial == row.trial)
            .order_by(Evaluation.contributor)
        )
    )


def view(session: Session, row: Round) -> RoundView:
    """The round as `coldmerge.rounds.state.transition` wants it."""
    inputs = contributions.admitted(session, row.id)
    names = [item.contributor for item in inputs]
    policy = get_policy(row)
    revoked = set(
        session.scalars(select(Contributor.name).where(Contributor.revoked_at.is_not(None)))
    )
    stored, again = evaluations_of(session, row), replay_of(row)
    return RoundView(
        id=row.id,
        model=row.model,
        state=State(row.state),
        policy=policy,
        opened_at=row.opened_at,
        closes_at=row.closes_at,
        contributors=tuple(sorted(names)),
        evaluators=tuple(sorted({*names, *(again.evaluators if again else ())} - revoked)),
        evaluations=tuple(
            documents.Evaluation.parse(item.document)
            for item in stored
            if item.contributor not in revoked
        ),
        candidate_digest=row.candidate_digest,
        candidate_master=row.candidate_master,
        candidate_state=row.candidate_state,
        evaluation_closes_at=row.evaluation_closes_at,
        held=row.held,
        reason=row.reason,
        merge_attempts=row.merge_attempts,
        consenting=trials.consenting(policy, inputs),
        **trials.read(session, row),
    )


def open_round(
    session: Session,
    model: str,
    policy: RoundPolicy,
    now: datetime,
    *,
    actor: str = COORDINATOR,
    round_id: str | None = None,
    probe_seed: int | None = None,
) -> Round:
    """Open a round on the model's latest release, with every parameter of its merge written down.

    A simulation gives `round_id` and `probe_seed`; otherwise they are drawn.

    Raises:
        ConfigError: no such merge method or outer optimizer, or not with these parameters, or
            not for a model of this size.
        NotFoundError: no such model, or it has no release.
        ConflictError: a round of the model is going on.
    """
    policy = resolved(policy)
    base = base_of_next(session, model)
    check_size(policy, releases.get_listing(session, base.content_digest))
    opened = state.open_view(round_id or new_id("round"), model, policy, now)
    seen = screening.opening(session, base, policy.screening)
    return insert(session, base, opened, actor, probe_seed=probe_seed, screening=seen)


def base_of_next(session: Session, model: str) -> Release:
    """The release that a new round of the model starts from: openers queue up here.

    Raises:
        NotFoundError: no such model, or it has no release.
        ConflictError: a round of the model is going on.
    """
    releases.get_model(session, model, lock=True)
    base = releases.latest_release(session, model)
    active = active_round(session, model)
    if active is not None:
        raise ConflictError(
            "round.already_active",
            f"A round of {model} is already going on.",
            expected="one active round per model",
            got=f"{active.id} is {active.state}",
            hint=f"Wait for it, or end it with `coldmerge round abandon {active.id}`.",
            model=model,
            round=active.id,
        )
    return base


def insert(
    session: Session,
    base: Release,
    view: RoundView,
    actor: str,
    *,
    probe_seed: int | None = None,
    **columns: object,
) -> Round:
    """A new round on `base`, flushed and logged; `columns` are what a view does not have."""
    row = Round(
        id=view.id,
        model=view.model,
        state=view.state,
        active=True,
        version=1,
        base_number=base.number,
        base_digest=base.content_digest,
        policy=view.policy.to_json(),
        probe_seed=secrets.randbelow(2**31) if probe_seed is None else probe_seed,
        trial=0,
        opened_at=view.opened_at,
        closes_at=view.closes_at,
        merge_attempts=0,
        held=False,
        reason=view.reason,
        **columns,
    )
    session.add(row)
    session.flush()
    round_log.opened(session, row, view.opened_at, actor)
    return row


def apply(
    session: Session,
    row: Round,
    event: Event,
    now: datetime,
    signer: Signer,
    *,
    actor: str = COORDINATOR,
) -> tuple[Effect, ...]:
    """Move the round by `event` and carry out the effects, all in this transaction.

    `actor` is who the audit log says moved it.

    `row` is brought up to date. A tick that changes nothing writes nothing. Read `row`
    in this transaction, with `get(…, lock=True)`.

    Raises:
        ConflictError: the event does not fit the state, or another process moved the
            round first (`round.moved`): read it again and decide again.
    """
    before = view(session, row)
    after, effects = state.transition(before, event, now)
    if isinstance(event, state.Tick) and after == before and not effects:
        return ()
    _store(session, row, after, now)
    for effect in effects:
        _carry_out(session, row, effect, now, signer)
    session.flush()
    round_log.moved(session, row, before, event, now, actor)
    return effects


def _store(session: Session, row: Round, after: RoundView, now: datetime) -> None:
    session.flush()
    moved = session.connection().execute(
        update(Round)
        .where(Round.id == row.id, Round.version == row.version)
        .values(
            state=after.state,
            active=after.state.active,
            version=row.version + 1,
            closes_at=after.closes_at,
            candidate_digest=after.candidate_digest,
            candidate_master=after.candidate_master,
            candidate_state=after.candidate_state,
            evaluation_closes_at=after.evaluation_closes_at,
            held=after.held,
            reason=after.reason,
            merge_attempts=after.merge_attempts,
            ended_at=None if after.state.active else now,
            **trials.columns(session, row, after),
        )
    )
    if moved.rowcount != 1:
        raise ConflictError(
            "round.moved",
            f"Round {row.id} was moved by another process meanwhile.",
            expected=f"version {row.version}",
            hint="Look at the round again and repeat the call if it still applies.",
            round=row.id,
        )
    session.refresh(row)


def _carry_out(session: Session, row: Round, effect: Effect, now: datetime, signer: Signer) -> None:
    if isinstance(effect, state.FreezeInputs):
        inputs = contributions.admitted(session, row.id)
        row.sealed_inputs = [item.manifest_digest for item in inputs]
        row.screening = screening.sealing(session, row, inputs, get_policy(row))
        row.coefficients = learned.sealing(row, inputs, get_policy(row))
    elif isinstance(effect, state.Publish):
        row.release_number = _publish(session, row, effect.flags, now, signer).number
        trials.mark(session, row)
    else:
        text = effect.text + continuous.outlook(session, row)
        body = notices.about_round(row, effect.kind, text, signer.federation)
        notices.insert(session, get_policy(row).webhook, body, now)


def _publish(
    session: Session, row: Round, flags: tuple[str, ...], now: datetime, signer: Signer
) -> Release:
    if row.candidate_digest is None or row.candidate_master is None:
        raise ConflictError(
            "round.no_candidate",
            f"Round {row.id} has no candidate to publish.",
            hint="Abandon the round and open another.",
            round=row.id,
        )
    again, parent = replay_of(row), row.base_digest
    if again is None:
        policy = get_policy(row)
        how = recipe_of(policy, row) | learned.in_recipe(session, row, policy)
    else:
        parent = releases.get_release(session, row.model, again.start).content_digest
        how = again.recipe() | screening.in_replay(session, row) | learned.in_replay(session, row)
        flags = (*flags, "remerged")
    return releases.publish(
        session,
        signer,
        row.model,
        row.candidate_digest,
        row.candidate_master,
        now,
        recipe=how,
        state_digest=row.candidate_state,
        parents=(parent,),
        round_id=row.id,
        contributions=tuple(contributions.kept(row)),
        flags=flags,
    )


def record_evaluation(
    session: Session,
    row: Round,
    signed: Signed,
    now: datetime,
    signer: Signer,
    *,
    actor: str = COORDINATOR,
) -> documents.Evaluation:
    """Store an evaluation whose signature was checked, and let the gate look again.

    The last one of a contributor counts. One that is stored already changes nothing, in
    any state: its contributor did not hear our answer and asks again.

    Raises:
        ManifestError: it is of another candidate, or contradicts itself.
        ConflictError: the round is not CANDIDATE.
    """
    evaluation = documents.Evaluation.parse(signed.document)
    stored = session.get(Evaluation, (row.id, row.trial, evaluation.contributor))
    if stored is not None and stored.document == signed.document:
        return evaluation
    if row.state == State.CANDIDATE and row.candidate_digest is not None:
        check_evaluation(
            evaluation,
            base_digest=row.base_digest,
            candidate_digest=row.candidate_digest,
            probe_seed=row.probe_seed,
        )
        learned.check_report(row, get_policy(row), evaluation)
        session.merge(
            Evaluation(
                round=row.id,
                trial=row.trial,
                contributor=evaluation.contributor,
                document=signed.document,
                signature=signed.signature,
                reported_at=now,
            )
        )
        round_log.evaluated(session, row, evaluation, now, actor)
    apply(session, row, state.Evaluated(), now, signer)
    return evaluation
