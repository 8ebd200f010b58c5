from coldmerge.wire.v1 import common_pb2 as _common_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class CheckpointRequest(_message.Message):
    __slots__ = ("from_size",)
    FROM_SIZE_FIELD_NUMBER: _ClassVar[int]
    from_size: int
    def __init__(self, from_size: _Optional[int] = ...) -> None: ...

class CheckpointResponse(_message.Message):
    __slots__ = ("checkpoint", "consistency")
    CHECKPOINT_FIELD_NUMBER: _ClassVar[int]
    CONSISTENCY_FIELD_NUMBER: _ClassVar[int]
    checkpoint: _common_pb2.SignedDocument
    consistency: _containers.RepeatedScalarFieldContainer[bytes]
    def __init__(self, checkpoint: _Optional[_Union[_common_pb2.SignedDocument, _Mapping]] = ..., consistency: _Optional[_Iterable[bytes]] = ...) -> None: ...

class ProveRequest(_message.Message):
    __slots__ = ("leaf_hash", "size")
    LEAF_HASH_FIELD_NUMBER: _ClassVar[int]
    SIZE_FIELD_NUMBER: _ClassVar[int]
    leaf_hash: bytes
    size: int
    def __init__(self, leaf_hash: _Optional[bytes] = ..., size: _Optional[int] = ...) -> None: ...

class ProveResponse(_message.Message):
    __slots__ = ("position", "inclusion")
    POSITION_FIELD_NUMBER: _ClassVar[int]
    INCLUSION_FIELD_NUMBER: _ClassVar[int]
    position: int
    inclusion: _containers.RepeatedScalarFieldContainer[bytes]
    def __init__(self, position: _Optional[int] = ..., inclusion: _Optional[_Iterable[bytes]] = ...) -> None: ...

class ReadAuditRequest(_message.Message):
    __slots__ = ("start", "limit")
    START_FIELD_NUMBER: _ClassVar[int]
    LIMIT_FIELD_NUMBER: _ClassVar[int]
    start: int
    limit: int
    def __init__(self, start: _Optional[int] = ..., limit: _Optional[int] = ...) -> None: ...

class AuditLeaf(_message.Message):
    __slots__ = ("position", "document")
    POSITION_FIELD_NUMBER: _ClassVar[int]
    DOCUMENT_FIELD_NUMBER: _ClassVar[int]
    position: int
    document: bytes
    def __init__(self, position: _Optional[int] = ..., document: _Optional[bytes] = ...) -> None: ...
