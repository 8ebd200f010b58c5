"""Judging a candidate at home: the same seeded probe on base and candidate, in pairs.

Only counts and scores are reported; texts, labels and predictions stay here.
"""

from __future__ import annotations

from coldmerge.core.documents import Evaluation, sign
from coldmerge.core.errors import ConflictError
from coldmerge.core.progress import Progress, silent
from coldmerge.evaluation.metrics import PairedScores
from coldmerge.wire.v1 import common_pb2
from coldmerge_client import papers, sent_log, slopes
from coldmerge_client.bases import base_of
from coldmerge_client.papers import Addressed, Body
from coldmerge_client.prepare import Leaving
from coldmerge_client.pull import pull_candidate
from coldmerge_client.session import Session
from coldmerge_client.training.config import TrainConfig


def evaluate(
    session: Session,
    round_: common_pb2.Round,
    config: TrainConfig,
    *,
    progress: Progress = silent,
) -> PairedScores:
    """Compare a round's candidate with its base on this machine's validation data.

    Raises:
        ConflictError: the round has no candidate to judge.
        DataError: the validation data cannot be used.
    """
    if round_.state != common_pb2.Round.CANDIDATE:
        raise ConflictError(
            "evaluate.no_candidate",
            "The round has no candidate that waits for evaluations.",
            expected="a round in CANDIDATE",
            got=common_pb2.Round.State.Name(round_.state),
            hint="Follow it with `coldmerge watch`.",
            round=round_.id,
        )
    base = base_of(session, round_, progress)
    candidate = pull_candidate(session, round_.model, round_.candidate_digest, progress=progress)
    return papers.compare(
        config,
        Body(base.folder, base.digest),
        Body(candidate.folder, candidate.digest),
        round_.probe_seed,
        session.home.cache / "features",
        progress,
        objective=round_.probe.objective or None,
    )


def slopes_of(
    session: Session,
    round_: common_pb2.Round,
    config: TrainConfig,
    *,
    progress: Progress = silent,
) -> dict[str, tuple[float, ...]]:
    """The slopes that a round asks for of its probe at hand, on this machine's validation data.

    Raises:
        ConfigError: the trainer has none.
        DataError: the validation data cannot be used, or a slope is no number.
        NotFoundError: the coordinator keeps a candidate no more along which they are told.
    """
    digests = (*round_.probe.directions, round_.candidate_digest)
    start, *ends, here = [
        Body(pull_candidate(session, round_.model, each, progress=progress).folder, each)
        for each in digests
    ]
    return slopes.along(
        config,
        here,
        slopes.Directions(start.folder, tuple(end.folder for end in ends)),
        round_.probe_seed,
        session.home.cache / "features",
        progress,
        objective=round_.probe.objective,
        by_layer=round_.probe.slopes == "layer",
    )


def leaving_scores(round_: common_pb2.Round, scores: PairedScores) -> Leaving:
    """What leaves with a report, for a person to approve: numbers, no tensors."""
    numbers: dict[str, float] = {
        "items": scores.n,
        "base_accuracy": scores.base.accuracy,
        "candidate_accuracy": scores.candidate.accuracy,
        "base_macro_f1": scores.base.macro_f1,
        "candidate_macro_f1": scores.candidate.macro_f1,
        "only_candidate_right": scores.gained,
        "only_base_right": scores.lost,
    } | {str(name): value for name, value in scores.means.items()}
    for layer, along in scores.slopes.items():
        names = (f"slope_{place}" + (f".{layer}" if layer else "") for place in range(len(along)))
        numbers |= zip(names, along, strict=True)
    return Leaving(
        model=round_.model,
        base_number=round_.base_number,
        kind="evaluation",
        encoding="none",
        tensors=(),
        payload_bytes=0,
        norm=0.0,
        numbers=numbers,
        kept_home=(),
        unchanged=0,
    )


def report(session: Session, round_: common_pb2.Round, scores: PairedScores) -> Evaluation:
    """Sign a paired evaluation, write it to the sent log and hand it in.

    Raises:
        ConflictError: the gate has decided already.
    """
    member = session.member
    addressed = Addressed(
        member.federation,
        member.contributor,
        round_.model,
        round_.id,
        round_.base_digest,
        round_.base_number,
    )
    evaluation = papers.evaluation(
        addressed, round_.candidate_digest, round_.probe_seed, scores, session.clock.now()
    )
    sent_log.record(
        session.home, "evaluation", evaluation.model_dump(mode="json"), session.clock.now()
    )
    session.report_evaluation(sign(evaluation, session.home.identity_key()))
    return evaluation
