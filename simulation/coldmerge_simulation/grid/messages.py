"""Flower's messages as a `ContributionGrid` reads and writes them."""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from coldmerge.core.documents import Evaluation
from coldmerge.core.errors import ConfigError, DataError
from coldmerge_simulation.flower import compat
from coldmerge_simulation.grid.rounds import Arrays

TRAIN: str = compat.MessageType.TRAIN
EVALUATE: str = compat.MessageType.EVALUATE


def kind_of(sent: Sequence[compat.Message]) -> str:
    """`train` or `evaluate`, which all of the messages are.

    Raises:
        ConfigError: they are something else, or not all the same.
    """
    kinds = {message.metadata.message_type.partition(".")[0] for message in sent}
    if len(kinds) != 1 or not kinds <= {TRAIN, EVALUATE}:
        raise ConfigError(
            "grid.message_type",
            "Contributors train and evaluate; other messages cannot be sent to them.",
            expected=f"messages of one kind, {TRAIN} or {EVALUATE}",
            got=", ".join(sorted(kinds)),
            hint="Ask contributors for numbers in the metrics that their trainer gives.",
        )
    return str(kinds.pop())


def common_arrays(sent: Sequence[compat.Message]) -> Arrays:
    """The one record of arrays that all messages hold; none at all is fine to evaluate.

    Raises:
        DataError: they hold different ones, several, or not floats.
    """
    records = [list(message.content.array_records.values()) for message in sent]
    first = records[0]
    same = all(
        len(one) == len(first) and all(a is b or a == b for a, b in zip(one, first, strict=True))
        for one in records
    )
    least = 1 if kind_of(sent) == TRAIN else 0
    if not same or not least <= len(first) <= 1:
        raise DataError(
            "grid.not_one_model",
            "The messages do not hold one model for all.",
            expected="one ArrayRecord, the same in each message",
            got=f"{len(first)} in the first" if same else "different ones",
            hint="A round is on one release; use a strategy that sends all the same arrays.",
        )
    return to_arrays(first[0]) if first else {}


def to_arrays(record: compat.ArrayRecord) -> Arrays:
    """The arrays of a record, in float32.

    Raises:
        DataError: one does not hold floats.
    """
    found: Arrays = {}
    for name, array in record.items():
        values = array.numpy()
        if not np.issubdtype(values.dtype, np.floating):
            raise DataError(
                "grid.not_float",
                f"The strategy's array {name} does not hold floating point numbers.",
                expected="float32",
                got=values.dtype,
                hint="Start from grid.arrays(): integers are not merged.",
            )
        found[name] = values.astype(np.float32)
    return found


def to_record(arrays: Arrays) -> compat.ArrayRecord:
    """A record of these arrays."""
    return compat.ArrayRecord({name: compat.Array(array) for name, array in arrays.items()})


def key_of(message: compat.Message) -> str:
    """Under which key the message holds its arrays: the reply's go under the same."""
    return str(next(iter(message.content.array_records)))


def scores_of(evaluation: Evaluation) -> dict[str, float]:
    """What an evaluation says, by the names that Flower's strategies weight by."""
    return {
        "num-examples": evaluation.n,
        "accuracy": evaluation.candidate.accuracy,
        "macro_f1": evaluation.candidate.macro_f1,
        "base_accuracy": evaluation.base.accuracy,
        "base_macro_f1": evaluation.base.macro_f1,
    }


def reply(
    message: compat.Message,
    metrics: Mapping[str, float],
    arrays: Mapping[str, compat.ArrayRecord],
) -> compat.Message:
    """The answer of the node that `message` went to."""
    content = compat.RecordDict({**arrays, "metrics": compat.MetricRecord(dict(metrics))})
    return compat.message(content, message.metadata.message_type, **_back(message))


def refusal(message: compat.Message, why: str) -> compat.Message:
    """That there is no answer, and why."""
    return compat.error_message(why, 0, message.metadata.message_type, **_back(message))


def refusals(asked: Mapping[str, compat.Message], why: str) -> list[compat.Message]:
    """That none of these is answered."""
    return [refusal(message, why) for message in asked.values()]


def _back(message: compat.Message) -> dict[str, Any]:
    said = message.metadata
    return {
        "source": said.dst_node_id,
        "target": said.src_node_id,
        "run_id": said.run_id,
        "message_id": uuid.uuid4().hex,
        "reply_to": said.message_id,
        "group": said.group_id,
    }
