"""Every error coldmerge raises on purpose, in one tree.

    ColdmergeError
    ├── ConfigError              a setting, option or YAML file is wrong
    ├── CheckpointError          a model folder cannot be read or does not fit
    ├── TaskVectorError          a task vector does not fit its release
    ├── ManifestError            a signed document is malformed, forged or replayed
    ├── DataError                private training or evaluation data cannot be used
    ├── UnauthenticatedError     who you are could not be established
    ├── PermissionDeniedError    who you are may not do this
    ├── NotFoundError            the named thing does not exist
    ├── ConflictError            the thing exists but is in another state
    ├── ResourceError            disk, quota or size limit reached
    ├── UnavailableError         the coordinator cannot be reached, or went away
    └── IntegrityError           bytes or signatures differ from what was promised

An error carries a `code` (stable, documented in docs/errors.md), one sentence,
what was expected and what came, the ids of the things involved, and a hint that
says what to do next. The class decides the gRPC status and the exit status.
"""

from __future__ import annotations

from functools import partial
from typing import ClassVar


class ColdmergeError(Exception):
    """Base of the tree: never raised itself.

    `code` is `<area>.<what>`; `hint` names the next thing to type or check.
    """

    exit_status: ClassVar[int] = 1
    grpc_status: ClassVar[str] = "INTERNAL"

    def __init__(
        self,
        code: str,
        message: str,
        *,
        hint: str,
        expected: object = None,
        got: object = None,
        **ids: object,
    ) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.hint = hint
        self.expected = None if expected is None else str(expected)
        self.got = None if got is None else str(got)
        self.ids = {key: str(value) for key, value in ids.items() if value is not None}

    def __reduce__(self) -> tuple[object, ...]:
        make = partial(type(self), hint=self.hint, expected=self.expected, got=self.got)
        return partial(make, **self.ids), (self.code, self.message)

    def __str__(self) -> str:
        lines = [f"{self.message} [{self.code}]"]
        lines += [f"  {key}: {value}" for key, value in self.ids.items()]
        if self.expected is not None:
            lines.append(f"  expected: {self.expected}")
        if self.got is not None:
            lines.append(f"  got: {self.got}")
        lines.append(f"  hint: {self.hint}")
        return "\n".join(lines)

    def as_dict(self) -> dict[str, object]:
        """The error as JSON-ready values, for `--format json` and the wire."""
        return {
            "kind": type(self).__name__,
            "code": self.code,
            "message": self.message,
            "expected": self.expected,
            "got": self.got,
            "ids": self.ids,
            "hint": self.hint,
        }


class ConfigError(ColdmergeError):
    """A setting, option or YAML file is wrong."""

    exit_status = 2
    grpc_status = "INVALID_ARGUMENT"


class CheckpointError(ColdmergeError):
    """A model folder cannot be read, or does not fit the release."""

    exit_status = 3
    grpc_status = "INVALID_ARGUMENT"


class TaskVectorError(ColdmergeError):
    """A task vector does not fit the release it claims to start from."""

    exit_status = 3
    grpc_status = "INVALID_ARGUMENT"


class ManifestError(ColdmergeError):
    """A signed document is malformed, forged or replayed."""

    exit_status = 3
    grpc_status = "INVALID_ARGUMENT"


class DataError(ColdmergeError):
    """Private training or evaluation data cannot be used."""

    exit_status = 4
    grpc_status = "INVALID_ARGUMENT"


class UnauthenticatedError(ColdmergeError):
    """Who is calling could not be established."""

    exit_status = 5
    grpc_status = "UNAUTHENTICATED"


class PermissionDeniedError(ColdmergeError):
    """Who is calling is known and may not do this."""

    exit_status = 5
    grpc_status = "PERMISSION_DENIED"


class NotFoundError(ColdmergeError):
    """The named thing does not exist."""

    exit_status = 6
    grpc_status = "NOT_FOUND"


class ConflictError(ColdmergeError):
    """The thing exists, but is in another state than the call needs."""

    exit_status = 7
    grpc_status = "FAILED_PRECONDITION"


class ResourceError(ColdmergeError):
    """Disk, quota or a size limit is reached."""

    exit_status = 8
    grpc_status = "RESOURCE_EXHAUSTED"


class UnavailableError(ColdmergeError):
    """The coordinator cannot be reached, or went away."""

    exit_status = 9
    grpc_status = "UNAVAILABLE"


class IntegrityError(ColdmergeError):
    """Bytes or signatures differ from what was promised."""

    exit_status = 10
    grpc_status = "DATA_LOSS"


KINDS: dict[str, type[ColdmergeError]] = {
    cls.__name__: cls for cls in ColdmergeError.__subclasses__()
}
"""The classes by name: what an error that crossed the wire is rebuilt from."""
