"""Norms and counts of a change against numpy in float64."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from coldmerge.core import dtypes
from coldmerge.core.checkpoint import Checkpoint
from coldmerge.core.comparison import (
    Change,
    buffer_changes,
    by_layer,
    changes,
    layer_of,
    layer_order,
    match_sides,
)
from coldmerge.core.deltas import Tuned
from coldmerge.core.errors import ColdmergeError, TaskVectorError
from tests.support import write_model

Arrays = dict[str, np.ndarray[Any, Any]]
BF16 = dtypes.NUMPY["BF16"]


def pair(tmp_path: Path, a: Arrays, b: Arrays) -> tuple[Checkpoint, Checkpoint]:
    folders = (write_model(tmp_path / "a", a), write_model(tmp_path / "b", b))
    return Checkpoint.open(folders[0]), Checkpoint.open(folders[1])


@pytest.mark.parametrize("kinds", [("<f4", "<f4"), ("<f4", BF16), ("<f2", "<f4"), (BF16, BF16)])
@pytest.mark.parametrize("block", [7, 2**18])
def test_the_numbers_are_those_of_numpy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kinds: tuple[Any, Any], block: int
) -> None:
    monkeypatch.setattr(dtypes.blocks, "__defaults__", (block,))
    draw = np.random.default_rng(5)
    start = {f"h.{n}.w": draw.standard_normal((n + 1, 9)) for n in range(3)}
    end = {n: np.where(draw.random(x.shape) < 0.3, x, x + 0.5) for n, x in start.items()}
    a, b = pair(
        tmp_path,
        {n: x.astype(kinds[0]) for n, x in start.items()},
        {n: x.astype(kinds[1]) for n, x in end.items()},
    )
    sides = match_sides(a, b)
    told: list[int] = []
    found = changes(a, sides.delta, sides.delta.names, "b", told.append)
    assert list(found) == sorted(start)
    for name, change in found.items():
        one = a.array(name).astype(np.float32)
        delta = (b.array(name).astype(np.float32) - one).astype(np.float64)
        assert change.elements == delta.size
        assert change.changed == np.count_nonzero(delta)
        assert change.largest == np.abs(delta).max()
        assert math.isclose(change.norm, float(np.linalg.norm(delta)), rel_tol=1e-12)
        relative = float(np.linalg.norm(delta) / np.linalg.norm(one.astype(np.float64)))
        assert math.isclose(change.relative or 0, relative, rel_tol=1e-12)
        assert change.fraction == change.changed / delta.size
    assert sum(told) == sum(a.tensors[name].nbytes for name in start)
    total = sum(found.values(), Change())
    assert total == by_layer(dict(reversed(found.items())))["h.0"] + found["h.1.w"] + found["h.2.w"]


def test_what_cannot_be_compared_is_said(tmp_path: Path) -> None:
    ones = np.ones((2, 3), np.float32)
    a, b = pair(
        tmp_path,
        {"m.w": ones, "m.v": ones, "m.old": ones, "m.t": ones, "m.ids": np.arange(5)},
        {"w": ones, "v": ones.T, "new": ones, "t": ones.astype("<f2"), "ids": np.arange(5) // 4},
    )
    sides = match_sides(a, b)
    assert sides.delta.names == {"m.w", "m.t"}
    assert (sides.only_in_a, sides.only_in_b) == (("m.old",), ("new",))
    assert [(one.name, one.a, one.b) for one in sides.shapes] == [
        ("m.v", "F32 [2, 3]", "F32 [3, 2]")
    ]
    assert [(one.name, one.a, one.b) for one in sides.types] == [
        ("m.t", "F32 [2, 3]", "F16 [2, 3]")
    ]
    assert buffer_changes(a, b, sides.buffers) == {"m.ids": Change(elements=5, changed=4)}


def test_models_without_a_common_name_are_refused(tmp_path: Path) -> None:
    a, b = pair(tmp_path, {"x": np.ones(2, "<f4")}, {"y": np.ones(2, "<f4")})
    with pytest.raises(TaskVectorError) as caught:
        match_sides(a, b)
    assert caught.value.code == "weights.no_match"


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("side", ["a", "b"])
def test_a_nan_names_its_tensor_and_model(tmp_path: Path, bad: float, side: str) -> None:
    models = {key: {"x": np.ones(4, "<f4"), "y": np.ones(4, "<f4")} for key in "ab"}
    models[side]["y"][2] = bad
    a, b = pair(tmp_path, models["a"], models["b"])
    with pytest.raises(ColdmergeError) as caught:
        changes(a, match_sides(a, b).delta, ["x", "y"], str(b.folder))
    assert caught.value.code == "weights.not_finite"
    assert caught.value.ids == {"tensor": "y", "model": str(tmp_path / side)}


def test_untouched_tensors_count_as_unchanged(tmp_path: Path) -> None:
    a, b = pair(
        tmp_path, {"x": np.ones(4, "<f4"), "y": np.ones(9, "<f4")}, {"x": np.ones(4, "<f4")}
    )
    found = changes(a, Tuned(a, b, {"x": "x"}), ["x", "y"], "b")
    assert found["y"] == Change(elements=9, base_squares=9.0)
    assert Change().relative is None
    assert Change().fraction == 0


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("encoder.layer.3.attention.self.query.weight", "encoder.layer.3"),
        ("model.layers.10.mlp.experts.7.w1.weight", "model.layers.10"),
        ("0.auto_model.encoder.layer.2.x", "0.auto_model.encoder.layer.2"),
        ("decoder.block.0.layer.1.x", "decoder.block.0"),
        ("model.embed_tokens.weight", "embeddings"),
        ("embeddings.LayerNorm.bias", "embeddings"),
        ("transformer.wte.weight", "embeddings"),
        ("pooler.dense.weight", "other"),
        ("lm_head.weight", "other"),
    ],
)
def test_the_layer_of_a_name(name: str, layer: str) -> None:
    assert layer_of(name) == layer


@given(st.permutations(["embeddings", "a.1", "a.2", "a.10", "b.0", "other"]))
def test_layers_stand_in_the_order_of_the_model(layers: list[str]) -> None:
    assert sorted(layers, key=layer_order) == ["embeddings", "a.1", "a.2", "a.10", "b.0", "other"]
