import datetime

from google.protobuf import timestamp_pb2 as _timestamp_pb2
from coldmerge.wire.v1 import common_pb2 as _common_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class BeginRequest(_message.Message):
    __slots__ = ("manifest",)
    MANIFEST_FIELD_NUMBER: _ClassVar[int]
    manifest: _common_pb2.SignedDocument
    def __init__(self, manifest: _Optional[_Union[_common_pb2.SignedDocument, _Mapping]] = ...) -> None: ...

class BeginResponse(_message.Message):
    __slots__ = ("upload_id", "committed_size", "total_size", "receipt")
    UPLOAD_ID_FIELD_NUMBER: _ClassVar[int]
    COMMITTED_SIZE_FIELD_NUMBER: _ClassVar[int]
    TOTAL_SIZE_FIELD_NUMBER: _ClassVar[int]
    RECEIPT_FIELD_NUMBER: _ClassVar[int]
    upload_id: str
    committed_size: int
    total_size: int
    receipt: _common_pb2.SignedDocument
    def __init__(self, upload_id: _Optional[str] = ..., committed_size: _Optional[int] = ..., total_size: _Optional[int] = ..., receipt: _Optional[_Union[_common_pb2.SignedDocument, _Mapping]] = ...) -> None: ...

class WriteRequest(_message.Message):
    __slots__ = ("upload_id", "chunk")
    UPLOAD_ID_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    upload_id: str
    chunk: _common_pb2.Chunk
    def __init__(self, upload_id: _Optional[str] = ..., chunk: _Optional[_Union[_common_pb2.Chunk, _Mapping]] = ...) -> None: ...

class WriteResponse(_message.Message):
    __slots__ = ("committed_size",)
    COMMITTED_SIZE_FIELD_NUMBER: _ClassVar[int]
    committed_size: int
    def __init__(self, committed_size: _Optional[int] = ...) -> None: ...

class QueryWriteStatusRequest(_message.Message):
    __slots__ = ("upload_id",)
    UPLOAD_ID_FIELD_NUMBER: _ClassVar[int]
    upload_id: str
    def __init__(self, upload_id: _Optional[str] = ...) -> None: ...

class WriteStatus(_message.Message):
    __slots__ = ("committed_size", "total_size")
    COMMITTED_SIZE_FIELD_NUMBER: _ClassVar[int]
    TOTAL_SIZE_FIELD_NUMBER: _ClassVar[int]
    committed_size: int
    total_size: int
    def __init__(self, committed_size: _Optional[int] = ..., total_size: _Optional[int] = ...) -> None: ...

class CommitRequest(_message.Message):
    __slots__ = ("upload_id",)
    UPLOAD_ID_FIELD_NUMBER: _ClassVar[int]
    upload_id: str
    def __init__(self, upload_id: _Optional[str] = ...) -> None: ...

class CommitResponse(_message.Message):
    __slots__ = ("receipt",)
    RECEIPT_FIELD_NUMBER: _ClassVar[int]
    receipt: _common_pb2.SignedDocument
    def __init__(self, receipt: _Optional[_Union[_common_pb2.SignedDocument, _Mapping]] = ...) -> None: ...

class Contribution(_message.Message):
    __slots__ = ("id", "model", "round", "contributor", "manifest_digest", "state", "payload_bytes", "examples", "accepted_at", "reason")
    class State(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        STATE_UNSPECIFIED: _ClassVar[Contribution.State]
        ADMITTED: _ClassVar[Contribution.State]
        REPLACED: _ClassVar[Contribution.State]
        WITHDRAWN: _ClassVar[Contribution.State]
        QUARANTINED: _ClassVar[Contribution.State]
        REFUSED: _ClassVar[Contribution.State]
    STATE_UNSPECIFIED: Contribution.State
    ADMITTED: Contribution.State
    REPLACED: Contribution.State
    WITHDRAWN: Contribution.State
    QUARANTINED: Contribution.State
    REFUSED: Contribution.State
    ID_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    ROUND_FIELD_NUMBER: _ClassVar[int]
    CONTRIBUTOR_FIELD_NUMBER: _ClassVar[int]
    MANIFEST_DIGEST_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    PAYLOAD_BYTES_FIELD_NUMBER: _ClassVar[int]
    EXAMPLES_FIELD_NUMBER: _ClassVar[int]
    ACCEPTED_AT_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    id: str
    model: str
    round: str
    contributor: str
    manifest_digest: str
    state: Contribution.State
    payload_bytes: int
    examples: int
    accepted_at: _timestamp_pb2.Timestamp
    reason: str
    def __init__(self, id: _Optional[str] = ..., model: _Optional[str] = ..., round: _Optional[str] = ..., contributor: _Optional[str] = ..., manifest_digest: _Optional[str] = ..., state: _Optional[_Union[Contribution.State, str]] = ..., payload_bytes: _Optional[int] = ..., examples: _Optional[int] = ..., accepted_at: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., reason: _Optional[str] = ...) -> None: ...

class GetContributionRequest(_message.Message):
    __slots__ = ("id",)
    ID_FIELD_NUMBER: _ClassVar[int]
    id: str
    def __init__(self, id: _Optional[str] = ...) -> None: ...

class ListContributionsRequest(_message.Message):
    __slots__ = ("model", "round")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    ROUND_FIELD_NUMBER: _ClassVar[int]
    model: str
    round: str
    def __init__(self, model: _Optional[str] = ..., round: _Optional[str] = ...) -> None: ...

class ListContributionsResponse(_message.Message):
    __slots__ = ("contributions",)
    CONTRIBUTIONS_FIELD_NUMBER: _ClassVar[int]
    contributions: _containers.RepeatedCompositeFieldContainer[Contribution]
    def __init__(self, contributions: _Optional[_Iterable[_Union[Contribution, _Mapping]]] = ...) -> None: ...

class WithdrawRequest(_message.Message):
    __slots__ = ("id",)
    ID_FIELD_NUMBER: _ClassVar[int]
    id: str
    def __init__(self, id: _Optional[str] = ...) -> None: ...
