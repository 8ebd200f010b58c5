"""Merkle trees as RFC 6962 defines them: roots, and short proofs about them.

A leaf is sha256(0x00 || bytes), a node sha256(0x01 || left || right). A tree of n leaves
splits at the largest power of two below n. Proofs are made from the hashes of complete
subtrees, which never change once their leaves are there; checking one needs two roots.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence

EMPTY_ROOT = hashlib.sha256(b"").digest()
Subtree = Callable[[int, int], bytes]
"""(level, index) → hash of the complete subtree of 2**level leaves from index * 2**level on."""


def leaf_hash(data: bytes) -> bytes:
    """The hash of a leaf."""
    return hashlib.sha256(b"\x00" + data).digest()


def node_hash(left: bytes, right: bytes) -> bytes:
    """The hash of an inner node."""
    return hashlib.sha256(b"\x01" + left + right).digest()


def merkle_root(leaves: Iterable[bytes]) -> str:
    """The root over `leaves` (their bytes), hexadecimal. That of nothing is sha256 of nothing."""
    tree = Frontier()
    for leaf in leaves:
        tree.append(leaf_hash(leaf))
    return tree.root().hex()


class Frontier:
    """A tree that grows at its right edge: what it remembers is logarithmic in its size."""

    def __init__(self, size: int = 0, complete: Sequence[bytes] = ()) -> None:
        """`complete`: the hashes of the complete subtrees of `size` leaves, largest first."""
        self.size = size
        self._complete = list(complete)

    @classmethod
    def of(cls, size: int, subtree: Subtree) -> Frontier:
        """The tree of the first `size` leaves."""
        return cls(size, [subtree(*place) for place in complete_subtrees(size)])

    def append(self, leaf: bytes) -> list[tuple[int, int, bytes]]:
        """Add a leaf's hash; (level, index, hash) of the subtrees that this completed."""
        node, level, index = leaf, 0, self.size
        made = [(0, index, leaf)]
        while index % 2:
            node = node_hash(self._complete.pop(), node)
            level, index = level + 1, index // 2
            made.append((level, index, node))
        self._complete.append(node)
        self.size += 1
        return made

    def root(self) -> bytes:
        """The root of the leaves so far."""
        if not self._complete:
            return EMPTY_ROOT
        *rest, root = self._complete
        for node in reversed(rest):
            root = node_hash(node, root)
        return root


def complete_subtrees(size: int) -> list[tuple[int, int]]:
    """(level, index) of the complete subtrees that make up `size` leaves, largest first."""
    found, start = [], 0
    for level in reversed(range(size.bit_length())):
        if size >> level & 1:
            found.append((level, start >> level))
            start += 1 << level
    return found


def _split(size: int) -> int:
    """The largest power of two below `size`, which is at least 2."""
    return 1 << (size - 1).bit_length() - 1


def _hash(start: int, stop: int, subtree: Subtree) -> bytes:
    """The hash over leaves `start` to `stop`, a range that the tree's own splits lead to."""
    size = stop - start
    if size & (size - 1) == 0:
        level = size.bit_length() - 1
        return subtree(level, start >> level)
    middle = start + _split(size)
    return node_hash(_hash(start, middle, subtree), _hash(middle, stop, subtree))


def inclusion_proof(position: int, size: int, subtree: Subtree) -> list[bytes]:
    """That the leaf at `position` is in the tree of `size` leaves: RFC 6962, 2.1.1.

    `position` must be below `size`.
    """
    start, stop, proof = 0, size, []
    while stop - start > 1:
        middle = start + _split(stop - start)
        if position < middle:
            proof.append(_hash(middle, stop, subtree))
            stop = middle
        else:
            proof.append(_hash(start, middle, subtree))
            start = middle
    return proof[::-1]


def consistency_proof(first: int, second: int, subtree: Subtree) -> list[bytes]:
    """That the tree of `second` leaves begins with that of `first`: RFC 6962, 2.1.2.

    Empty when `first` is 0 or `second`; it must not be above it.
    """
    if first in (0, second):
        return []
    start, stop, proof, whole = 0, second, list[bytes](), True
    while first != stop:
        middle = start + _split(stop - start)
        if first <= middle:
            proof.append(_hash(middle, stop, subtree))
            stop = middle
        else:
            proof.append(_hash(start, middle, subtree))
            start, whole = middle, False
    if not whole:
        proof.append(_hash(start, stop, subtree))
    return proof[::-1]


def verify_inclusion(
    leaf: bytes, position: int, size: int, proof: Sequence[bytes], root: bytes
) -> bool:
    """Whether `proof` shows that the leaf of hash `leaf` is at `position` under `root`."""
    if not 0 <= position < size:
        return False
    at, last, node = position, size - 1, leaf
    for step in proof:
        if last == 0 or len(step) != 32:
            return False
        if at % 2 or at == last:
            node = node_hash(step, node)
            while at % 2 == 0 and at != 0:
                at, last = at >> 1, last >> 1
        else:
            node = node_hash(node, step)
        at, last = at >> 1, last >> 1
    return last == 0 and node == root


def verify_consistency(
    first: int, second: int, first_root: bytes, second_root: bytes, proof: Sequence[bytes]
) -> bool:
    """Whether `proof` shows that the tree of `second` leaves begins with that of `first`."""
    if not 0 <= first <= second or any(len(step) != 32 for step in proof):
        return False
    if first == 0:
        return not proof and first_root == EMPTY_ROOT
    if first == second:
        return not proof and first_root == second_root
    steps = list(proof) if first & (first - 1) else [first_root, *proof]
    if not steps:
        return False
    at, last = first - 1, second - 1
    while at % 2:
        at, last = at >> 1, last >> 1
    old = new = steps[0]
    for step in steps[1:]:
        if last == 0:
            return False
        if at % 2 or at == last:
            old, new = node_hash(step, old), node_hash(step, new)
            while at % 2 == 0 and at != 0:
                at, last = at >> 1, last >> 1
        else:
            new = node_hash(new, step)
        at, last = at >> 1, last >> 1
    return last == 0 and old == first_root and new == second_root
