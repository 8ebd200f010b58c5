"""Flower, as the rest of this package knows it: every name comes from here.

Two of them are not in Flower's public API (`make_message`, `TaskIdentity`). They, the settings
that keep Flower offline, and the range of versions that works stand here alone;
`tests/simulation/flower/test_compat.py` says what each name must do.

Raises:
    ConfigError: at import, `simulation.no_flower` or `simulation.flower_version`.
"""

from __future__ import annotations

import logging
import os
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version

from coldmerge.core.errors import ConfigError

LOWEST, BELOW = (1, 41), (1, 43)
RANGE = "flwr>=1.41,<1.43"
OFFLINE = {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1"}
"""What a process must have in its environment before it imports Flower, to call nobody."""


def check_version(found: str | None) -> None:
    """Check Flower's version; None: it is not installed.

    Raises:
        ConfigError: `simulation.no_flower`, `simulation.flower_version`.
    """
    hint = "pip install 'coldmerge[simulation]', or for a coordinator 'coldmerge[flower]'"
    if found is None:
        raise ConfigError(
            "simulation.no_flower",
            "Flower is not installed.",
            expected=RANGE,
            got="no package flwr",
            hint=hint,
        )
    numbers = re.match(r"(\d+)\.(\d+)", found)
    if numbers is None or not LOWEST <= (int(numbers[1]), int(numbers[2])) < BELOW:
        raise ConfigError(
            "simulation.flower_version",
            f"Flower {found} is not a version that coldmerge works with.",
            expected=RANGE,
            got=f"flwr {found}",
            hint=hint,
        )


def flower_version() -> str | None:
    """The version of Flower that is installed; None: there is none."""
    try:
        return version("flwr")
    except PackageNotFoundError:
        return None


check_version(flower_version())
for _key, _value in OFFLINE.items():
    os.environ.setdefault(_key, _value)

try:
    from flwr.app import (
        Array,
        ArrayRecord,
        ConfigRecord,
        Context,
        Error,
        Message,
        MessageType,
        Metadata,
        MetricRecord,
        RecordDict,
    )
    from flwr.app.message.message import make_message
    from flwr.clientapp import ClientApp
    from flwr.proto.node_pb2 import NodeInfo
    from flwr.serverapp import Grid, ServerApp, strategy
    from flwr.serverapp.exception import AggregationError, InconsistentMessageReplies
    from flwr.serverapp.strategy import FedAvg, Result, Strategy
    from flwr.supercore.run import Run
    from flwr.supercore.task_identity import TaskIdentity
except ImportError as _error:
    raise ConfigError(
        "simulation.flower_names",
        f"Flower {flower_version()} lacks a name that coldmerge uses: {_error}.",
        expected=RANGE,
        got=str(_error),
        hint="Reinstall it: pip install --force-reinstall 'coldmerge[simulation]'",
    ) from _error

SERVER_NODE = 1
"""The node id that Flower gives to the side of the ServerApp."""

_identity = threading.Lock()


@contextmanager
def identity(run_id: int, node_id: int = SERVER_NODE, task_id: int = 0) -> Iterator[None]:
    """Who this process is while a ServerApp or ClientApp runs in it outside Flower's runtime.

    `Message(content, node, type)` reads it. It is one for the whole process.
    """
    with _identity:
        before = (TaskIdentity._run_id, TaskIdentity._node_id, TaskIdentity._task_id)
        TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = run_id, node_id, task_id
    try:
        yield
    finally:
        with _identity:
            TaskIdentity._run_id, TaskIdentity._node_id, TaskIdentity._task_id = before


def message(
    content: RecordDict,
    message_type: str,
    *,
    source: int = SERVER_NODE,
    target: int = SERVER_NODE,
    run_id: int = 0,
    message_id: str = "",
    reply_to: str = "",
    group: str = "",
    ttl: float = 43_200.0,
) -> Message:
    """A message with every word of its metadata given: needs no `identity`."""
    return make_message(_metadata(locals()), content=content)


def error_message(
    reason: str,
    code: int,
    message_type: str,
    *,
    source: int,
    target: int = SERVER_NODE,
    run_id: int = 0,
    message_id: str = "",
    reply_to: str = "",
    group: str = "",
    ttl: float = 43_200.0,
) -> Message:
    """A message that carries an error in place of content."""
    return make_message(_metadata(locals()), error=Error(code, reason))


def _metadata(given: dict[str, object]) -> Metadata:
    return Metadata(
        run_id=given["run_id"],
        message_id=given["message_id"],
        src_node_id=given["source"],
        dst_node_id=given["target"],
        reply_to_message_id=given["reply_to"],
        group_id=given["group"],
        created_at=time.time(),
        ttl=given["ttl"],
        message_type=given["message_type"],
    )


def set_message_id(target: Message, message_id: str) -> None:
    """Give a message the id that whoever carries it knows it by, as Flower's own grids do."""
    target.metadata.__dict__["_message_id"] = message_id


def context(
    run_id: int,
    node_id: int = SERVER_NODE,
    run_config: dict[str, bool | float | int | str] | None = None,
    node_config: dict[str, bool | float | int | str] | None = None,
    state: RecordDict | None = None,
) -> Context:
    """What a ServerApp or ClientApp is called with beside the grid or message."""
    return Context(
        run_id=run_id,
        node_id=node_id,
        node_config=node_config or {},
        state=RecordDict() if state is None else state,
        run_config=run_config or {},
    )


def quiet(level: int = logging.WARNING) -> None:
    """Let Flower's logger say no less than `level`, in this process from now on."""
    logging.getLogger("flwr").setLevel(level)


class _Muted(logging.Filter):
    """Drops what a thread logs while it is muted."""

    def __init__(self) -> None:
        super().__init__()
        self.inside = threading.local()

    def filter(self, record: logging.LogRecord) -> bool:
        del record
        return not getattr(self.inside, "muted", False)


_muted = _Muted()
logging.getLogger("flwr").addFilter(_muted)


@contextmanager
def muted() -> Iterator[None]:
    """Flower logs nothing from this thread: what went wrong is said by an error of ours."""
    before = getattr(_muted.inside, "muted", False)
    _muted.inside.muted = True
    try:
        yield
    finally:
        _muted.inside.muted = before


__all__ = [
    "BELOW",
    "LOWEST",
    "OFFLINE",
    "RANGE",
    "SERVER_NODE",
    "AggregationError",
    "Array",
    "ArrayRecord",
    "ClientApp",
    "ConfigRecord",
    "Context",
    "Error",
    "FedAvg",
    "Grid",
    "InconsistentMessageReplies",
    "Message",
    "MessageType",
    "Metadata",
    "MetricRecord",
    "NodeInfo",
    "RecordDict",
    "Result",
    "Run",
    "ServerApp",
    "Strategy",
    "TaskIdentity",
    "check_version",
    "context",
    "error_message",
    "flower_version",
    "identity",
    "make_message",
    "message",
    "muted",
    "quiet",
    "set_message_id",
    "strategy",
]
