from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from coldmerge.core.errors import ColdmergeError, ConflictError, DataError
from coldmerge.demo import digits, folders
from coldmerge_client.training.config import DataConfig as TrainingData
from coldmerge_client.training.config import TrainConfig
from coldmerge_client.training.data import classification
from coldmerge_client.training.trainer import TrainJob, load_trainer
from coldmerge_simulation.contributors.attacks import flip_labels
from coldmerge_simulation.contributors.conduct import Attack
from coldmerge_simulation.data import DataConfig, make


def config(partition: Any = "task", folder: Path | None = None, **keys: Any) -> DataConfig:
    values = {"partition": partition, **keys}
    return DataConfig.model_validate(values, context={"folder": folder or Path.cwd()})


def task_folder(
    folder: Path, rows: Sequence[dict[str, Any]], parts: Sequence[str] = ("train", "test")
) -> Path:
    folder.mkdir(parents=True)
    for part in parts:
        lines = [json.dumps(row) for row in rows]
        (folder / f"{part}.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def texts(count: int = 60, labels: Sequence[Any] = ("no", "yes")) -> list[dict[str, Any]]:
    return [
        {"text": f"{n}", "label": labels[n % len(labels)], "hospital": f"h{n % 7}"}
        for n in range(count)
    ]


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_characters_that_end_lines_elsewhere_are_text_and_dashes_are_labels(tmp_path: Path) -> None:
    rows = [{"text": f"some\u2028{n}\x85", "label": ("--1", "-")[n % 2]} for n in range(20)]
    for name in ("a", "b"):
        task_folder(tmp_path / "sets" / name, rows)
    raw = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (tmp_path / "sets" / "b" / "train.jsonl").write_text(raw, encoding="utf-8")
    made = make(config(source=str(tmp_path / "sets")), 2, 0, tmp_path / "data")
    assert [share.examples for share in made.shares] == [16, 16]
    noisy = flip_labels(
        Attack(kind="label_flip", strength=0.5),
        made.shares[1].folder,
        tmp_path / "noisy",
        seed=0,
    )
    lines_left = (noisy / "train.jsonl").read_text().split("\n")[:-1]
    assert len(lines_left) == 16
    read = classification(TrainingData(train=made.shares[1].folder))
    assert (len(read.train), read.labels) == (16, ("-", "--1"))


def test_two_hundred_contributors_with_a_handful_each_can_train_and_validate(
    tmp_path: Path,
) -> None:
    way = {"by": "dirichlet", "alpha": 1.0, "minimum": 4}
    made = make(config(way, tasks=["digits-0123456"]), 200, 0, tmp_path / "data")
    assert len(made.shares) == 200
    for share in made.shares:
        train, validation = (
            lines(share.folder / f"{part}.jsonl") for part in ("train", "validation")
        )
        assert len(train) + len(validation) >= 4
        assert {row["label"] for row in validation} <= {row["label"] for row in train}
        assert len({row["label"] for row in train}) >= 2
        assert validation


@pytest.mark.parametrize("by", ["task", {"by": "dirichlet", "alpha": 0.3}, "iid"])
def test_the_digits_train_whatever_share_of_them_one_holds(tmp_path: Path, by: Any) -> None:
    made = make(config(by), 7, 1, tmp_path / "data")
    assert made.names == tuple(f"org-{n}" for n in range(1, 8))
    assert [task.name for task in made.unseen] == ["digits-789"]
    assert len(made.seen) == (3 if by == "task" else 1)
    share = min(made.shares, key=lambda share: share.examples)
    trained = load_trainer(
        TrainConfig.parse({"trainer": digits.TRAINER, "data": str(share.folder), "lr": 1e-3})
    ).train(
        TrainJob(
            digits.pretrain(tmp_path / "base", 0),
            tmp_path / "out",
            None,
            TrainConfig.parse({"data": str(share.folder)}),
            0,
        )
    )
    assert trained.examples == share.examples == sum(share.labels.values())


def test_the_same_settings_give_the_same_bytes_and_are_read_again(tmp_path: Path) -> None:
    how = config({"by": "dirichlet", "alpha": 0.2})
    first, second = make(how, 12, 5, tmp_path / "a"), make(how, 12, 5, tmp_path / "b")
    other = make(how, 12, 6, tmp_path / "c")

    def bytes_of(folder: Path) -> dict[str, bytes]:
        return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*.jsonl")}

    assert bytes_of(tmp_path / "a") == bytes_of(tmp_path / "b") != bytes_of(tmp_path / "c")
    assert [s.labels for s in first.shares] == [s.labels for s in second.shares]
    assert [s.labels for s in first.shares] != [s.labels for s in other.shares]
    assert make(how, 12, 5, tmp_path / "a") == first
    with pytest.raises(ConflictError, match="another simulation"):
        make(how, 11, 5, tmp_path / "a")


def test_what_a_killed_run_left_is_made_again(tmp_path: Path) -> None:
    (tmp_path / ".data.partial").mkdir()
    (tmp_path / ".data.partial" / "junk").touch()
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "junk").touch()
    make(config("iid"), 3, 0, tmp_path / "data")
    assert not (tmp_path / ".data.partial").exists()
    assert not (tmp_path / "data" / "junk").exists()


def test_folders_of_any_name_with_words_as_labels(tmp_path: Path) -> None:
    parts = ("train", "validation", "test")
    for name in ("Müller & co", "b", "kept back"):
        task_folder(tmp_path / "sets" / name, texts(), parts)
    made = make(
        config("task", tmp_path, source="sets", unseen=["kept back"]), 4, 0, tmp_path / "data"
    )
    assert [share.task for share in made.shares] == ["Müller & co", "b"] * 2
    assert [task.name for task in made.seen] == ["Müller & co", "b"]
    assert [task.name for task in made.unseen] == ["kept back"]
    train = lines(made.shares[0].folder / "train.jsonl")
    assert {row["label"] for row in train} == {"no", "yes"}
    assert all("hospital" in row for row in train)
    assert {example.label for example in made.seen[0].test} == {0, 1}


def test_one_contributor_to_a_task_keeps_its_parts(tmp_path: Path) -> None:
    task_folder(tmp_path / "sets" / "a", texts(40), ("train", "test"))
    (tmp_path / "sets/a/validation.jsonl").write_text(
        "\n".join(json.dumps(row) for row in texts(12)) + "\n"
    )
    made = make(config("task", tmp_path, source="sets/a"), 1, 0, tmp_path / "data")

    def key(row: dict[str, Any]) -> int:
        return int(row["text"])

    assert sorted(lines(made.shares[0].folder / "train.jsonl"), key=key) == texts(40)
    assert sorted(lines(made.shares[0].folder / "validation.jsonl"), key=key) == texts(12)


def test_some_keep_only_a_share_of_what_they_were_dealt(tmp_path: Path) -> None:
    task_folder(tmp_path / "a", texts(90, ("one", "two", "three")))
    (tmp_path / "a/validation.jsonl").write_text(
        "\n".join(
            json.dumps({**row, "text": f"v{row['text']}"}) for row in texts(30, ("one", "two"))
        )
    )
    full, keeping = (
        make(config("iid", tmp_path, source="a", keeps=keeps), 2, 5, tmp_path / f"data-{place}")
        for place, keeps in enumerate(({}, {"org-2": 0.2}))
    )

    def held(made: Any, place: int, part: str) -> list[dict[str, Any]]:
        return lines(made.shares[place].folder / f"{part}.jsonl")

    for part in ("train", "validation"):
        assert held(full, 0, part) == held(keeping, 0, part)
        known = [row["text"] for row in held(full, 1, part)]
        kept = [row["text"] for row in held(keeping, 1, part)]
        assert set(kept) < set(known)
        assert len(kept) == round(0.2 * len(known))
    assert {row["label"] for row in held(keeping, 1, "train")} == {"one", "two", "three"}
    assert keeping.shares[1].examples == len(held(keeping, 1, "train"))


def test_a_share_that_is_too_small_to_train_on_is_refused(tmp_path: Path) -> None:
    task_folder(tmp_path / "a", texts(40))
    keeps = {"org-1": 0.001}
    assert wrong(tmp_path, "iid", 2, source="a", keeps=keeps) == "simulation.share_too_small"


def test_without_validation_each_contributor_sets_some_aside(tmp_path: Path) -> None:
    task_folder(tmp_path / "a", texts(60))
    made = make(
        config({"by": "column", "column": "hospital"}, tmp_path, source="a"),
        5,
        0,
        tmp_path / "data",
    )
    for share in made.shares:
        train, validation = (
            lines(share.folder / f"{part}.jsonl") for part in ("train", "validation")
        )
        assert 0 < len(validation) < len(train)
        assert {row["label"] for row in validation} <= {row["label"] for row in train}
    everybody = [
        row["text"]
        for share in made.shares
        for part in ("train", "validation")
        for row in lines(share.folder / f"{part}.jsonl")
    ]
    assert sorted(everybody, key=int) == [str(n) for n in range(60)]


def test_columns_are_mapped(tmp_path: Path) -> None:
    rows = [{"utterance": f"u{n}", "intent": n % 3} for n in range(30)]
    task_folder(tmp_path / "a", rows)
    columns = {"text": "utterance", "label": "intent"}
    made = make(config("iid", tmp_path, source="a", columns=columns), 2, 0, tmp_path / "data")
    assert set(lines(made.shares[0].folder / "train.jsonl")[0]) == {"text", "label"}


def wrong(tmp_path: Path, partition: Any, contributors: int, **keys: Any) -> str:
    with pytest.raises(ColdmergeError) as caught:
        make(config(partition, tmp_path, **keys), contributors, 0, tmp_path / "data")
    assert caught.value.hint
    assert not (tmp_path / "data").exists()
    return caught.value.code


def test_what_cannot_be_dealt_is_refused(tmp_path: Path) -> None:
    task_folder(tmp_path / "a", texts(30))
    task_folder(tmp_path / "same", texts(30, ["one"]))
    task_folder(tmp_path / "no test", texts(30), ["train"])
    split = [{"text": f"{n}", "label": n % 2, "site": n % 2} for n in range(30)]
    task_folder(tmp_path / "split", split)
    column = {"by": "column", "column": "hospital"}
    found = {
        "more contributors than examples": wrong(tmp_path, "iid", 11, source="a"),
        "a minimum beyond the data": wrong(
            tmp_path, {"by": "dirichlet", "minimum": 8}, 4, source="a"
        ),
        "one class in all": wrong(tmp_path, "iid", 3, source="same"),
        "one class for one": wrong(tmp_path, {"by": "column", "column": "site"}, 2, source="split"),
        "absent column": wrong(tmp_path, {**column, "column": "ward"}, 3, source="a"),
        "few values": wrong(tmp_path, column, 8, source="a"),
        "absent part": wrong(tmp_path, "iid", 2, source="no test"),
        "absent text": wrong(tmp_path, "iid", 2, source="a", columns={"text": "body"}),
        "absent folder": wrong(tmp_path, "iid", 2, source="nowhere"),
        "absent task": wrong(tmp_path, "iid", 2, source="a", tasks=["b"]),
        "all unseen": wrong(tmp_path, "iid", 2, source="a", unseen=["a"]),
        "no such digits": wrong(tmp_path, "iid", 2, tasks=["letters"]),
        "no such library": wrong(tmp_path, "iid", 2, source="documentation", tasks=["cobol"]),
    }
    assert found == {
        "more contributors than examples": "simulation.too_few_examples",
        "a minimum beyond the data": "simulation.too_few_examples",
        "one class in all": "simulation.one_class",
        "one class for one": "simulation.one_class",
        "absent column": "simulation.no_column",
        "few values": "simulation.too_few_values",
        "absent part": "simulation.no_split",
        "absent text": "simulation.no_label_or_text",
        "absent folder": "simulation.no_source",
        "absent task": "simulation.no_task",
        "all unseen": "simulation.no_task",
        "no such digits": "demo.unknown_digits",
        "no such library": "demo.unknown_library",
    }


@pytest.mark.parametrize(
    ("line", "code"),
    [
        ("{", "simulation.bad_line"),
        ("[1]", "simulation.bad_line"),
        ('{"label": 1}', "simulation.no_label_or_text"),
        ('{"text": "a"}', "simulation.no_label_or_text"),
        ('{"text": "a", "label": null}', "simulation.bad_label"),
        ('{"text": "a", "label": [1]}', "simulation.bad_label"),
        ("", "simulation.empty_split"),
    ],
)
def test_a_line_that_is_no_example_is_named(tmp_path: Path, line: str, code: str) -> None:
    task_folder(tmp_path / "a", texts(30))
    (tmp_path / "a/train.jsonl").write_text(line + "\n")
    assert wrong(tmp_path, "iid", 2, source="a") == code


def test_tasks_of_a_simulation_are_folders_like_any_other(tmp_path: Path) -> None:
    make(config("task"), 3, 0, tmp_path / "data")
    task = folders.load(tmp_path / "data/tasks/seen/00/digits-234")
    assert task.train == digits.task("digits-234", 0).train
    with pytest.raises(DataError):
        folders.load(tmp_path / "data/org-1")
