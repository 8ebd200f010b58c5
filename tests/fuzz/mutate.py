"""A seeded mutator over a corpus: fast, deterministic, and aware of numbers and tokens."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from random import Random

from tests.fuzz.engine import Target

MAX_BYTES = 2**16
_NUMBER = re.compile(rb"-?[0-9]+")
NUMBERS = (
    *(b"0", b"-0", b"1", b"-1", b"2", b"3", b"15", b"16", b"17", b"255", b"65536"),
    *(b"2147483647", b"2147483648", b"4294967296", b"1099511627776", b"1099511627777"),
    *(b"9007199254740993", b"9223372036854775807", b"9223372036854775808"),
    *(b"18446744073709551615", b"18446744073709551616", b"1e3", b"1.0", b"1e400", b"-1e400"),
    *(b"NaN", b"Infinity", b"true", b"null", b'"1"', b"0x10", b"9" * 400, b"9" * 5000),
)
TOKENS = (
    *(b"{", b"}", b"[", b"]", b'"', b",", b":", b"\\", b"\n", b" ", b"\t", b"\x00", b"\xff"),
    *(b"\xef\xbb\xbf", "\u2028".encode(), b"\\ud800", b"\\u0000", b"\xed\xa0\x80", b"../../"),
    *(b"null", b"true", b"NaN", b"-Infinity", b"[" * 40, b"{}", b"[]", b'""', b'"a":1,'),
)


class Mutator:
    """Endless inputs made from a target's corpus; the same seed gives the same inputs."""

    def __init__(self, target: Target, seed: int) -> None:
        self._corpus = list(target.corpus().values())
        self._tokens = (*TOKENS, *target.tokens)
        self._repair = target.repair
        self._random = Random(f"{target.name} {seed}")
        self._steps = (
            *(self._flip, self._set, self._insert, self._insert, self._delete, self._repeat),
            *(self._number, self._number, self._splice, self._cut, self._swap),
        )

    def __iter__(self) -> Iterator[bytes]:
        yield from self._corpus
        while True:
            yield self.input()

    def input(self) -> bytes:
        """One input: a corpus file, changed in one to five places."""
        draw = self._random.random
        data = bytearray(self._pick(self._corpus))
        for _ in range(1 + int(5 * draw() * draw())):
            self._steps[int(draw() * len(self._steps))](data)
        return self._repair(data[:MAX_BYTES], self._random)

    def _pick(self, choices: Sequence[bytes]) -> bytes:
        return choices[int(self._random.random() * len(choices))]

    def _at(self, data: bytearray) -> int:
        return int(self._random.random() * (len(data) + 1))

    def _span(self, data: bytearray) -> tuple[int, int]:
        start = self._at(data)
        return start, start + 1 + int(self._random.random() ** 3 * 64)

    def _flip(self, data: bytearray) -> None:
        if data:
            data[self._at(data) % len(data)] ^= 1 << int(self._random.random() * 8)

    def _set(self, data: bytearray) -> None:
        if data:
            data[self._at(data) % len(data)] = int(self._random.random() * 256)

    def _insert(self, data: bytearray) -> None:
        at = self._at(data)
        data[at:at] = self._pick(self._tokens)

    def _delete(self, data: bytearray) -> None:
        start, stop = self._span(data)
        del data[start:stop]

    def _repeat(self, data: bytearray) -> None:
        start, stop = self._span(data)
        data[start:start] = data[start:stop] * (1 + int(self._random.random() ** 4 * 20))

    def _number(self, data: bytearray) -> None:
        found = _NUMBER.search(data, self._at(data))
        if found:
            data[found.start() : found.end()] = self._pick(NUMBERS)

    def _splice(self, data: bytearray) -> None:
        other = self._pick(self._corpus)
        start = int(self._random.random() * (len(other) + 1))
        at = self._at(data)
        data[at : at + 1 + int(self._random.random() * 64)] = other[start : start + 64]

    def _cut(self, data: bytearray) -> None:
        if self._random.random() < 0.2:
            del data[self._at(data) :]

    def _swap(self, data: bytearray) -> None:
        start, stop = self._span(data)
        middle = (start + stop) // 2
        data[start:stop] = data[middle:stop] + data[start:middle]
