"""Plans as people have them: ours in examples/merge, and mergekit's own.

mergekit's example files are under a licence of their own and not copied here. Plans of the
same structure are; where COLDMERGE_MERGEKIT_EXAMPLES names the folder of a checkout of
mergekit, a slow test runs the originals, byte for byte.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file

from coldmerge.core.checkpoint import Checkpoint
from coldmerge.core.digests import content_entries
from coldmerge.core.extraction import extract
from coldmerge.merging.plan import Opened, load, run
from coldmerge.merging.plan.parameters import check_words
from tests.merging.models import Tensors, adapter, llama, stored, tensors, write_plan

EXAMPLES = Path(__file__).parents[2] / "examples" / "merge"
ORACLES = Path(__file__).parents[1] / "oracles" / "plans"
ORIGINALS = ("linear.yml", "ties.yml", "gradient-slerp.yml", "bio-merge.yml")


def merged(plan_path: Path, shelf: Path, out: Path) -> Tensors:
    plan = load(plan_path)
    with Opened(plan, shelf) as opened:
        run(plan, opened, out, threads=2)
    return stored(out)


def references(body: dict[str, Any]) -> list[str]:
    """The models that a plan names, each once."""
    parts = [body, *body.get("slices", [])]
    listed = [
        entry for part in parts for key in ("models", "sources") for entry in part.get(key, [])
    ]
    found = [body.get("base_model"), *(entry["model"] for entry in listed)]
    return list(dict.fromkeys(filter(None, found)))


def layers_of(body: dict[str, Any], otherwise: int) -> int:
    """How many layers a plan's models have."""
    slices = body.get("slices")
    return int(slices[-1]["sources"][0]["layer_range"][1]) if slices else otherwise


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_example_runs_as_it_is(path: Path, tmp_path: Path) -> None:
    body = yaml.safe_load(path.read_text())
    for seed, name in enumerate(references(body)):
        for part in name.split("+"):
            if part.endswith("-lora"):
                adapter(tmp_path / part, seed)
            elif not part.endswith(".safetensors"):
                llama(tmp_path / part, seed, layers=layers_of(body, 4))
    if "./contribution.safetensors" in references(body):
        base = Checkpoint.open(tmp_path / body["base_model"])
        tuned, out = llama(tmp_path / "tuned", 9), tmp_path / "contribution.safetensors"
        extract(base, tuned, out, base_digest=content_entries(base).digest)
    path = write_plan(tmp_path, path.read_text())
    check_words(load(path))
    found = merged(path, tmp_path, tmp_path / "out")
    assert set(found) == set(tensors(0, layers_of(body, 4)))


def family(shelf: Path, *names: str, layers: int) -> dict[str, Tensors]:
    """Models of these names: the first the base, or a fine-tune like the others."""
    for seed, name in enumerate(names):
        llama(shelf / name, seed, layers=layers)
    return {name: tensors(seed, layers) for seed, name in enumerate(names)}


def test_an_average_of_three_models_of_a_hub(tmp_path: Path) -> None:
    models = family(tmp_path / "shelf", "a/one", "b/two", "c/three", layers=4)
    text = """\
models:
  - model: a/one
    parameters:
      weight: 1.0
  - model: b/two
    parameters:
      weight: 0.3
  - model: c/three
    parameters:
      weight: 0.5
merge_method: linear
dtype: float16
"""
    found = merged(write_plan(tmp_path, text), tmp_path / "shelf", tmp_path / "out")
    for name, array in found.items():
        assert array.dtype == np.float16
        total = sum(w * models[m][name] for m, w in zip(models, (1.0, 0.3, 0.5), strict=True))
        np.testing.assert_allclose(array, total / 1.8, rtol=2e-3, atol=1e-4, err_msg=name)


def test_a_slerp_with_gradients_over_forty_layers(tmp_path: Path) -> None:
    models = family(tmp_path / "shelf", "a/one", "b/two", layers=40)
    text = """\
slices:
  - sources:
      - model: a/one
        layer_range: [0, 40]
      - model: b/two
        layer_range: [0, 40]
# the same as models: …
merge_method: slerp
base_model: a/one
parameters:
  t:
    - filter: self_attn
      value: [0, 0.5, 0.3, 0.7, 1]
    - filter: mlp
      value: [1, 0.5, 0.7, 0.3, 0]
    - value: 0.5 # the rest
dtype: float16
"""
    found = merged(write_plan(tmp_path, text), tmp_path / "shelf", tmp_path / "out")
    ends = {
        "model.layers.0.self_attn.q_proj.weight": "a/one",
        "model.layers.39.self_attn.q_proj.weight": "b/two",
        "model.layers.0.mlp.down_proj.weight": "b/two",
        "model.layers.39.mlp.down_proj.weight": "a/one",
    }
    for name, model in ends.items():
        np.testing.assert_allclose(found[name], models[model][name], rtol=2e-3, atol=1e-4)
    name = "model.norm.weight"
    one, two = (models[m][name].astype(np.float64) for m in models)
    cosine = one @ two / np.linalg.norm(one) / np.linalg.norm(two)
    angle = np.arccos(cosine)
    expected = np.sin(0.5 * angle) / np.sin(angle) * (one + two)
    np.testing.assert_allclose(found[name], expected, rtol=2e-3, atol=1e-4)


def test_ties_with_gradients_and_filters(tmp_path: Path) -> None:
    models = family(tmp_path / "shelf", "o/base", "a/one", "b/two", "c/three", layers=4)
    text = """\
models:
  - model: a/one
    parameters:
      density: [1, 0.7, 0.1] # a gradient
      weight: 1.0
  - model: b/two
    parameters:
      density: 0.5
      weight: [0, 0.3, 0.7, 1] # another
  - model: c/three
    parameters:
      density: 0.33
      weight:
        - filter: mlp
          value: 0.5
        - value: 0
merge_method: ties
base_model: o/base
parameters:
  normalize: true
  int8_mask: true
dtype: float32
"""
    found = merged(write_plan(tmp_path, text), tmp_path / "shelf", tmp_path / "out")
    # At the first layer only `one` has a weight, untrimmed; at the last `two` weighs 1.
    first = "model.layers.0.self_attn.q_proj.weight"
    np.testing.assert_allclose(found[first], models["a/one"][first], atol=1e-6)
    last = "model.layers.3.self_attn.q_proj.weight"
    expected = _ties(models, last, {"a/one": (1.0, 0.1), "b/two": (1.0, 0.5)})
    np.testing.assert_allclose(found[last], expected, atol=1e-6)
    mlp = "model.layers.3.mlp.down_proj.weight"
    expected = _ties(
        models, mlp, {"a/one": (1.0, 0.1), "b/two": (1.0, 0.5), "c/three": (0.5, 0.33)}
    )
    np.testing.assert_allclose(found[mlp], expected, atol=1e-6)


def _ties(models: dict[str, Tensors], name: str, given: dict[str, tuple[float, float]]) -> Any:
    """TIES of one tensor in float64, {model: (weight, density)}."""
    base, rows, weights = models["o/base"][name].astype(np.float64), [], []
    for model, (weight, density) in given.items():
        tau = models[model][name].astype(np.float64) - base
        least = np.sort(np.abs(tau).ravel())[-int(density * tau.size)]
        rows.append(np.where(np.abs(tau) >= least, tau, 0) * weight)
        weights.append(np.full(tau.shape, weight))
    stack = np.stack(rows)
    sign = np.where(stack.sum(0) >= 0, 1.0, -1.0)
    agree = stack * sign > 0
    shares = (agree * np.stack(weights)).sum(0)
    return base + (stack * agree).sum(0) / np.where(shares == 0, 1, shares)


@pytest.mark.slow
@pytest.mark.parametrize("name", ORIGINALS)
def test_mergekits_own_files_run_unchanged(name: str, tmp_path: Path) -> None:
    folder = os.environ.get("COLDMERGE_MERGEKIT_EXAMPLES")
    if not folder:
        pytest.skip("COLDMERGE_MERGEKIT_EXAMPLES names no folder of mergekit's examples")
    path = Path(folder) / name
    body = yaml.safe_load(path.read_text())
    for seed, model in enumerate(references(body)):
        llama(tmp_path / model, seed, layers=layers_of(body, 32))
    found = merged(path, tmp_path, tmp_path / "out")
    assert {str(array.dtype) for array in found.values()} == {"float16"}
    base = next(iter(references(body)))
    assert any(not np.array_equal(found[n], stored(tmp_path / base)[n]) for n in found)


@pytest.mark.parametrize("name", ["layers", "linear", "slerp", "ties"])
def test_whole_plans_agree_with_mergekit(name: str, tmp_path: Path) -> None:
    found = merged(ORACLES / f"{name}.yaml", tmp_path, tmp_path / "out")
    expected = load_file(ORACLES / "expected" / f"{name}.safetensors")
    assert set(found) == set(expected)
    for tensor, array in expected.items():
        assert found[tensor].dtype == array.dtype
        got, wanted = found[tensor].astype(np.float32), array.astype(np.float32)
        np.testing.assert_allclose(got, wanted, rtol=2e-6, atol=1e-6, err_msg=tensor)
