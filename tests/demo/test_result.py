from __future__ import annotations

import pytest

from coldmerge.demo.page import demo_page
from coldmerge.demo.result import DemoResult, Row, Run
from coldmerge.demo.scores import Scores, TaskScore
from coldmerge.demo.table import COLUMNS, rows, size, summary
from coldmerge.report.page import Figure


def scores(seen: float, unseen: float) -> Scores:
    return Scores(
        (TaskScore("a", (seen - 1, seen + 1)), TaskScore("b", (seen - 1, seen + 1))),
        (TaskScore("c", (unseen, unseen)),),
    )


def one_run(seed: int, shift: float = 0.0) -> Run:
    return Run(
        seed,
        (
            Row(0, "0" * 64, "PUBLISHED", scores=scores(50, 70)),
            Row(1, "1" * 64, "PUBLISHED", 2, 3_000_000, "round-1", "", scores(56 + shift, 70.5)),
            Row(2, "2" * 64, "REJECTED", 2, 3_000_000, "round-2", "fell", scores(40, 60)),
            Row(2, None, "ABANDONED", 0, 0, "round-3", "too few"),
        ),
        10.0,
    )


def result(*runs: Run) -> DemoResult:
    return DemoResult("tiny", 10_000_000, ("a", "b"), ("c",), runs, 20.0)


def test_one_seed_reports_the_spread_over_draws() -> None:
    found = result(one_run(0)).as_json()
    assert found["spread_over"] == "draws"
    first, second, rejected, abandoned = found["releases"]
    assert (first["number"], first["state"], first["seen"]) == (0, "PUBLISHED", 50.0)
    assert first["seen_spread"] == pytest.approx(2**0.5, abs=0.01)
    assert (second["contributions"], second["bytes_shipped"]) == (2, 3_000_000)
    assert (rejected["state"], rejected["reason"]) == ("REJECTED", "fell")
    assert abandoned["seen"] is None
    assert abandoned["digest"] is None


def test_gains_compare_the_last_published_release_with_the_first() -> None:
    gains = result(one_run(0)).as_json()["gains"]
    assert gains["seen"] == {
        "mean": 6.0,
        "median": 6.0,
        "standard_error": 0.0,
        "wins": 2,
        "tasks": {"a": 6.0, "b": 6.0},
    }
    assert gains["unseen"]["tasks"] == {"c": 0.5}


def test_several_seeds_report_means_and_the_spread_over_seeds() -> None:
    found = result(one_run(0), one_run(1, shift=2.0)).as_json()
    assert found["seeds"] == [0, 1]
    assert found["spread_over"] == "seeds"
    assert found["releases"][1]["seen"] == 57.0
    assert found["releases"][1]["seen_spread"] == pytest.approx(2**0.5, abs=0.01)
    assert found["gains"]["seen"]["mean"] == 7.0
    assert [run["releases"][1]["seen"] for run in found["runs"]] == [56.0, 58.0]


def test_the_table_has_a_row_for_each_release_and_rejected_candidate() -> None:
    found = rows(result(one_run(0)))
    assert all(len(row) == len(COLUMNS) for row in found)
    assert [row[1] for row in found] == ["pretrained", "published", "rejected", "abandoned"]
    assert found[1][2:5] == ("2", "3.0 MB", "15 %")
    assert found[1][5] == "56.0 ± 1.4 (+6.0)"
    assert found[3][5] == "–"
    assert summary(result(one_run(0)))[0].startswith("Seen tasks: +6.0 points on average")


def test_sizes_are_in_powers_of_1000() -> None:
    found = [size(n) for n in (0, 999, 1000, 254_600, 85_200_000, 3 * 10**12)]
    assert found == ["0 B", "999 B", "1.0 kB", "254.6 kB", "85.2 MB", "3000.0 GB"]


def test_the_page_has_curves_gains_lineage_and_the_table() -> None:
    page = demo_page(result(one_run(0)))
    titles = [section.title for section in page.sections]
    assert titles == [
        "Accuracy by release",
        "Gain by task",
        "Lineage",
        "Releases",
        "What was run",
    ]
    assert sum(isinstance(section, Figure) for section in page.sections) == 3
