from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from coldmerge.core.errors import ColdmergeError, ConfigError, DataError
from coldmerge_client.training import TrainConfig, data, tables

Write = Callable[[Path, list[dict[str, Any]]], Path]

ROWS: list[dict[str, Any]] = [
    {"text": "NA", "label": "yes"},
    {"text": "null and void", "label": "no"},
    {"text": 'a "quoted", text', "label": "yes"},
    {"text": "ünïcode — €", "label": "no"},
]


def config(folder: Path, **settings: Any) -> Any:
    return TrainConfig.parse({"data": {"train": folder, **settings}}).data


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        with path.open("w", newline="") as file:
            delimiter = "\t" if path.suffix == ".tsv" else ","
            table = csv.DictWriter(file, list(rows[0]), delimiter=delimiter)
            table.writeheader()
            table.writerows(rows)
    return path


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl", ".parquet"])
def test_every_format_gives_the_same_examples(tmp_path: Path, suffix: str) -> None:
    write(tmp_path / f"train{suffix}", ROWS)
    write(tmp_path / f"validation{suffix}", ROWS[:2])
    found = data.classification(config(tmp_path))
    assert [example.text for example in found.train] == [row["text"] for row in ROWS]
    assert found.labels == ("no", "yes")
    assert [example.label for example in found.train] == [1, 0, 1, 0]
    assert len(found.validation) == 2


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_integer_labels_sort_as_numbers_and_may_have_names(tmp_path: Path, suffix: str) -> None:
    rows = [{"text": f"text {number}", "label": number} for number in (10, 9, 2, 0)]
    path = write(tmp_path / f"train{suffix}", rows)
    assert data.classification(config(path, validation=path)).labels == ("0", "2", "9", "10")
    names = [f"class {number}" for number in range(11)]
    named = data.classification(config(path, validation=path, labels=names))
    assert named.labels == tuple(names)
    assert [example.label for example in named.train] == [10, 9, 2, 0]


def test_columns_can_be_called_anything(tmp_path: Path) -> None:
    rows = [
        {"first": f"one {n}", "second": f"two {n}", "class": str(n % 2), "text_pair": "no"}
        for n in range(9)
    ]
    path = write(tmp_path / "train.csv", rows)
    columns = {"text": "first", "text_pair": "second", "label": "class"}
    found = data.classification(config(path, columns=columns))
    assert found.train[0].pair is not None
    assert found.train[0].pair.startswith("two")


def test_a_missing_column_lists_those_that_exist(tmp_path: Path) -> None:
    path = write(tmp_path / "train.jsonl", [{"sentence": "a b", "topic": "x"}])
    with pytest.raises(DataError) as caught:
        data.classification(config(path))
    assert caught.value.code == "data.missing_column"
    assert caught.value.got == "sentence, topic"


def test_rows_without_text_are_dropped_and_counted(tmp_path: Path) -> None:
    rows = [*ROWS, {"text": "", "label": "yes"}, {"text": "  ", "label": "no"}]
    for suffix in (".csv", ".jsonl"):
        path = write(tmp_path / f"train{suffix}", rows)
        valid = write(tmp_path / f"validation{suffix}", rows[:1])
        found = data.classification(config(path, validation=valid))
        assert (len(found.train), found.dropped) == (4, 2)


@pytest.mark.parametrize(
    ("train", "validation", "code"),
    [
        (ROWS, [{"text": "what", "label": "maybe"}], "data.unseen_labels"),
        (ROWS[:1] * 3, ROWS[:1], "data.one_class"),
        ([{"text": "", "label": "yes"}], ROWS, "data.empty"),
        (ROWS, [{"text": " ", "label": "yes"}], "data.empty"),
        ([*ROWS, {"text": "x", "label": None}], ROWS, "data.bad_label"),
        ([{"text": "x", "label": 0.5}], ROWS, "data.bad_label"),
    ],
)
def test_data_that_cannot_be_used_is_refused(
    tmp_path: Path, train: list[dict[str, Any]], validation: list[dict[str, Any]], code: str
) -> None:
    write(tmp_path / "train.jsonl", train)
    write(tmp_path / "validation.jsonl", validation)
    with pytest.raises(DataError) as caught:
        data.classification(config(tmp_path))
    assert caught.value.code == code


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "broken.jsonl").write_text('{"text": "a secret", "label"\n')
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 no more")
    (tmp_path / "binary.csv").write_bytes(bytes(range(256)) * 4)
    (tmp_path / "table.xlsx").write_bytes(b"PK")
    (tmp_path / "folder").mkdir()
    for name, code in (
        ("empty.jsonl", "data.empty"),
        ("broken.jsonl", "data.unreadable"),
        ("broken.parquet", "data.unreadable"),
        ("binary.csv", "data.unreadable"),
        ("table.xlsx", "data.unknown_format"),
        ("absent.jsonl", "data.no_file"),
        ("folder", "data.no_train_file"),
    ):
        with pytest.raises(DataError) as caught:
            data.classification(config(tmp_path / name))
        assert caught.value.code == code, name
        assert "secret" not in str(caught.value)


def test_without_a_validation_file_a_stable_share_is_held_out(tmp_path: Path) -> None:
    rows = [{"text": f"text {number}", "label": str(number % 3)} for number in range(200)]
    rows.append({"text": "the only one", "label": "rare"})
    path = write(tmp_path / "train.jsonl", rows)
    before = data.classification(config(path))
    assert 20 < len(before.validation) < 60
    write(path, [*rows[::-1], {"text": "late", "label": "0"}])
    after = data.classification(config(path))
    held = {example.text for example in before.validation}
    assert held <= {example.text for example in after.validation}
    assert "the only one" not in held
    assert held.isdisjoint(example.text for example in after.train)
    write(path, rows[:1])
    with pytest.raises(DataError) as caught:
        data.classification(config(path))
    assert caught.value.code == "data.too_few_to_hold_out"


def test_known_labels_keep_their_places(tmp_path: Path) -> None:
    path = write(tmp_path / "train.jsonl", ROWS)
    found = data.classification(config(path, validation=path), ("yes", "other"))
    assert found.labels == ("yes", "other", "no")
    assert [example.label for example in found.train] == [0, 2, 0, 2]


def test_a_subset_shows_every_class(tmp_path: Path) -> None:
    rows = [{"text": f"text {number}", "label": str(max(0, number - 95))} for number in range(100)]
    path = write(tmp_path / "train.jsonl", rows)
    found = data.classification(config(path, validation=path))
    chosen = data.subset(found.train, 10, 1)
    assert len(chosen) == 10
    assert {example.label for example in chosen} == {0, 1, 2, 3, 4}
    assert chosen == data.subset(found.train, 10, 1) != data.subset(found.train, 10, 2)
    assert data.subset(found.train, None, 1) == list(found.train)


def test_words_and_tags_must_align(tmp_path: Path) -> None:
    path = write(tmp_path / "train.jsonl", [{"tokens": ["a", "b"], "tags": ["O"]}])
    with pytest.raises(DataError) as caught:
        data.tokens(config(path))
    assert caught.value.code == "data.unaligned_tags"
    rows = [{"tokens": "two words", "tags": "O X"}, {"tokens": "three words", "tags": "O O"}]
    path = write(tmp_path / "train.csv", rows)
    found = data.tokens(config(path, validation=path))
    assert (found.train[0].text, found.train[0].label) == (("two", "words"), (0, 1))


def test_nothing_is_left_in_the_scratch_folder(tmp_path: Path) -> None:
    path = write(tmp_path / "train.jsonl", ROWS)
    scratch = tmp_path / "scratch"
    tables.read_table(path, scratch)
    assert list(scratch.iterdir()) == []
    assert scratch.stat().st_mode & 0o077 == 0


def test_the_digest_follows_the_bytes_not_the_place(tmp_path: Path) -> None:
    one = tables.digest(config(write(tmp_path / "one" / "train.jsonl", ROWS)))
    two = tables.digest(config(write(tmp_path / "two" / "train.jsonl", ROWS)))
    assert one == two
    write(tmp_path / "two" / "train.jsonl", ROWS[:3])
    assert tables.digest(config(tmp_path / "two")) != one


def test_the_configuration_file(tmp_path: Path) -> None:
    path = tmp_path / "model.yaml"
    path.write_text("data: texts\nepochs: 2\nlora: {r: 8}\n")
    found = TrainConfig.load(path)
    assert found.data.train == tmp_path / "texts"
    assert found.lora.r == 8
    assert found.head_rate == pytest.approx(10 * found.lr)
    for text, code in (
        ("data: texts\nepoch: 2\n", "training.bad_config"),
        ("epochs: 2\n", "training.bad_config"),
        ("data: texts\nlr: fast\n", "training.bad_config"),
        ("- a list\n", "training.bad_config"),
        ("data: [\n", "training.not_yaml"),
    ):
        path.write_text(text)
        with pytest.raises(ConfigError) as caught:
            TrainConfig.load(path)
        assert caught.value.code == code
        assert isinstance(caught.value, ColdmergeError)
    with pytest.raises(ConfigError) as caught:
        TrainConfig.load(tmp_path / "absent.yaml")
    assert caught.value.code == "training.no_config"
