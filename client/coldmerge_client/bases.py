"""Which round takes a contribution now, and against which release."""

from __future__ import annotations

from coldmerge.core.errors import ConflictError, IntegrityError
from coldmerge.core.progress import Progress, silent
from coldmerge.wire.v1 import common_pb2
from coldmerge_client.home import Home
from coldmerge_client.outbox import Outbox
from coldmerge_client.pull import Pulled, pull
from coldmerge_client.session import Session
from coldmerge_client.train import finished_at
from coldmerge_client.training.config import TrainConfig

NOT_APPROVED = "not approved"
"""Why a person's no gave an entry of the outbox up."""


def open_round(session: Session, model: str, base: int | None = None) -> common_pb2.Round:
    """The round that takes contributions now, with `base`: those against that release.

    Raises:
        ConflictError: none is open, or the open one does not take what was trained on `base`.
    """
    found = session.newest_round(model)
    if found is None or found.state != common_pb2.Round.OPEN:
        state = "no round yet" if found is None else common_pb2.Round.State.Name(found.state)
        raise ConflictError(
            "push.no_open_round",
            f"No round of {model} takes contributions now.",
            expected="a round that is OPEN",
            got=state,
            hint="Wait for the next one with `coldmerge watch`; the fine-tune is kept.",
            model=model,
        )
    if base is not None and all(base != each.number for each in admitted(found)):
        raise _not_taken(found, base)
    return found


def _not_taken(round_: common_pb2.Round, base: int) -> ConflictError:
    newest, *older = admitted(round_)
    hint = f"Fine-tune release {newest.number} (`coldmerge pull`), then push again."
    if older:
        return ConflictError(
            "push.too_stale",
            "This fine-tune is of a release that the open round takes no task vectors against: "
            "it is too old, or was taken back.",
            expected=f"release {' or '.join(str(each.number) for each in (newest, *older))}",
            got=f"release {base}",
            hint=hint,
            model=round_.model,
            round=round_.id,
        )
    return ConflictError(
        "push.other_base",
        "The open round is on another release than this fine-tune.",
        expected=f"release {newest.number}",
        got=f"release {base}",
        hint=hint,
        model=round_.model,
        round=round_.id,
    )


def admitted(round_: common_pb2.Round) -> list[common_pb2.AdmittedBase]:
    """The releases whose task vectors the round takes; the one it is on comes first."""
    own = common_pb2.AdmittedBase(
        number=round_.base_number, digest=round_.base_digest, discount=1.0
    )
    return [own, *(base for base in round_.bases if base.number != round_.base_number)]


def staleness(round_: common_pb2.Round, number: int) -> str | None:
    """A sentence about what a fine-tune of release `number` counts for; None: in full."""
    base = next((each for each in admitted(round_) if each.number == number), None)
    if base is None or base.staleness == 0:
        return None
    merges = "one merge" if base.staleness == 1 else f"{base.staleness} merges"
    return (
        f"The fine-tune is stale: release {number} is {merges} before release "
        f"{round_.base_number}, so that its task vector is multiplied by {base.discount:.3g}"
    )


def base_of(
    session: Session,
    round_: common_pb2.Round,
    progress: Progress = silent,
    *,
    number: int | None = None,
) -> Pulled:
    """The release a round is on, or release `number` of those it admits; pulled and verified.

    Raises:
        IntegrityError: the round names another digest than the signed record.
        ConflictError: the round does not take task vectors against release `number`.
    """
    wanted = round_.base_number if number is None else number
    named = next((each for each in admitted(round_) if each.number == wanted), None)
    if named is None:
        raise _not_taken(round_, wanted)
    older = named.number != round_.base_number
    base = pull(session, round_.model, named.number, allow_older=older, progress=progress)
    if base.digest != named.digest:
        raise IntegrityError(
            "push.round_on_unknown_base",
            "The round is on another content than the signed release of that number.",
            expected=base.digest,
            got=named.digest,
            hint="Do not contribute; ask the coordinator's admin what happened.",
            round=round_.id,
        )
    return base


def unsent(home: Home, round_: common_pb2.Round, config: TrainConfig | None = None) -> int | None:
    """The newest release before the round's whose fine-tune is finished here, may still be
    counted, and has not been sent (nor kept home by a person); None: there is none.
    """
    for base in admitted(round_):
        if base.digest == round_.base_digest or _settled(home, round_.model, base.digest):
            continue
        if finished_at(home, round_.model, base.digest, config) is not None:
            return base.number
    return None


def _settled(home: Home, model: str, digest: str) -> bool:
    """Whether a fine-tune of that release was sent, or kept home by a person."""
    return any(
        entry.manifest.model == model
        and entry.manifest.base_digest == digest
        and (entry.state == "sent" or entry.reason == NOT_APPROVED)
        for entry in Outbox(home).naming(digest)
    )
