"""Runs side by side."""

from __future__ import annotations

from pathlib import Path

import pytest

from coldmerge.core.errors import DataError, NotFoundError
from coldmerge_simulation.results.comparing import Run, compare, difference, load, summary


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"releases": []}', "not json"])
def test_what_is_no_result_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "result.json").write_text(text)
    with pytest.raises(DataError, match="not the result of a simulation"):
        load(tmp_path)


def test_a_run_that_has_not_ended_is_named(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError) as caught:
        load(tmp_path / "nowhere")
    assert caught.value.got is None
    (tmp_path / "simulation.json").write_text("{}")
    with pytest.raises(NotFoundError) as caught:
        load(tmp_path)
    assert caught.value.got == "a run that has not ended"


def test_differences_have_an_error_from_two_pairs_on() -> None:
    assert difference([]) is None
    one, two = difference([1.5]), difference([1.0, -3.0])
    assert one is not None
    assert two is not None
    assert (one.error, str(one)) == (None, "+1.5 (1 up, 0 down)")
    assert (two.mean, two.error, two.pairs) == (-1.0, 2.0, 2)


def test_a_run_without_measures_has_no_accuracy() -> None:
    release = {"number": 0, "digest": "d", "seen": None, "unseen": None}
    result = {"seed": 0, "engine": "local", "rounds": [], "releases": [release]}
    run = Run("a", {**result, "seconds": 0, "peak_bytes": 0})
    found = summary(run)
    assert (found["seen"], found["seen_gain"], found["releases"]) == (None, None, 0)
    assert compare([run, run])["differences"][0]["seen"] is None
