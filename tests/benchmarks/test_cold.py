"""benchmarks/cold: what it reads and refuses, what it leaves out, and a whole small run."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks.cold.__main__ import main
from benchmarks.cold.costs import Sizes, Speed, cost, simulated
from benchmarks.cold.outcome import Outcome
from benchmarks.cold.planning import BASELINES, PROTOCOLS, Parts, choose
from benchmarks.cold.recipes import STUDIES, Federation, load, study
from benchmarks.cold.sets import draw, read, read_set
from coldmerge.core.errors import ConfigError, ConflictError, DataError
from coldmerge_simulation import SimulationConfig

ALL = Parts(("ties", "sam"), BASELINES, PROTOCOLS, seeds=3, rounds=3)
SPEED = Speed(step=0.19, fixed=1.0, text=0.004, first=0.004, start=8)
COUNTS = (2000,) * 8
SIZES = Sizes(COUNTS, COUNTS, (2000,) * 20, 16, 500, 400, 5, 3)


def rows(count: int, labels: int, word: str = "") -> list[dict[str, Any]]:
    return [{"text": f"{word} text {i} of {i % labels}", "label": i % labels} for i in range(count)]


def write(folder: Path, **parts: list[dict[str, Any]]) -> Path:
    folder.mkdir(parents=True)
    wanted = {"train": rows(120, 2), "test": rows(60, 2), **parts}
    for part, found in wanted.items():
        if found:
            lines = "".join(json.dumps(row) + "\n" for row in found)
            (folder / f"{part}.jsonl").write_text(lines)
    return folder


def test_every_other_set_trains_and_bad_ones_are_left_out_with_the_reason(tmp_path: Path) -> None:
    for name in "abcde":
        write(tmp_path / name)
    write(tmp_path / "f", test=[])
    (tmp_path / "_others" / "g").mkdir(parents=True)
    split = read(tmp_path, None, None)
    assert [task.name for task in split.seen] == ["a", "c", "e"]
    assert [task.name for task in split.unseen] == ["b", "d"]
    assert split.dropped == {"f": "The set f has no readable test.jsonl."}
    split = read(tmp_path, ["d", "b"], None)
    assert [task.name for task in split.seen] == ["d", "b"]
    assert [task.name for task in split.unseen] == ["a", "c", "e"]
    split = read(tmp_path, None, ["d"])
    assert [task.name for task in split.seen] == ["a", "b", "c", "e"]
    split = read(tmp_path, ["d", "b"], ["a"])
    assert split.dropped == {"c": "not asked for", "e": "not asked for", "f": "not asked for"}


@pytest.mark.parametrize(
    ("code", "parts"),
    [
        ("cold.no_split", {"test": []}),
        ("cold.no_split", {"train": []}),
        ("cold.one_class", {"train": rows(120, 1)}),
        ("cold.unknown_label", {"test": rows(60, 3)}),
        ("cold.unknown_label", {"validation": rows(60, 4)}),
        ("cold.empty_text", {"train": [*rows(120, 2), {"text": "  ", "label": 1}]}),
        ("cold.bad_line", {"test": [*rows(60, 2), {"text": "no label"}]}),
        ("cold.bad_line", {"test": [*rows(60, 2), {"text": "half", "label": 0.5}]}),
        ("cold.bad_line", {"test": [*rows(60, 2), {"text": 3, "label": 0}]}),
        ("cold.bad_line", {"test": [*rows(60, 2), {"text": "half \ud83d", "label": 0}]}),
        ("cold.mixed_labels", {"train": [*rows(120, 2), {"text": "a word", "label": "1"}]}),
        ("cold.too_small", {"train": rows(90, 2)}),
        ("cold.too_small", {"test": rows(20, 2)}),
    ],
)
def test_a_set_that_was_asked_for_and_cannot_be_used_is_an_error(
    tmp_path: Path, code: str, parts: dict[str, list[dict[str, Any]]]
) -> None:
    for name in "abc":
        write(tmp_path / name)
    write(tmp_path / "bad", **parts)
    with pytest.raises(DataError) as caught:
        read(tmp_path, ["a", "bad"], None)
    assert caught.value.code == code
    assert read(tmp_path, None, None).dropped.keys() == {"bad"}


@pytest.mark.parametrize(
    ("code", "seen", "unseen"),
    [
        ("cold.unknown_set", ["a", "z"], None),
        ("cold.set_named_twice", ["a", "b"], ["b", "c"]),
        ("cold.too_few_sets", ["a"], ["b"]),
        ("cold.too_few_sets", ["a", "b", "c"], None),
    ],
)
def test_names_that_make_no_split(
    tmp_path: Path, code: str, seen: list[str], unseen: list[str] | None
) -> None:
    for name in "abc":
        write(tmp_path / name)
    with pytest.raises((ConfigError, DataError)) as caught:
        read(tmp_path, seen, unseen)
    assert caught.value.code == code


def test_a_folder_without_sets_is_said_on_standard_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--data", str(tmp_path), "--out", str(tmp_path / "out"), "--format", "json"]
    assert main(words) == ConfigError.exit_status
    said = capsys.readouterr()
    assert json.loads(said.out)["error"]["code"] == "cold.no_data"
    assert "cold.no_data" in said.err
    assert not (tmp_path / "out").exists()


def test_labels_are_words_as_contributors_read_them(tmp_path: Path) -> None:
    padded = [{"text": "some text", "label": (" --1", "-2 ", "é")[i % 3]} for i in range(150)]
    assert read_set(write(tmp_path / "a", train=padded, test=padded)).labels == ("-2", "--1", "é")


def test_a_place_for_results_that_is_none_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in "abc":
        write(tmp_path / "data" / name)
    (tmp_path / "file").write_text("")
    words = ["--data", str(tmp_path / "data"), "--out", str(tmp_path / "file"), "--format", "json"]
    assert main(words) == ConfigError.exit_status
    assert json.loads(capsys.readouterr().out)["error"]["code"] == "cold.bad_out"


def test_draws_hold_every_label_and_follow_from_name_and_number(tmp_path: Path) -> None:
    task = read_set(write(tmp_path / "a", train=[*rows(150, 2), {"text": "rare", "label": 7}]))
    pool = range(len(task.train))
    first, again, other = (draw(task, pool, 20, *purpose) for purpose in ((0, 1), (0, 1), (0, 2)))
    assert first == again != other
    assert {task.train[position].label for position in first} == {0, 1, 2}
    assert len(set(first)) == 20


def test_a_budget_leaves_out_in_the_declared_order() -> None:
    def costs(parts: Parts) -> float:
        cheaper = Speed(0.03, 0.5, 0.001, 0.004, 8) if parts.cheap else SPEED
        return cost(parts, cheaper, SIZES, replace(eight(), rounds=parts.rounds))

    full = costs(ALL)
    assert choose(ALL, costs, None) == (ALL, [])
    assert choose(ALL, costs, full + 1) == (ALL, [])
    found = [choose(ALL, costs, full * share) for share in (0.99, 0.6, 0.3, 0.12, 0.08)]
    lengths = [len(left_out) for _, left_out in found]
    assert lengths[0] == 1
    assert lengths == sorted(lengths)
    assert found[0][1] == ["recipe sam"]
    words = found[3][1]
    assert words[:4] == ["recipe sam", "recipe ties", "protocol full", "protocol ft100"]
    for parts, _ in found:
        assert parts.rounds >= 2
    smallest = replace(ALL, recipes=(), baselines=(), protocols=("lp100", "frozen"), seeds=1)
    least = costs(replace(smallest, rounds=2, cheap=True))
    assert choose(ALL, costs, least + 1)[0].cheap
    with pytest.raises(ConfigError) as caught:
        choose(ALL, costs, least - 1)
    assert caught.value.code == "cold.small_budget"
    assert f"at least {int(least // 60) + 1}m" in str(caught.value.expected)


def eight() -> Federation:
    return Federation(Path(), tuple("abcdefgh"), COUNTS, "digits", rounds=3, changes={})


def test_what_a_recipe_costs_follows_from_its_settings() -> None:
    mine = eight()

    def seconds(name: str) -> float:
        return simulated(mine.simulation(name, 0), COUNTS, SIZES, SPEED)

    mean = seconds("mean")
    steps = 3 * 8 * 2 * 32
    assert mean == pytest.approx(8 + 5 + steps * 0.19 + 3 * (8 * 1.0 + 3))
    assert seconds("sam") == pytest.approx(mean + steps * 0.19)
    assert seconds("partial") < 0.6 * mean
    assert seconds("examples-100") < mean < seconds("examples-1000")
    judged = 3 * 20 * sum(COUNTS) * 0.004
    assert seconds("coefficients-mean") > mean / 2 + judged
    once = simulated(mine.oneshot(0), COUNTS, SIZES, SPEED)
    assert once == pytest.approx(mean, rel=0.1)


def test_few_simulations_keep_one_worker_waiting() -> None:
    alone = Parts((), (), ("lp100",), seeds=1, rounds=3)
    mine = eight()
    simulation = simulated(mine.simulation("mean", 0), COUNTS, SIZES, SPEED)
    assert cost(alone, SPEED, SIZES, mine) > simulation
    two = cost(replace(alone, seeds=2), SPEED, SIZES, mine)
    assert two < 1.5 * cost(alone, SPEED, SIZES, mine)


def federation(tmp_path: Path) -> Federation:
    return Federation(tmp_path, ("a", "b", "c"), (2000, 2000, 800), "digits", rounds=3, changes={})


def test_every_recipe_is_a_simulation(tmp_path: Path) -> None:
    there = [recipe for name in STUDIES for recipe in study(name)]
    assert {"sam", "ties", "lora", "cohort-2", "cohort-16", "examples-100"} <= set(there)
    assert not {"mean", "cheap"} & set(there)
    assert len(set(there)) == len(there)
    for name in there:
        for count in (8, 11):
            seen = tuple("abcdefghijk"[:count])
            many = replace(federation(tmp_path), seen=seen, counts=(900,) * count)
            found = SimulationConfig.parse(many.simulation(name, 5))
            assert (found.seed, found.data.unseen) == (5, ())
    with pytest.raises(ConfigError, match=r"cold\.unknown_recipe"):
        load("nonsense")


def test_baselines_take_as_many_steps_on_as_many_examples(tmp_path: Path) -> None:
    mine = federation(tmp_path)
    mean, once = mine.simulation("mean", 0), mine.oneshot(0)
    trained = [3 * min(500, count) * mean["train"]["epochs"] for count in mine.counts]
    parsed = SimulationConfig.parse(once)
    assert parsed.rounds == 1
    most = once["train"]["max_examples"]
    for place, count in enumerate(mine.counts):
        own = parsed.overrides.get(f"org-{place + 1}", {})
        epochs = own.get("epochs", once["train"]["epochs"])
        assert min(most, count) * epochs == pytest.approx(trained[place], 1e-3)
    pooled = mine.multitask(tmp_path / "pooled", 0)
    assert pooled["contributors"] == 1
    there = sum(min(most, count) for count in mine.counts)
    assert there * pooled["train"]["epochs"] == pytest.approx(sum(trained), 1e-3)
    assert pooled["round"] == {**mean["round"], "min_contributions": 1}
    assert SimulationConfig.parse({**pooled, "seed": 1}).rounds == 1


@pytest.mark.slow
def test_a_whole_run_measures_everything_and_goes_on(tmp_path: Path) -> None:
    from tests.tiny import write_bert

    write_bert(tmp_path / "model", layers=3)
    for place, name in enumerate("abcd"):
        fruit = ("apple", "iron", "grape")[: 2 + place % 2]
        texts = [
            {"text": f"some {fruit[i % len(fruit)]} and", "label": fruit[i % len(fruit)]}
            for i in range(130)
        ]
        write(tmp_path / "data" / name, train=texts, test=texts[:60])
    words = ["--data", str(tmp_path / "data"), "--model", str(tmp_path / "model"), "--seeds", "1"]
    words += ["--rounds", "2", "--out", str(tmp_path / "out"), "--format", "json"]
    assert main(words) == 0
    outcome = Outcome(tmp_path / "out")
    variants = {score.variant for score in outcome.scores()}
    assert {"base", "mean", "multitask", "oneshot-mean", "oneshot-ties", "alone"} <= variants
    assert {score.protocol for score in outcome.scores()} == set(PROTOCOLS)
    gain = json.loads((tmp_path / "out" / "gain.json").read_text())["gain"]
    assert set(gain) == {"seen", "unseen"}
    mean = {run.release: run for run in outcome.runs() if run.variant == "mean"}
    assert mean[2].steps == 2 * mean[1].steps
    before = len(outcome.scores())
    assert main(words) == 0
    assert len((tmp_path / "out" / "scores.jsonl").read_text().splitlines()) == before
    assert main([*words, "--rounds", "3"]) == ConflictError.exit_status
