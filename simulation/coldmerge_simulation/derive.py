"""Everything random of a simulation, derived from its seed: so that nothing depends on the order
in which contributors are asked, or on the engine that asks them.
"""

from __future__ import annotations

import hashlib

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey


def raw(seed: int, *purpose: object) -> bytes:
    """32 bytes for a purpose such as ("nonce", contributor, round)."""
    text = "\x1f".join(["coldmerge", str(seed), *map(str, purpose)])
    return hashlib.sha256(text.encode()).digest()


def number(seed: int, *purpose: object, below: int = 2**31) -> int:
    """A whole number in [0, below)."""
    return int.from_bytes(raw(seed, *purpose), "big") % below


def token(seed: int, *purpose: object) -> str:
    """32 hexadecimal digits."""
    return raw(seed, *purpose)[:16].hex()


def identity(seed: int, contributor: str) -> Ed25519PrivateKey:
    """The key that signs for a simulated contributor. It protects nothing."""
    return Ed25519PrivateKey.from_private_bytes(raw(seed, "identity", contributor))
