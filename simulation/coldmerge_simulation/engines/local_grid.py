"""A Flower Grid within one process: every node is a function call. Nothing listens anywhere."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from coldmerge_simulation.flower.compat import (
    SERVER_NODE,
    ClientApp,
    Context,
    Grid,
    Message,
    RecordDict,
    Run,
    context,
    error_message,
    identity,
    set_message_id,
)

FIRST_NODE = 100
RUN_ID = 1
_RAISED = 1


class LocalGrid(Grid):
    """Runs a ClientApp for `nodes` nodes, one message at a time, when a reply is asked for.

    Use it inside `running`. Like Flower's own simulation, node i has the partition-id i, and
    keeps the state of its Context between messages.
    """

    def __init__(self, client: ClientApp, nodes: int) -> None:
        self._client = client
        self._contexts = {
            FIRST_NODE + part: context(
                RUN_ID,
                FIRST_NODE + part,
                node_config={"partition-id": part, "num-partitions": nodes},
            )
            for part in range(nodes)
        }
        self._waiting: deque[Message] = deque()
        self._replies: dict[str, Message] = {}
        self._count = 0
        self._run: Run | None = None

    @contextmanager
    def running(self) -> Iterator[Context]:
        """Who this process is meanwhile; yields the ServerApp's context."""
        with identity(RUN_ID):
            yield context(RUN_ID)

    def set_run(self, run: Run) -> None:
        """Note the run."""
        self._run = run

    @property
    def run(self) -> Run:
        """The run that was set."""
        if self._run is None:
            self._run = Run.create_empty(RUN_ID)
        return self._run

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        """A message as Flower's older apps make it."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> list[int]:
        """All nodes."""
        return list(self._contexts)

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Keep messages until their replies are asked for."""
        identifiers = []
        for message in messages:
            self._count += 1
            set_message_id(message, f"message-{self._count}")
            self._waiting.append(message)
            identifiers.append(message.metadata.message_id)
        return identifiers

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """The replies that there are; where there is none yet, one message is handled first."""
        wanted = set(message_ids)
        if not wanted & self._replies.keys() and self._waiting:
            message = self._waiting.popleft()
            self._replies[message.metadata.message_id] = self._handle(message)
        return [self._replies.pop(known) for known in sorted(wanted & self._replies.keys())]

    def send_and_receive(
        self,
        messages: Iterable[Message],
        *,
        timeout: float | None = None,  # noqa: ARG002 - nothing is waited for
    ) -> list[Message]:
        """Handle all messages."""
        waiting = set(self.push_messages(messages))
        replies: list[Message] = []
        while waiting:
            found = self.pull_messages(waiting)
            replies += found
            waiting -= {reply.metadata.reply_to_message_id for reply in found}
        return replies

    def _handle(self, message: Message) -> Message:
        about = message.metadata
        if about.dst_node_id not in self._contexts:
            return _error(message, f"there is no node {about.dst_node_id}")
        try:
            reply = self._client(message, self._contexts[about.dst_node_id])
        except Exception as error:  # noqa: BLE001 - as Flower: an error is a reply
            return _error(message, f"{type(error).__name__}: {error}")
        return reply if isinstance(reply, Message) else _error(message, "the app gave no message")


def _error(message: Message, reason: str) -> Message:
    about = message.metadata
    return error_message(
        reason,
        _RAISED,
        about.message_type,
        source=about.dst_node_id,
        target=SERVER_NODE,
        run_id=about.run_id,
        reply_to=about.message_id,
    )
