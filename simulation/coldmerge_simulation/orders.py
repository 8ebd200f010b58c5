"""What goes between the ServerApp and the ClientApp: an order, and an answer to it.

Both are plain values as JSON, and bytes beside them only where the two share no folder.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from coldmerge.core.documents import Signed
from coldmerge.core.errors import KINDS, ColdmergeError, DataError
from coldmerge_simulation.flower.compat import ConfigRecord, Message, RecordDict

WORDS, FILES = "coldmerge", "coldmerge.files"
TRAIN, EVALUATE, HELLO = "train", "evaluate", "query"
"""Flower's types of messages: train and sign, judge a candidate, say which part one plays."""

MAX_REASON = 500


@dataclass(frozen=True)
class Order:
    """What a contributor is asked to do. `values` are as `client_app` reads them."""

    kind: str
    contributor: str
    values: Mapping[str, Any]
    files: Mapping[str, bytes] = field(default_factory=dict)


@dataclass(frozen=True)
class Answer:
    """What came of an order: values, or why there are none."""

    values: Mapping[str, Any]
    files: Mapping[str, bytes] = field(default_factory=dict)
    error: ColdmergeError | None = None

    def signed(self) -> Signed:
        """The signed document of the answer.

        Raises:
            DataError: there is none.
        """
        try:
            said = self.values["signed"]
            return Signed(*(base64.b64decode(said[part], validate=True) for part in _PARTS))
        except (KeyError, TypeError, ValueError) as error:
            raise unreadable(f"no signed document: {type(error).__name__}") from error


_PARTS = ("document", "signature")
_WORDS = ("code", "message", "hint", "expected", "got")


def signed_values(signed: Signed) -> dict[str, str]:
    """A signed document as values of an answer."""
    return {part: base64.b64encode(getattr(signed, part)).decode() for part in _PARTS}


def pack(values: Mapping[str, Any], files: Mapping[str, bytes]) -> RecordDict:
    """The content of a message."""
    record = RecordDict({WORDS: ConfigRecord({"json": json.dumps(dict(values))})})
    if files:
        record[FILES] = ConfigRecord(dict(files))
    return record


def unpack(content: RecordDict) -> tuple[dict[str, Any], dict[str, bytes]]:
    """What `pack` packed.

    Raises:
        DataError: the content is of another kind.
    """
    try:
        values = json.loads(str(content[WORDS]["json"]))
        files = dict(content[FILES]) if FILES in content else {}
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise unreadable(f"{type(error).__name__}: {error}") from error
    if not isinstance(values, dict) or not all(isinstance(v, bytes) for v in files.values()):
        raise unreadable("values of other types")
    return values, files


def answer_of(reply: Message) -> Answer:
    """An answer, whatever a reply holds: an error where it cannot be used."""
    if reply.has_error():
        return Answer({}, error=failed(reply.error.reason or f"error {reply.error.code}"))
    if not reply.has_content():
        return Answer({}, error=unreadable("no content"))
    try:
        values, files = unpack(reply.content)
        if "error" in values:
            return Answer(values, error=_error(values["error"]))
        return Answer(values, files)
    except DataError as error:
        return Answer({}, error=error)


def error_values(error: Exception) -> dict[str, Any]:
    """An exception of a ClientApp as values of an answer."""
    known = error if isinstance(error, ColdmergeError) else failed(_sentence(error))
    return {"error": json.loads(json.dumps(known.as_dict(), default=str))}


def failed(why: str) -> DataError:
    """The error of a contributor whose work ended with an exception."""
    return DataError(
        "simulation.client_failed",
        "The contributor's work failed.",
        got=why[-MAX_REASON:],
        hint="Look at the trainer, and at the run's log.",
    )


def unreadable(why: str) -> DataError:
    """The error of a contributor that answered something else."""
    return DataError(
        "simulation.unreadable_answer",
        "The contributor's answer cannot be read.",
        expected="what coldmerge_simulation.contributors.client_app answers",
        got=why[:MAX_REASON],
        hint="Run the same version of coldmerge on every node.",
    )


def silent(seconds: float) -> DataError:
    """The error of a contributor that did not answer."""
    return DataError(
        "simulation.no_answer",
        "The contributor did not answer.",
        expected=f"an answer within {seconds:g} s",
        hint="Raise `patience`, or look whether its node still runs.",
    )


def _error(said: Any) -> ColdmergeError:
    kind = said.get("kind") if isinstance(said, dict) else None
    if not isinstance(kind, str) or kind not in KINDS:
        return unreadable("an error of no known kind")
    words = {key: str(said[key])[:MAX_REASON] for key in _WORDS if said.get(key) is not None}
    code, message = words.pop("code", "None"), words.pop("message", "None")
    return KINDS[kind](code, message, **{"hint": "Look at the run's log.", **words})


def _sentence(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
