"""Asking contributors, some at a time, and hearing them in the order in which they were asked."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from coldmerge.core.errors import UnavailableError
from coldmerge_simulation.flower.compat import Grid, Message
from coldmerge_simulation.orders import (
    HELLO,
    Answer,
    Order,
    answer_of,
    pack,
    silent,
    unreadable,
)

POLL_SECONDS = 0.02
MEETING_SECONDS = 120.0
"""How long nodes may take to come up before the first order."""


@dataclass
class _Asked:
    order: Order
    until: float
    answer: Answer | None = None


class Desk:
    """Sends orders to nodes. What it holds grows with `at_a_time`, not with the contributors.

    `patience` is how many seconds an answer may take.
    """

    def __init__(
        self, grid: Grid, nodes: Mapping[str, int], at_a_time: int, patience: float
    ) -> None:
        self._grid, self._nodes = grid, nodes
        self._at_a_time, self._patience = at_a_time, patience

    def ask(self, orders: Iterable[Order]) -> Iterator[tuple[Order, Answer]]:
        """Yield each order with its answer, in order.

        Closed before its end, it leaves those that were asked alone: their answers are lost.
        """
        todo = iter(orders)
        line: deque[_Asked] = deque()
        waiting: dict[str, _Asked] = {}
        more = True
        while line or more:
            while more and len(line) < self._at_a_time:
                order = next(todo, None)
                if order is None:
                    more = False
                else:
                    line.append(self._send(order, waiting))
            self._hear(waiting)
            while line and line[0].answer is not None:
                first = line.popleft()
                if first.answer is not None:
                    yield first.order, first.answer

    def _send(self, order: Order, waiting: dict[str, _Asked]) -> _Asked:
        values = {**order.values, "contributor": order.contributor}
        message = Message(
            pack(values, order.files),
            self._nodes[order.contributor],
            order.kind,
            ttl=self._patience,
        )
        asked = _Asked(order, time.monotonic() + self._patience)
        sent = list(self._grid.push_messages([message]))
        if sent and sent[0]:
            waiting[sent[0]] = asked
        else:
            asked.answer = Answer({}, error=unreadable("its node took no message"))
        return asked

    def _hear(self, waiting: dict[str, _Asked]) -> None:
        """Take the replies that there are; wait a moment if there are none."""
        if not waiting:
            return
        replies = list(self._grid.pull_messages(list(waiting)))
        for reply in replies:
            asked = waiting.pop(reply.metadata.reply_to_message_id, None)
            if asked is not None:
                asked.answer = answer_of(reply)
        now = time.monotonic()
        for identifier in [known for known, asked in waiting.items() if asked.until < now]:
            waiting.pop(identifier).answer = Answer({}, error=silent(self._patience))
        if not replies and waiting:
            time.sleep(POLL_SECONDS)


def meet(grid: Grid, names: tuple[str, ...]) -> dict[str, int]:
    """Which node plays which contributor: asked of every node, once.

    Raises:
        UnavailableError: no node came, or nobody plays one of them.
    """
    deadline = time.monotonic() + MEETING_SECONDS
    parts: dict[int, int] = {}
    total = 0
    while time.monotonic() < deadline:
        fresh = [node for node in grid.get_node_ids() if node not in parts.values()]
        for part, of, node in _introduced(grid, fresh):
            parts[part], total = node, max(total, of)
        if total and len(parts) == total:
            return {name: parts[place % total] for place, name in enumerate(names)}
        time.sleep(POLL_SECONDS * 10)
    raise UnavailableError(
        "simulation.no_contributors",
        "The nodes that play the contributors did not all come.",
        expected=f"{total or 'at least 1'} nodes, with partition-id 0 and up",
        got=f"{len(parts)} after {MEETING_SECONDS:g} s",
        hint="Start the SuperNodes with --node-config 'partition-id=0 num-partitions=1', and look "
        "at their logs.",
    )


def _introduced(grid: Grid, nodes: list[int]) -> list[tuple[int, int, int]]:
    messages = [Message(pack({}, {}), node, HELLO) for node in nodes]
    found = []
    for reply in grid.send_and_receive(messages, timeout=30.0) if messages else ():
        said = answer_of(reply).values
        part, of = said.get("partition-id"), said.get("num-partitions")
        if isinstance(part, int) and isinstance(of, int) and 0 <= part < of:
            found.append((part, of, reply.metadata.src_node_id))
    return found
