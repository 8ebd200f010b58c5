import datetime

from google.protobuf import timestamp_pb2 as _timestamp_pb2
from coldmerge.wire.v1 import contributions_pb2 as _contributions_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class ListQuarantineRequest(_message.Message):
    __slots__ = ("model",)
    MODEL_FIELD_NUMBER: _ClassVar[int]
    model: str
    def __init__(self, model: _Optional[str] = ...) -> None: ...

class QuarantinedContribution(_message.Message):
    __slots__ = ("contribution", "reason", "norm", "reference_norm")
    CONTRIBUTION_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    NORM_FIELD_NUMBER: _ClassVar[int]
    REFERENCE_NORM_FIELD_NUMBER: _ClassVar[int]
    contribution: _contributions_pb2.Contribution
    reason: str
    norm: float
    reference_norm: float
    def __init__(self, contribution: _Optional[_Union[_contributions_pb2.Contribution, _Mapping]] = ..., reason: _Optional[str] = ..., norm: _Optional[float] = ..., reference_norm: _Optional[float] = ...) -> None: ...

class ListQuarantineResponse(_message.Message):
    __slots__ = ("contributions",)
    CONTRIBUTIONS_FIELD_NUMBER: _ClassVar[int]
    contributions: _containers.RepeatedCompositeFieldContainer[QuarantinedContribution]
    def __init__(self, contributions: _Optional[_Iterable[_Union[QuarantinedContribution, _Mapping]]] = ...) -> None: ...

class QuarantineDecision(_message.Message):
    __slots__ = ("contribution", "reason")
    CONTRIBUTION_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    contribution: str
    reason: str
    def __init__(self, contribution: _Optional[str] = ..., reason: _Optional[str] = ...) -> None: ...

class GetReportRequest(_message.Message):
    __slots__ = ("round",)
    ROUND_FIELD_NUMBER: _ClassVar[int]
    round: str
    def __init__(self, round: _Optional[str] = ...) -> None: ...

class Report(_message.Message):
    __slots__ = ("round", "report_json")
    ROUND_FIELD_NUMBER: _ClassVar[int]
    REPORT_JSON_FIELD_NUMBER: _ClassVar[int]
    round: str
    report_json: str
    def __init__(self, round: _Optional[str] = ..., report_json: _Optional[str] = ...) -> None: ...

class GetHistoryRequest(_message.Message):
    __slots__ = ("contributor", "limit")
    CONTRIBUTOR_FIELD_NUMBER: _ClassVar[int]
    LIMIT_FIELD_NUMBER: _ClassVar[int]
    contributor: str
    limit: int
    def __init__(self, contributor: _Optional[str] = ..., limit: _Optional[int] = ...) -> None: ...

class HistoryEntry(_message.Message):
    __slots__ = ("round", "model", "state", "reason", "accepted_at", "norm", "reference_norm", "clip_factor", "cosine_to_merged", "isolated", "release_number", "discount")
    ROUND_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    ACCEPTED_AT_FIELD_NUMBER: _ClassVar[int]
    NORM_FIELD_NUMBER: _ClassVar[int]
    REFERENCE_NORM_FIELD_NUMBER: _ClassVar[int]
    CLIP_FACTOR_FIELD_NUMBER: _ClassVar[int]
    COSINE_TO_MERGED_FIELD_NUMBER: _ClassVar[int]
    ISOLATED_FIELD_NUMBER: _ClassVar[int]
    RELEASE_NUMBER_FIELD_NUMBER: _ClassVar[int]
    DISCOUNT_FIELD_NUMBER: _ClassVar[int]
    round: str
    model: str
    state: str
    reason: str
    accepted_at: _timestamp_pb2.Timestamp
    norm: float
    reference_norm: float
    clip_factor: float
    cosine_to_merged: float
    isolated: bool
    release_number: int
    discount: float
    def __init__(self, round: _Optional[str] = ..., model: _Optional[str] = ..., state: _Optional[str] = ..., reason: _Optional[str] = ..., accepted_at: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., norm: _Optional[float] = ..., reference_norm: _Optional[float] = ..., clip_factor: _Optional[float] = ..., cosine_to_merged: _Optional[float] = ..., isolated: _Optional[bool] = ..., release_number: _Optional[int] = ..., discount: _Optional[float] = ...) -> None: ...

class History(_message.Message):
    __slots__ = ("contributor", "entries")
    CONTRIBUTOR_FIELD_NUMBER: _ClassVar[int]
    ENTRIES_FIELD_NUMBER: _ClassVar[int]
    contributor: str
    entries: _containers.RepeatedCompositeFieldContainer[HistoryEntry]
    def __init__(self, contributor: _Optional[str] = ..., entries: _Optional[_Iterable[_Union[HistoryEntry, _Mapping]]] = ...) -> None: ...
