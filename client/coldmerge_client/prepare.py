"""Between a fine-tune and the outbox: extract what changed, sign it, say what would leave."""

from __future__ import annotations

import secrets
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from coldmerge.core.checkpoint import Checkpoint
from coldmerge.core.documents import (
    LEARN_COEFFICIENTS,
    LEAVE_ONE_OUT,
    Consent,
    Manifest,
    Statistic,
    sign,
)
from coldmerge.core.errors import (
    PermissionDeniedError,
    TaskVectorError,
)
from coldmerge.core.extraction import Extraction, extract
from coldmerge.core.names import is_private, split_key
from coldmerge.core.progress import Counter, Progress, silent
from coldmerge.core.statistics import FOLDER, Measured, Wanted
from coldmerge.rounds.policy import MergePolicy, parse_template
from coldmerge.rounds.statistics import statistics_for, trim_density
from coldmerge.wire.channel import MAX_DOCUMENT_IN_MESSAGE
from coldmerge.wire.v1 import common_pb2
from coldmerge_client import papers
from coldmerge_client.bases import base_of
from coldmerge_client.files import exclusive
from coldmerge_client.outbox import PAYLOAD, Outbox, OutboxEntry
from coldmerge_client.papers import Addressed
from coldmerge_client.policy import SendPolicy, section
from coldmerge_client.pull import Pulled
from coldmerge_client.session import Session


@dataclass(frozen=True)
class Facts:
    """The numbers about training that go into a manifest."""

    examples: int
    metrics: Mapping[str, float] = field(default_factory=dict)
    training: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Leaving:
    """All that would leave with a contribution (or an evaluation), and what stays and why.

    `tensors` pairs each name with its bytes, statistics among them: `statistics` says which
    kinds, and what they were made of. Besides tensors only `numbers` and `consents` leave: what
    the signed manifest says.
    """

    model: str
    base_number: int
    kind: str
    encoding: str
    tensors: tuple[tuple[str, int], ...]
    payload_bytes: int
    norm: float
    numbers: Mapping[str, float]
    kept_home: tuple[tuple[str, str], ...]
    unchanged: int
    statistics: Mapping[Statistic, float] = field(default_factory=dict)
    consents: tuple[str, ...] = ()


def prepare(
    session: Session,
    round_: common_pb2.Round,
    tuned: Path,
    facts: Facts,
    *,
    base: int | None = None,
    policy: SendPolicy | None = None,
    progress: Progress = silent,
) -> OutboxEntry:
    """Extract what the fine-tune in `tuned` changed, sign it and put it in the outbox.

    `base` is the release it was trained on, where the round takes stale ones; by default the
    round's. An entry of the same round, or of an earlier one on that release, that was not sent
    yet is given up for this one.

    Raises:
        ConflictError: the round takes no task vectors against `base`.
        TaskVectorError: shapes differ, a value is not finite, or nothing changed.
        NotFoundError: the round asks for statistics that were not measured.
        PermissionDeniedError: it is larger than the policy allows, or the round asks for
            statistics that the policy keeps at home.
    """
    home, outbox = session.home, Outbox(session.home)
    policy = policy or SendPolicy.load(home.policy)
    merge = merge_of(round_)
    check_asked(merge, policy)
    origin = base_of(session, round_, progress, number=base)
    with exclusive(home.lock("outbox"), "the outbox", wait=True):
        outbox.tidy()
        draft = outbox.draft()
        try:
            found = _extract(origin, tuned, draft / PAYLOAD, policy, merge, progress)
            manifest = _manifest(session, origin, round_.id, found, facts, policy)
            manifest = manifest.model_copy(update={"consents": policy.consents(round_.policy_json)})
            check_size(manifest, policy)
            check_message(manifest)
            signed = sign(manifest, home.identity_key())
            _give_up_earlier(outbox, manifest)
            return outbox.commit(
                draft, signed, kept_home=found.kept_home, unchanged=len(found.unchanged)
            )
        except BaseException:
            shutil.rmtree(draft, ignore_errors=True)
            raise


def preview(
    session: Session,
    base: Pulled,
    tuned: Path,
    facts: Facts,
    *,
    policy: SendPolicy | None = None,
    merge: MergePolicy | None = None,
    progress: Progress = silent,
) -> Leaving:
    """What a push of `tuned` would send to a round that merges by `merge`.

    Nothing is signed, kept or sent.
    """
    policy = policy or SendPolicy.load(session.home.policy)
    merge = merge or MergePolicy()
    check_asked(merge, policy)
    session.home.cache.mkdir(parents=True, exist_ok=True, mode=0o700)
    with tempfile.TemporaryDirectory(dir=session.home.cache) as folder:
        found = _extract(base, tuned, Path(folder) / PAYLOAD, policy, merge, progress)
        manifest = _manifest(session, base, "none-yet", found, facts, policy)
        check_size(manifest, policy)
    return _leaving(manifest, found.kept_home, len(found.unchanged))


def merge_of(round_: common_pb2.Round) -> MergePolicy:
    """The method by which a round merges, and its parameters: its frozen policy says them.

    What else a newer coordinator may say there is not looked at.

    Raises:
        ConfigError: a parameter is not what it should be.
        IntegrityError: the policy cannot be read.
    """
    said = section(round_.policy_json, "merge")
    known = {key: said[key] for key in ("method", "parameters") if key in said}
    return parse_template({"merge": known}, f"of {round_.id}").merge


def check_asked(merge: MergePolicy, policy: SendPolicy) -> None:
    """Hold what a round asks for beside deltas against what the owner lets go.

    Raises:
        PermissionDeniedError: it asks for a statistic that stays at home.
    """
    kept = sorted(kind for kind in statistics_for(merge) if policy.keeps(kind))
    if kept:
        raise PermissionDeniedError(
            "push.statistic_not_allowed",
            f"The round merges by {merge.method} and asks for {kept[0]} statistics of this "
            "machine's data; they stay at home.",
            expected=f"`may_send: [{kept[0]}]` in policy.yaml",
            got=f"may_send: [{', '.join(policy.may_send)}]",
            hint="Read in docs/security.md what they tell; allow them there, or leave this "
            "round out.",
        )


def asked_of(session: Session, base: Pulled) -> frozenset[Statistic]:
    """The statistics to measure after training on `base`: asked by its open round, and allowed."""
    found = session.newest_round(base.model)
    if found is None or found.state != common_pb2.Round.OPEN or found.base_digest != base.digest:
        return frozenset()
    policy = SendPolicy.load(session.home.policy)
    asked = statistics_for(merge_of(found)) - {"trim"}
    return frozenset(kind for kind in asked if not policy.keeps(kind))


def wanted(tuned: Path, merge: MergePolicy) -> Wanted:
    """What a merge asks for beside deltas, measured in the folder of the fine-tune.

    Raises:
        NotFoundError: it was not measured.
    """
    measured = statistics_for(merge) - {"trim"}
    found = Measured.open(tuned / FOLDER, measured) if measured else None
    return Wanted(trim_density(merge), found)


def _extract(
    base: Pulled,
    tuned: Path,
    out: Path,
    policy: SendPolicy,
    merge: MergePolicy,
    progress: Progress,
) -> Extraction:
    checkpoint = Checkpoint.open(base.folder)
    elements = sum(spec.size for spec in checkpoint.tensors.values())
    return extract(
        checkpoint,
        tuned,
        out,
        base_digest=base.digest,
        private=(*base.private, *policy.private),
        encoding=policy.encoding,
        statistics=wanted(tuned, merge),
        progress=Counter("extract", elements, progress).add,
    )


def _manifest(
    session: Session,
    base: Pulled,
    round_id: str,
    found: Extraction,
    facts: Facts,
    policy: SendPolicy,
) -> Manifest:
    sent = facts if policy.metrics else Facts(facts.examples)
    return papers.manifest(
        addressed(session, base, round_id),
        found,
        examples=facts.examples,
        metrics=sent.metrics,
        training=sent.training,
        nonce=secrets.token_hex(16),
        now=session.clock.now(),
    )


def addressed(session: Session, base: Pulled, round_id: str) -> Addressed:
    """That this machine speaks of a round on `base`."""
    member = session.member
    return Addressed(
        member.federation, member.contributor, base.model, round_id, base.digest, base.number or 0
    )


def check_size(manifest: Manifest, policy: SendPolicy) -> None:
    """Hold a contribution against the owner's limit.

    Raises:
        PermissionDeniedError: it is larger.
    """
    if policy.max_bytes is not None and manifest.payload_bytes > policy.max_bytes:
        raise PermissionDeniedError(
            "push.over_own_limit",
            "The contribution is larger than this machine's policy allows.",
            expected=f"at most {policy.max_bytes} bytes",
            got=f"{manifest.payload_bytes} bytes",
            hint="Raise max_bytes in policy.yaml, use `encoding: bf16`, or train with LoRA.",
        )


def check_message(manifest: Manifest) -> None:
    """Refuse a list of tensors that does not fit into one message.

    Raises:
        TaskVectorError: it does not.
    """
    length = len(manifest.canonical())
    if length > MAX_DOCUMENT_IN_MESSAGE:
        raise TaskVectorError(
            "push.too_many_tensors",
            "The list of what would leave is too long for one message.",
            expected=f"a manifest of at most {MAX_DOCUMENT_IN_MESSAGE} bytes",
            got=f"{length} bytes for {len(manifest.tensors)} tensors",
            hint="Fine-tune fewer modules: `target_modules` of LoRA, or `freeze`.",
        )


def against_policy(manifest: Manifest, policy: SendPolicy) -> str | None:
    """What `policy` keeps at home, of a contribution that was prepared under an earlier one."""
    for tensor in manifest.tensors:
        if is_private(split_key(tensor.name, manifest.statistics)[0], policy.private):
            return f"tensor {tensor.name}"
    for kind in sorted(manifest.statistics):
        if policy.keeps(kind):
            return f"{kind} statistics"
    if not policy.metrics and (manifest.metrics or manifest.training):
        return "numbers about training"
    for consent in manifest.consents:
        if not policy.allows(consent):
            return f"consent to {_CONSENTS[consent]}"
    return None


_CONSENTS: Mapping[Consent, str] = {
    LEAVE_ONE_OUT: "be left out of a candidate alone",
    LEARN_COEFFICIENTS: "a coefficient of our own",
}


def check_policy(manifest: Manifest, policy: SendPolicy) -> None:
    """Hold a prepared contribution against what the owner allows now.

    Raises:
        PermissionDeniedError: it is larger, or holds what stays at home by now.
    """
    check_size(manifest, policy)
    found = against_policy(manifest, policy)
    if found is not None:
        raise PermissionDeniedError(
            "push.against_own_policy",
            "The contribution in the outbox holds what this machine's policy now keeps at home.",
            expected="nothing that `private`, `metrics`, `may_send` and the consents in "
            "policy.yaml keep",
            got=found,
            hint="Run `coldmerge push` again: it prepares the fine-tune by today's policy.",
            round=manifest.round,
        )


def _give_up_earlier(outbox: Outbox, manifest: Manifest) -> None:
    for entry in outbox.pending():
        if entry.manifest.model != manifest.model:
            continue
        if entry.manifest.round == manifest.round:
            outbox.refuse(entry, "replaced by a newer fine-tune before it was sent")
        elif entry.manifest.base_digest == manifest.base_digest:
            outbox.refuse(entry, "not sent before its round sealed; signed again for the next")


def describe(entry: OutboxEntry) -> Leaving:
    """Exactly what would leave with `entry`: nothing else is in the messages."""
    return _leaving(entry.manifest, entry.kept_home, entry.unchanged)


def _leaving(manifest: Manifest, kept_home: tuple[tuple[str, str], ...], unchanged: int) -> Leaving:
    return Leaving(
        model=manifest.model,
        base_number=manifest.base_number,
        kind=manifest.kind,
        encoding=manifest.encoding,
        tensors=tuple((tensor.name, tensor.nbytes) for tensor in manifest.tensors),
        payload_bytes=manifest.payload_bytes,
        norm=manifest.norm,
        numbers={"examples": manifest.examples, **manifest.metrics, **manifest.training},
        kept_home=kept_home,
        unchanged=unchanged,
        statistics=manifest.statistics,
        consents=manifest.consents,
    )
