"""What travels in an order and its answer."""

from __future__ import annotations

from coldmerge_simulation.flower import compat
from coldmerge_simulation.orders import answer_of, pack


def test_a_reason_is_as_long_as_a_person_reads() -> None:
    said = {"error": {"kind": "DataError", "code": "x", "message": "a" * 10**6, "got": "b" * 10**6}}
    found = answer_of(compat.message(pack(said, {}), "train")).error
    assert found is not None
    assert len(str(found)) < 2000
