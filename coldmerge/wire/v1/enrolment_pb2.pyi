import datetime

from google.protobuf import timestamp_pb2 as _timestamp_pb2
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class EnrolRequest(_message.Message):
    __slots__ = ("token", "machine", "csr_der", "identity_public_key", "proof")
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    MACHINE_FIELD_NUMBER: _ClassVar[int]
    CSR_DER_FIELD_NUMBER: _ClassVar[int]
    IDENTITY_PUBLIC_KEY_FIELD_NUMBER: _ClassVar[int]
    PROOF_FIELD_NUMBER: _ClassVar[int]
    token: str
    machine: str
    csr_der: bytes
    identity_public_key: bytes
    proof: bytes
    def __init__(self, token: _Optional[str] = ..., machine: _Optional[str] = ..., csr_der: _Optional[bytes] = ..., identity_public_key: _Optional[bytes] = ..., proof: _Optional[bytes] = ...) -> None: ...

class EnrolResponse(_message.Message):
    __slots__ = ("federation", "contributor", "role", "certificate_chain_pem", "signing_public_key", "expires_at")
    FEDERATION_FIELD_NUMBER: _ClassVar[int]
    CONTRIBUTOR_FIELD_NUMBER: _ClassVar[int]
    ROLE_FIELD_NUMBER: _ClassVar[int]
    CERTIFICATE_CHAIN_PEM_FIELD_NUMBER: _ClassVar[int]
    SIGNING_PUBLIC_KEY_FIELD_NUMBER: _ClassVar[int]
    EXPIRES_AT_FIELD_NUMBER: _ClassVar[int]
    federation: str
    contributor: str
    role: str
    certificate_chain_pem: bytes
    signing_public_key: bytes
    expires_at: _timestamp_pb2.Timestamp
    def __init__(self, federation: _Optional[str] = ..., contributor: _Optional[str] = ..., role: _Optional[str] = ..., certificate_chain_pem: _Optional[bytes] = ..., signing_public_key: _Optional[bytes] = ..., expires_at: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ...) -> None: ...

class RenewRequest(_message.Message):
    __slots__ = ("contributor", "machine", "csr_der", "at", "proof", "new_identity_public_key", "new_proof")
    CONTRIBUTOR_FIELD_NUMBER: _ClassVar[int]
    MACHINE_FIELD_NUMBER: _ClassVar[int]
    CSR_DER_FIELD_NUMBER: _ClassVar[int]
    AT_FIELD_NUMBER: _ClassVar[int]
    PROOF_FIELD_NUMBER: _ClassVar[int]
    NEW_IDENTITY_PUBLIC_KEY_FIELD_NUMBER: _ClassVar[int]
    NEW_PROOF_FIELD_NUMBER: _ClassVar[int]
    contributor: str
    machine: str
    csr_der: bytes
    at: _timestamp_pb2.Timestamp
    proof: bytes
    new_identity_public_key: bytes
    new_proof: bytes
    def __init__(self, contributor: _Optional[str] = ..., machine: _Optional[str] = ..., csr_der: _Optional[bytes] = ..., at: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., proof: _Optional[bytes] = ..., new_identity_public_key: _Optional[bytes] = ..., new_proof: _Optional[bytes] = ...) -> None: ...

class RenewResponse(_message.Message):
    __slots__ = ("certificate_chain_pem", "expires_at")
    CERTIFICATE_CHAIN_PEM_FIELD_NUMBER: _ClassVar[int]
    EXPIRES_AT_FIELD_NUMBER: _ClassVar[int]
    certificate_chain_pem: bytes
    expires_at: _timestamp_pb2.Timestamp
    def __init__(self, certificate_chain_pem: _Optional[bytes] = ..., expires_at: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ...) -> None: ...
