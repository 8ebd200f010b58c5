"""Signed documents: what contributors and the coordinator put their names to.

A document is a frozen pydantic model rendered as canonical JSON (sorted keys, no
white space, ASCII, no NaN) and signed with Ed25519 (RFC 8032). Its digest is the
sha256 of those bytes. There is one rendering, so a document that was parsed and
rendered again must give the same bytes; anything else is refused.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, Self, TypeVar

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from pydantic import (
    AwareDatetime,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    FailFast,
    Field,
    ValidationError,
    model_validator,
)

from coldmerge.core.errors import ManifestError
from coldmerge.core.ids import IDENTIFIER, TENSOR_NAME
from coldmerge.core.validation import first_problem

MAX_DOCUMENT_BYTES = 8 * 2**20

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Identifier = Annotated[str, Field(pattern=rf"^{IDENTIFIER}$")]
MetricName = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]{0,31}$")]
TensorName = Annotated[str, Field(pattern=rf"^{TENSOR_NAME}$")]
MAX_ENTRIES = 100_000
MAX_RECIPE = 20_480
"""Parameters, and what was clipped of each of a round's contributions, at most 10,000."""


def _at_most(count: int) -> BeforeValidator:
    """A table with more entries is refused before one of them is looked at."""

    def check(value: object) -> object:
        if isinstance(value, dict) and len(value) > count:
            raise ValueError(f"there are {len(value)} entries, and {count} are the most")
        return value

    return BeforeValidator(check)


def _scalings(value: object) -> object:
    for name, scaling in value.items() if isinstance(value, dict) else ():
        if type(scaling) not in (int, float) or not re.fullmatch(TENSOR_NAME, str(name)):
            raise ValueError(f"{name!r:.80} has no scaling that is a number")
    return value


Extent = Annotated[int, Field(ge=0, le=2**40)]
Metrics = Annotated[dict[MetricName, float], _at_most(64), Field(max_length=64)]
Scalings = Annotated[dict[TensorName, float], BeforeValidator(_scalings)]
Digests = Annotated[tuple[Sha256, ...], FailFast()]
Encoding = Literal["fp32", "bf16"]
Kind = Literal["full", "lora"]
Statistic = Literal["fisher", "gram", "trim"]
"""What a contributor may ship about a tensor beside its delta: see `coldmerge.core.statistics`."""
LEAVE_ONE_OUT: Literal["leave_one_out"] = "leave_one_out"
"""Consent to candidates from which one's own task vector can be computed, to find a bad update."""
LEARN_COEFFICIENTS: Literal["learn_coefficients"] = "learn_coefficients"
"""The same consent, to learn what one's own task vector is to be multiplied by."""
Consent = Literal["leave_one_out", "learn_coefficients"]
Mean = Literal["base_loss", "candidate_loss", "base_entropy", "candidate_entropy"]
"""Means over an evaluator's validation examples: see `Evaluation.means`."""
LARGEST_MEAN = 1e4
"""In nats an example: far beyond what any model loses."""
LARGEST_SLOPE = 1e6
MOST_SLOPES = 2048
"""Of an evaluation: its 64 KiB hold as many numbers of 17 characters, and some names."""

Layer = Annotated[str, Field(pattern=rf"^({TENSOR_NAME})?$")]
Slopes = Annotated[
    tuple[Annotated[float, Field(ge=-LARGEST_SLOPE, le=LARGEST_SLOPE)], ...], FailFast()
]


class Document(BaseModel):
    """Base of all signed documents. Subclasses set `type`, which the signature covers.

    `later` names the fields that a schema got after documents of it had been signed: while
    they are empty they are left out, so that those documents keep their bytes.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    schema_name: ClassVar[str]
    max_bytes: ClassVar[int] = MAX_DOCUMENT_BYTES
    later: ClassVar[frozenset[str]] = frozenset()

    @model_validator(mode="before")
    @classmethod
    def _knows_its_keys(cls, values: Any) -> Any:
        """One sentence for the first unknown key: pydantic would make one for each."""
        if isinstance(values, dict) and not values.keys() <= cls.model_fields.keys():
            unknown = min(set(values) - set(cls.model_fields), key=str)
            raise ValueError(f"there is no field {unknown!r:.80}")
        return values

    def canonical(self) -> bytes:
        """The one byte rendering that is hashed and signed."""
        body = {"type": self.schema_name, **self.model_dump(mode="json")}
        for key in self.later:
            if not body[key]:
                del body[key]
        return json.dumps(
            body, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False
        ).encode("ascii")

    def digest(self) -> str:
        """sha256 of the canonical rendering, as 64 hexadecimal digits."""
        return hashlib.sha256(self.canonical()).hexdigest()

    @classmethod
    def parse(cls, raw: bytes) -> Self:
        """Read canonical bytes.

        Raises:
            ManifestError: too large, not this type, breaks the schema, or not canonical.
        """
        if len(raw) > cls.max_bytes:
            raise ManifestError(
                "document.too_large",
                f"A {cls.schema_name} document is too large.",
                expected=f"at most {cls.max_bytes} bytes",
                got=f"{len(raw)} bytes",
                hint="Check that the file is a coldmerge document.",
            )
        try:
            _check_amount(raw)
            body = json.loads(raw)
            found = body.pop("type", None) if isinstance(body, dict) else None
            if found != cls.schema_name:
                raise ManifestError(
                    "document.wrong_type",
                    "A signed document is of another type.",
                    expected=cls.schema_name,
                    got=found,
                    hint="Send the document that this call asks for.",
                )
            document = cls.model_validate(body)
        except (ValueError, RecursionError) as error:
            raise ManifestError(
                "document.malformed",
                f"A {cls.schema_name} document cannot be read: {_first_problem(error)}",
                hint="Client and coordinator may differ in version; compare `coldmerge --version`.",
            ) from error
        if document.canonical() != raw:
            raise ManifestError(
                "document.not_canonical",
                f"A {cls.schema_name} document is not in canonical form.",
                expected="sorted keys, no white space, no duplicates",
                got="another rendering of the same content",
                hint="Render it with coldmerge.core.documents.",
            )
        return document


def _check_amount(raw: bytes) -> None:
    """Count before parsing: a document of brackets would become 20 times its size.

    Raises:
        ValueError: it has more tables or lists than a document of the most tensors.
    """
    for mark in (b"{", b"["):
        if raw.count(mark) > MAX_ENTRIES + 64:
            raise ValueError(f"it has {raw.count(mark)} times {mark.decode()!r}")


def _first_problem(error: Exception) -> str:
    if isinstance(error, ValidationError):
        problem = first_problem(error)
        return f"{problem.key}: {problem.text}"
    return str(error)


class TensorEntry(Document):
    """One tensor: canonical name, safetensors dtype, shape, sha256 of its little-endian bytes."""

    schema_name = "coldmerge.tensor/1"

    name: TensorName
    dtype: str = Field(pattern=r"^[A-Z0-9_]{1,12}$")
    shape: Annotated[tuple[Extent, ...], FailFast()] = Field(max_length=16)
    sha256: Sha256
    nbytes: int = Field(ge=0, le=2**48)


class FileEntry(Document):
    """One non-weight file of a release (config, tokenizer): relative POSIX path and content."""

    schema_name = "coldmerge.file/1"

    path: str = Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]*(/[A-Za-z0-9_][A-Za-z0-9_.-]*){0,3}$")
    size: int = Field(ge=0, le=2**30)
    sha256: Sha256


class Manifest(Document):
    """What a contributor signs: one task vector against one exact release.

    `tensors` are in the order of the payload stream (sorted by name). For `lora` each
    target has two entries, `<name>.lora_A` and `<name>.lora_B`, and a `scaling` that
    already folds alpha, rank and rsLoRA in: delta = scaling * B @ A. `statistics` says of
    what the statistics among the tensors (`<name>.fisher`, `.gram`, `.trim`) were made:
    examples, tokens, density. `metrics` and `training` hold numbers only: there is no field
    that could carry an example. `consents`: what the contributor agrees to in this round.
    """

    schema_name = "coldmerge.manifest/1"
    later = frozenset({"consents", "statistics"})

    federation: Identifier
    model: Identifier
    round: Identifier
    contributor: Identifier
    base_digest: Sha256
    base_number: int = Field(ge=0)
    nonce: str = Field(pattern=r"^[0-9a-f]{32}$")
    created_at: AwareDatetime
    kind: Kind
    encoding: Encoding
    tensors: Annotated[tuple[TensorEntry, ...], FailFast()] = Field(
        min_length=1, max_length=MAX_ENTRIES
    )
    scaling: Scalings = Field(default_factory=dict)
    statistics: Annotated[dict[Statistic, Annotated[float, Field(gt=0)]], _at_most(8)] = Field(
        default_factory=dict
    )
    examples: int = Field(ge=1, le=10**12)
    norm: float = Field(ge=0)
    metrics: Metrics = Field(default_factory=dict)
    training: Metrics = Field(default_factory=dict)
    consents: tuple[Consent, ...] = Field(default=(), max_length=2)

    @property
    def payload_bytes(self) -> int:
        """Length of the payload stream: the tensors' bytes, end to end, in `tensors` order."""
        return sum(entry.nbytes for entry in self.tensors)

    def content_key(self) -> str:
        """What orders the inputs of a merge: sha256 of who contributed what, and of nothing else.

        Federation, round, nonce and time are not in it: the same contributions are merged in
        the same order, and so to the same bytes, wherever and whenever they are sent.
        """
        parts = {"contributor", "base_digest", "kind", "encoding", "scaling", "examples"}
        body = self.model_dump(mode="json", include=parts)
        body["tensors"] = [[e.name, e.dtype, list(e.shape), e.sha256] for e in self.tensors]
        body["statistics"] = dict(self.statistics)
        raw = json.dumps(body, sort_keys=True, separators=(",", ":"), allow_nan=False)
        return hashlib.sha256(raw.encode("ascii")).hexdigest()


class Receipt(Document):
    """The coordinator's signed word that a contribution is durable and counted."""

    schema_name = "coldmerge.receipt/1"
    max_bytes = 2**16

    federation: Identifier
    model: Identifier
    round: Identifier
    contributor: Identifier
    contribution: Identifier
    manifest_digest: Sha256
    payload_bytes: int
    accepted_at: AwareDatetime


class Scores(Document):
    """Scores in [0, 1] on one evaluator's validation data."""

    schema_name = "coldmerge.scores/1"

    accuracy: float = Field(ge=0, le=1)
    macro_f1: float = Field(ge=0, le=1)


class Evaluation(Document):
    """A contributor's paired comparison of a candidate with its base (McNemar's counts).

    `gained`: items only the candidate got right; `lost`: items only the base got right.
    `means`, where the round asks for them: the mean loss of the probe, or the mean entropy of
    its predictions, in nats an item. `slopes` are how that mean changes, to first order, from
    here along the round's directions, in their order: by layer, or under "" in all layers at once.
    """

    schema_name = "coldmerge.evaluation/1"
    max_bytes = 2**16
    later = frozenset({"means", "slopes"})

    federation: Identifier
    model: Identifier
    round: Identifier
    contributor: Identifier
    base_digest: Sha256
    candidate_digest: Sha256
    n: int = Field(ge=1, le=10**12)
    base: Scores
    candidate: Scores
    gained: int = Field(ge=0)
    lost: int = Field(ge=0)
    probe_seed: int = Field(ge=0)
    means: Annotated[
        dict[Mean, Annotated[float, Field(ge=0, le=LARGEST_MEAN)]],
        _at_most(4),
    ] = Field(default_factory=dict)
    slopes: Annotated[dict[Layer, Slopes], _at_most(MOST_SLOPES)] = Field(default_factory=dict)
    created_at: AwareDatetime


class ReleaseRecord(Document):
    """The coordinator's signed statement of what a release is and where it came from.

    `content_digest` names the bytes (see `coldmerge.core.digests`); `master_digest` the
    fp32 master behind them; `state_digest` what the outer optimizer remembers for the next
    round, if there is one. `previous_record` chains the records of one model.
    """

    schema_name = "coldmerge.release/1"
    later = frozenset({"state_digest"})

    federation: Identifier
    model: Identifier
    number: int = Field(ge=0)
    content_digest: Sha256
    master_digest: Sha256
    state_digest: Sha256 | None = None
    previous_record: Sha256 | None
    parents: Digests
    round: Identifier | None
    recipe: Annotated[dict[str, str | int | float | bool | None], _at_most(MAX_RECIPE)]
    contributions: Digests
    flags: Annotated[tuple[str, ...], FailFast()] = ()
    created_at: AwareDatetime


@dataclass(frozen=True)
class Signed:
    """Canonical document bytes and the Ed25519 signature over them."""

    document: bytes
    signature: bytes


D = TypeVar("D", bound=Document)


def sign(document: Document, key: Ed25519PrivateKey) -> Signed:
    """Sign the canonical bytes of `document`."""
    raw = document.canonical()
    return Signed(raw, key.sign(raw))


def verify(signed: Signed, kind: type[D], key: Ed25519PublicKey) -> D:
    """Check the signature, then parse.

    Raises:
        ManifestError: the signature is not by `key`, or the document is malformed.
    """
    try:
        key.verify(signed.signature, signed.document)
    except InvalidSignature as error:
        raise ManifestError(
            "document.bad_signature",
            f"The signature on a {kind.schema_name} document does not match its bytes and key.",
            hint="The document was changed on the way or signed with another identity key.",
        ) from error
    return kind.parse(signed.document)
