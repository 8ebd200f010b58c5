from __future__ import annotations

from pathlib import Path

import pytest

from coldmerge.report.heatmap import Heatmap, heatmaps, write_picture

LABELS = ["law", "a name <of> some length that goes on and on"]
MAPS = [
    Heatmap("Cosine", LABELS, LABELS, [[1.0, -0.004], [-0.004, 1.0]]),
    Heatmap("Signs", ["h.0", "other"], LABELS, [[0.77, None], [0.25, 0.5]], low=0.0),
]


@pytest.mark.parametrize("count", [1, 3, 40])
def test_numbers_are_in_the_cells(tmp_path: Path, count: int) -> None:
    labels = [f"model {n}" for n in range(count)]
    values = [[(n - m) / count for n in range(count)] for m in range(count)]
    write_picture("t", "c", [Heatmap("Cosine", labels, labels, values)], tmp_path / "p.svg")
    svg = (tmp_path / "p.svg").read_text()
    for label in labels:
        assert label in svg
    for row in values:
        for value in row:
            assert f">{value:.2f}<" in svg


def test_what_is_not_there_is_a_dash_and_zero_has_no_minus(tmp_path: Path) -> None:
    write_picture("t", "c", MAPS, tmp_path / "p.svg")
    svg = (tmp_path / "p.svg").read_text()
    for text in (">–<", ">0.00<", ">0.77<", ">Signs<", ">h.0<", "&lt;of&gt;"):
        assert text in svg
    assert "-0.00" not in svg


def test_the_three_kinds_of_file(tmp_path: Path) -> None:
    for suffix, first in ((".svg", b"<svg"), (".png", b"\x89PNG"), (".html", b"<!DOCTYPE html>")):
        path = tmp_path / f"new/p{suffix}"
        write_picture("Likeness", "c", MAPS, path)
        assert path.read_bytes().startswith(first)
    assert "Likeness" in (tmp_path / "new/p.html").read_text()


def test_the_same_values_give_the_same_picture() -> None:
    assert heatmaps(MAPS) == heatmaps(MAPS)


def test_points_have_their_own_range_and_format(tmp_path: Path) -> None:
    points = Heatmap("Gain", ["a"], ["1", "2"], [[-0.04, 7.26]], -8.0, 8.0, "+.1f")
    write_picture("t", "c", [points], tmp_path / "p.svg")
    svg = (tmp_path / "p.svg").read_text()
    assert ">+0.0<" in svg
    assert ">+7.3<" in svg
