import datetime

from google.protobuf import duration_pb2 as _duration_pb2
from google.protobuf import timestamp_pb2 as _timestamp_pb2
from coldmerge.wire.v1 import common_pb2 as _common_pb2
from coldmerge.wire.v1 import models_pb2 as _models_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class InviteRequest(_message.Message):
    __slots__ = ("contributor", "role", "ttl", "machine")
    CONTRIBUTOR_FIELD_NUMBER: _ClassVar[int]
    ROLE_FIELD_NUMBER: _ClassVar[int]
    TTL_FIELD_NUMBER: _ClassVar[int]
    MACHINE_FIELD_NUMBER: _ClassVar[int]
    contributor: str
    role: str
    ttl: _duration_pb2.Duration
    machine: str
    def __init__(self, contributor: _Optional[str] = ..., role: _Optional[str] = ..., ttl: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., machine: _Optional[str] = ...) -> None: ...

class InviteResponse(_message.Message):
    __slots__ = ("invitation", "fingerprint", "expires_at")
    INVITATION_FIELD_NUMBER: _ClassVar[int]
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    EXPIRES_AT_FIELD_NUMBER: _ClassVar[int]
    invitation: str
    fingerprint: str
    expires_at: _timestamp_pb2.Timestamp
    def __init__(self, invitation: _Optional[str] = ..., fingerprint: _Optional[str] = ..., expires_at: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ...) -> None: ...

class Machine(_message.Message):
    __slots__ = ("name", "enrolled_at", "last_seen_at", "client_version", "revoked", "revoked_reason")
    NAME_FIELD_NUMBER: _ClassVar[int]
    ENROLLED_AT_FIELD_NUMBER: _ClassVar[int]
    LAST_SEEN_AT_FIELD_NUMBER: _ClassVar[int]
    CLIENT_VERSION_FIELD_NUMBER: _ClassVar[int]
    REVOKED_FIELD_NUMBER: _ClassVar[int]
    REVOKED_REASON_FIELD_NUMBER: _ClassVar[int]
    name: str
    enrolled_at: _timestamp_pb2.Timestamp
    last_seen_at: _timestamp_pb2.Timestamp
    client_version: str
    revoked: bool
    revoked_reason: str
    def __init__(self, name: _Optional[str] = ..., enrolled_at: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., last_seen_at: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., client_version: _Optional[str] = ..., revoked: _Optional[bool] = ..., revoked_reason: _Optional[str] = ...) -> None: ...

class Contributor(_message.Message):
    __slots__ = ("name", "role", "revoked", "machines", "contributions", "revoked_reason")
    NAME_FIELD_NUMBER: _ClassVar[int]
    ROLE_FIELD_NUMBER: _ClassVar[int]
    REVOKED_FIELD_NUMBER: _ClassVar[int]
    MACHINES_FIELD_NUMBER: _ClassVar[int]
    CONTRIBUTIONS_FIELD_NUMBER: _ClassVar[int]
    REVOKED_REASON_FIELD_NUMBER: _ClassVar[int]
    name: str
    role: str
    revoked: bool
    machines: _containers.RepeatedCompositeFieldContainer[Machine]
    contributions: int
    revoked_reason: str
    def __init__(self, name: _Optional[str] = ..., role: _Optional[str] = ..., revoked: _Optional[bool] = ..., machines: _Optional[_Iterable[_Union[Machine, _Mapping]]] = ..., contributions: _Optional[int] = ..., revoked_reason: _Optional[str] = ...) -> None: ...

class ListContributorsRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListContributorsResponse(_message.Message):
    __slots__ = ("contributors",)
    CONTRIBUTORS_FIELD_NUMBER: _ClassVar[int]
    contributors: _containers.RepeatedCompositeFieldContainer[Contributor]
    def __init__(self, contributors: _Optional[_Iterable[_Union[Contributor, _Mapping]]] = ...) -> None: ...

class RevokeRequest(_message.Message):
    __slots__ = ("contributor", "machine", "reason")
    CONTRIBUTOR_FIELD_NUMBER: _ClassVar[int]
    MACHINE_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    contributor: str
    machine: str
    reason: str
    def __init__(self, contributor: _Optional[str] = ..., machine: _Optional[str] = ..., reason: _Optional[str] = ...) -> None: ...

class OpenRoundRequest(_message.Message):
    __slots__ = ("model", "policy_json")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    POLICY_JSON_FIELD_NUMBER: _ClassVar[int]
    model: str
    policy_json: str
    def __init__(self, model: _Optional[str] = ..., policy_json: _Optional[str] = ...) -> None: ...

class RoundAction(_message.Message):
    __slots__ = ("round", "reason")
    ROUND_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    round: str
    reason: str
    def __init__(self, round: _Optional[str] = ..., reason: _Optional[str] = ...) -> None: ...

class ExtendRoundRequest(_message.Message):
    __slots__ = ("round", "by")
    ROUND_FIELD_NUMBER: _ClassVar[int]
    BY_FIELD_NUMBER: _ClassVar[int]
    round: str
    by: _duration_pb2.Duration
    def __init__(self, round: _Optional[str] = ..., by: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ...) -> None: ...

class ResolveRoundRequest(_message.Message):
    __slots__ = ("round", "publish", "reason")
    ROUND_FIELD_NUMBER: _ClassVar[int]
    PUBLISH_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    round: str
    publish: bool
    reason: str
    def __init__(self, round: _Optional[str] = ..., publish: _Optional[bool] = ..., reason: _Optional[str] = ...) -> None: ...

class RollbackRequest(_message.Message):
    __slots__ = ("model", "number", "reason")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    model: str
    number: int
    reason: str
    def __init__(self, model: _Optional[str] = ..., number: _Optional[int] = ..., reason: _Optional[str] = ...) -> None: ...

class RemergeRequest(_message.Message):
    __slots__ = ("model", "without", "reason")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    WITHOUT_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    model: str
    without: _containers.RepeatedScalarFieldContainer[str]
    reason: str
    def __init__(self, model: _Optional[str] = ..., without: _Optional[_Iterable[str]] = ..., reason: _Optional[str] = ...) -> None: ...

class AdmittedContribution(_message.Message):
    __slots__ = ("id", "contributor", "manifest_digest", "payload_bytes", "examples", "norm", "accepted_at", "state", "reason", "base_number", "discount", "coefficients")
    class CoefficientsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    ID_FIELD_NUMBER: _ClassVar[int]
    CONTRIBUTOR_FIELD_NUMBER: _ClassVar[int]
    MANIFEST_DIGEST_FIELD_NUMBER: _ClassVar[int]
    PAYLOAD_BYTES_FIELD_NUMBER: _ClassVar[int]
    EXAMPLES_FIELD_NUMBER: _ClassVar[int]
    NORM_FIELD_NUMBER: _ClassVar[int]
    ACCEPTED_AT_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    BASE_NUMBER_FIELD_NUMBER: _ClassVar[int]
    DISCOUNT_FIELD_NUMBER: _ClassVar[int]
    COEFFICIENTS_FIELD_NUMBER: _ClassVar[int]
    id: str
    contributor: str
    manifest_digest: str
    payload_bytes: int
    examples: int
    norm: float
    accepted_at: _timestamp_pb2.Timestamp
    state: str
    reason: str
    base_number: int
    discount: float
    coefficients: _containers.ScalarMap[str, float]
    def __init__(self, id: _Optional[str] = ..., contributor: _Optional[str] = ..., manifest_digest: _Optional[str] = ..., payload_bytes: _Optional[int] = ..., examples: _Optional[int] = ..., norm: _Optional[float] = ..., accepted_at: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., state: _Optional[str] = ..., reason: _Optional[str] = ..., base_number: _Optional[int] = ..., discount: _Optional[float] = ..., coefficients: _Optional[_Mapping[str, float]] = ...) -> None: ...

class ListRoundContributionsResponse(_message.Message):
    __slots__ = ("contributions",)
    CONTRIBUTIONS_FIELD_NUMBER: _ClassVar[int]
    contributions: _containers.RepeatedCompositeFieldContainer[AdmittedContribution]
    def __init__(self, contributions: _Optional[_Iterable[_Union[AdmittedContribution, _Mapping]]] = ...) -> None: ...
