from __future__ import annotations

import json

import pytest

from benchmarks import attack_matrix, many


@pytest.mark.slow
def test_the_matrix_has_a_cell_for_every_rule_and_attacker(
    capsys: pytest.CaptureFixture[str],
) -> None:
    small = "--contributors 4 --rounds 1 --seeds 1 --dropouts 0 --attackers 0 1 --jobs 1"
    typed = [*small.split(), "--rules", "mean", "clipped mean", "--format", "json"]
    assert attack_matrix.main(typed) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [(row["rule"], row["attackers"]) for row in rows] == [
        ("mean", 0),
        ("mean", 1),
        ("clipped mean", 0),
        ("clipped mean", 1),
    ]
    assert rows[0]["digest"] != rows[1]["digest"]
    text = attack_matrix.table(rows)
    assert [line[:12].strip() for line in text.splitlines()] == ["rule", "mean", "clipped mean"]


@pytest.mark.slow
def test_many_says_time_memory_and_curve(capsys: pytest.CaptureFixture[str]) -> None:
    assert many.main(["--contributors", "5", "--rounds", "1", "--format", "json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert (row["contributors"], row["accepted"], len(row["seen"])) == (5, 5, 2)
    assert row["peak_bytes"] > 10**8
    assert row["processor"] > 0
