"""The protocol version both sides negotiate, and the metadata that carries it."""

from __future__ import annotations

from functools import cache
from importlib.metadata import PackageNotFoundError, version

PROTOCOL = 1
"""Version of the wire contract this code speaks. The coordinator states its minimum."""

PROTOCOL_KEY = "coldmerge-protocol"
CLIENT_KEY = "coldmerge-client"
ERROR_KEY = "coldmerge-error-bin"


@cache
def client_version() -> str:
    """The installed version of coldmerge, or `unknown` outside an installation."""
    try:
        return version("coldmerge")
    except PackageNotFoundError:
        return "unknown"


def call_metadata() -> tuple[tuple[str, str], ...]:
    """The metadata that every call carries."""
    return ((PROTOCOL_KEY, str(PROTOCOL)), (CLIENT_KEY, client_version()))
