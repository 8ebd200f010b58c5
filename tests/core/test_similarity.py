"""Cosines and signs against numpy in float64, for every form a model is stored in."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from coldmerge.core import similarity as module
from coldmerge.core.adapter_writer import write_adapter
from coldmerge.core.algebra import Delta
from coldmerge.core.checkpoint import Checkpoint, CheckpointWriter
from coldmerge.core.deltas import open_delta
from coldmerge.core.digests import content_entries
from coldmerge.core.dtypes import Floats32
from coldmerge.core.errors import ColdmergeError
from coldmerge.core.extraction import extract
from coldmerge.core.header import TensorSpec
from coldmerge.core.low_rank import Choice, factorize
from coldmerge.core.similarity import similarity
from tests.support import write_model

SHAPES = {"embed.weight": (30, 8), "h.0.q.weight": (8, 8), "h.1.q.weight": (8, 12), "norm": (8,)}


def draw(seed: int, sparse: float = 0.0) -> dict[str, Floats32]:
    rng = np.random.default_rng(seed)
    return {
        n: np.where(rng.random(s) < sparse, 0, rng.standard_normal(s)).astype(np.float32)
        for n, s in SHAPES.items()
    }


def plus(base: dict[str, Floats32], change: dict[str, Floats32]) -> dict[str, Floats32]:
    return {name: base[name] + change[name] for name in base}


def check(found: module.Sums, changes: list[dict[str, Any]], names: list[str]) -> None:
    """`found` is what numpy says of the changes, over the tensors `names`."""
    rows = np.array(
        [np.concatenate([c[n].reshape(-1) for n in names]) for c in changes], np.float64
    )
    norms = np.linalg.norm(rows, axis=1)
    np.testing.assert_allclose(found.norms, norms, rtol=1e-12)
    for i, one in enumerate(rows):
        for j, two in enumerate(rows):
            if norms[i] and norms[j]:
                cosine = np.dot(one, two) / norms[i] / norms[j]
                np.testing.assert_allclose(found.cosines[i, j], cosine, rtol=1e-9, atol=1e-12)
            else:
                assert np.isnan(found.cosines[i, j])
            both = (one != 0) & (two != 0)
            agree = (np.sign(one) == np.sign(two))[both]
            if both.any():
                assert found.sign_agreement[i, j] == agree.mean()
            else:
                assert np.isnan(found.sign_agreement[i, j])


@settings(max_examples=25, deadline=None)
@given(
    count=st.integers(1, 5), sparse=st.sampled_from([0.0, 0.5, 1.0]), block=st.sampled_from([5, 99])
)
def test_any_changes(
    tmp_path_factory: pytest.TempPathFactory, count: int, sparse: float, block: int
) -> None:
    root = tmp_path_factory.mktemp("s")
    zero = {name: np.zeros(shape, np.float32) for name, shape in SHAPES.items()}
    base = Checkpoint.open(write_model(root / "base", zero))
    changes = [draw(seed, sparse if seed else 0.0) for seed in range(count)]
    deltas = [
        open_delta(base, write_model(root / f"m{seed}", change))
        for seed, change in enumerate(changes)
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "BLOCK", block)
        found = similarity(base, deltas, [f"m{n}" for n in range(count)])
    assert list(found.layers) == ["embeddings", "h.0", "h.1", "other"]
    check(found.total, changes, sorted(SHAPES))
    check(found.layers["h.1"], changes, ["h.1.q.weight"])


def shard(source: Checkpoint, folder: Path) -> Path:
    with CheckpointWriter(folder, max_shard_bytes=400) as writer:
        specs = [TensorSpec(n, s.dtype, s.shape, 0, s.nbytes) for n, s in source.tensors.items()]
        writer.declare(specs)
        for name in source.tensors:
            writer.write(name, source.raw(name))
    return folder


def test_folders_shards_adapters_and_task_vectors_mixed(tmp_path: Path) -> None:
    start = draw(100)
    base = Checkpoint.open(write_model(tmp_path / "base", start))
    digest = content_entries(base).digest
    one = Checkpoint.open(write_model(tmp_path / "one", plus(start, draw(1))))
    shard(one, tmp_path / "two")
    assert len(list((tmp_path / "two").glob("*.safetensors"))) > 2
    extract(base, one.folder, tmp_path / "three.safetensors", base_digest=digest)
    choice = Choice(3, 6.0)
    delta = open_delta(base, one.folder, digest)
    made = factorize(base, delta, tmp_path / "f.safetensors", choice, label="one")
    write_adapter(made.vector, base, tmp_path / "four", choice.rank, choice.alpha)
    paths = [tmp_path / name for name in ("one", "two", "three.safetensors", "four")]
    deltas = [open_delta(base, path, digest) for path in paths]
    told: list[int] = []
    found = similarity(base, deltas, ["one", "two", "three", "four"], told.append)
    assert sum(told) == sum(spec.nbytes for spec in base.tensors.values())
    exact = {n: one.array(n).astype(np.float32) - start[n] for n in SHAPES}
    rough = {
        n: made.vector.block(n, 0, x.size).reshape(x.shape) if n in made.vector.names else x * 0
        for n, x in exact.items()
    }
    check(found.total, [exact, exact, exact, rough], sorted(SHAPES))


def test_a_low_rank_change_against_its_origin(tmp_path: Path) -> None:
    """Of an orthogonal projection P: cos(Δ, PΔ) = ‖PΔ‖ / ‖Δ‖, and the rest is the error."""
    start = draw(100)
    base = Checkpoint.open(write_model(tmp_path / "base", start))
    tuned = write_model(tmp_path / "tuned", plus(start, draw(1)))
    delta = open_delta(base, tuned)
    made = factorize(base, delta, tmp_path / "f.safetensors", Choice(3, 3.0), label="tuned")
    found = similarity(base, [delta, made.vector], ["tuned", "rank 3"])
    cosine = found.layers["h.0"].cosines[0, 1]
    error = next(one for one in made.factored if one.name == "h.0.q.weight").relative_error
    np.testing.assert_allclose(cosine**2 + error**2, 1, rtol=1e-6)


def failure(base: Checkpoint, path: Path, digest: str = "") -> ColdmergeError:
    def compare() -> module.Similarity:
        deltas: list[Delta] = [open_delta(base, path, digest)] * 2
        return similarity(base, deltas, ["first", "second"])

    with pytest.raises(ColdmergeError) as caught:
        compare()
    return caught.value


def test_refusals(tmp_path: Path) -> None:
    start = draw(100)
    base = Checkpoint.open(write_model(tmp_path / "base", start))
    broken = plus(start, draw(1))
    broken["norm"][3] = np.nan
    error = failure(base, write_model(tmp_path / "nan", broken))
    assert (error.code, error.ids["tensor"]) == ("weights.not_finite", "norm")
    assert error.ids["model"] == "first"
    wide = {name: np.ones((9, 9), np.float32) for name in SHAPES}
    error = failure(base, write_model(tmp_path / "wide", wide))
    assert error.code == "extract.shape_mismatch"
    assert "embed.weight, h.0.q.weight, h.1.q.weight, …" in error.message
    assert failure(base, tmp_path / "nowhere").code == "weights.not_found"
    save_file(start, tmp_path / "plain.safetensors")
    assert failure(base, tmp_path / "plain.safetensors").code == "task_vector.not_one"
    moved = write_model(tmp_path / "moved", plus(start, draw(1)))
    extract(base, moved, tmp_path / "v.safetensors", base_digest="ab" * 32)
    error = failure(base, tmp_path / "v.safetensors", "cd" * 32)
    assert error.code == "task_vector.other_base"


SCRIPT = """
import sys
from pathlib import Path
from coldmerge.core.checkpoint import Checkpoint
from coldmerge.core.deltas import open_delta
from coldmerge.core.low_rank import Choice, factorize
from coldmerge.core.similarity import similarity
root = Path(sys.argv[1])
base = Checkpoint.open(root / "base")
deltas = [open_delta(base, root / f"m{n}") for n in range(3)]
print(similarity(base, deltas, "abc").total.dots.tobytes().hex())
out = factorize(base, deltas[0], root / "f.safetensors", Choice(8, 8.0), label="m0").vector.path
print(out.read_bytes().hex())
"""


def test_the_same_bytes_with_one_and_two_threads(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for name in ("base", "m0", "m1", "m2"):
        big = {"h.0.q.weight": rng.standard_normal((300, 500)).astype(np.float32)}
        write_model(tmp_path / name, big)
    answers = [
        subprocess.run(
            [sys.executable, "-c", SCRIPT, str(tmp_path)],
            check=True,
            capture_output=True,
            text=True,
            env={"OPENBLAS_NUM_THREADS": threads, "OMP_NUM_THREADS": threads},
        ).stdout
        for threads in "12"
    ]
    assert answers[0] == answers[1]
