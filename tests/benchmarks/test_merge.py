from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from benchmarks import merge, peers
from benchmarks.agreement import compare, cuts, left_open
from benchmarks.llama import Llama, write
from benchmarks.merge_plans import METHODS, Inputs, plan
from benchmarks.processes import measure
from coldmerge.core.checkpoint import Checkpoint
from tests.support import write_model

TINY = "20000"
FIELDS = {"method", "sources", "dtype", "ours_s", "mergekit_s", "floor_s", "speedup"} | {
    "floor_ratio",
    "ours_rss_mb",
    "mergekit_rss_mb",
    "rss_ratio",
    "ours_anon_mb",
    "mergekit_anon_mb",
    "max_diff",
}
Array = np.ndarray[Any, Any]


@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
def test_a_tiny_run_without_mergekit(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], dtype: str
) -> None:
    asked = ["--sources", "2", "--dtype", dtype, "--methods", "linear,ties,ties_trim,slerp"]
    options = ["--repeats", "1", "--parameters", TINY, "--no-peer", "--work", str(tmp_path)]
    assert merge.main([*asked, *options, "--format", "json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["machine"]["processors"] >= 1
    assert [one["method"] for one in printed["rows"]] == ["linear", "ties", "ties_trim", "slerp"]
    assert [one["sources"] for one in printed["rows"]] == [2, 2, 2, 1]
    for one in printed["rows"]:
        assert set(one) >= FIELDS
        assert one["dtype"] == dtype
        assert one["mergekit_s"] is one["speedup"] is one["max_diff"] is None
        assert one["ours_s"] > 0 < one["floor_s"]
        assert 10 < one["ours_anon_mb"] < one["ours_rss_mb"] < 1000
    assert list(tmp_path.iterdir()) == []


def test_the_default_model_has_the_quoted_size() -> None:
    shape = Llama.of(109_500_000)
    assert round(shape.parameters / 1e6, 1) == 109.5
    assert json.loads(shape.config("float32"))["num_attention_heads"] == 12


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_models_are_seeded_and_fine_tunes_lie_near_their_base(tmp_path: Path, dtype: str) -> None:
    shape = Llama.of(int(TINY))
    base = write(tmp_path / "base", shape, dtype, seed=0)
    folders = [write(tmp_path / name, shape, dtype, base=base, seed=1) for name in ("a", "b")]
    bytes_of = [(folder / "model.safetensors").read_bytes() for folder in folders]
    assert bytes_of[0] == bytes_of[1]
    one, origin = Checkpoint.open(folders[0]), Checkpoint.open(base)
    name = "model.embed_tokens.weight"
    size = origin.tensors[name].size
    move = one.block(name, 0, size) - origin.block(name, 0, size)
    assert 0.8e-3 < move.std() < 1.2e-3


def test_plans_name_the_base_only_where_the_method_has_one(tmp_path: Path) -> None:
    inputs = Inputs(tmp_path / "base", [tmp_path / "a", tmp_path / "b"])
    linear = yaml.safe_load(plan(METHODS["linear"], inputs, "float32"))
    assert "base_model" not in linear
    assert "out_dtype" not in linear
    ties = yaml.safe_load(plan(METHODS["ties"], inputs, "bfloat16"))
    assert ties["base_model"] == str(tmp_path / "base")
    assert ties["models"][1]["parameters"] == {"weight": 1.0, "density": 0.2}
    assert (ties["dtype"], ties["out_dtype"]) == ("float32", "bfloat16")


def test_shipped_thresholds_are_asked_for_where_inputs_ship_them(tmp_path: Path) -> None:
    vector = tmp_path / "a.safetensors"
    vector.write_bytes(b"")
    trim = METHODS["ties_trim"]
    ours = yaml.safe_load(plan(trim, Inputs(tmp_path / "base", [vector]), "float32"))
    assert ours["parameters"] == {"thresholds": "shipped"}
    theirs = yaml.safe_load(plan(trim, Inputs(tmp_path / "base", [tmp_path]), "float32"))
    assert "parameters" not in theirs


def test_an_unknown_method_is_refused_with_the_known_ones(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit):
        merge.main(["--methods", "linear,nonsense"])
    said = capsys.readouterr().err
    assert "nonsense" in said
    assert "breadcrumbs" in said


def test_a_disk_that_is_too_small_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    huge = str(10**15)
    with pytest.raises(SystemExit, match=r"needs [\d.]+ GB.*--work"):
        merge.main(["--no-peer", "--parameters", huge, "--work", str(tmp_path)])
    assert list(tmp_path.iterdir()) == []


def test_methods_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert merge.main(["--list"]) == 0
    assert capsys.readouterr().out.split() == list(METHODS)


def test_a_process_is_measured() -> None:
    grown = "x = b'1' * 200_000_000; import threading; threading.Event().wait(0.1)"
    measured = measure([sys.executable, "-c", grown], limit=60)
    assert measured.seconds >= 0.1
    assert 200e6 < measured.anonymous <= measured.rss < 400e6


def test_a_process_beyond_its_limit_is_ended_with_its_children(tmp_path: Path) -> None:
    note = tmp_path / "pid"
    script = f"tail -f /dev/null & echo $! > {note}; wait"
    with pytest.raises(SystemExit, match="after its limit of 1 s"):
        measure(["sh", "-c", script], limit=1)
    state = Path(f"/proc/{int(note.read_text())}/stat")
    assert not state.exists() or state.read_text().split()[2] == "Z"


def test_a_process_that_fails_is_quoted() -> None:
    with pytest.raises(SystemExit, match="what went wrong"):
        measure(["sh", "-c", "echo what went wrong; exit 3"], limit=60)


def test_a_folder_that_is_no_environment_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("precious")
    with pytest.raises(SystemExit, match="no Python environment"):
        peers.mergekit(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def _folders(tmp_path: Path, ours: Array, theirs: Array, sources: list[Array]) -> Any:
    write = {"base": np.zeros_like(ours), "ours": ours, "theirs": theirs}
    for name, array in write.items():
        write_model(tmp_path / name, {"w": array})
    tuned = [
        write_model(tmp_path / f"tuned-{place}", {"w": source})
        for place, source in enumerate(sources)
    ]
    return Inputs(tmp_path / "base", tuned), tmp_path / "ours", tmp_path / "theirs"


def test_a_wrong_merge_is_noticed(tmp_path: Path) -> None:
    right = np.linspace(-1, 1, 50, dtype=np.float32)
    wrong = right.copy()
    wrong[3] += 1e-3
    found = compare(METHODS["linear"], *_folders(tmp_path, wrong, right, [right]))
    assert not found.agrees
    assert found.largest == pytest.approx(1e-3, rel=1e-3)


def test_only_ties_at_the_cut_may_differ(tmp_path: Path) -> None:
    delta = np.array([4, 3, 3, 2, 1, 1, 1, 1, 1, 1], np.float32)
    ours, theirs = np.zeros((2, 10), np.float32)
    ours[[0, 1]], theirs[[0, 2]] = delta[[0, 1]], delta[[0, 2]]
    inputs, a, b = _folders(tmp_path, ours, theirs, [delta])
    found = compare(METHODS["ties"], inputs, a, b)
    assert found.agrees
    assert (found.largest, found.open_share) == (0, 0.2)
    assert not compare(METHODS["task_arithmetic"], inputs, a, b).agrees


def test_cuts_are_mergekits() -> None:
    magnitude = np.arange(100, dtype=np.float32)
    assert cuts(METHODS["ties"], magnitude) == (80, np.inf)
    assert cuts(METHODS["breadcrumbs"], magnitude) == (79, 98)
    assert cuts(METHODS["breadcrumbs"], magnitude[:1]) == (np.inf, 0)


def test_sums_that_rounding_decides_are_left_open(tmp_path: Path) -> None:
    one = np.array([1, 1, 1, 1, 1], np.float32)
    other = np.array([-1, 1, -1, 1, 1], np.float32)
    inputs, _, _ = _folders(tmp_path, one, one, [one, other, 1e-7 * one])
    opened = [Checkpoint.open(path) for path in inputs.sources]
    found = left_open(METHODS["sce"], "w", Checkpoint.open(inputs.base), opened)
    assert found.tolist()[0]
    assert not found[1]


def test_random_merges_are_compared_by_their_length(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    one, other = generator.standard_normal((2, 10**5), np.float32)
    inputs, a, b = _folders(tmp_path, one, other, [one])
    found = compare(METHODS["dare_ties"], inputs, a, b)
    assert found.agrees
    assert found.norm_ratio == pytest.approx(1, abs=0.02)
    inputs, a, b = _folders(tmp_path / "again", one, np.float32(1.1) * other, [one])
    assert not compare(METHODS["dare_ties"], inputs, a, b).agrees
