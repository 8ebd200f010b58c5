"""Trees and proofs against the definition in RFC 6962, and vectors of Certificate Transparency."""

from __future__ import annotations

import hashlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pymerkle import InmemoryTree

from coldmerge.core.merkle import (
    EMPTY_ROOT,
    Frontier,
    complete_subtrees,
    consistency_proof,
    inclusion_proof,
    leaf_hash,
    merkle_root,
    node_hash,
    verify_consistency,
    verify_inclusion,
)

# The leaves and roots of Certificate Transparency's own tests (merkle_tree_test.cc).
VECTORS = [
    b"",
    b"\x00",
    b"\x10",
    b"\x20\x21",
    b"\x30\x31",
    b"\x40\x41\x42\x43",
    b"\x50\x51\x52\x53\x54\x55\x56\x57",
    b"\x60\x61\x62\x63\x64\x65\x66\x67\x68\x69\x6a\x6b\x6c\x6d\x6e\x6f",
]
ROOTS = [
    "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855",
    "6e340b9cffb37a989ca544e6bb780a2c78901d3fb33738768511a30617afa01d",
    "fac54203e7cc696cf0dfcb42c92a1d9dbaf70ad9e621f4bd8d98662f00e3c125",
    "aeb6bcfe274b70a14fb067a5e5578264db0fa9b51af5e0ba159158f329e06e77",
    "d37ee418976dd95753c1c73862b9398fa2a2cf9b4ff0fdfe8b30cd95209614b7",
    "4e3bbb1f7b478dcfe71fb631631519a3bca12c9aefca1612bfce4c13a86264d4",
    "76e67dadbcdf1e10e1b74ddc608abd2f98dfb16fbce75277b5232a127f2087ef",
    "ddb89be403809e325750d3d263cd78929c2942b7942a34b77e122c9594a74c8c",
    "5dc9da79a70659a9ad559cb701ded9a2ab9d823aad2f4960cfe370eff4604328",
]
# (position + 1, size) → path, (first, second) → proof; from the same tests.
PATHS = {
    (1, 1): [],
    (1, 8): [
        "96a296d224f285c67bee93c30f8a309157f0daa35dc5b87e410b78630a09cfc7",
        "5f083f0a1a33ca076a95279832580db3e0ef4584bdff1f54c8a360f50de3031e",
        "6b47aaf29ee3c2af9af889bc1fb9254dabd31177f16232dd6aab035ca39bf6e4",
    ],
    (6, 8): [
        "bc1a0643b12e4d2d7c77918f44e0f4f79a838b6cf9ec5b5c283e1f4d88599e6b",
        "ca854ea128ed050b41b35ffc1b87b8eb2bde461e9e3b5596ece6b9d5975a0ae0",
        "d37ee418976dd95753c1c73862b9398fa2a2cf9b4ff0fdfe8b30cd95209614b7",
    ],
    (3, 3): ["fac54203e7cc696cf0dfcb42c92a1d9dbaf70ad9e621f4bd8d98662f00e3c125"],
    (2, 5): [
        "6e340b9cffb37a989ca544e6bb780a2c78901d3fb33738768511a30617afa01d",
        "5f083f0a1a33ca076a95279832580db3e0ef4584bdff1f54c8a360f50de3031e",
        "bc1a0643b12e4d2d7c77918f44e0f4f79a838b6cf9ec5b5c283e1f4d88599e6b",
    ],
}
EXTENSIONS = {
    (1, 1): [],
    (1, 8): [
        "96a296d224f285c67bee93c30f8a309157f0daa35dc5b87e410b78630a09cfc7",
        "5f083f0a1a33ca076a95279832580db3e0ef4584bdff1f54c8a360f50de3031e",
        "6b47aaf29ee3c2af9af889bc1fb9254dabd31177f16232dd6aab035ca39bf6e4",
    ],
    (6, 8): [
        "0ebc5d3437fbe2db158b9f126a1d118e308181031d0a949f8dededebc558ef6a",
        "ca854ea128ed050b41b35ffc1b87b8eb2bde461e9e3b5596ece6b9d5975a0ae0",
        "d37ee418976dd95753c1c73862b9398fa2a2cf9b4ff0fdfe8b30cd95209614b7",
    ],
    (2, 5): [
        "5f083f0a1a33ca076a95279832580db3e0ef4584bdff1f54c8a360f50de3031e",
        "bc1a0643b12e4d2d7c77918f44e0f4f79a838b6cf9ec5b5c283e1f4d88599e6b",
    ],
}


def split(size: int) -> int:
    k = 1
    while 2 * k < size:
        k *= 2
    return k


def naive_root(leaves: list[bytes]) -> bytes:
    """MTH of RFC 6962, 2.1, as it is written there."""
    if not leaves:
        return hashlib.sha256(b"").digest()
    if len(leaves) == 1:
        return hashlib.sha256(b"\x00" + leaves[0]).digest()
    k = split(len(leaves))
    return hashlib.sha256(b"\x01" + naive_root(leaves[:k]) + naive_root(leaves[k:])).digest()


def naive_path(m: int, leaves: list[bytes]) -> list[bytes]:
    """PATH of RFC 6962, 2.1.1."""
    if len(leaves) == 1:
        return []
    k = split(len(leaves))
    if m < k:
        return [*naive_path(m, leaves[:k]), naive_root(leaves[k:])]
    return [*naive_path(m - k, leaves[k:]), naive_root(leaves[:k])]


def naive_subproof(m: int, leaves: list[bytes], whole: bool) -> list[bytes]:
    """SUBPROOF of RFC 6962, 2.1.2."""
    n = len(leaves)
    if m == n:
        return [] if whole else [naive_root(leaves)]
    k = split(n)
    if m <= k:
        return [*naive_subproof(m, leaves[:k], whole), naive_root(leaves[k:])]
    return [*naive_subproof(m - k, leaves[k:], False), naive_root(leaves[:k])]


class Grown:
    """A tree that was appended to leaf by leaf, as the log is; only complete subtrees are kept."""

    def __init__(self, leaves: list[bytes]) -> None:
        self.nodes: dict[tuple[int, int], bytes] = {}
        self.tree = Frontier()
        for leaf in leaves:
            for level, index, node in self.tree.append(leaf_hash(leaf)):
                self.nodes[level, index] = node

    def subtree(self, level: int, index: int) -> bytes:
        return self.nodes[level, index]


def made(size: int) -> list[bytes]:
    return [b"leaf %d" % number for number in range(size)]


def test_published_vectors() -> None:
    grown = Grown(VECTORS)
    for size, root in enumerate(ROOTS):
        assert merkle_root(VECTORS[:size]) == root
        assert Frontier.of(size, grown.subtree).root().hex() == root
    for (number, size), path in PATHS.items():
        assert [step.hex() for step in inclusion_proof(number - 1, size, grown.subtree)] == path
    for (first, second), proof in EXTENSIONS.items():
        assert [s.hex() for s in consistency_proof(first, second, grown.subtree)] == proof


@pytest.mark.parametrize("size", [*range(1, 20), 31, 32, 33])
def test_every_proof_of_small_trees_is_the_rfcs_and_verifies(size: int) -> None:
    leaves = made(size)
    grown, root = Grown(leaves), naive_root(leaves)
    assert grown.tree.root() == root
    for position in range(size):
        proof = inclusion_proof(position, size, grown.subtree)
        assert proof == naive_path(position, leaves)
        assert verify_inclusion(leaf_hash(leaves[position]), position, size, proof, root)
    for first in range(1, size + 1):
        proof = consistency_proof(first, size, grown.subtree)
        assert proof == naive_subproof(first, leaves, True)
        assert verify_consistency(first, size, naive_root(leaves[:first]), root, proof)


@settings(max_examples=60, deadline=None)
@given(data=st.data(), size=st.integers(2, 400))
def test_proofs_hold_and_no_other_statement_does(data: st.DataObject, size: int) -> None:
    leaves = made(size)
    grown, root = Grown(leaves), naive_root(leaves)
    position = data.draw(st.integers(0, size - 1))
    first = data.draw(st.integers(1, size - 1))
    path = inclusion_proof(position, size, grown.subtree)
    leaf = leaf_hash(leaves[position])
    assert verify_inclusion(leaf, position, size, path, root)
    assert not verify_inclusion(leaf_hash(b"another"), position, size, path, root)
    assert not verify_inclusion(leaf, size, size, path, root)
    assert not verify_inclusion(leaf, position, size, path[:-1], root)
    assert not verify_inclusion(leaf, position, size, [*path, root], root)
    other = data.draw(st.integers(0, size - 1).filter(lambda at: at != position))
    assert not verify_inclusion(leaf, other, size, path, root)
    older = naive_root(leaves[:first])
    proof = consistency_proof(first, size, grown.subtree)
    assert verify_consistency(first, size, older, root, proof)
    assert not verify_consistency(
        first, size, naive_root([*leaves[: first - 1], b"x"]), root, proof
    )
    assert not verify_consistency(first, size, older, naive_root([*leaves[:-1], b"x"]), proof)
    assert not verify_consistency(size, first, root, older, proof)
    assert not verify_consistency(first, size, older, root, [*proof, root])
    if proof:
        at = data.draw(st.integers(0, len(proof) - 1))
        wrong = [*proof[:at], leaf_hash(proof[at]), *proof[at + 1 :]]
        assert not verify_consistency(first, size, older, root, wrong)
        assert not verify_consistency(first, size, older, root, proof[:-1])


def test_the_empty_tree_is_consistent_with_every_tree_and_proves_nothing() -> None:
    root = naive_root(made(5))
    assert naive_root([]) == EMPTY_ROOT
    assert consistency_proof(0, 5, Grown(made(5)).subtree) == []
    assert verify_consistency(0, 5, EMPTY_ROOT, root, [])
    assert not verify_consistency(0, 5, root, root, [])
    assert not verify_inclusion(root, 0, 0, [], EMPTY_ROOT)
    assert complete_subtrees(0) == []
    assert complete_subtrees(7) == [(2, 0), (1, 2), (0, 6)]
    assert node_hash(b"a", b"b") == hashlib.sha256(b"\x01ab").digest()


@pytest.mark.parametrize("size", [1, 2, 3, 7, 8, 13, 64, 100])
def test_a_third_party_agrees(size: int) -> None:
    leaves = made(size)
    theirs = InmemoryTree(algorithm="sha256")
    for leaf in leaves:
        theirs.append_entry(leaf)
    grown = Grown(leaves)
    assert theirs.get_root() == grown.tree.root()
    for position in {0, size // 2, size - 1}:
        proof = theirs.prove_inclusion(position + 1)
        ours = inclusion_proof(position, size, grown.subtree)
        assert set(proof.path) == {leaf_hash(leaves[position]), *ours}
    for first in {1, size // 2, size - 1} - {0}:
        older = theirs.get_root(first)
        ours = consistency_proof(first, size, grown.subtree)
        assert verify_consistency(first, size, older, grown.tree.root(), ours)
