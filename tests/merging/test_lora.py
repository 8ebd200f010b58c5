"""LoRA merges against PEFT and dense float64 products; tolerances are of the largest entry."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from coldmerge.core.adapters import Adapter
from coldmerge.core.checkpoint import Checkpoint
from coldmerge.core.deltas import AdapterDelta
from coldmerge.core.dtypes import Floats32, Floats64, size
from coldmerge.core.errors import ColdmergeError
from coldmerge.core.extraction import extract
from coldmerge.core.task_vector import TaskVector
from coldmerge.core.vector_writer import VectorWriter
from coldmerge.merging import Input
from coldmerge.merging.lora import MergedAdapter, merge_adapters, truncated
from tests.support import write_model

pytestmark = [  # PEFT is behind transformers here
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]
DIGEST = "cd" * 32
PEFT = Path(__file__).parents[1] / "oracles" / "peft"
in_tmp = settings(
    max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.fixture(autouse=True)
def _torch() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(3)


def close(found: Floats32 | Floats64, expected: Floats32 | Floats64, part: float = 2e-6) -> None:
    scale = max(1e-9, float(np.abs(expected).max(initial=0)))
    np.testing.assert_allclose(found, expected, rtol=0, atol=part * scale)


def delta_of(base: Checkpoint, folder: Path, name: str) -> Floats32:
    """What our own reader makes of an adapter folder."""
    shape = base.shape(name)
    found = AdapterDelta(base, Adapter(folder), DIGEST).block(name, 0, size(shape))
    return found.reshape(shape)


Factors = dict[str, tuple[Floats64, Floats64, float]]


def vector(path: Path, factors: Factors) -> TaskVector:
    """A `lora` task vector with these (A, B, scaling)."""
    ordered = sorted(factors.items(), key=lambda item: f"{item[0]}.lora_A")
    planned = [
        (f"{name}.lora_{part}", x.shape)
        for name, (a, b, _) in ordered
        for part, x in (("A", a), ("B", b))
    ]
    with VectorWriter(
        path,
        planned,
        kind="lora",
        encoding="fp32",
        base_digest=DIGEST,
        scaling={name: s for name, (_, _, s) in ordered},
    ) as writer:
        for name, (a, b, _) in ordered:
            for part, x in (("A", a), ("B", b)):
                writer.append(x.astype(np.float32).reshape(-1))
                writer.keep(f"{name}.lora_{part}", x.shape)
    return writer.open()


def draw(rng: np.random.Generator, shape: tuple[int, ...], rank: int) -> Any:
    a, b = rng.standard_normal((rank, *shape[1:])), rng.standard_normal((shape[0], rank))
    return a.astype(np.float32), b.astype(np.float32), float(rng.uniform(0.3, 2))


def dense(vectors: Sequence[TaskVector], weights: Sequence[float], name: str) -> Floats64:
    """Σ wᵢsᵢBᵢAᵢ multiplied out in float64."""
    total: Floats64 = np.zeros((1, 1))
    for one, weight in zip(vectors, weights, strict=True):
        if name in one.names:
            stored = load_file(one.path)
            a, b = (stored[f"{name}.lora_{part}"].double().numpy() for part in "AB")
            total = total + weight * one.scaling[name] * (b @ a.reshape(len(a), -1))
    return total


def inputs(vectors: Sequence[TaskVector], weights: Sequence[float]) -> list[Input]:
    return [
        Input(f"{i:03}", one, weight, label=f"adapter {i}")
        for i, (one, weight) in enumerate(zip(vectors, weights, strict=True))
    ]


@pytest.fixture
def peft_base(tmp_path: Path) -> Checkpoint:
    (tmp_path / "base").mkdir()
    shutil.copy(PEFT / "base.safetensors", tmp_path / "base" / "model.safetensors")
    (tmp_path / "base" / "config.json").write_text("{}")
    return Checkpoint.open(tmp_path / "base")


@pytest.mark.parametrize("case", range(6))
def test_peft_merges_to_the_same(tmp_path: Path, peft_base: Checkpoint, case: int) -> None:
    entry = json.loads((PEFT / "cases.json").read_text())[case]
    vectors = [
        extract(peft_base, PEFT / name, tmp_path / f"{name}.v", base_digest=DIGEST).task_vector
        for name in entry["weights"]
    ]
    merge_adapters(
        peft_base,
        inputs(vectors, list(entry["weights"].values())),
        tmp_path / "out",
        method=f"lora_{entry['combination']}",  # type: ignore[arg-type]
        rank=entry["rank"],
    )
    expected = load_file(PEFT / "expected.safetensors")
    for name in ("up.weight", "down.weight"):
        wanted = expected[f"{case}/{name}"].numpy()
        close(delta_of(peft_base, tmp_path / "out", name), wanted, 5e-6)


problems = st.tuples(
    st.tuples(st.integers(1, 9), st.integers(1, 9)),
    st.lists(st.integers(1, 5), min_size=1, max_size=4),
    st.integers(1, 6),
    st.integers(0, 999),
)


@in_tmp
@given(problems, st.booleans())
def test_concatenation_is_exact_and_truncation_the_best_there_is(
    tmp_path_factory: pytest.TempPathFactory,
    problem: tuple[tuple[int, int], list[int], int, int],
    normalize: bool,
) -> None:
    shape, ranks, rank, seed = problem
    rng, tmp_path = np.random.default_rng(seed), tmp_path_factory.mktemp("lora")
    base = Checkpoint.open(write_model(tmp_path / "base", {"m.weight": np.zeros(shape, "f4")}))
    vectors = [
        vector(tmp_path / f"{i}", {"m.weight": draw(rng, shape, r)}) for i, r in enumerate(ranks)
    ]
    weights = list(rng.uniform(0.2, 2, len(ranks)) * (1 if normalize else -1))
    exact = dense(vectors, weights, "m.weight") / (sum(weights) if normalize else 1)
    given_inputs = inputs(vectors, weights)
    whole = merge_adapters(base, given_inputs, tmp_path / "cat", normalize=normalize)
    close(delta_of(base, tmp_path / "cat", "m.weight"), exact)
    assert whole.tensors[0].rank == sum(ranks)
    assert whole.relative_error < 1e-6
    short = merge_adapters(
        base, given_inputs, tmp_path / "svd", method="lora_svd", rank=rank, normalize=normalize
    )
    s = np.linalg.svd(exact, compute_uv=False)
    kept = short.tensors[0].rank
    assert kept == min(rank, sum(ranks), *shape)
    found = delta_of(base, tmp_path / "svd", "m.weight")
    best = float(np.linalg.norm(s[kept:]))
    assert np.linalg.norm(found - exact) <= best + 2e-6 * s[0]
    assert short.relative_error == pytest.approx(best / np.linalg.norm(s), abs=1e-6)
    assert short.tensors[0].norm == pytest.approx(np.linalg.norm(s), rel=1e-9)


def tiny() -> torch.nn.Module:
    """Every kind of module that LoRA of PEFT wraps."""

    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.word_embeddings = torch.nn.Embedding(11, 6)
            self.proj = torch.nn.Linear(6, 10)
            self.square = torch.nn.Linear(10, 10, bias=False)
            self.kernel = torch.nn.Conv2d(3, 5, 3)
            self.line = torch.nn.Conv1d(4, 2, 3)

    return Net()


TARGETS = ["word_embeddings", "proj", "square", "kernel", "line"]


def adapted(
    state: dict[str, torch.Tensor], folder: Path, **options: Any
) -> dict[str, torch.Tensor]:
    """A random adapter by PEFT in `folder`, and the weights it makes."""
    from peft import LoraConfig, get_peft_model

    model: Any = tiny()
    model.load_state_dict(state)
    wrapped: Any = get_peft_model(model, LoraConfig(**({"target_modules": TARGETS} | options)))
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.3 * torch.randn_like(parameter))
    wrapped.save_pretrained(folder)
    merged: dict[str, torch.Tensor] = wrapped.merge_and_unload().state_dict()
    return merged


OPTIONS: list[dict[str, Any]] = [
    {"r": 2, "lora_alpha": 5},
    {"r": 3, "lora_alpha": 4, "use_rslora": True},
    {"r": 4, "rank_pattern": {"proj": 1}, "alpha_pattern": {"square": 9}},
    {"r": 2, "target_modules": ["proj", "line"], "use_rslora": True},
]
WEIGHTS = [0.5, -0.25, 2.0, 1.0]


@pytest.mark.parametrize(
    ("method", "rank"), [("lora_cat", None), ("lora_svd", 40), ("lora_svd", 2)]
)
@pytest.mark.parametrize("alpha", [None, 7.5])
def test_peft_loads_what_was_merged(
    tmp_path: Path, method: Any, rank: int | None, alpha: float | None
) -> None:
    """rsLoRA, patterns, embeddings and convolutions: PEFT's own merge of each, summed dense."""
    from peft import PeftModel

    state = tiny().state_dict()
    (tmp_path / "base").mkdir()
    save_file(state, tmp_path / "base" / "model.safetensors")
    (tmp_path / "base" / "config.json").write_text("{}")
    base = Checkpoint.open(tmp_path / "base")
    vectors, wanted = [], {name: np.zeros(x.shape) for name, x in state.items()}
    for i, options in enumerate(OPTIONS):
        merged = adapted(state, tmp_path / f"a{i}", **options)
        found = extract(base, tmp_path / f"a{i}", tmp_path / f"v{i}", base_digest=DIGEST)
        vectors.append(found.task_vector)
        for name, x in merged.items():
            wanted[name] += WEIGHTS[i] * (x.double() - state[name].double()).numpy()
    out = tmp_path / "new" / "out"
    made = merge_adapters(
        base, inputs(vectors, WEIGHTS), out, method=method, rank=rank, alpha=alpha
    )
    model: Any = tiny()
    model.load_state_dict(state)
    loaded = PeftModel.from_pretrained(model, out).merge_and_unload().state_dict()
    errors = {one.name: one.error for one in made.tensors}
    for name, change in wanted.items():
        ours = change if name not in errors else delta_of(base, out, name)
        close(loaded[name].numpy(), state[name].numpy() + ours)
        if rank != 2:
            close(ours, change)
        if name in errors:
            lost = np.linalg.norm(delta_of(base, out, name) - change)
            assert lost == pytest.approx(errors[name], abs=1e-5)
    assert sorted(errors) == sorted(f"{module}.weight" for module in TARGETS)
    assert (made.relative_error < 1e-6) is (rank != 2)


def one_tensor(tmp_path: Path, *factors: Any) -> tuple[Checkpoint, list[TaskVector]]:
    shape = (len(factors[0][1]), factors[0][0].shape[1])
    base = Checkpoint.open(write_model(tmp_path / "base", {"m.weight": np.zeros(shape, "f4")}))
    return base, [vector(tmp_path / f"{i}", {"m.weight": f}) for i, f in enumerate(factors)]


def test_averaging_factors_would_be_another_model(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    pairs = [draw(rng, (8, 6), 2) for _ in range(2)]
    base, vectors = one_tensor(tmp_path, *pairs)
    merge_adapters(base, inputs(vectors, [0.5, 0.5]), tmp_path / "out", method="lora_svd", rank=4)
    found = delta_of(base, tmp_path / "out", "m.weight")
    exact = dense(vectors, [0.5, 0.5], "m.weight")
    close(found, exact)
    a, b = (np.mean([pair[k] for pair in pairs], axis=0) for k in (0, 1))
    assert np.linalg.norm(b @ a - exact) > 0.5 * np.linalg.norm(exact)


def test_the_same_bytes_in_any_order_and_again(tmp_path: Path) -> None:
    rng = np.random.default_rng(2)
    base, vectors = one_tensor(tmp_path, *(draw(rng, (20, 30), 3) for _ in range(4)))
    given_inputs = inputs(vectors, [1, 2, 3, 4])
    for method in ("lora_cat", "lora_svd"):
        folders = [tmp_path / f"{method}{i}" for i in range(2)]
        for folder, order in zip(folders, (given_inputs, given_inputs[::-1]), strict=True):
            merge_adapters(base, order, folder, method=method)
        for file in ("adapter_config.json", "adapter_model.safetensors"):
            assert (folders[0] / file).read_bytes() == (folders[1] / file).read_bytes()


def test_bfloat16_tells_the_error_of_what_is_stored(tmp_path: Path) -> None:
    rng = np.random.default_rng(4)
    base, vectors = one_tensor(tmp_path, *(draw(rng, (20, 30), 2) for _ in range(2)))
    made = merge_adapters(base, inputs(vectors, [1, 1]), tmp_path / "out", encoding="bf16")
    exact = dense(vectors, [1, 1], "m.weight")
    lost = np.linalg.norm(delta_of(base, tmp_path / "out", "m.weight") - exact)
    assert made.tensors[0].error == pytest.approx(lost, rel=1e-3)
    assert 1e-4 < made.relative_error < 1e-2
    stored = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert {x.dtype for x in stored.values()} == {torch.bfloat16}


def test_a_tensor_that_cancels_is_left_out(tmp_path: Path) -> None:
    rng = np.random.default_rng(5)
    shape = (6, 7)
    base = Checkpoint.open(
        write_model(tmp_path / "base", {n: np.zeros(shape, "f4") for n in ("a.weight", "b.weight")})
    )
    same = draw(rng, shape, 2)
    one = vector(tmp_path / "1", {"a.weight": same, "b.weight": draw(rng, shape, 2)})
    two = vector(tmp_path / "2", {"a.weight": same})
    made = merge_adapters(base, inputs([one, two], [1, -1]), tmp_path / "out", method="lora_svd")
    assert [one.name for one in made.tensors] == ["b.weight"]
    assert set(Adapter(tmp_path / "out").targets) == {"b"}
    with pytest.raises(ColdmergeError) as caught:
        merge_adapters(base, inputs([two, two], [1, -1]), tmp_path / "none")
    assert caught.value.code == "merge.nothing_left"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "2", "base", "out"]


def test_truncation_keeps_what_is_of_that_rank() -> None:
    rng = np.random.default_rng(6)
    for shape, inner in (((5, 9), 3), ((9, 5), 20), ((1, 1), 2)):
        pair = rng.standard_normal((inner, shape[1])), rng.standard_normal((shape[0], inner))
        a, b = truncated(pair, min(inner, *shape))
        close(b @ a, pair[1] @ pair[0], 1e-12)


def refused(
    base: Checkpoint, given_inputs: list[Input], out: Path, **options: Any
) -> ColdmergeError:
    with pytest.raises(ColdmergeError) as caught:
        merge_adapters(base, given_inputs, out, **options)
    return caught.value


def test_what_is_not_lora_names_three_tensors_and_the_input(tmp_path: Path) -> None:
    names = [f"m{i}.weight" for i in range(5)]
    start = {name: np.zeros((3, 4), np.float32) for name in names}
    base = Checkpoint.open(write_model(tmp_path / "base", start))
    tuned = write_model(tmp_path / "tuned", {name: x + 1 for name, x in start.items()})
    full = extract(base, tuned, tmp_path / "v", base_digest=DIGEST).task_vector
    error = refused(base, [Input("1", full, label="org-1")], tmp_path / "out")
    assert error.code == "merge.not_lora"
    assert error.ids["input"] == "org-1"
    assert "m0.weight, m1.weight, m2.weight and 2 more" in error.message


@pytest.mark.parametrize(
    ("code", "options", "weights"),
    [
        ("merge.bad_parameter", {"rank": 3}, [1, 1]),
        ("merge.bad_parameter", {"method": "lora_svd", "rank": 0}, [1, 1]),
        ("merge.bad_parameter", {"alpha": 0.0}, [1, 1]),
        ("merge.weights_sum_to_zero", {"normalize": True}, [1, -1]),
        ("merge.weights_sum_to_zero", {}, [1, float("inf")]),
        ("task_vector.not_finite", {}, [1e30, 1e30]),
    ],
)
def test_bad_parameters_are_refused(
    tmp_path: Path, code: str, options: dict[str, Any], weights: list[float]
) -> None:
    rng = np.random.default_rng(7)
    a, b, _ = draw(rng, (4, 5), 2)
    base, vectors = one_tensor(tmp_path, (a, b, 1e10), (a, b, 1.0))
    error = refused(base, inputs(vectors, weights), tmp_path / "out", **options)
    assert error.code == code
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".*"))


def test_bad_inputs_are_refused(tmp_path: Path) -> None:
    rng = np.random.default_rng(8)
    a, b, s = draw(rng, (4, 5), 2)
    base, vectors = one_tensor(tmp_path, (a, b, s), (a * np.float32(np.nan), b, s))
    error = refused(base, inputs(vectors, [1, 1]), tmp_path / "out")
    assert (error.code, error.ids["model"]) == ("weights.not_finite", "adapter 1")
    assert refused(base, [], tmp_path / "out").code == "merge.inputs"
    twice = [Input("k", vectors[0]), Input("k", vectors[0])]
    assert refused(base, twice, tmp_path / "out").code == "merge.duplicate_input"
    other = Checkpoint.open(write_model(tmp_path / "other", {"m.weight": np.zeros((4, 6), "f4")}))
    assert refused(other, inputs(vectors[:1], [1]), tmp_path / "out").code == (
        "task_vector.does_not_fit"
    )
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("x")
    assert refused(base, inputs(vectors[:1], [1]), tmp_path / "out").code == "weights.out_exists"


def test_progress_counts_tensors(tmp_path: Path) -> None:
    rng = np.random.default_rng(9)
    base, vectors = one_tensor(tmp_path, draw(rng, (4, 5), 2))
    told: list[tuple[str, int, int]] = []
    made: MergedAdapter = merge_adapters(
        base,
        inputs(vectors, [1]),
        tmp_path / "out",
        progress=lambda step, done, total: told.append((step, done, total)),
    )
    assert told == [("merge", 1, 1)]
    assert made.folder == tmp_path / "out"
