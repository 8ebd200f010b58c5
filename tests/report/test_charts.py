from __future__ import annotations

import json

import pytest
import vl_convert

from coldmerge.report.charts import (
    Ancestor,
    CurvePoint,
    Spec,
    TaskGain,
    accuracy_curves,
    lineage,
    task_gains,
)
from coldmerge.report.runs import RunPoint, run_curves

SPECS: dict[str, Spec] = {
    "curves": accuracy_curves(
        [
            CurvePoint(release, group, 60.0 + release + shift, 1.5)
            for release in range(4)
            for group, shift in (("seen", 0.0), ("unseen", 8.0))
        ],
        "draws",
    ),
    "runs": run_curves(
        [
            RunPoint(run, group, release, 60.0 + release, 1.0)
            for run in ("mean", "ties <2>")
            for group in ("seen", "unseen")
            for release in range(3)
        ]
    ),
    "gains": task_gains([TaskGain("a", "seen", 3.14), TaskGain("<b>", "unseen", -0.04)]),
    "lineage": lineage(
        [
            Ancestor(0, "a" * 64, "PUBLISHED", 0, "pretrained"),
            Ancestor(1, "b" * 64, "PUBLISHED", 6, "85 MB shipped"),
            Ancestor(2, "c" * 64, "REJECTED", 6, "85 MB shipped"),
            Ancestor(2, "d" * 64, "PUBLISHED", 5, "70 MB shipped"),
        ]
    ),
}
WORDS = {
    "curves": ["release", "accuracy, points", "63.0", "seen", "unseen"],
    "gains": ["+3.1", "+0.0", "&lt;b&gt;"],
    "runs": ["seen tasks", "unseen tasks", "mean", "ties &lt;2&gt;", "62"],
    "lineage": ["aaaaaaaa", "cccccccc", "85 MB shipped", "pretrained"],
}


@pytest.mark.parametrize("name", sorted(SPECS))
def test_each_picture_is_json_and_draws(name: str) -> None:
    spec = json.loads(json.dumps(SPECS[name]))
    assert "vega-lite" in spec["$schema"]
    svg = vl_convert.vegalite_to_svg(spec)
    assert svg.startswith("<svg")
    for word in WORDS[name]:
        assert word in svg


def test_pictures_of_nothing_draw() -> None:
    for spec in (accuracy_curves([], "draws"), task_gains([]), lineage([]), run_curves([])):
        assert vl_convert.vegalite_to_svg(spec).startswith("<svg")


def test_the_same_values_give_the_same_picture() -> None:
    gains = [TaskGain("a", "seen", 3.14), TaskGain("<b>", "unseen", -0.04)]
    assert task_gains(gains[::-1]) == SPECS["gains"]
