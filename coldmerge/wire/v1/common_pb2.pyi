import datetime

from google.protobuf import timestamp_pb2 as _timestamp_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class SignedDocument(_message.Message):
    __slots__ = ("document", "signature")
    DOCUMENT_FIELD_NUMBER: _ClassVar[int]
    SIGNATURE_FIELD_NUMBER: _ClassVar[int]
    document: bytes
    signature: bytes
    def __init__(self, document: _Optional[bytes] = ..., signature: _Optional[bytes] = ...) -> None: ...

class Chunk(_message.Message):
    __slots__ = ("offset", "data")
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    offset: int
    data: bytes
    def __init__(self, offset: _Optional[int] = ..., data: _Optional[bytes] = ...) -> None: ...

class Tensor(_message.Message):
    __slots__ = ("name", "dtype", "shape", "sha256", "nbytes")
    NAME_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    SHAPE_FIELD_NUMBER: _ClassVar[int]
    SHA256_FIELD_NUMBER: _ClassVar[int]
    NBYTES_FIELD_NUMBER: _ClassVar[int]
    name: str
    dtype: str
    shape: _containers.RepeatedScalarFieldContainer[int]
    sha256: str
    nbytes: int
    def __init__(self, name: _Optional[str] = ..., dtype: _Optional[str] = ..., shape: _Optional[_Iterable[int]] = ..., sha256: _Optional[str] = ..., nbytes: _Optional[int] = ...) -> None: ...

class File(_message.Message):
    __slots__ = ("path", "size", "sha256")
    PATH_FIELD_NUMBER: _ClassVar[int]
    SIZE_FIELD_NUMBER: _ClassVar[int]
    SHA256_FIELD_NUMBER: _ClassVar[int]
    path: str
    size: int
    sha256: str
    def __init__(self, path: _Optional[str] = ..., size: _Optional[int] = ..., sha256: _Optional[str] = ...) -> None: ...

class ErrorDetail(_message.Message):
    __slots__ = ("kind", "code", "message", "hint", "expected", "got", "ids")
    class IdsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    KIND_FIELD_NUMBER: _ClassVar[int]
    CODE_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    HINT_FIELD_NUMBER: _ClassVar[int]
    EXPECTED_FIELD_NUMBER: _ClassVar[int]
    GOT_FIELD_NUMBER: _ClassVar[int]
    IDS_FIELD_NUMBER: _ClassVar[int]
    kind: str
    code: str
    message: str
    hint: str
    expected: str
    got: str
    ids: _containers.ScalarMap[str, str]
    def __init__(self, kind: _Optional[str] = ..., code: _Optional[str] = ..., message: _Optional[str] = ..., hint: _Optional[str] = ..., expected: _Optional[str] = ..., got: _Optional[str] = ..., ids: _Optional[_Mapping[str, str]] = ...) -> None: ...

class Round(_message.Message):
    __slots__ = ("id", "model", "state", "mode", "base_number", "base_digest", "opened_at", "closes_at", "min_contributions", "max_contributions", "contributions", "candidate_digest", "evaluation_closes_at", "min_evaluators", "evaluations", "release_number", "reason", "held", "policy_json", "probe_seed", "trial", "left_out", "trials", "remerge", "bases", "probe", "probes")
    class State(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        STATE_UNSPECIFIED: _ClassVar[Round.State]
        OPEN: _ClassVar[Round.State]
        SEALED: _ClassVar[Round.State]
        MERGING: _ClassVar[Round.State]
        CANDIDATE: _ClassVar[Round.State]
        PUBLISHED: _ClassVar[Round.State]
        REJECTED: _ClassVar[Round.State]
        ABANDONED: _ClassVar[Round.State]
    STATE_UNSPECIFIED: Round.State
    OPEN: Round.State
    SEALED: Round.State
    MERGING: Round.State
    CANDIDATE: Round.State
    PUBLISHED: Round.State
    REJECTED: Round.State
    ABANDONED: Round.State
    class Mode(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        MODE_UNSPECIFIED: _ClassVar[Round.Mode]
        SCREENED: _ClassVar[Round.Mode]
    MODE_UNSPECIFIED: Round.Mode
    SCREENED: Round.Mode
    ID_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    MODE_FIELD_NUMBER: _ClassVar[int]
    BASE_NUMBER_FIELD_NUMBER: _ClassVar[int]
    BASE_DIGEST_FIELD_NUMBER: _ClassVar[int]
    OPENED_AT_FIELD_NUMBER: _ClassVar[int]
    CLOSES_AT_FIELD_NUMBER: _ClassVar[int]
    MIN_CONTRIBUTIONS_FIELD_NUMBER: _ClassVar[int]
    MAX_CONTRIBUTIONS_FIELD_NUMBER: _ClassVar[int]
    CONTRIBUTIONS_FIELD_NUMBER: _ClassVar[int]
    CANDIDATE_DIGEST_FIELD_NUMBER: _ClassVar[int]
    EVALUATION_CLOSES_AT_FIELD_NUMBER: _ClassVar[int]
    MIN_EVALUATORS_FIELD_NUMBER: _ClassVar[int]
    EVALUATIONS_FIELD_NUMBER: _ClassVar[int]
    RELEASE_NUMBER_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    HELD_FIELD_NUMBER: _ClassVar[int]
    POLICY_JSON_FIELD_NUMBER: _ClassVar[int]
    PROBE_SEED_FIELD_NUMBER: _ClassVar[int]
    TRIAL_FIELD_NUMBER: _ClassVar[int]
    LEFT_OUT_FIELD_NUMBER: _ClassVar[int]
    TRIALS_FIELD_NUMBER: _ClassVar[int]
    REMERGE_FIELD_NUMBER: _ClassVar[int]
    BASES_FIELD_NUMBER: _ClassVar[int]
    PROBE_FIELD_NUMBER: _ClassVar[int]
    PROBES_FIELD_NUMBER: _ClassVar[int]
    id: str
    model: str
    state: Round.State
    mode: Round.Mode
    base_number: int
    base_digest: str
    opened_at: _timestamp_pb2.Timestamp
    closes_at: _timestamp_pb2.Timestamp
    min_contributions: int
    max_contributions: int
    contributions: int
    candidate_digest: str
    evaluation_closes_at: _timestamp_pb2.Timestamp
    min_evaluators: int
    evaluations: int
    release_number: int
    reason: str
    held: bool
    policy_json: str
    probe_seed: int
    trial: int
    left_out: int
    trials: _containers.RepeatedCompositeFieldContainer[Trial]
    remerge: bool
    bases: _containers.RepeatedCompositeFieldContainer[AdmittedBase]
    probe: Probe
    probes: _containers.RepeatedCompositeFieldContainer[MeasuredProbe]
    def __init__(self, id: _Optional[str] = ..., model: _Optional[str] = ..., state: _Optional[_Union[Round.State, str]] = ..., mode: _Optional[_Union[Round.Mode, str]] = ..., base_number: _Optional[int] = ..., base_digest: _Optional[str] = ..., opened_at: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., closes_at: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., min_contributions: _Optional[int] = ..., max_contributions: _Optional[int] = ..., contributions: _Optional[int] = ..., candidate_digest: _Optional[str] = ..., evaluation_closes_at: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., min_evaluators: _Optional[int] = ..., evaluations: _Optional[int] = ..., release_number: _Optional[int] = ..., reason: _Optional[str] = ..., held: _Optional[bool] = ..., policy_json: _Optional[str] = ..., probe_seed: _Optional[int] = ..., trial: _Optional[int] = ..., left_out: _Optional[int] = ..., trials: _Optional[_Iterable[_Union[Trial, _Mapping]]] = ..., remerge: _Optional[bool] = ..., bases: _Optional[_Iterable[_Union[AdmittedBase, _Mapping]]] = ..., probe: _Optional[_Union[Probe, _Mapping]] = ..., probes: _Optional[_Iterable[_Union[MeasuredProbe, _Mapping]]] = ...) -> None: ...

class Probe(_message.Message):
    __slots__ = ("number", "most", "objective", "directions", "slopes")
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    MOST_FIELD_NUMBER: _ClassVar[int]
    OBJECTIVE_FIELD_NUMBER: _ClassVar[int]
    DIRECTIONS_FIELD_NUMBER: _ClassVar[int]
    SLOPES_FIELD_NUMBER: _ClassVar[int]
    number: int
    most: int
    objective: str
    directions: _containers.RepeatedScalarFieldContainer[str]
    slopes: str
    def __init__(self, number: _Optional[int] = ..., most: _Optional[int] = ..., objective: _Optional[str] = ..., directions: _Optional[_Iterable[str]] = ..., slopes: _Optional[str] = ...) -> None: ...

class MeasuredProbe(_message.Message):
    __slots__ = ("number", "evaluators", "value", "point")
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    EVALUATORS_FIELD_NUMBER: _ClassVar[int]
    VALUE_FIELD_NUMBER: _ClassVar[int]
    POINT_FIELD_NUMBER: _ClassVar[int]
    number: int
    evaluators: int
    value: float
    point: _containers.RepeatedScalarFieldContainer[float]
    def __init__(self, number: _Optional[int] = ..., evaluators: _Optional[int] = ..., value: _Optional[float] = ..., point: _Optional[_Iterable[float]] = ...) -> None: ...

class AdmittedBase(_message.Message):
    __slots__ = ("number", "digest", "staleness", "discount")
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    STALENESS_FIELD_NUMBER: _ClassVar[int]
    DISCOUNT_FIELD_NUMBER: _ClassVar[int]
    number: int
    digest: str
    staleness: int
    discount: float
    def __init__(self, number: _Optional[int] = ..., digest: _Optional[str] = ..., staleness: _Optional[int] = ..., discount: _Optional[float] = ...) -> None: ...

class Trial(_message.Message):
    __slots__ = ("number", "left_out", "passed", "reason")
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    LEFT_OUT_FIELD_NUMBER: _ClassVar[int]
    PASSED_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    number: int
    left_out: int
    passed: bool
    reason: str
    def __init__(self, number: _Optional[int] = ..., left_out: _Optional[int] = ..., passed: _Optional[bool] = ..., reason: _Optional[str] = ...) -> None: ...
