"""The contributor's loop: wait for a round, pull, train, push, judge the candidate, again.

Every step looks first at what is done already, on disk and at the coordinator, so the
loop may be killed anywhere and started again: training resumes, an upload goes on, a
candidate is judged once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Literal

from coldmerge.core.errors import (
    ConfigError,
    ConflictError,
    DataError,
    ManifestError,
    NotFoundError,
    PermissionDeniedError,
)
from coldmerge.core.progress import Progress, silent
from coldmerge.evaluation.metrics import PairedScores
from coldmerge.rounds.statistics import statistics_for
from coldmerge.wire.v1 import common_pb2, contributions_pb2
from coldmerge_client import checkpoints
from coldmerge_client.bases import NOT_APPROVED, base_of, staleness, unsent
from coldmerge_client.evaluate import evaluate, leaving_scores, report, slopes_of
from coldmerge_client.files import exclusive
from coldmerge_client.outbox import Outbox, OutboxEntry
from coldmerge_client.policy import SendPolicy, said
from coldmerge_client.prepare import (
    Facts,
    against_policy,
    check_asked,
    merge_of,
    prepare,
)
from coldmerge_client.pull import prune, pull
from coldmerge_client.push import Approve, send
from coldmerge_client.session import Session
from coldmerge_client.train import finished_at, forget, train
from coldmerge_client.training.config import TrainConfig

Kind = Literal[
    "waiting", "training", "stale", "sending", "sent", "held", "skipped", "evaluating", "evaluated"
]
_State = common_pb2.Round
_ENDED = frozenset({_State.PUBLISHED, _State.REJECTED, _State.ABANDONED})
_Standing = contributions_pb2.Contribution
_ARRIVED = frozenset({_Standing.ADMITTED, _Standing.QUARANTINED, _Standing.REFUSED})
"""What is not sent again: it counts, or an admin looks at it, or has."""


@dataclass(frozen=True)
class Step:
    """Something the loop does or did; `text` is one sentence for a person."""

    kind: Kind
    text: str
    round: common_pb2.Round | None = None


def unheard(step: Step) -> None:
    """Tell nobody."""


@dataclass(frozen=True)
class Terms:
    """How to take part. `keep` is the number of pulled releases that stay on the disk."""

    config: TrainConfig
    policy: SendPolicy
    approve: Approve | None = None
    progress: Progress = silent
    tell: Callable[[Step], None] = unheard
    keep: int = 3


def contribute(
    session: Session,
    model: str,
    terms: Terms,
    *,
    rounds: int | None = None,
) -> Iterator[common_pb2.Round]:
    """Take part in round after round; each is yielded when it has ended.

    An organization enrolled as evaluator only judges candidates. A round that a person
    did not approve, or whose contribution was taken back, is left out and not counted; a
    re-merge is judged and not counted.

    Args:
        session: the connection. It reconnects when the coordinator restarts; its
            timeout says how long the coordinator may stay away.
        model: name of the model.
        terms: training configuration, policy, whom to ask and whom to tell.
        rounds: end after that many rounds; None: go on for ever.

    Raises:
        UnavailableError: the coordinator stayed away longer.
        ConflictError: another process of this home takes part already.
    """
    loop = _Loop(session, model, terms)
    with exclusive(session.home.lock(f"contribute-{model}"), f"rounds of {model}", wait=False):
        finished = 0
        while rounds is None or finished < rounds:
            current = loop.next()
            for ended in loop.settle(current):
                finished += not ended.remerge
                yield ended
            if rounds is None or finished < rounds:
                loop.act(current)


class _Loop:
    """One run of the loop: which rounds we are part of, and what to do about a round."""

    def __init__(self, session: Session, model: str, terms: Terms) -> None:
        self.session = session
        self.model = model
        self.terms = terms
        self.outbox = Outbox(session.home)
        self.part_of: set[str] = set()
        self.taken_back: set[str] = set()
        self.not_asked: set[str] = set()
        self.last: bytes | None = None

    def next(self) -> common_pb2.Round:
        """The newest round, as soon as it differs from the one looked at last."""
        with closing(self.session.watch_round(self.model)) as watch:
            current = next(
                found for found in watch if found.SerializeToString(deterministic=True) != self.last
            )
        self.last = current.SerializeToString(deterministic=True)
        return current

    def settle(self, current: common_pb2.Round) -> list[common_pb2.Round]:
        """The rounds we were part of that have ended; their release is pulled."""
        ours = [
            current if current.id == round_id else self.session.round(round_id)
            for round_id in sorted(self.part_of)
        ]
        ended = [found for found in ours if found.state in _ENDED]
        if any(found.state == _State.PUBLISHED for found in ended):
            latest = pull(self.session, self.model, progress=self.terms.progress)
            forget(self.session.home, self.model, keep=latest)
            prune(self.session.home, self.model, keep=self.terms.keep)
        self.part_of.difference_update(found.id for found in ended)
        return ended

    def act(self, current: common_pb2.Round) -> None:
        """Do what `current` asks of us now."""
        if current.state == _State.OPEN:
            checkpoints.refresh(self.session)
            self._contribute(current)
        elif current.state not in _ENDED:
            self._judge(current)

    def _tell(self, kind: Kind, text: str, round_: common_pb2.Round) -> None:
        self.terms.tell(Step(kind, text, round_))

    def _contributed(self, round_: common_pb2.Round) -> bool:
        if round_.id in self.part_of:
            return True
        if self.session.member.role == "evaluator":
            self.part_of.add(round_.id)
            return True
        mine = self.session.contributions(self.model, "" if round_.remerge else round_.id)
        arrived = [each for each in mine if each.state in _ARRIVED]
        if arrived:
            self.part_of.add(round_.id)
            self._tell_standing(arrived[0], round_)
        elif any(each.state == _Standing.WITHDRAWN for each in mine):
            self._tell_taken_back(round_)
        return round_.id in self.part_of

    def _tell_taken_back(self, round_: common_pb2.Round) -> None:
        if round_.id in self.taken_back or round_.remerge:
            return
        self.taken_back.add(round_.id)
        text = (
            "Our contribution to this round was taken back: waiting for the next round. "
            f"`coldmerge push {self.model}` sends another one to this round"
        )
        self._tell("skipped", text, round_)

    def _left_alone(self, round_: common_pb2.Round) -> bool:
        """Whether the round is for others."""
        asked = said(round_.policy_json).get("contributors")
        others = asked is not None and self.session.member.contributor not in asked
        if others and round_.id not in self.not_asked:
            self.not_asked.add(round_.id)
            self._tell("skipped", "This round is for other contributors", round_)
        return round_.id in self.not_asked

    def _declined(self, round_: common_pb2.Round) -> bool:
        return any(
            entry.manifest.round == round_.id and entry.reason == NOT_APPROVED
            for entry in self.outbox.naming(round_.id)
        )

    def _contribute(self, round_: common_pb2.Round) -> None:
        if self._contributed(round_) or self._declined(round_) or round_.id in self.taken_back:
            return
        if self._left_alone(round_):
            return
        try:
            self._send(round_)
        except ConflictError:
            if self.session.round(round_.id).state == _State.OPEN:
                raise
            self._give_up(round_, "the round ended before the contribution was sent")
        self.last = None

    def _made(self, round_: common_pb2.Round) -> OutboxEntry | None:
        """Train, unless that was done, and sign; None: a continuous round sealed meanwhile."""
        terms, session = self.terms, self.session
        merge = merge_of(round_)
        check_asked(merge, terms.policy)
        number = self._to_train_on(round_)
        base = base_of(session, round_, terms.progress, number=number)
        self._tell("training", f"Training on release {number}", round_)
        trained = train(
            session.home,
            base,
            terms.config,
            statistics=statistics_for(merge) - {"trim"},
            progress=terms.progress,
        )
        if round_.bases and session.round(round_.id).state != _State.OPEN:
            self._tell(
                "waiting", "The round is sealed: what was trained waits for the next", round_
            )
            return None
        facts = Facts(trained.examples, trained.metrics, trained.training)
        return prepare(
            session,
            round_,
            trained.folder,
            facts,
            base=number,
            policy=terms.policy,
            progress=terms.progress,
        )

    def _to_train_on(self, round_: common_pb2.Round) -> int:
        """The round's base; or an older release whose fine-tune is finished and still counts."""
        home, config = self.session.home, self.terms.config
        if finished_at(home, self.model, round_.base_digest, config) is not None:
            return round_.base_number
        older = unsent(home, round_, config)
        return round_.base_number if older is None else older

    def _send(self, round_: common_pb2.Round) -> None:
        terms, session = self.terms, self.session
        entry = self.outbox.for_round(round_.id)
        outdated = entry is not None and against_policy(entry.manifest, terms.policy) is not None
        if entry is None or not entry.pending or outdated:
            entry = self._made(round_)
        if entry is None:
            return
        stale = staleness(round_, entry.manifest.base_number)
        if stale is not None:
            self._tell("stale", stale, round_)
        self._tell("sending", f"Sending {entry.manifest.payload_bytes} bytes", round_)
        try:
            entry = send(
                session,
                entry,
                policy=terms.policy,
                approve=terms.approve,
                progress=terms.progress,
            )
        except PermissionDeniedError as error:
            if error.code != "push.not_approved":
                raise
            self._give_up(round_, NOT_APPROVED)
            return
        self.part_of.add(round_.id)
        self._tell("sent", "The contribution is durable at the coordinator", round_)
        if entry.receipt is not None:
            self._tell_standing(session.contribution(entry.receipt.contribution), round_)

    def _tell_standing(
        self, found: contributions_pb2.Contribution, round_: common_pb2.Round
    ) -> None:
        if found.state == _Standing.QUARANTINED:
            text = f"It does not count before an admin accepts it: {found.reason}"
            self._tell("held", text, round_)
        elif found.state == _Standing.REFUSED:
            self._tell("held", f"An admin left it out of this round: {found.reason}", round_)

    def _give_up(self, round_: common_pb2.Round, reason: str) -> None:
        entry = self.outbox.for_round(round_.id)
        if entry is not None and entry.pending:
            self.outbox.refuse(entry, reason)
        self._tell("skipped", f"Not part of this round: {reason}", round_)

    def _judge(self, round_: common_pb2.Round) -> None:
        """Report on a candidate, once."""
        if not self._contributed(round_) or round_.state != _State.CANDIDATE:
            return
        asked = round_.min_evaluators > 0 or round_.HasField("probe")
        if not asked or self._judged() == _candidate_of(round_):
            return
        self._tell("evaluating", "Judging the candidate on our own data", round_)
        scores = self._scores(round_)
        if scores is not None and self._may_leave(round_, scores):
            self._report(round_, scores)
        with self.session.home.state() as state:
            state.setdefault("judged", {})[self.model] = _candidate_of(round_)
        prune(
            self.session.home,
            self.model,
            keep=self.terms.keep,
            candidates=(round_.candidate_digest, *round_.probe.directions),
        )
        self.last = None

    def _scores(self, round_: common_pb2.Round) -> PairedScores | None:
        """What we find; None: our trainer lacks a probe's number, or the candidate is gone."""
        terms = self.terms
        try:
            scores = evaluate(self.session, round_, terms.config, progress=terms.progress)
        except ConfigError as error:
            if error.code != "training.no_number":
                raise
            self._tell("skipped", f"We do not measure probes: {error.message}", round_)
            return None
        except NotFoundError:
            if self._is_at_hand(round_):
                raise
            self._tell("skipped", "The gate had decided before we had the candidate", round_)
            return None
        return self._with_slopes(round_, scores) if round_.probe.slopes else scores

    def _with_slopes(self, round_: common_pb2.Round, scores: PairedScores) -> PairedScores:
        """The scores, with the slopes that a probe asks for besides, where we have them."""
        terms = self.terms
        try:
            found = slopes_of(self.session, round_, terms.config, progress=terms.progress)
        except (ConfigError, DataError, NotFoundError) as error:
            self._tell("skipped", f"We report no slopes: {error.message}", round_)
            return scores
        return replace(scores, slopes=found)

    def _may_leave(self, round_: common_pb2.Round, scores: PairedScores) -> bool:
        """Whether a person lets the scores leave, where the policy asks one."""
        terms = self.terms
        if not terms.policy.require_approval:
            return True
        if terms.approve is not None and terms.approve(leaving_scores(round_, scores)):
            return True
        self._tell("skipped", "The scores stay here: they were not approved", round_)
        return False

    def _report(self, round_: common_pb2.Round, scores: PairedScores) -> None:
        try:
            report(self.session, round_, scores)
        except (ConflictError, ManifestError):
            if self._is_at_hand(round_):
                raise
            self._tell("skipped", "The gate had decided before our report", round_)
        else:
            change = 100 * (scores.candidate.accuracy - scores.base.accuracy)
            self._tell("evaluated", f"Accuracy {change:+.1f} points on {scores.n} items", round_)

    def _is_at_hand(self, round_: common_pb2.Round) -> bool:
        """Whether the candidate is still the one that is judged."""
        now = self.session.round(round_.id)
        return now.state == _State.CANDIDATE and _candidate_of(now) == _candidate_of(round_)

    def _judged(self) -> str | None:
        """The candidate we judged last. Two rounds on one release may make the same one."""
        with self.session.home.state() as state:
            found: str | None = state.get("judged", {}).get(self.model)
        return found


def _candidate_of(round_: common_pb2.Round) -> str:
    """Names a round's candidate: there is another one in each trial of the gate's search."""
    return f"{round_.id}#{round_.trial}" if round_.trial else round_.id
