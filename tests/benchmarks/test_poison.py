"""The command that prints how far one attacker moves a merge."""

from __future__ import annotations

import pytest

from benchmarks.poison import main, share, vectors


@pytest.mark.parametrize("scale", ["1000", "1e30"])
def test_an_attacker_is_held_to_the_largest_admissible_share(
    capsys: pytest.CaptureFixture[str], scale: str
) -> None:
    assert main(["--scale", scale, "--size", "20000"]) == 0
    free, clipped, _ = capsys.readouterr().out.splitlines()[1:]
    assert "mean" in free
    assert "no clip" in free
    assert " 1 of the largest admissible share" in clipped


def test_an_ordinary_contribution_is_not_held_back() -> None:
    inputs = vectors(5, 1000, 1.5, seed=3)
    assert share(inputs, 2.0)[0] == share(inputs, None)[0]
