"""Identifiers: a prefix that says what it names, and 96 random bits."""

from __future__ import annotations

import secrets


def new_id(prefix: str) -> str:
    """A fresh identifier such as `round-3f2a…` (24 hexadecimal digits)."""
    return f"{prefix}-{secrets.token_hex(12)}"
