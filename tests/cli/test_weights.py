"""`coldmerge diff` and `coldmerge similarity`, as typed."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path

import numpy as np
import pytest

from coldmerge.cli.weights import names_of, with_others
from coldmerge.core.dtypes import Floats32
from coldmerge.core.similarity import Sums
from tests.cli.conftest import Command
from tests.support import write_model

SHAPES = {"embed.weight": (20, 8), "h.0.q.weight": (8, 8), "h.1.q.weight": (8, 8), "norm": (8,)}


def draw(seed: int) -> dict[str, Floats32]:
    rng = np.random.default_rng(seed)
    return {name: rng.standard_normal(s).astype(np.float32) for name, s in SHAPES.items()}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """base, and law and math that moved from it."""
    for seed, name in enumerate(("base", "law", "math")):
        change = draw(seed)
        write_model(tmp_path / name, {n: x + change[n] * bool(seed) for n, x in draw(0).items()})
    return tmp_path


def test_diff_of_folders(coldmerge: Command, root: Path) -> None:
    found = coldmerge("diff", root / "base", root / "law", "--format", "json").json
    change = draw(1)
    norms = {name: float(np.linalg.norm(x.astype(np.float64))) for name, x in change.items()}
    assert [row["tensor"] for row in found["tensors"]] == sorted(SHAPES)
    for row in found["tensors"]:
        assert math.isclose(row["norm"], norms[row["tensor"]], rel_tol=1e-5)
    assert [row["layer"] for row in found["layers"]] == ["embeddings", "h.0", "h.1", "other"]
    assert math.isclose(found["total"]["norm"], math.hypot(*norms.values()), rel_tol=1e-5)
    assert found["total"]["changed_fraction"] == 1
    assert found["only_in_a"] == found["only_in_b"] == found["shapes_differ"] == []
    top = coldmerge("diff", root / "base", root / "law", "--top", 2, "--format", "json").json
    most = sorted(norms, key=lambda name: -norms[name])[:2]
    assert [row["tensor"] for row in top["tensors"]] == most
    assert top["total"] == found["total"]


def test_diff_reads_for_people(coldmerge: Command, root: Path) -> None:
    said = coldmerge("diff", root / "base", root / "law").out
    for text in ("h.1.q.weight", "embeddings", "relative norm", "total norm"):
        assert text in said
    assert "Every value is the same" in coldmerge("diff", root / "law", root / "law").out
    assert "Every value is the same" not in said
    odd = draw(0) | {"norm": np.ones(9, np.float32), "new": np.ones(1, np.float32)}
    said = coldmerge("diff", root / "base", write_model(root / "odd", odd)).out
    assert "norm: F32 [8] and F32 [9]" in said
    assert "only in b" in said
    assert "Every value is the same" not in said


def test_diff_of_a_task_vector_is_that_of_its_folder(coldmerge: Command, root: Path) -> None:
    vector = root / "v.safetensors"
    made = coldmerge("extract", root / "base", root / "law", vector, "--format", "json").json
    by_vector = coldmerge("diff", root / "base", vector, "--format", "json").json
    by_folder = coldmerge("diff", root / "base", root / "law", "--format", "json").json
    for key in ("tensors", "layers", "total"):
        assert by_vector[key] == by_folder[key]
    assert math.isclose(made["norm"], by_folder["total"]["norm"], rel_tol=1e-12)
    other = coldmerge("diff", root / "math", vector, "--format", "json")
    assert other.status == 3
    assert other.json["error"]["code"] == "task_vector.other_base"


def test_similarity(coldmerge: Command, root: Path) -> None:
    arguments = ["similarity", root / "base", root / "law", root / "math", root / "base"]
    found = coldmerge(*arguments, "--per-layer", "--format", "json").json
    assert [model["name"] for model in found["models"]] == ["law", "math", "base"]
    one, two = (np.concatenate([draw(n)[s].reshape(-1) for s in SHAPES]) for n in (1, 2))
    cosine = float(one @ two / np.linalg.norm(one) / np.linalg.norm(two))
    assert math.isclose(found["cosine"][0][1], cosine, abs_tol=1e-5)
    assert found["cosine"][2] == [None, None, None]
    assert found["sign_agreement"][0][0] == 1
    assert [layer["layer"] for layer in found["layers"]] == ["embeddings", "h.0", "h.1", "other"]
    said = coldmerge(*arguments, "--per-layer").out
    for text in ("1 law", "2 math", "3 base", "1.000", "–", "mean cosine by layer"):
        assert text in said


@pytest.mark.parametrize("suffix", [".svg", ".png", ".html"])
def test_the_picture(coldmerge: Command, root: Path, suffix: str) -> None:
    picture = root / f"p{suffix}"
    arguments = ["similarity", root / "base", root / "law", root / "math", "--per-layer"]
    assert f"p{suffix}" in coldmerge(*arguments, "--picture", picture).out
    assert picture.stat().st_size > 1000
    if suffix == ".svg":
        assert "by layer" in picture.read_text()


def test_a_picture_that_cannot_be_drawn_is_refused_at_once(
    coldmerge: Command, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["similarity", root / "nowhere", root / "law", "--format", "json", "--picture"]
    said = coldmerge(*arguments, "p.jpg")
    assert (said.status, said.json["error"]["code"]) == (2, "report.unknown_picture")
    real = importlib.util.find_spec
    monkeypatch.setattr(
        "coldmerge.cli.weights.find_spec", lambda name: None if name == "altair" else real(name)
    )
    said = coldmerge(*arguments, "p.png")
    assert (said.status, said.json["error"]["code"]) == (2, "report.not_installed")
    assert "pip install 'coldmerge[report]'" in said.err


def test_refusals(coldmerge: Command, root: Path) -> None:
    broken = draw(1)
    broken["norm"][0] = np.inf
    write_model(root / "broken", broken)
    for verb in ("diff", "similarity"):
        said = coldmerge(verb, root / "base", root / "broken")
        assert said.status == 3
        assert "weights.not_finite" in said.err
        assert "hint:" in said.err
        assert "tensor: norm" in said.err
        assert "broken" in said.err
        assert coldmerge(verb, root / "base", root / "nowhere").status == 6
        assert "checkpoint.no_safetensors" in coldmerge(verb, root / "no", root / "law").err


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (["a/x", "b/y.safetensors"], ["x", "y"]),
        (["a/x", "b/x"], ["a/x", "b/x"]),
        (["x/v1.2", "x/v1.3"], ["v1.2", "v1.3"]),
        (["x", "x"], ["x (1)", "x (2)"]),
    ],
)
def test_names_differ(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, paths: list[str], names: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert names_of([Path(path) for path in paths]) == names


def test_the_mean_with_the_others_leaves_out_what_is_not_there() -> None:
    dots = np.array([[1.0, 0.5, 0], [0.5, 1.0, 0], [0, 0, 0]])
    assert with_others(Sums(dots, dots, dots)) == [0.5, 0.5, None]
