"""Flower over coldmerge's wire: a stock ServerApp drives enrolled contributors.

`ContributionGrid` is what `Strategy.start(grid=...)` is given in place of Flower's own grid. A
`train` message becomes a round on the latest release, opened by the admin for the contributors
whom the strategy asks; they pull, train and push as ever (`coldmerge contribute`), over mutual
TLS, and each admitted task vector becomes a reply. An `evaluate` message is answered with the
signed evaluations that the round's gate collects.

The coordinator makes the release, not the strategy: it merges by the round's recipe, which it
can do again at any time, and the grid checks that the strategy came to the same arrays. What the
coordinator could not make again is never signed.
"""

from __future__ import annotations

import logging
import time
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from coldmerge.core.errors import DataError
from coldmerge.wire.v1 import common_pb2
from coldmerge_simulation.flower import compat
from coldmerge_simulation.grid.agreement import check_same, check_tensors, largest_difference
from coldmerge_simulation.grid.messages import (
    EVALUATE,
    TRAIN,
    common_arrays,
    key_of,
    kind_of,
    refusal,
    refusals,
    reply,
    scores_of,
    to_arrays,
    to_record,
)
from coldmerge_simulation.grid.rounds import (
    ENDED,
    Arrays,
    Latest,
    Overdue,
    Rounds,
    Standing,
    goes_on,
    round_policy,
)

POLL_SECONDS = 0.2
PATIENCE = 60.0
MERGING = 3600.0
"""Seconds that a merge may take, with its repetitions, before the grid waits no longer."""
TTL = 43_200.0
"""Seconds for which a message is valid, and a round open, unless the strategy says otherwise."""
_State = common_pb2.Round
_ANSWERS = frozenset({"ADMITTED", "QUARANTINED", "REFUSED"})
"""States of a contribution that nobody waits for any longer."""

log = logging.getLogger(__name__)


@dataclass
class _Batch:
    """Messages that were pushed together, by contributor, and the round that answers them."""

    kind: str
    asked: dict[str, compat.Message]
    round_id: str | None
    arrays: Arrays


class ContributionGrid(compat.Grid):
    """A grid whose nodes are the contributors of the coordinator in `folder`, which is served.

    `policy` replaces keys of the model's round template; the merge is `mean` weighted by
    examples unless it says otherwise, and must be what the strategy computes. `patience`:
    seconds that a coordinator may be away; `merging`: seconds that a merge may take. One
    ServerApp at a time; use it in a `with`.

    Raises:
        ConfigError: no coordinator in `folder`, or which model is not clear.
        NotFoundError: no such model.
    """

    def __init__(
        self,
        folder: Path,
        model: str | None = None,
        *,
        policy: Mapping[str, Any] | None = None,
        patience: float = PATIENCE,
        merging: float = MERGING,
    ) -> None:
        self._merging = merging
        self._rounds = Rounds(Path(folder), model, patience)
        self._policy = dict(policy or {})
        self._run = compat.Run.create_empty(run_id=1)
        self._batches: list[_Batch] = []
        self._last: str | None = None
        self._inputs = 1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Hang up. A round that goes on is left to the coordinator."""
        self._rounds.close()

    def set_run(self, run: compat.Run) -> None:
        """Take part in a run of Flower; without one, there is a run with number 1."""
        self._run = run

    @property
    def run(self) -> compat.Run:
        """The run."""
        return self._run

    def drive(self, app: compat.ServerApp, **run_config: bool | float | int | str) -> None:
        """Run a ServerApp on this grid, to its end."""
        run_id = self._run.run_id
        with compat.identity(run_id):
            app(self, compat.context(run_id, run_config=run_config))

    def arrays(self) -> compat.ArrayRecord:
        """The latest release: the `initial_arrays` to start a strategy from.

        Its float tensors that are not private, in float32, by name.
        """
        return to_record(self._rounds.arrays(self._rounds.latest().digest))

    def create_message(
        self,
        content: compat.RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> compat.Message:
        """A message to one node."""
        return compat.message(
            content,
            message_type,
            target=dst_node_id,
            run_id=self._run.run_id,
            group=group_id,
            ttl=TTL if ttl is None else ttl,
        )

    def get_node_ids(self) -> list[int]:
        """One number per active contributor, the same in every run.

        Raises:
            NotFoundError: there is none: FedAvg would wait for ever.
            UnavailableError: the coordinator does not answer.
        """
        return sorted(self._rounds.nodes())

    def push_messages(self, messages: Iterable[compat.Message]) -> list[str]:
        """Send messages of one kind, with the same arrays, to different contributors.

        Raises:
            DataError: other arrays than the model has, or no contributor of that number.
            ConflictError: the arrays are not the latest release, or not the candidate, or
                another round of the model goes on.
            ConfigError: another kind of message, or too few contributors for a round.
        """
        sent = list(messages)
        if not sent:
            return []
        kind, arrays = kind_of(sent), common_arrays(sent)
        asked = self._addressed(sent)
        if kind == TRAIN:
            batch = self._train(asked, arrays)
        else:
            batch = _Batch(EVALUATE, asked, self._last, arrays)
        for message in sent:
            compat.set_message_id(message, uuid.uuid4().hex)
        self._batches.append(batch)
        return [message.metadata.message_id for message in sent]

    def pull_messages(self, message_ids: Iterable[str]) -> list[compat.Message]:
        """The replies that are there, each once.

        Those to `train` come together, when the round is sealed: not before is it known how
        much of each task vector counts.

        Raises:
            ConflictError: the strategy's arrays are not what the coordinator merged.
        """
        wanted, found = set(message_ids), []
        for batch in list(self._batches):
            found += self._answers(batch, wanted)
            if not batch.asked:
                self._batches.remove(batch)
        return found

    def send_and_receive(
        self, messages: Iterable[compat.Message], *, timeout: float | None = None
    ) -> list[compat.Message]:
        """Push, and wait for the replies; after `timeout` seconds, what `give_up` gives."""
        ids = self.push_messages(messages)
        deadline = None if timeout is None else time.monotonic() + timeout
        replies: list[compat.Message] = []
        while len(replies) < len(ids):
            replies += self.pull_messages(ids)
            if deadline is not None and time.monotonic() > deadline:
                return [*replies, *self.give_up(ids)]
            if len(replies) < len(ids):
                time.sleep(POLL_SECONDS)
        return replies

    def give_up(self, ids: Iterable[str]) -> list[compat.Message]:
        """Wait no longer: the replies that there are, or will ever be.

        A round that still takes contributions is sealed with those that came, or abandoned
        when they are fewer than its policy asks for.
        """
        wanted, replies = set(ids), []
        for batch in list(self._batches):
            if not any(m.metadata.message_id in wanted for m in batch.asked.values()):
                continue
            if batch.kind == TRAIN and batch.round_id is not None:
                now = self._rounds.standing(batch.round_id)
                if now.round.state == _State.OPEN:
                    self._close(now)
            replies += self._answers(batch, wanted)
            self._batches.remove(batch)
        return replies

    def settle(self, timeout: float | None = None) -> common_pb2.Round | None:
        """Wait until the last round has ended: that round, or None if there was none.

        Raises:
            ConflictError: it goes on after `timeout` seconds, or waits for an admin; or its merge
                does, after the `merging` seconds of this grid: a full disk, a worker that is away.
        """
        if self._last is None:
            return None
        begun = time.monotonic()
        overdue = Overdue(self._merging)
        while (now := self._rounds.get(self._last)).state not in ENDED:
            late = timeout is not None and time.monotonic() - begun > timeout
            if now.held or late or overdue.is_(now):
                raise goes_on(now)
            time.sleep(POLL_SECONDS)
        return now

    def release(self, arrays: compat.ArrayRecord, timeout: float | None = None) -> int:
        """The number of the latest release, once it is certain that it is these `arrays`.

        Raises:
            ConflictError: it is not, or the last round goes on.
            DataError: these are not the model's tensors.
        """
        self.settle(timeout)
        latest = self._rounds.latest()
        self._check("release", to_arrays(arrays), latest.digest, f"release {latest.number}")
        return latest.number

    def _addressed(self, sent: Sequence[compat.Message]) -> dict[str, compat.Message]:
        nodes = self._rounds.nodes()
        asked: dict[str, compat.Message] = {}
        for message in sent:
            name = nodes.get(message.metadata.dst_node_id)
            if name is None or name in asked:
                raise DataError(
                    "grid.bad_node",
                    "A message is for nobody, or the second one for the same contributor.",
                    expected="one message to each of some of get_node_ids()",
                    got=f"node {message.metadata.dst_node_id}" + (f", {name}" if name else ""),
                    hint="Sample from grid.get_node_ids() in each round.",
                )
            asked[name] = message
        return asked

    def _check_start(self, arrays: Arrays, latest: Latest) -> None:
        """What a round is asked to start from must be the latest release, if it can be.

        It cannot where the gate has rejected what the strategy made, or had it made again
        without some. A strategy's arrays do not go into a release, so nothing is lost then.
        """
        before = self.settle()
        if before is None or (before.state == _State.PUBLISHED and not before.left_out):
            self._check("release", arrays, latest.digest, f"release {latest.number}")
            return
        check_tensors(arrays, self._rounds.arrays(latest.digest))
        if before.candidate_digest and not before.left_out:
            self._check("candidate", arrays, before.candidate_digest, f"that of {before.id}")
        log.warning(
            "Round %s was %s (%s): the next one starts from release %s, not from these arrays",
            *(before.id, _State.State.Name(before.state), before.reason, latest.number),
        )

    def _train(self, asked: dict[str, compat.Message], arrays: Arrays) -> _Batch:
        self._rounds.check_windowed(self._policy)
        self._check_start(arrays, self._rounds.latest())
        seconds = min(message.metadata.ttl for message in asked.values())
        opened = self._rounds.open(round_policy(self._policy, list(asked), seconds))
        self._last = opened.id
        return _Batch(TRAIN, asked, opened.id, arrays)

    def _check(self, what: str, arrays: Arrays, digest: str, name: str) -> None:
        latest = self._rounds.latest()
        ours = self._rounds.arrays(digest)
        check_same(arrays, ours, latest.dtypes, inputs=self._inputs, what=what, name=name)
        found = largest_difference(arrays, ours)
        log.info("The strategy's arrays are %s: largest difference %.3g", name, found)

    def _answers(self, batch: _Batch, wanted: set[str]) -> list[compat.Message]:
        open_ = {
            name: message
            for name, message in batch.asked.items()
            if message.metadata.message_id in wanted
        }
        if not open_:
            return []
        answer = self._trained if batch.kind == TRAIN else self._evaluated
        replies = answer(batch, open_)
        done = {one.metadata.reply_to_message_id for one in replies}
        batch.asked = {
            name: message
            for name, message in batch.asked.items()
            if message.metadata.message_id not in done
        }
        return replies

    def _trained(self, batch: _Batch, asked: Mapping[str, compat.Message]) -> list[compat.Message]:
        """Replies once the round is sealed; it is sealed here when nobody is left to wait for."""
        if batch.round_id is None:
            return []
        now = self._rounds.standing(batch.round_id)
        if now.round.state == _State.OPEN:
            answered = {name for name, (state, _) in now.contributions.items() if state in _ANSWERS}
            if not answered.issuperset(batch.asked):
                return []
            self._close(now)
            now = self._rounds.standing(batch.round_id)
        return self._sealed(now, asked)

    def _sealed(self, now: Standing, asked: Mapping[str, compat.Message]) -> list[compat.Message]:
        merged = self._rounds.contributed(now.round.id)
        self._inputs = max(1, len(merged))
        common = set.intersection(*(set(one.metrics) for one in merged.values())) if merged else ()
        replies = []
        for name, message in asked.items():
            if name in merged:
                one = merged.pop(name)
                numbers = {"num-examples": one.examples}
                metrics = numbers | {key: one.metrics[key] for key in sorted(common)}
                content = {key_of(message): to_record(one.arrays)}
                replies.append(reply(message, metrics, content))
            else:
                replies.append(refusal(message, f"{name} is not merged: {_why(now, name)}"))
        return replies

    def _close(self, now: Standing) -> None:
        least = now.round.min_contributions
        if now.admitted >= least:
            self._rounds.seal(now.round.id)
        else:
            came = f"{now.admitted} of at least {least} contributions counted"
            self._rounds.abandon(now.round.id, f"the Flower grid gave up: {came}")

    def _evaluated(
        self, batch: _Batch, asked: Mapping[str, compat.Message]
    ) -> list[compat.Message]:
        """The signed evaluations that have come in; why there is none, when none can come."""
        if batch.round_id is None:
            return refusals(asked, "no round was trained: there is no candidate to judge")
        now = self._rounds.get(batch.round_id)
        if now.state not in {_State.CANDIDATE, *ENDED} or now.HasField("probe"):
            return []
        if now.candidate_digest and batch.arrays and not now.left_out:
            self._check("candidate", batch.arrays, now.candidate_digest, f"{now.id}'s candidate")
            batch.arrays = {}
        if now.min_evaluators == 0:
            return refusals(asked, f"round {now.id} has no gate: nobody judges its candidate")
        replies, rest = [], dict(asked)
        for name, one in self._rounds.evaluations(now.id).items():
            if name in rest:
                replies.append(reply(rest.pop(name), scores_of(one), {}))
        if now.state in ENDED:
            replies += refusals(rest, f"did not judge before round {now.id} ended")
        return replies


def _why(now: Standing, name: str) -> str:
    state, reason = now.contributions.get(name, ("no contribution came", ""))
    ended = _State.State.Name(now.round.state)
    return f"{state}{f', {reason}' if reason else ''}; the round is {ended} {now.round.reason}"
