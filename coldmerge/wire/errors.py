"""Our errors as gRPC statuses, and back."""

from __future__ import annotations

import grpc
from google.protobuf.message import DecodeError

from coldmerge.core.errors import (
    KINDS,
    ColdmergeError,
    ConflictError,
    IntegrityError,
    ManifestError,
    NotFoundError,
    PermissionDeniedError,
    ResourceError,
    UnauthenticatedError,
    UnavailableError,
)
from coldmerge.wire.v1 import common_pb2
from coldmerge.wire.version import ERROR_KEY

MAX_DETAIL_BYTES = 6 * 2**10  # trailing metadata must stay below gRPC's 8 KiB

Metadata = tuple[tuple[str, bytes], ...]


def to_status(error: ColdmergeError) -> tuple[grpc.StatusCode, str, Metadata]:
    """The status code, the details and the trailing metadata that carry `error`."""
    detail = common_pb2.ErrorDetail(
        kind=type(error).__name__,
        code=error.code,
        message=_clip(error.message, 1024),
        hint=_clip(error.hint, 1024),
        expected=_clip(error.expected or "", 512),
        got=_clip(error.got or "", 512),
        ids={key: _clip(value, 128) for key, value in list(error.ids.items())[:12]},
    )
    code = getattr(grpc.StatusCode, error.grpc_status)
    raw = detail.SerializeToString()
    metadata: Metadata = ((ERROR_KEY, raw),) if len(raw) <= MAX_DETAIL_BYTES else ()
    return code, _clip(f"{error.message} [{error.code}]", 1024), metadata


def _clip(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"


def from_rpc_error(error: grpc.RpcError) -> ColdmergeError:
    """The error behind a failed call: ours when it carries one, else by its status."""
    for key, value in error.trailing_metadata() or ():
        if key == ERROR_KEY:
            rebuilt = _rebuild(value)
            if rebuilt is not None:
                return rebuilt
    return _by_status(error.code(), error.details() or "no details")


def _rebuild(raw: bytes) -> ColdmergeError | None:
    try:
        detail = common_pb2.ErrorDetail.FromString(raw)
    except DecodeError:
        return None
    kind = KINDS.get(detail.kind)
    if kind is None:
        return None
    rebuilt = kind(
        detail.code,
        detail.message,
        hint=detail.hint,
        expected=detail.expected or None,
        got=detail.got or None,
    )
    rebuilt.ids = dict(sorted(detail.ids.items()))
    return rebuilt


_UNREACHABLE_HINT = (
    "Check the address, the network and that the coordinator runs. The coordinator also hangs "
    "up on a missing, expired or foreign certificate, which looks the same from here: "
    "`coldmerge doctor` tells them apart."
)


def _by_status(code: grpc.StatusCode, details: str) -> ColdmergeError:
    status = grpc.StatusCode
    if code in (status.UNAVAILABLE, status.CANCELLED):
        return UnavailableError(
            "wire.unreachable",
            "The coordinator cannot be reached, or hung up.",
            got=details,
            hint=_UNREACHABLE_HINT,
        )
    if code is status.DEADLINE_EXCEEDED:
        return UnavailableError(
            "wire.too_slow",
            "The coordinator did not answer in time.",
            got=details,
            hint="Try again; if it stays slow, look at the coordinator's load and the network.",
        )
    kinds: dict[grpc.StatusCode, type[ColdmergeError]] = {
        status.UNAUTHENTICATED: UnauthenticatedError,
        status.PERMISSION_DENIED: PermissionDeniedError,
        status.NOT_FOUND: NotFoundError,
        status.FAILED_PRECONDITION: ConflictError,
        status.ABORTED: ConflictError,
        status.RESOURCE_EXHAUSTED: ResourceError,
        status.INVALID_ARGUMENT: ManifestError,
        status.UNIMPLEMENTED: NotFoundError,
    }
    return kinds.get(code, IntegrityError)(
        "wire.failed",
        f"The coordinator answered {getattr(code, 'name', code)}.",
        got=details,
        hint="Compare `coldmerge --version` on both sides, then look at the coordinator's log.",
    )
