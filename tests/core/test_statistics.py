"""Statistics beside the deltas: from the trainer's folder or the extraction, into the file."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from coldmerge.core import algebra
from coldmerge.core.checkpoint import Checkpoint
from coldmerge.core.documents import Statistic
from coldmerge.core.dtypes import Floats32
from coldmerge.core.errors import CheckpointError, ColdmergeError, NotFoundError, TaskVectorError
from coldmerge.core.extraction import Extraction, extract
from coldmerge.core.selection import kept
from coldmerge.core.statistics import Measured, Wanted
from coldmerge.core.task_vector import TaskVector, vector_header
from coldmerge.core.vector_writer import VectorWriter

Save = Callable[..., Checkpoint]
DIGEST = "ab" * 32
DENSITY = 0.3


def run(base: Checkpoint, tuned: Path, wanted: Wanted, **options: Any) -> Extraction:
    out = tuned.parent / "v.safetensors"
    return extract(base, tuned, out, base_digest=DIGEST, statistics=wanted, **options)


def by_numpy(delta: Floats32) -> np.float32:
    k = kept(DENSITY, delta.size)
    return np.float32(np.partition(np.abs(delta), delta.size - k)[delta.size - k])


def whole(vector: TaskVector, name: str) -> Floats32:
    return vector.block(name, 0, int(np.prod(vector.shape(name))))


def measured(
    folder: Path, tensors: Mapping[str, torch.Tensor], counts: Mapping[str, object]
) -> Path:
    folder.mkdir()
    save_file(dict(tensors), folder / "model.safetensors")
    (folder / "statistics.json").write_text(json.dumps(counts))
    return folder


def weights(**moved: float) -> dict[str, torch.Tensor]:
    """A model; `moved` says how far a tensor moves."""
    torch.manual_seed(1)
    found = {
        "a.weight": torch.randn(6, 4),
        "a.weight-x": torch.randn(3),
        "a.weight.b": torch.randn(5),
        "b.weight": torch.randn(700, 700),
        "head.weight": torch.randn(2, 6),
    }
    for key, step in moved.items():
        name = key.replace("_", ".")
        found[name] = found[name] + step * torch.randn_like(found[name])
    return found


@pytest.mark.parametrize("encoding", ["fp32", "bf16"])
def test_trim_thresholds_are_those_of_the_stored_deltas(save: Save, encoding: str) -> None:
    base, tuned = save("base", weights()), save("tuned", weights(a_weight=0.1, b_weight=0.01))
    vector = run(base, tuned.folder, Wanted(DENSITY), encoding=encoding).task_vector
    assert vector.statistics == {"trim": DENSITY}
    assert vector.names == {"a.weight", "b.weight"}
    for name in vector.names:
        found = vector.statistic(name, "trim", 0, 1)
        assert found.tolist() == [by_numpy(whole(vector, name))]
        assert np.count_nonzero(np.abs(whole(vector, name)) >= found[0]) >= kept(
            DENSITY, whole(vector, name).size
        )
    assert not vector.has_statistic("a.weight-x", "trim")
    assert vector.specs["b.weight.trim"].dtype == "F32"


@pytest.mark.parametrize("encoding", ["fp32", "bf16"])
def test_trim_thresholds_of_adapters_are_of_the_product(save: Save, encoding: str) -> None:
    base = save("base", weights())
    adapter = base.folder.parent / "adapter"
    adapter.mkdir()
    prefix = "base_model.model.a"
    factors = {
        f"{prefix}.lora_A.weight": torch.randn(2, 4),
        f"{prefix}.lora_B.weight": torch.randn(6, 2),
    }
    save_file(factors, adapter / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 6}
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    fisher = {"a.weight.fisher": torch.rand(6, 4)}
    folder = measured(adapter / "statistics", fisher, {"fisher": 7})
    wanted = Wanted(DENSITY, Measured.open(folder, {"fisher"}))
    vector = run(base, adapter, wanted, encoding=encoding).task_vector
    keys = ["a.weight.fisher", "a.weight.lora_A", "a.weight.lora_B", "a.weight.trim"]
    assert list(vector.specs) == keys
    assert vector.deltas == ("a.weight.lora_A", "a.weight.lora_B")
    assert vector.statistic("a.weight", "trim", 0, 1)[0] == by_numpy(whole(vector, "a.weight"))
    np.testing.assert_array_equal(
        vector.statistic("a.weight", "fisher", 3, 20), fisher[keys[0]].reshape(-1)[3:20].numpy()
    )


def test_measured_statistics_travel_with_their_tensors_and_with_no_other(save: Save) -> None:
    base = save("base", weights())
    tuned = save("tuned", weights(a_weight=0.1, b_weight=0.1, head_weight=0.1))
    tensors = {f"{name}.fisher": torch.rand_like(x) for name, x in weights().items()}
    tensors |= {"a.weight.gram": torch.randn(4, 4), "head.weight.gram": torch.randn(6, 6)}
    folder = measured(tuned.folder / "statistics", tensors, {"fisher": 31, "gram": 4096})
    wanted = Wanted(DENSITY, Measured.open(folder, {"fisher", "gram"}))
    found = run(base, tuned.folder, wanted, private=["head.*"], encoding="bf16")
    vector = found.task_vector
    assert vector.statistics == {"fisher": 31, "gram": 4096, "trim": DENSITY}
    shipped = {"a.weight": ["fisher", "gram", "trim"], "b.weight": ["fisher", "trim"]}
    keys = [*shipped, *(f"{name}.{kind}" for name in shipped for kind in shipped[name])]
    assert [entry.name for entry in found.entries] == sorted(keys)
    for key in ("a.weight.fisher", "a.weight.gram", "b.weight.fisher"):
        name, _, kind = key.rpartition(".")
        count = tensors[key].numel()
        expected = tensors[key].reshape(-1).numpy()
        np.testing.assert_array_equal(vector.statistic(name, kind, 0, count), expected)
    alone = extract(base, tuned.folder, tuned.folder.parent / "w", base_digest=DIGEST)
    assert found.norm == pytest.approx(alone.norm, rel=0.1)
    assert vector.norm() == pytest.approx(found.norm, rel=1e-12)


def test_without_statistics_the_file_is_what_it_was(save: Save) -> None:
    base, tuned = save("base", weights()), save("tuned", weights(a_weight=0.1))
    vector = run(base, tuned.folder, Wanted()).task_vector
    assert vector.statistics == {}
    assert b"statistics" not in vector.path.read_bytes()[: vector.payload_start]
    again = vector_header(
        vector.specs.values(), kind="full", encoding="fp32", base_digest=DIGEST, scaling={}
    )
    assert vector.path.read_bytes()[: vector.payload_start].startswith(again[8:].rstrip(), 8)
    with pytest.raises(NotFoundError) as caught:
        vector.statistic("a.weight", "fisher", 0, 1)
    assert caught.value.code == "task_vector.no_such_statistic"


def failure(base: Checkpoint, tuned: Path, wanted: Wanted) -> ColdmergeError:
    with pytest.raises(ColdmergeError) as caught:
        run(base, tuned, wanted)
    assert not list(tuned.parent.glob("v.safetensors*"))
    return caught.value


@pytest.mark.parametrize(
    ("kind", "tensors"),
    [
        ("fisher", {"a.weight.fisher": torch.rand(6, 4)}),
        ("gram", {"b.other.gram": torch.rand(4, 4)}),
    ],
)
def test_a_statistic_that_is_missing_ends_the_extraction(
    save: Save, kind: Statistic, tensors: dict[str, torch.Tensor]
) -> None:
    base, tuned = save("base", weights()), save("tuned", weights(a_weight=0.1, b_weight=0.1))
    folder = measured(tuned.folder / "statistics", tensors, {kind: 5})
    error = failure(base, tuned.folder, Wanted(None, Measured.open(folder, {kind})))
    assert error.code == "extract.no_statistic"


def test_a_statistic_of_another_shape_is_refused(save: Save) -> None:
    base, tuned = save("base", weights()), save("tuned", weights(a_weight=0.1))
    for number, (key, value) in enumerate(
        [
            ("a.weight.gram", torch.rand(6, 6)),
            ("a.weight-x.gram", torch.rand(3, 3)),
            ("a.weight.gram", torch.ones(4, 4, dtype=torch.int32)),
        ]
    ):
        folder = measured(tuned.folder / str(number), {key: value}, {"gram": 5})
        error = failure(base, tuned.folder, Wanted(None, Measured.open(folder, {"gram"})))
        assert error.code == "statistics.wrong_shape"


def test_what_was_not_measured_is_said_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="no fisher") as caught:
        Measured.open(tmp_path / "nowhere", {"fisher"})
    assert caught.value.code == "statistics.not_measured"
    folder = measured(tmp_path / "s", {"w.gram": torch.rand(2, 2)}, {"gram": 4})
    with pytest.raises(NotFoundError):
        Measured.open(folder, {"fisher", "gram"})
    for wrong in (0, -1, True, "9", None, float("inf")):
        (folder / "statistics.json").write_text(json.dumps({"gram": wrong}))
        with pytest.raises(CheckpointError) as refused:
            Measured.open(folder, {"gram"})
        assert refused.value.code == "statistics.bad_counts"


def test_a_tensor_that_is_called_like_a_statistic(save: Save) -> None:
    start = {"a": torch.randn(4, 4), "a.gram": torch.randn(4, 4), "a.trim": torch.randn(3)}
    end = {name: value + 1 for name, value in start.items()}
    base, tuned = save("base", start), save("tuned", end)
    assert failure(base, tuned.folder, Wanted(DENSITY)).code == "extract.reserved_name"
    vector = run(base, tuned.folder, Wanted()).task_vector
    assert vector.names == {"a", "a.gram", "a.trim"}
    assert not vector.has_statistic("a", "gram")


def written(path: Path, keys: Mapping[str, tuple[int, ...]], **facts: Any) -> Path:
    settings: dict[str, Any] = {"kind": "full", "encoding": "bf16", "scaling": {}, **facts}
    with VectorWriter(path, keys.items(), base_digest=DIGEST, **settings) as writer:
        for key, shape in sorted(keys.items()):
            values = np.ones(int(np.prod(shape)), np.float32)
            statistic = key.rpartition(".")[2] in settings["statistics"]
            (writer.append_statistic if statistic else writer.append)(values)
            writer.keep(key, shape)
    return path


def test_a_file_whose_statistics_do_not_fit_is_malformed(tmp_path: Path) -> None:
    delta: dict[str, tuple[int, ...]] = {"a": (3, 2)}
    trim, gram = {"trim": 0.1}, {"gram": 9.0}
    sound = written(tmp_path / "v", {**delta, "a.trim": (1,)}, statistics=trim)
    assert TaskVector.open(sound).names == {"a"}
    wrong: list[tuple[dict[str, tuple[int, ...]], dict[str, float]]] = [
        ({**delta, "a.trim": (2,)}, trim),
        ({**delta, "b.trim": (1,)}, trim),
        (delta, trim),
        ({**delta, "a.gram": (3, 3)}, gram),
        ({"a": (2,), "a.gram": (2, 2)}, gram),
        ({**delta, "a.fisher": (2, 3)}, {"fisher": 4.0}),
    ]
    for keys, statistics in wrong:
        path = written(tmp_path / "v", keys, statistics=statistics)
        with pytest.raises(TaskVectorError) as caught:
            TaskVector.open(path)
        assert caught.value.code == "task_vector.malformed"


def test_metadata_that_lies_about_statistics(tmp_path: Path) -> None:
    path = written(tmp_path / "v", {"a": (2,), "a.trim": (1,)}, statistics={"trim": 0.5})
    raw = path.read_bytes()
    for lie in (rb"{\"trim\":-.5}", rb"{\"tram\":0.5}", rb"[\"trim\", 0.]", rb'{\"trim\":"0"}'):
        changed = tmp_path / "w"
        changed.write_bytes(raw.replace(rb"{\"trim\":0.5}", lie.ljust(14)))
        with pytest.raises(ColdmergeError) as caught:
            TaskVector.open(changed)
        assert caught.value.code in {"task_vector.bad_statistics", "safetensors.bad_json"}


def test_sums_and_multiples_have_no_statistics(save: Save, tmp_path: Path) -> None:
    base, tuned = save("base", weights()), save("tuned", weights(a_weight=0.1))
    vector = run(base, tuned.folder, Wanted(DENSITY)).task_vector
    twice = algebra.scale(vector, 2.0, tmp_path / "twice")
    total = algebra.add([(vector, 1.0), (vector, 1.0)], tmp_path / "total")
    for made in (twice, total):
        assert (made.statistics, list(made.specs)) == ({}, ["a.weight"])
        np.testing.assert_array_equal(whole(made, "a.weight"), 2 * whole(vector, "a.weight"))


def test_threads_read_one_vector_at_once(save: Save, tmp_path: Path) -> None:
    rows, columns, rank = 900, 400, 3
    generator = np.random.default_rng(0)
    names = [f"t{number}" for number in range(6)]
    keys = {f"{n}.lora_A": (rank, columns) for n in names}
    keys |= {f"{n}.lora_B": (rows, rank) for n in names}
    with VectorWriter(
        tmp_path / "v",
        keys.items(),
        kind="lora",
        encoding="fp32",
        base_digest=DIGEST,
        scaling=dict.fromkeys(names, 0.5),
    ) as writer:
        for key, shape in sorted(keys.items()):
            writer.append(generator.standard_normal(int(np.prod(shape))).astype(np.float32))
            writer.keep(key, shape)
    vector = writer.open()
    expected = {name: whole(vector, name) for name in names}
    wrong: list[str] = []

    def reader(seed: int) -> None:
        draw = np.random.default_rng(seed)
        for _ in range(60):
            name = names[draw.integers(len(names))]
            start = int(draw.integers(rows * columns - 1000))
            if not np.array_equal(
                vector.block(name, start, start + 1000), expected[name][start : start + 1000]
            ):
                wrong.append(name)

    threads = [threading.Thread(target=reader, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


@pytest.mark.parametrize("key", ["statistics", "scaling"])
def test_numbers_that_no_float_holds_are_refused(tmp_path: Path, key: str) -> None:
    text = '{"trim":' + "9" * 400 + "}"
    header = json.dumps(
        {
            "__metadata__": {
                "coldmerge.kind": "full",
                "coldmerge.encoding": "fp32",
                "coldmerge.base_digest": DIGEST,
                "coldmerge.scaling": "{}",
                f"coldmerge.{key}": text,
            },
            "w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]},
        }
    ).encode()
    path = tmp_path / "v.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    with pytest.raises(TaskVectorError) as caught:
        TaskVector.open(path)
    expected = {"statistics": "task_vector.bad_statistics", "scaling": "task_vector.not_one"}
    assert caught.value.code == expected[key]
