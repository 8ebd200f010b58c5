"""Which rounds made a model's release, one after the other, and without whom to make it again."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

from sqlalchemy import select
from sqlalchemy.orm import Session

from coldmerge.core.errors import ConflictError, NotFoundError
from coldmerge_coordinator.store import releases
from coldmerge_coordinator.store.models import Contribution, Contributor, Release, Round
from coldmerge_coordinator.store.releases import Recipe


@dataclass(frozen=True)
class Step:
    """A round's merge: its inputs, and the release it made (None within a re-merge)."""

    round: str
    inputs: tuple[str, ...]
    release: int | None = None


@dataclass(frozen=True)
class Replay:
    """Rounds to merge again, one on the other, from release `start` on.

    `without`: the manifest digests that no step has any more. `evaluators`: who judges.
    """

    start: int
    steps: tuple[Step, ...]
    without: tuple[str, ...] = ()
    evaluators: tuple[str, ...] = ()
    reason: str = ""

    def to_json(self) -> dict[str, Any]:
        """JSON-ready values that `from_json` reads back."""
        steps = [{"round": step.round, "inputs": list(step.inputs)} for step in self.steps]
        return {
            "start": self.start,
            "steps": steps,
            "without": list(self.without),
            "evaluators": list(self.evaluators),
            "reason": self.reason,
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        """What `to_json` wrote."""
        return cls(
            start=values["start"],
            steps=tuple(Step(one["round"], tuple(one["inputs"])) for one in values["steps"]),
            without=tuple(values["without"]),
            evaluators=tuple(values["evaluators"]),
            reason=values["reason"],
        )

    def recipe(self) -> Recipe:
        """What the record of the release says about how it was made."""
        return {
            "method": "remerge",
            "remerge.from": self.start,
            "remerge.rounds": ", ".join(step.round for step in self.steps),
            "remerge.without": ", ".join(self.without),
            "remerge.reason": self.reason or None,
        }

    @property
    def inputs(self) -> list[str]:
        """The manifest digests of all steps, sorted."""
        return sorted({digest for step in self.steps for digest in step.inputs})


def replay_of(row: Round) -> Replay | None:
    """What a round merges again; None for a round with inputs of its own."""
    return None if row.replay is None else Replay.from_json(row.replay)


def lineage(session: Session, model: str, number: int) -> Replay:
    """All that made release `number`, from an imported release on.

    A rollback has the lineage of the release it restored, and a re-merge that of the release
    it started from, then its own steps.
    """
    steps: list[Step] = []
    while True:
        record = releases.get_record(releases.get_release(session, model, number))
        row = session.get(Round, record.round) if record.round else None
        if record.recipe.get("method") == "rollback":
            number = int(record.recipe["number"] or 0)
        elif row is None:
            return Replay(number, tuple(reversed(steps)))
        elif (again := replay_of(row)) is not None:
            made = [*again.steps[:-1], *(_made(step, number) for step in again.steps[-1:])]
            steps += reversed(made)
            number = again.start
        else:
            steps.append(Step(row.id, record.contributions, number))
            number = row.base_number


def ancestors(session: Session, model: str, number: int, most: int) -> list[tuple[Release, int]]:
    """What release `number` was made from, newest first, and how many merges before it each was.

    The first is itself. Up to `most` merges back. What a rollback restored is no merge before it.
    Releases that a rollback took back, or a re-merge made anew, are none of them.
    """
    found: list[tuple[Release, int]] = []
    merges = 0
    while merges <= most:
        release = releases.get_release(session, model, number)
        found.append((release, merges))
        record = releases.get_record(release)
        row = session.get(Round, record.round) if record.round else None
        if record.recipe.get("method") == "rollback":
            number = int(record.recipe["number"] or 0)
        elif row is None:
            break
        elif (again := replay_of(row)) is not None:
            number, merges = again.start, merges + len(again.steps)
        else:
            number, merges = row.base_number, merges + 1
    return found


def _made(step: Step, number: int) -> Step:
    return Step(step.round, step.inputs, number)


def without(whole: Replay, removed: Collection[str], model: str) -> Replay:
    """What is left to merge again, from the release before the first step with one of `removed`.

    A step of which nothing is left is not repeated.

    Raises:
        ConflictError: no step has any of them.
    """
    removed = {*removed} & {*whole.inputs}
    first = next((at for at, one in enumerate(whole.steps) if {*one.inputs} & removed), None)
    if first is None:
        raise ConflictError(
            "remerge.nothing_there",
            f"The latest release of {model} was made without these contributions.",
            hint=f"See what each release holds with `coldmerge release list {model}`.",
            model=model,
        )
    start, begin = whole.start, 0
    for at, step in enumerate(whole.steps[:first], 1):
        if step.release is not None:
            start, begin = step.release, at
    kept = [
        Step(step.round, tuple(one for one in step.inputs if one not in removed))
        for step in whole.steps[begin:]
    ]
    return Replay(start, tuple(step for step in kept if step.inputs), tuple(sorted(removed)))


def digests_of(session: Session, model: str, named: Sequence[str]) -> set[str]:
    """The contributions to `model` that are meant: ids, or names of contributors (all of theirs).

    Raises:
        NotFoundError: there is no contribution or contributor of that name.
    """
    found: set[str] = set()
    for name in named:
        query = select(Contribution.manifest_digest).where(Contribution.model == model)
        if session.get(Contributor, name) is not None:
            query = query.where(Contribution.contributor == name)
        else:
            query = query.where(Contribution.id == name)
        digests = set(session.scalars(query))
        if not digests:
            raise NotFoundError(
                "remerge.unknown",
                f"{model} has no contribution, and none of a contributor, of that name.",
                got=name[:80],
                hint="See who sent what with `coldmerge round show`.",
                model=model,
            )
        found |= digests
    return found
