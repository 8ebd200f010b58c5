import datetime

from google.protobuf import timestamp_pb2 as _timestamp_pb2
from coldmerge.wire.v1 import common_pb2 as _common_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class ListModelsRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Model(_message.Message):
    __slots__ = ("name", "private_patterns", "latest_number", "latest_digest")
    NAME_FIELD_NUMBER: _ClassVar[int]
    PRIVATE_PATTERNS_FIELD_NUMBER: _ClassVar[int]
    LATEST_NUMBER_FIELD_NUMBER: _ClassVar[int]
    LATEST_DIGEST_FIELD_NUMBER: _ClassVar[int]
    name: str
    private_patterns: _containers.RepeatedScalarFieldContainer[str]
    latest_number: int
    latest_digest: str
    def __init__(self, name: _Optional[str] = ..., private_patterns: _Optional[_Iterable[str]] = ..., latest_number: _Optional[int] = ..., latest_digest: _Optional[str] = ...) -> None: ...

class ListModelsResponse(_message.Message):
    __slots__ = ("models",)
    MODELS_FIELD_NUMBER: _ClassVar[int]
    models: _containers.RepeatedCompositeFieldContainer[Model]
    def __init__(self, models: _Optional[_Iterable[_Union[Model, _Mapping]]] = ...) -> None: ...

class GetReleaseRequest(_message.Message):
    __slots__ = ("model", "number", "content_digest", "latest")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    CONTENT_DIGEST_FIELD_NUMBER: _ClassVar[int]
    LATEST_FIELD_NUMBER: _ClassVar[int]
    model: str
    number: int
    content_digest: str
    latest: bool
    def __init__(self, model: _Optional[str] = ..., number: _Optional[int] = ..., content_digest: _Optional[str] = ..., latest: _Optional[bool] = ...) -> None: ...

class Release(_message.Message):
    __slots__ = ("model", "number", "content_digest", "record", "tensors", "files", "published_at", "private_patterns")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    CONTENT_DIGEST_FIELD_NUMBER: _ClassVar[int]
    RECORD_FIELD_NUMBER: _ClassVar[int]
    TENSORS_FIELD_NUMBER: _ClassVar[int]
    FILES_FIELD_NUMBER: _ClassVar[int]
    PUBLISHED_AT_FIELD_NUMBER: _ClassVar[int]
    PRIVATE_PATTERNS_FIELD_NUMBER: _ClassVar[int]
    model: str
    number: int
    content_digest: str
    record: _common_pb2.SignedDocument
    tensors: _containers.RepeatedCompositeFieldContainer[_common_pb2.Tensor]
    files: _containers.RepeatedCompositeFieldContainer[_common_pb2.File]
    published_at: _timestamp_pb2.Timestamp
    private_patterns: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, model: _Optional[str] = ..., number: _Optional[int] = ..., content_digest: _Optional[str] = ..., record: _Optional[_Union[_common_pb2.SignedDocument, _Mapping]] = ..., tensors: _Optional[_Iterable[_Union[_common_pb2.Tensor, _Mapping]]] = ..., files: _Optional[_Iterable[_Union[_common_pb2.File, _Mapping]]] = ..., published_at: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., private_patterns: _Optional[_Iterable[str]] = ...) -> None: ...

class ListReleasesRequest(_message.Message):
    __slots__ = ("model",)
    MODEL_FIELD_NUMBER: _ClassVar[int]
    model: str
    def __init__(self, model: _Optional[str] = ...) -> None: ...

class ListReleasesResponse(_message.Message):
    __slots__ = ("releases",)
    RELEASES_FIELD_NUMBER: _ClassVar[int]
    releases: _containers.RepeatedCompositeFieldContainer[Release]
    def __init__(self, releases: _Optional[_Iterable[_Union[Release, _Mapping]]] = ...) -> None: ...

class WatchReleasesRequest(_message.Message):
    __slots__ = ("model", "after_number")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    AFTER_NUMBER_FIELD_NUMBER: _ClassVar[int]
    model: str
    after_number: int
    def __init__(self, model: _Optional[str] = ..., after_number: _Optional[int] = ...) -> None: ...

class ListKeysRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListKeysResponse(_message.Message):
    __slots__ = ("keys",)
    KEYS_FIELD_NUMBER: _ClassVar[int]
    keys: _containers.RepeatedCompositeFieldContainer[_common_pb2.SignedDocument]
    def __init__(self, keys: _Optional[_Iterable[_Union[_common_pb2.SignedDocument, _Mapping]]] = ...) -> None: ...

class ReadBlobRequest(_message.Message):
    __slots__ = ("sha256", "offset")
    SHA256_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    sha256: str
    offset: int
    def __init__(self, sha256: _Optional[str] = ..., offset: _Optional[int] = ...) -> None: ...
