from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from benchmarks.cold.claims import CLAIMS, Claim, claims
from benchmarks.cold.comparison import PRETRAINED, Place
from benchmarks.cold.records import Records
from benchmarks.cold.report import gain, markdown, page, result, table, write
from coldmerge.core.errors import DataError
from tests.benchmarks.cold_records import SEEN, STEPS, UNSEEN, Writer, plan, whole


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = whole(tmp_path_factory.mktemp("whole"))
    write(folder)
    return folder


def said(folder: Path) -> dict[str, Claim]:
    return {claim.id: claim for claim in claims(Records.read(folder))}


def test_claims_are_what_the_records_say(full: Path) -> None:
    found = said(full)
    assert [claim.id for claim in found.values()] == [id_ for id_, *_ in CLAIMS]
    verdicts = {key: claim.verdict for key, claim in found.items()}
    for key in (
        "R1",
        "R2",
        "R3",
        "R4",
        "R5",
        "P1",
        "P2",
        "P4",
        "P5",
        "P8",
        "P10",
        "O1",
        "O2",
        "O3",
    ):
        assert verdicts[key] == "holds", found[key]
    assert verdicts["P3"] == "fails"  # multitask was made better
    assert "2 seeds, not 3" in found["R1"].note
    records = Records.read(full)
    third = records.measured.compare(Place("mean", 3), PRETRAINED, "lp100", "seen")
    assert third is not None
    assert (found["R1"].mean, found["R1"].interval) == (third.mean, third.interval)
    assert "mean 5 against oneshot-mean 1" in found["R4"].note
    assert "steps" not in found["R4"].note


def test_claims_fail_when_the_records_say_so(tmp_path: Path) -> None:
    writer = Writer(tmp_path)
    writer.measure("base", 0, {"seen": 0, "unseen": 0})
    for release, seen in enumerate((6, 5, 3, 2, 1), 1):
        writer.measure("mean", release, {"seen": seen, "unseen": -2})
    writer.measure("oneshot-mean", 1, {"seen": 4, "unseen": 0}, steps=STEPS)
    assert said(tmp_path)["P1"].verdict == "not measured"  # a probe is no fine-tuning
    found = said(tmp_path)
    for key in ("R1", "R2", "R4", "R5", "P11"):
        assert found[key].verdict == "fails", found[key]
    for key in ("R3", "P3", "P8", "P9", "P10", "O1", "O2", "O3"):
        assert found[key].verdict == "not measured", found[key]
        assert found[key].note
    text = markdown(page(Records.read(tmp_path)))
    assert "claim R1 fails" in text
    assert "release 5 below release 4" in text


def test_the_table_has_the_gain_of_every_variant(full: Path) -> None:
    everything = result(full)
    found = everything["table"]
    records = Records.read(full)
    by_key = {(row["variant"], row["protocol"], row["group"]): row for row in found}
    assert len(by_key) == len(found)
    row = by_key["mean", "lp100", "seen"]
    mean = records.gain("seen")
    assert mean is not None
    assert row["gain"] == pytest.approx(mean.mean, abs=1e-4)
    assert row["low"] < row["gain"] < row["high"]
    assert row["runs_low"] < row["low"]
    assert (row["sets"], row["seeds"], row["release"], row["wins"]) == (8, 2, 5, mean.wins)
    assert row["seconds_per_point"] == pytest.approx(row["train_seconds"] / row["gain"], abs=0.1)
    assert table(full) == found
    assert gain(full) == everything["gain"]
    assert gain(full)["seen"] == row["gain"]
    assert row["over_mean"] is None
    assert by_key["sam", "lp100", "seen"]["over_mean"] > 0
    assert "gain" not in by_key["base", "lp100", "seen"]
    assert ("alone", "lp100", "unseen") not in by_key
    assert json.loads(json.dumps(everything)) == everything


def test_the_report_is_whole_and_needs_nothing_else(full: Path) -> None:
    html, text = (full / "report.html").read_text(), (full / "results.md").read_text()
    titles = re.findall(r"^## (.*)$", text, re.MULTILINE)
    for title in ("Claims", "What did not work", "The best round policy", "What it cost"):
        assert title in titles
        assert f"<h2>{title}</h2>" in html
    for title in ("Contributor by release", "Round policies by release", "Set by set"):
        assert f"<h2>{title}</h2>" in html
        assert title not in titles
    assert html.count("<svg") >= 4
    assert "default-src 'none'" in html
    assert "seed number 3" in text
    assert "one class only" in text
    assert "--seen emotion,entailment" in text
    assert "nan" not in re.findall(r"[a-z]+", text)


def test_markdown_tables_have_as_many_cells_as_columns(full: Path) -> None:
    lines = (full / "results.md").read_text().split("\n")
    widths: list[int] = []
    for line in [*lines, ""]:
        if line.startswith("|"):
            widths.append(len(re.findall(r"(?<!\\)\|", line)))
        else:
            assert len(set(widths)) <= 1, line
            widths = []


def test_a_folder_with_a_plan_only_says_so(tmp_path: Path) -> None:
    writer = Writer(tmp_path)
    write(tmp_path)
    text = (tmp_path / "results.md").read_text()
    assert "not measured" in text
    assert all(task in text for task in writer.plan.seen)
    assert table(tmp_path) == []
    assert gain(tmp_path) == {"seen": None, "unseen": None}
    assert {claim.verdict for claim in said(tmp_path).values()} == {"not measured"}


def test_one_seed_one_round_and_no_unseen_sets_make_a_smaller_report(tmp_path: Path) -> None:
    parts = {"recipes": ["atm"], "baselines": ["multitask", "oneshot"], "seeds": 1, "rounds": 2}
    writer = Writer(
        tmp_path,
        plan(
            SEEN[:2],
            (),
            settings={"parts": {**parts, "cheap": True}},
            left_out=("the full setting",),
            costs={"full_table_seconds": 5400.0},
        ),
    )
    writer.measure("base", 0, {"seen": 0}, seeds=[4], draws=1)
    writer.measure("mean", 1, {"seen": 6}, seeds=[4], draws=1)
    write(tmp_path)
    text = (tmp_path / "results.md").read_text()
    for words in ("no unseen sets", "atm", "multitask", "one-shot merges", "1 of 2 planned"):
        assert words in text, words
    assert "about 90 minutes" in text
    assert "one seed, so no band" in (tmp_path / "report.html").read_text()
    found = gain(tmp_path)
    assert found["unseen"] is None
    assert found["seen"] is not None
    r1 = said(tmp_path)["R1"]
    assert r1.verdict == "not measured"
    assert "asked after 3 rounds" in r1.note


def test_one_study_only_is_reported(tmp_path: Path) -> None:
    writer = Writer(tmp_path)
    for variant in ("mean", "ema"):  # the base is not there yet
        writer.measure(variant, 2, {"seen": 5, "unseen": 2})
    text = markdown(page(Records.read(tmp_path)))
    assert "The best round policy" in text
    assert gain(tmp_path) == {"seen": None, "unseen": None}


def test_a_measurement_that_is_under_way_changes_no_finished_figure(tmp_path: Path) -> None:
    writer = Writer(tmp_path)
    writer.measure("base", 0, {"seen": 0, "unseen": 0})
    writer.measure("mean", 1, {"seen": 6, "unseen": 2})
    before = gain(tmp_path)
    writer.measure("mean", 2, {"seen": 90, "unseen": 90}, tasks=[SEEN[0], UNSEEN[0]])
    assert gain(tmp_path) == before
    assert markdown(page(Records.read(tmp_path)))


def test_a_folder_of_something_else(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        write(tmp_path)
    assert caught.value.code == "cold.no_plan"
