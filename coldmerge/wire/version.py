"""The protocol version both sides negotiate, and the metadata that carries it."""

from __future__ import annotations

from coldmerge import __version__

PROTOCOL = 1
"""Version of the wire contract this code speaks. The coordinator states its minimum."""

PROTOCOL_KEY = "coldmerge-protocol"
CLIENT_KEY = "coldmerge-client"
ERROR_KEY = "coldmerge-error-bin"


def call_metadata() -> tuple[tuple[str, str], ...]:
    """The metadata that every call carries."""
    return ((PROTOCOL_KEY, str(PROTOCOL)), (CLIENT_KEY, __version__))
