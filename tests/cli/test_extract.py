"""`coldmerge extract`, as typed."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from coldmerge.core.checkpoint import Checkpoint
from coldmerge.core.deltas import open_delta
from coldmerge.core.digests import content_entries
from coldmerge.core.task_vector import TaskVector
from tests.cli.conftest import Command
from tests.support import write_model

SHAPES = {
    "classifier.weight": (3, 8),
    "embed.weight": (20, 8),
    "h.0.k.weight": (8, 8),
    "h.0.q.weight": (8, 16),
    "norm.weight": (8,),
}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """base, and tuned, of which only the key projection did not move."""
    rng = np.random.default_rng(0)
    start = {n: rng.standard_normal(s).astype(np.float32) for n, s in SHAPES.items()}
    end = {n: x + rng.standard_normal(x.shape).astype(np.float32) for n, x in start.items()}
    write_model(tmp_path / "base", start)
    write_model(tmp_path / "tuned", end | {"h.0.k.weight": start["h.0.k.weight"]})
    return tmp_path


@pytest.mark.parametrize("encoding", ["fp32", "bf16"])
def test_a_task_vector(coldmerge: Command, root: Path, encoding: str) -> None:
    base, out = Checkpoint.open(root / "base"), root / "deep/v.safetensors"
    options = ["--encoding", encoding, "--private", "classifier.*", "--trim", "0.25"]
    said = coldmerge("extract", base.folder, root / "tuned", out, *options, "--format", "json")
    vector = TaskVector.open(out)
    assert vector.base_digest == content_entries(base).digest == said.json["base_digest"]
    assert vector.names == {"embed.weight", "h.0.q.weight", "norm.weight"}
    assert vector.encoding == encoding
    assert said.json["left_out"] == [
        {"tensor": "classifier.weight", "reason": "private: classifier.*"}
    ]
    assert said.json["unchanged"] == ["h.0.k.weight"]
    assert said.json["statistics"] == {"trim": 0.25}
    magnitudes = np.sort(np.abs(vector.block("h.0.q.weight", 0, 128)))
    assert vector.statistic("h.0.q.weight", "trim", 0, 1) == magnitudes[-32]


def test_an_adapter(coldmerge: Command, root: Path) -> None:
    out = root / "adapter"
    arguments = ["extract", root / "base", root / "tuned", out, "--rank", 4]
    found = coldmerge(*arguments, "--alpha", 6, "--format", "json").json
    base = Checkpoint.open(root / "base")
    delta, exact = open_delta(base, out), open_delta(base, root / "tuned")
    assert delta.names == {"classifier.weight", "h.0.q.weight"}
    total = lost = 0.0
    for name, spec in base.tensors.items():
        one = exact.block(name, 0, spec.size).astype(np.float64)
        two = delta.block(name, 0, spec.size) if name in delta.names else 0
        total += float(np.square(one).sum())
        lost += float(np.square(one - two).sum())
    assert math.isclose(
        found["relative_error_with_left_out"], math.sqrt(lost / total), rel_tol=1e-5
    )
    assert [row["tensor"] for row in found["matrices"]] == sorted(delta.names)
    assert {row["left_out"] for row in found["left_out"]} == {"embed.weight", "norm.weight"}
    assert math.isclose(
        found["share_left_out"], sum(row["share"] for row in found["left_out"]), rel_tol=1e-12
    )
    assert found["rank_clipped"] == ["classifier.weight"]
    assert found["unchanged"] == ["h.0.k.weight"]
    config = json.loads((out / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (4, 6)
    assert config["rank_pattern"] == {"classifier": 3}
    assert config["target_modules"] == ["classifier", "q"]
    assert sorted(path.name for path in root.iterdir()) == ["adapter", "base", "tuned"]


def test_an_adapter_of_some_modules_reads_for_people(coldmerge: Command, root: Path) -> None:
    out = root / "adapter"
    options = ["--rank", 2, "--targets", "q", "--encoding", "bf16"]
    said = coldmerge("extract", root / "base", root / "tuned", out, *options).out
    for text in ("h.0.q.weight", "not among the targets", "an embedding", "relative error"):
        assert text in said
    assert open_delta(Checkpoint.open(root / "base"), out).names == {"h.0.q.weight"}


def test_refusals(coldmerge: Command, root: Path) -> None:
    def code(*arguments: object, base: str = "base", tuned: str = "tuned") -> tuple[int, str]:
        said = coldmerge(
            "extract", root / base, root / tuned, root / "out", *arguments, "--format", "json"
        )
        assert said.json["error"]["hint"]
        assert not (root / "out").exists()
        return said.status, said.json["error"]["code"]

    assert code("--rank", 0) == (2, "low_rank.bad_rank")
    assert code("--rank", 4, "--alpha", 0) == (2, "low_rank.bad_rank")
    assert code("--rank", 4, "--trim", 0.2) == (2, "extract.wrong_option")
    assert code("--alpha", 4) == (2, "extract.wrong_option")
    assert code("--targets", "q") == (2, "extract.wrong_option")
    assert code("--trim", 0) == (2, "extract.bad_density")
    assert code("--rank", 4, "--targets", "k") == (3, "low_rank.nothing_to_factorize")
    assert code(tuned="nowhere") == (6, "weights.not_found")
    assert code(base="nowhere") == (3, "checkpoint.no_safetensors")
    assert code(tuned="base") == (3, "extract.nothing_changed")
    wide = {name: np.ones((5, 5), np.float32) for name in SHAPES}
    write_model(root / "wide", wide)
    assert code(tuned="wide") == (3, "extract.shape_mismatch")
    assert code("--rank", 2, tuned="wide") == (3, "extract.shape_mismatch")
    nan = {n: np.full(s, np.nan, np.float32) for n, s in SHAPES.items()}
    write_model(root / "nan", nan)
    assert code("--rank", 2, tuned="nan") == (3, "weights.not_finite")
    assert code(tuned="nan") == (3, "extract.not_finite")


@pytest.mark.parametrize("options", [[], ["--rank", 2]])
def test_nothing_is_written_over(coldmerge: Command, root: Path, options: list[object]) -> None:
    (root / "out").mkdir()
    (root / "out" / "mine").write_text("mine")
    said = coldmerge("extract", root / "base", root / "tuned", root / "out", *options)
    assert said.status == 7
    assert "weights.out_exists" in said.err
    assert (root / "out" / "mine").read_text() == "mine"


def test_factors_beyond_the_type_are_refused(coldmerge: Command, root: Path) -> None:
    out = root / "adapter"
    ran = coldmerge("extract", root / "base", root / "tuned", out, "--rank", 2, "--alpha", "1e-300")
    assert "[task_vector.not_finite]" in ran.err
    assert ran.status == 3
    assert not out.exists()


def test_a_place_that_cannot_be_written_is_said(coldmerge: Command, root: Path) -> None:
    file = root / "file"
    file.touch()
    ran = coldmerge("extract", root / "base", root / "tuned", file / "vector")
    assert (ran.status, "[file.refused]" in ran.err) == (2, True)
    assert str(file) in ran.err.replace("\n", "")
