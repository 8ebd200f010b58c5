"""`coldmerge merge` and `coldmerge methods`, as they are typed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from huggingface_hub import ModelCard
from safetensors.numpy import save_file

from coldmerge.core.checkpoint import Checkpoint
from coldmerge.core.digests import content_entries
from coldmerge.core.errors import CheckpointError
from tests.cli.conftest import Command
from tests.merging.models import adapter, llama, stored, tensors, write_plan

ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join(entry for entry in sys.path if entry)}
NORM = "model.layers.0.input_layernorm.weight"
PLAN = """\
merge_method: ties
base_model: base
models:
  - model: one
    parameters: {density: 0.5}
  - model: two
dtype: bfloat16
"""


@pytest.fixture
def plan(tmp_path: Path) -> Path:
    """A plan beside its three models."""
    for seed, name in enumerate(("base", "one", "two")):
        llama(tmp_path / name, seed)
    return write_plan(tmp_path, PLAN)


def test_a_merged_folder_is_a_model_with_its_tokenizer_a_card_and_a_digest(
    coldmerge: Command, plan: Path, tmp_path: Path
) -> None:
    out = tmp_path / "new" / "merged"
    ran = coldmerge("merge", plan, out, "--format", "json")
    assert ran.status == 0, ran.err
    assert ran.json["digest"] == content_entries(Checkpoint.open(out)).digest
    assert ran.json["method"] == "ties"
    assert ran.json["inputs"] == ["one", "two"]
    assert json.loads((out / "config.json").read_text())["torch_dtype"] == "bfloat16"
    assert (out / "tokenizer.json").read_bytes() == (tmp_path / "base/tokenizer.json").read_bytes()
    assert {str(array.dtype) for array in stored(out).values()} == {"bfloat16"}
    card = ModelCard.load(out / "README.md")
    assert card.data.to_dict()["library_name"] == "transformers"
    assert PLAN in card.text
    assert "`ties`" in card.text


def test_the_digest_is_the_same_for_any_threads_shards_and_run(
    coldmerge: Command, plan: Path, tmp_path: Path
) -> None:
    found = []
    for number, options in enumerate(
        (["--threads", "1"], ["--threads", "2"], ["--shard-size", "1.5kB"])
    ):
        out = tmp_path / f"out{number}"
        found.append(coldmerge("merge", plan, out, *options, "--format", "json").json["digest"])
    assert len(set(found)) == 1
    assert len(list((tmp_path / "out2").glob("model-*-of-*.safetensors"))) > 1


def test_people_get_a_table_with_the_whole_digest(
    coldmerge: Command, plan: Path, tmp_path: Path
) -> None:
    ran = coldmerge("merge", plan, tmp_path / "out")
    assert content_entries(Checkpoint.open(tmp_path / "out")).digest in ran.out
    assert "one, two" in ran.out


def test_a_dry_run_says_what_it_would_take_and_writes_nothing(
    coldmerge: Command, plan: Path, tmp_path: Path
) -> None:
    before = sorted(tmp_path.iterdir())
    found = coldmerge("merge", plan, tmp_path / "out", "--dry-run", "--format", "json").json
    numbers = sum(array.size for array in tensors(0).values())
    assert found["tensors"] == found["merged"] == len(tensors(0))
    assert found["bytes_written"] == 2 * numbers
    assert found["bytes_read"] == 2 * 3 * 4 * numbers  # TIES reads everything twice
    assert found["memory_bytes"] > 10**7
    assert 0 < found["seconds"] < 60
    write_plan(tmp_path, "merge_method: linear\nmodels: [{model: one}, {model: two}]\n")
    found = coldmerge("merge", plan, tmp_path / "out", "--dry-run", "--format", "json").json
    assert found["bytes_read"] == 2 * 4 * numbers
    shown = coldmerge("merge", plan, tmp_path / "out", "--dry-run").out
    assert "estimates" in shown
    assert sorted(tmp_path.iterdir()) == before


def test_the_vocabulary_flag_is_that_of_the_hint(
    coldmerge: Command, plan: Path, tmp_path: Path
) -> None:
    llama(tmp_path / "other", 1, words=["fox", "the", "new"])
    write_plan(tmp_path, PLAN.replace("model: one", "model: other"))
    ran = coldmerge("merge", plan, tmp_path / "out")
    assert ran.status == 3
    assert "--vocabulary base" in ran.err
    ran = coldmerge("merge", plan, tmp_path / "out", "--vocabulary", "base")
    assert ran.status == 0
    assert "note: other: 10 tokens of the base are not in its vocabulary" in ran.err


def test_models_of_a_shelf_are_found_by_owner_and_name(
    coldmerge: Command, plan: Path, tmp_path: Path
) -> None:
    (tmp_path / "shelf" / "owner").mkdir(parents=True)
    (tmp_path / "one").rename(tmp_path / "shelf" / "owner" / "one")
    write_plan(tmp_path, PLAN.replace("model: one", "model: owner/one"))
    ran = coldmerge("merge", plan, tmp_path / "out", "--models", tmp_path / "shelf")
    assert ran.status == 0, ran.err
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert card.data.base_model == ["owner/one"]


@pytest.mark.parametrize("size", ["5 apples", "0GB", "-1MB", "9" * 400 + "GB"])
def test_a_shard_size_that_is_none_is_refused(
    coldmerge: Command, plan: Path, tmp_path: Path, size: str
) -> None:
    ran = coldmerge("merge", plan, tmp_path / "out", f"--shard-size={size}")
    assert ran.status == 2
    assert "5GB" in ran.err


BROKEN_PLANS = [
    ("parameters: {density: 0.5}", "paramters: {density: 0.5}", 5, "Did you mean `parameters`?"),
    ("density: 0.5", "density: 1.5", 5, "coldmerge methods ties"),
    ("merge_method: ties", "merge_method: passthrough", 1, "Use mergekit to stack layers"),
    ("dtype: bfloat16", "tokenizer_source: union", 7, "tokenizer_source: base"),
    ("dtype: bfloat16", "experts: [a, b]", 7, "mergekit-moe"),
    ("base_model: base", "base_model: [base", 3, "indentation"),
]


@pytest.mark.parametrize(("old", "new", "line", "hint"), BROKEN_PLANS)
def test_a_broken_plan_is_refused_with_line_and_hint(
    coldmerge: Command, plan: Path, tmp_path: Path, old: str, new: str, line: int, hint: str
) -> None:
    write_plan(tmp_path, PLAN.replace(old, new))
    ran = coldmerge("merge", plan, tmp_path / "out")
    assert ran.status == 2
    assert f"plan.yaml, line {line}, column" in ran.err
    assert hint in ran.err
    assert not (tmp_path / "out").exists()


def damage(tmp_path: Path, how: str) -> None:
    one, weights = tmp_path / "one", tmp_path / "one" / "model.safetensors"
    if how == "nan":
        found = stored(one)
        found[NORM][3] = np.nan
        save_file(found, weights)
    elif how == "header":
        weights.write_bytes(b"\xff" * 100)
    elif how == "short":
        weights.write_bytes(weights.read_bytes()[:-10])
    elif how == "density":
        write_plan(tmp_path, PLAN.replace("0.5", "0"))
    elif how == "weights":
        text = PLAN.replace("ties", "linear").replace("{density: 0.5}", "{weight: -1}")
        write_plan(tmp_path, text.replace("base_model: base\n", ""))
    elif how == "folder":
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "precious.txt").write_text("mine")
    else:
        found = stored(one)
        weights.unlink()
        places = {name: f"part-{name[0]}.safetensors" for name in found}
        for file in set(places.values()):
            save_file({n: x for n, x in found.items() if places[n] == file}, one / file)
        if how == "shard":
            (one / "part-l.safetensors").unlink()
        else:
            places["lm_head.weight"] = "part-m.safetensors"
        index = {"metadata": {}, "weight_map": places}
        (one / "model.safetensors.index.json").write_text(json.dumps(index))


DAMAGES = [
    ("nan", 3, f"Tensor {NORM} of input one holds NaN or infinity."),
    ("header", 3, "one cannot be merged."),
    ("short", 3, "A safetensors file is longer or shorter than its header says."),
    ("density", 2, "`density` of ties cannot be 0."),
    ("weights", 2, "The weights of a merge sum to zero, so they cannot be normalized."),
    ("folder", 7, "The folder to write exists already and is not empty."),
    ("shard", 3, "names a file that is not there"),
    ("index", 3, "disagree about tensor lm_head.weight"),
]


@pytest.mark.parametrize(("how", "status", "sentence"), DAMAGES)
def test_bad_input_is_refused_with_a_sentence_and_nothing_is_left(
    coldmerge: Command, plan: Path, tmp_path: Path, how: str, status: int, sentence: str
) -> None:
    damage(tmp_path, how)
    before = {path.name for path in tmp_path.iterdir()}
    ran = coldmerge("merge", plan, tmp_path / "out")
    assert ran.status == status
    assert sentence in ran.err
    assert "hint: " in ran.err
    assert "Traceback" not in ran.err
    assert {path.name for path in tmp_path.iterdir()} == before


_SMALL_DISK = """
import subprocess, sys
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16k", "tmpfs", sys.argv[2]], check=True)
sys.argv = ["coldmerge", "merge", sys.argv[1], sys.argv[2] + "/out"]
from coldmerge.cli import main
main()
"""


def test_a_disk_that_is_too_small_is_noticed_before_starting(plan: Path, tmp_path: Path) -> None:
    probe = subprocess.run(["unshare", "-rm", "true"], capture_output=True, check=False)
    if probe.returncode:
        pytest.skip("user namespaces are not allowed here")
    llama(tmp_path / "large", changes={"extra": np.ones(20_000, np.float32)})
    write_plan(tmp_path, "merge_method: linear\nmodels: [{model: large}]\n")
    (tmp_path / "disk").mkdir()
    ran = subprocess.run(
        ["unshare", "-rm", sys.executable, "-c", _SMALL_DISK, plan, tmp_path / "disk"],
        capture_output=True,
        text=True,
        check=False,
        env=ENVIRONMENT,
    )
    assert ran.returncode == 8, ran.stderr
    assert "The disk is too small for the merged model." in ran.stderr


_STUCK = """
import sys
from pathlib import Path
from coldmerge.merging.plan import Opened, load, run

def progress(step, done, total):
    if done > total // 3:
        print("writing", flush=True)
        sys.stdin.read()

plan = load(sys.argv[1])
with Opened(plan) as opened:
    run(plan, opened, sys.argv[2], threads=1, progress=progress)
"""


def test_a_killed_merge_leaves_nothing_that_loads_and_can_be_run_again(
    coldmerge: Command, plan: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    process = subprocess.Popen(
        [sys.executable, "-c", _STUCK, plan, out],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=ENVIRONMENT,
    )
    with process:
        assert process.stdout is not None
        assert process.stdout.readline() == "writing\n"
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert not out.exists()
    partial = tmp_path / f"out.partial-{process.pid}"
    assert (partial / "config.json").is_file()
    with pytest.raises(CheckpointError):
        Checkpoint.open(partial)
    assert coldmerge("merge", plan, out).status == 0
    assert not partial.exists()
    assert coldmerge("merge", plan, tmp_path / "again", "--format", "json").json["digest"] == (
        content_entries(Checkpoint.open(out)).digest
    )


def test_the_unfinished_folder_of_a_living_process_is_left_alone(
    coldmerge: Command, plan: Path, tmp_path: Path
) -> None:
    alive = tmp_path / f"out.partial-{os.getppid()}"
    alive.mkdir()
    assert coldmerge("merge", plan, tmp_path / "out").status == 0
    assert alive.is_dir()


def test_methods_are_listed_with_their_papers(coldmerge: Command) -> None:
    rows = {row["method"]: row["what"] for row in coldmerge("methods", "--format", "json").json}
    assert {"linear", "mean", "ties"} <= set(rows)
    assert "arXiv 2306.01708" in rows["ties"]


def test_a_method_is_shown_with_its_parameters_and_ranges(coldmerge: Command) -> None:
    shown = coldmerge("methods", "ties").out
    assert "(0, 1]" in shown
    assert "each model" in shown
    found = coldmerge("methods", "ties", "--format", "json").json
    assert found["each"]["properties"]["density"]["maximum"] == 1
    assert found["parameters"]["properties"]["lambda"]["default"] == 1.0
    ran = coldmerge("methods", "tise")
    assert ran.status == 2
    assert "There is no merge method tise." in ran.err


def test_adapters_merge_into_an_adapter_folder(
    coldmerge: Command, plan: Path, tmp_path: Path
) -> None:
    adapter(tmp_path / "lora1", 1)
    adapter(tmp_path / "lora2", 2)
    text = "merge_method: lora_cat\nbase_model: base\nmodels: [{model: lora1}, {model: lora2}]\n"
    write_plan(tmp_path, text)
    found = coldmerge("merge", plan, tmp_path / "x", "--dry-run", "--format", "json").json
    assert (found["tensors"], found["bytes_written"]) == (2, 2 * 2 * 2 * 2 * 8 * 4)
    found = coldmerge("merge", plan, tmp_path / "out", "--format", "json").json
    assert (found["tensors"], found["rank"]) == (2, 4)
    assert found["relative_error"] < 1e-6
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    assert "lora_alpha" in coldmerge("methods", "lora_svd").out


_LIGHT = """
import sys
sys.argv = ["coldmerge", "merge", sys.argv[1], sys.argv[2], "--format", "json"]
from coldmerge.cli import main
try:
    main()
finally:
    heavy = {"torch", "transformers", "huggingface_hub.repocard", "grpc", "scipy"}
    print(sorted(heavy & set(sys.modules)), file=sys.stderr)
"""


def test_a_merge_starts_light(plan: Path, tmp_path: Path) -> None:
    ran = subprocess.run(
        [sys.executable, "-c", _LIGHT, plan, tmp_path / "out"],
        capture_output=True,
        text=True,
        check=False,
        env=ENVIRONMENT,
    )
    assert ran.stderr == "[]\n"


def test_a_folder_that_cannot_be_made_is_said(coldmerge: Command, plan: Path) -> None:
    ran = coldmerge("merge", plan, plan / "out")
    assert ran.status == 7
    assert "[checkpoint.cannot_create]" in ran.err
