"""Identifiers: what names look like, and how fresh ones are made."""

from __future__ import annotations

import re
import secrets

IDENTIFIER = r"[a-zA-Z0-9][a-zA-Z0-9._-]{0,63}"
"""Names of federations, organizations, machines, models and rounds."""

IDENTIFIER_RULE = "up to 64 letters, digits, `.`, `_` and `-`, the first a letter or a digit"

_PORT = r"(6553[0-5]|655[0-2][0-9]|65[0-4][0-9]{2}|6[0-4][0-9]{3}|[1-5]?[0-9]{1,4})"
ADDRESS = rf"(\[[0-9a-fA-F:]+\]|[A-Za-z0-9._-]{{1,253}}):{_PORT}"
"""Where a server listens: a name or an IP address, `[::1]` for IPv6, and a port."""

TENSOR_NAME = r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,254}"
"""Names of tensors, in files and in documents."""


def is_identifier(text: str) -> bool:
    """Whether `text` may be a name."""
    return re.fullmatch(IDENTIFIER, text) is not None


def new_id(prefix: str) -> str:
    """A fresh identifier such as `round-3f2a…`: what it names, and 96 random bits."""
    return f"{prefix}-{secrets.token_hex(12)}"
