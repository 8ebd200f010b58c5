"""Models whose vocabularies differ from the base's."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from coldmerge.core.checkpoint import Checkpoint
from coldmerge.core.errors import CheckpointError
from coldmerge.merging.plan import Opened, load
from coldmerge.merging.plan.vocabulary import Recoded, rows_of, tokens
from tests.merging.models import WORDS, llama, stored, tensors, write_plan
from tests.merging.plans import merged, plan_text, refused

BASE = tensors(0)
Q0, EMBED, HEAD = (
    "model.layers.0.self_attn.q_proj.weight",
    "model.embed_tokens.weight",
    "lm_head.weight",
)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return llama(tmp_path / "base")


def reordered(tmp_path: Path) -> tuple[Path, list[str]]:
    """A fine-tune with the base's words in another order, two gone and two new."""
    words = [*reversed(WORDS[2:]), "pad", "hello", "world"]
    return llama(tmp_path / "other", 1, words=words), words


def test_another_vocabulary_is_refused_with_the_flag_that_handles_it(
    tmp_path: Path, base: Path
) -> None:
    reordered(tmp_path)
    error = refused(tmp_path, plan_text("other"))
    assert error.code == "plan.vocabularies_differ"
    assert "--vocabulary base" in error.hint
    assert "tokenizer_source: base" in error.hint
    assert (str(error.expected)[:2], str(error.got)[:2]) == ("12", "13")


@pytest.mark.parametrize("by", ["flag", "plan", "name"])
def test_rows_are_matched_by_token_onto_the_bases_vocabulary(
    tmp_path: Path, base: Path, by: str
) -> None:
    folder, words = reordered(tmp_path)
    source = {"plan": "tokenizer_source: base", "name": "tokenizer: {source: base}", "flag": ""}
    found, notes = merged(
        tmp_path, plan_text("other", extra=source[by] + "\n"), by_token=by == "flag"
    )
    theirs = stored(folder)
    for name in (EMBED, HEAD):
        for row, word in enumerate(WORDS):
            expected = theirs[name][words.index(word)] if word in words else BASE[name][row]
            np.testing.assert_allclose(found[name][row], expected, atol=1e-6, err_msg=word)
    assert "2 tokens of the base are not in its vocabulary" in notes[0]
    tokenizer = (tmp_path / "out" / "tokenizer.json").read_bytes()
    assert tokenizer == (base / "tokenizer.json").read_bytes()


def test_rows_of_a_vocabulary_do_not_depend_on_blocks(tmp_path: Path, base: Path) -> None:
    reordered(tmp_path)
    plan = load(write_plan(tmp_path, plan_text("other")))
    with Opened(plan, by_token=True) as opened:
        source = opened.inputs[0].source
        whole = source.block(EMBED, 0, 96)
        parts = [source.block(EMBED, at, min(at + 13, 96)) for at in range(0, 96, 13)]
    np.testing.assert_array_equal(whole, np.concatenate(parts))


def test_the_same_size_with_other_words_is_refused_and_a_few_are_noted(
    tmp_path: Path, base: Path
) -> None:
    llama(tmp_path / "shuffled", 1, words=WORDS[::-1])
    error = refused(tmp_path, plan_text("shuffled"))
    assert error.code == "plan.vocabularies_differ"
    assert 'row 0 is "the" in the base and "away" here' in str(error.got)
    llama(tmp_path / "close", 1, words=[*WORDS[:-1], "<|im_end|>"])
    _, notes = merged(tmp_path, plan_text("close"))
    assert "8.33%" in notes[0]
    assert "`--vocabulary base`" in notes[0]


def test_a_vocabulary_that_is_not_there_cannot_be_matched(tmp_path: Path, base: Path) -> None:
    folder, _ = reordered(tmp_path)
    (folder / "tokenizer.json").unlink()
    assert refused(tmp_path, plan_text("other"), by_token=True).code == "plan.no_vocabulary"


@pytest.mark.parametrize(
    "body",
    [
        {"model": {"vocab": "abc"}},
        {"model": {"vocab": [1, 2]}},
        {"added_tokens": [1]},
        {"added_tokens": [{"content": [1], "id": 2}]},
    ],
)
def test_a_damaged_vocabulary_is_refused(
    tmp_path: Path, base: Path, body: dict[str, object]
) -> None:
    folder, _ = reordered(tmp_path)
    (folder / "tokenizer.json").write_text(json.dumps(body))
    error = refused(tmp_path, plan_text("other"), by_token=True)
    assert (error.code, "checkpoint.bad_tokenizer" in error.message) == (
        "plan.unusable_model",
        True,
    )


def test_a_line_of_a_vocabulary_ends_where_the_line_does_and_nowhere_else(tmp_path: Path) -> None:
    words = ["a", "b\u2028c", "d\x85", "e"]
    (tmp_path / "vocab.txt").write_text("\n".join(words) + "\n", "utf-8")
    assert tokens(tmp_path) == {word: row for row, word in enumerate(words)}
    (tmp_path / "vocab.txt").write_bytes(b"\xff\n")
    with pytest.raises(CheckpointError, match="bad_tokenizer"):
        tokens(tmp_path)


def test_the_vocabulary_of_another_model_than_the_base_is_refused(
    tmp_path: Path, base: Path
) -> None:
    llama(tmp_path / "one", 1)
    error = refused(tmp_path, plan_text("one", extra="tokenizer_source: one\n"))
    assert error.code == "plan.vocabulary_source"
    assert "line 5" in error.message


@pytest.mark.parametrize("kind", ["vocab.json", "vocab.txt", "unigram", "added"])
def test_vocabularies_are_read_in_every_form(tmp_path: Path, base: Path, kind: str) -> None:
    folder, words = reordered(tmp_path)
    table = {word: row for row, word in enumerate(words)}
    (folder / "tokenizer.json").unlink()
    if kind == "vocab.json":
        (folder / kind).write_text(json.dumps(table))
    elif kind == "vocab.txt":
        (folder / kind).write_text("\n".join(words) + "\n")
    elif kind == "unigram":
        pairs = {"model": {"type": "Unigram", "vocab": [[word, -1.0] for word in words]}}
        (folder / "tokenizer.json").write_text(json.dumps(pairs))
    else:
        added = [{"id": table.pop(word), "content": word} for word in words[:3]]
        body = {"model": {"vocab": table}, "added_tokens": added}
        (folder / "tokenizer.json").write_text(json.dumps(body))
    found, _ = merged(tmp_path, plan_text("other"), by_token=True)
    np.testing.assert_allclose(
        found[EMBED][WORDS.index("fox")], stored(folder)[EMBED][words.index("fox")], atol=1e-6
    )


def test_any_rows_of_a_vocabulary_are_read_in_any_pieces(tmp_path: Path, base: Path) -> None:
    model = Checkpoint.open(llama(tmp_path / "one", 1, words=[*WORDS, "more"]))
    opened, theirs = Checkpoint.open(base), stored(tmp_path / "one")[EMBED]
    draw = np.random.default_rng(5)
    for _ in range(30):
        rows = draw.permutation(np.r_[np.arange(len(theirs)), [-1, -1, -1]])[: len(WORDS)]
        if draw.random() < 0.5:
            rows.sort()
        source = Recoded(opened, model, {EMBED: EMBED}, "", rows, frozenset({EMBED}))
        expected = np.where(rows[:, None] >= 0, theirs[rows], BASE[EMBED]).reshape(-1)
        start, stop = sorted(draw.choice(expected.size + 1, 2, replace=False))
        np.testing.assert_array_equal(source.theta(EMBED, start, stop), expected[start:stop])


def test_tokens_without_a_row_have_none() -> None:
    base, model = {"a": 0, "b": 1, "c": 5}, {"a": 2, "b": 3, "z": 0}
    assert rows_of(base, model, count=4, available=3).tolist() == [2, -1, -1, -1]
