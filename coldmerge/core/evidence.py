"""What the audit log is made of: its entries, and signed checkpoints of the whole of it.

A leaf of the log is the canonical bytes of a document. Most are entries written for the
log. A release record and a receipt are leaves themselves, byte for byte: whoever holds one
knows its leaf, and can ask for the proof that it is in the log.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import AwareDatetime, Field, model_validator

from coldmerge.core.documents import Document, Identifier, Sha256

KIND = r"[a-z][a-z_]{0,30}\.[a-z][a-z_]{0,30}"
MAX_TEXT = 300
"""Characters of a reason or a sentence in an entry. Nothing in an entry is longer."""

Key = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]{0,31}$")]
Text = Annotated[str, Field(max_length=MAX_TEXT)]
Detail = bool | int | float | Text | None


class AuditEntry(Document):
    """Something that was decided: `kind` is `<noun>.<event>`, `ids` say about what.

    `actor` is who: `<contributor>/<machine>`, `local admin`, or the `coordinator` itself.
    `detail` holds numbers, digests and bounded reasons: no field could carry an example.
    """

    schema_name = "coldmerge.audit/1"

    federation: Identifier
    position: int = Field(ge=0)
    at: AwareDatetime
    kind: str = Field(pattern=rf"^{KIND}$")
    actor: str = Field(min_length=1, max_length=129)
    ids: dict[Key, Annotated[str, Field(max_length=128)]] = Field(max_length=16)
    detail: dict[Key, Detail] = Field(max_length=32)


class Latest(Document):
    """A model's newest release when a checkpoint was made."""

    schema_name = "coldmerge.latest/1"

    number: int = Field(ge=0)
    record_digest: Sha256


class AuditCheckpoint(Document):
    """The coordinator's signed word of how long its log is, and of its root.

    `releases` are the newest of each model: a client refuses any other. `key` is the number
    of the signing key. After `expires_at` nobody has to believe it.
    """

    schema_name = "coldmerge.checkpoint/1"

    federation: Identifier
    size: int = Field(ge=0)
    root: Sha256
    releases: dict[Identifier, Latest]
    key: int = Field(ge=0)
    issued_at: AwareDatetime
    expires_at: AwareDatetime

    @model_validator(mode="after")
    def _in_order(self) -> AuditCheckpoint:
        if self.expires_at <= self.issued_at:
            raise ValueError("it expires before it was issued")
        return self
