from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from coldmerge.core.checkpoint import Checkpoint
from coldmerge.core.checkpoint_writer import CheckpointWriter
from coldmerge.core.errors import CheckpointError, ColdmergeError, ConflictError, NotFoundError

Save = Callable[..., Checkpoint]


def failure(folder: Path) -> ColdmergeError:
    with pytest.raises(ColdmergeError) as caught:
        Checkpoint.open(folder)
    return caught.value


def test_every_value_reads_as_in_torch(save: Save) -> None:
    tensors = {
        "w": torch.randn(33, 17),
        "h": torch.randn(5, 4).half(),
        "b": torch.randn(3, 3, 3).bfloat16(),
        "ids": torch.arange(12).reshape(3, 4),
        "mask": torch.tensor([True, False]),
        "scalar": torch.tensor(1.5),
        "empty": torch.zeros(0, 3),
    }
    folder = save("m", tensors)
    assert list(folder.tensors) == sorted(tensors)
    for name, tensor in tensors.items():
        assert folder.shape(name) == tuple(tensor.shape)
        array = folder.array(name)
        assert not array.flags.writeable or array.size == 0
        if tensor.is_floating_point():
            expected = tensor.float().numpy()
            np.testing.assert_array_equal(array.astype(np.float32), expected)
            block = folder.block(name, 0, tensor.numel())
            assert block.dtype == np.float32
            np.testing.assert_array_equal(block, expected.reshape(-1))
        else:
            np.testing.assert_array_equal(array, tensor.numpy())
    np.testing.assert_array_equal(folder.block("w", 100, 120), tensors["w"].reshape(-1)[100:120])


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.integers(0, 70), st.integers(0, 70))
def test_a_block_is_a_slice(tmp_path: Path, start: int, stop: int) -> None:
    values = torch.arange(50).bfloat16().reshape(5, 10)
    save_file({"x": values}, tmp_path / "model.safetensors")
    folder = Checkpoint.open(tmp_path)
    expected = values.float().reshape(-1).numpy()[start:stop]
    np.testing.assert_array_equal(folder.block("x", start, stop), expected)
    assert bytes(folder.raw("x", start, stop)) == folder.array("x").tobytes()[start:stop]


def test_a_buffer_has_no_blocks(save: Save) -> None:
    folder = save("m", {"ids": torch.arange(3), "x": torch.ones(1)})
    with pytest.raises(CheckpointError) as caught:
        folder.block("ids", 0, 3)
    assert caught.value.code == "checkpoint.not_float"
    with pytest.raises(NotFoundError) as missing:
        folder.block("nothing", 0, 3)
    assert missing.value.code == "checkpoint.no_such_tensor"


def test_transformers_shards_read_as_one(tmp_path: Path, make_bert: Callable[..., Any]) -> None:
    from transformers import BertModel

    model = make_bert(BertModel)
    model.save_pretrained(tmp_path / "m", max_shard_size="8KB")
    assert len(list((tmp_path / "m").glob("*.safetensors"))) > 2
    folder = Checkpoint.open(tmp_path / "m")
    state = model.state_dict()
    assert set(folder.tensors) <= set(state)
    for name in folder.tensors:
        np.testing.assert_array_equal(folder.array(name), state[name].numpy())
    assert folder.config["model_type"] == "bert"


def test_tied_weights_are_the_one_tensor_in_the_file(
    tmp_path: Path, make_bert: Callable[..., Any]
) -> None:
    from transformers import BertForMaskedLM

    make_bert(BertForMaskedLM).save_pretrained(tmp_path / "m")
    folder = Checkpoint.open(tmp_path / "m")
    assert set(folder.tensors) == set(load_file(tmp_path / "m" / "model.safetensors"))
    assert "cls.predictions.decoder.weight" not in folder.tensors


def test_only_release_files_are_listed(save: Save) -> None:
    folder = save("m", {"x": torch.ones(1)})
    carried = [
        "chat_template.jinja",
        "config_sentence_transformers.json",
        "generation_config.json",
        "merges.txt",
        "modules.json",
        "spiece.model",
        "tokenizer.json",
        "tokenizer_config.json",
        "vocab.txt",
    ]
    left = ["README.md", "modeling.py", "pytorch_model.bin", "optimizer.pt", "trainer_state.json"]
    for name in carried + left:
        (folder.folder / name).write_text("{}")
    (folder.folder / "1_Pooling").mkdir()
    (folder.folder / "1_Pooling" / "config.json").write_text("{}")
    (folder.folder / "1_Pooling" / "code.py").write_text("")
    (folder.folder / ".git").mkdir()
    (folder.folder / ".git" / "config.json").write_text("{}")
    listed = [path.as_posix() for path in folder.files()]
    assert listed == sorted([*carried, "config.json", "1_Pooling/config.json"])


def test_no_safetensors_says_what_is_there(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"pickle")
    error = failure(tmp_path)
    assert error.code == "checkpoint.no_safetensors"
    assert error.got == "pytorch_model.bin"
    assert failure(tmp_path / "none").got == "no such folder"


def sharded(folder: Path) -> dict[str, Any]:
    save_file({"a": torch.ones(2)}, folder / "s1.safetensors")
    save_file({"b": torch.ones(2)}, folder / "s2.safetensors")
    return {"a": "s1.safetensors", "b": "s2.safetensors"}


@pytest.mark.parametrize(
    ("code", "changes"),
    [
        ("checkpoint.missing_shard", {"b": "s3.safetensors"}),
        ("checkpoint.index_lies", {"c": "s1.safetensors"}),
        ("checkpoint.index_lies", {"a": "s2.safetensors"}),
        ("checkpoint.index_lies", {"a": None}),
        ("checkpoint.bad_index", {"a": "../s1.safetensors"}),
        ("checkpoint.bad_index", {"a": 3}),
    ],
)
def test_an_index_that_lies_is_refused(tmp_path: Path, code: str, changes: dict[str, Any]) -> None:
    weight_map = sharded(tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    assert list(Checkpoint.open(tmp_path).tensors) == ["a", "b"]
    weight_map |= changes
    if weight_map["a"] is None:
        weight_map["a"] = weight_map.pop("b")
        weight_map["z"] = "s1.safetensors"
    index.write_text(json.dumps({"weight_map": weight_map}))
    assert failure(tmp_path).code == code


@pytest.mark.parametrize("text", ["", "[]", "{", '{"weight_map": []}', "{}"])
def test_a_broken_index_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(text)
    assert failure(tmp_path).code in {"checkpoint.bad_json", "checkpoint.bad_index"}


def test_a_corrupt_header_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"\xff" * 100)
    assert failure(tmp_path).code == "safetensors.bad_length"


def test_a_missing_configuration_is_named(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError) as caught:
        _ = Checkpoint.open(tmp_path).config
    assert caught.value.code == "checkpoint.bad_json"


def test_a_written_folder_loads_in_transformers_and_torch(
    tmp_path: Path, make_bert: Callable[..., Any]
) -> None:
    from transformers import AutoModel, BertModel

    model = make_bert(BertModel).bfloat16()
    model.save_pretrained(tmp_path / "m")
    source = Checkpoint.open(tmp_path / "m")
    for shard in (5 * 10**9, 3000):
        out = tmp_path / f"copy-{shard}"
        with CheckpointWriter(out, max_shard_bytes=shard) as writer:
            writer.declare(list(source.tensors.values()))
            for path in source.files():
                writer.copy_file(source.folder / path, path)
            for name, spec in reversed(source.tensors.items()):
                middle = spec.nbytes // 2
                writer.write(name, source.raw(name, 0, middle))
                writer.write(name, source.raw(name, middle))
        loaded = AutoModel.from_pretrained(out, dtype=torch.bfloat16)
        for name, tensor in model.state_dict().items():
            assert torch.equal(loaded.state_dict()[name], tensor)


def test_mixed_types_stay_aligned(tmp_path: Path, save: Save) -> None:
    source = save("m", {"a": torch.ones(3).bool(), "b": torch.arange(3), "c": torch.ones(1).half()})
    with CheckpointWriter(tmp_path / "out") as writer:
        writer.declare(list(source.tensors.values()))
        for name in source.tensors:
            writer.write(name, source.array(name))
    for name, tensor in load_file(tmp_path / "out" / "model.safetensors").items():
        np.testing.assert_array_equal(tensor.numpy(), source.array(name))


def test_nothing_is_left_when_writing_fails(tmp_path: Path, save: Save) -> None:
    source = save("m", {"a": torch.ones(4)})
    specs = list(source.tensors.values())

    def write(nbytes: int) -> None:
        with CheckpointWriter(tmp_path / "out") as writer:
            writer.declare(specs)
            writer.write("a", bytes(nbytes))

    for nbytes, code in ((8, "checkpoint.incomplete"), (17, "checkpoint.undeclared_bytes")):
        with pytest.raises(CheckpointError) as caught:
            write(nbytes)
        assert caught.value.code == code
    with pytest.raises(KeyError), CheckpointWriter(tmp_path / "out"):
        raise KeyError
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_a_full_folder_is_not_written_over(tmp_path: Path, save: Save) -> None:
    source = save("m", {"a": torch.ones(4)})
    with pytest.raises(ConflictError) as caught, CheckpointWriter(source.folder):
        pass
    assert caught.value.code == "checkpoint.folder_exists"
    (tmp_path / "empty").mkdir()
    with CheckpointWriter(tmp_path / "empty") as writer:
        writer.declare([])
    assert Checkpoint.open(tmp_path / "empty").tensors == {}


def test_reading_leaves_no_memory_behind(tmp_path: Path) -> None:
    """A 400 MB model is read through in a process whose peak stays far below that."""
    save_file({"x": torch.zeros(100_000_000)}, tmp_path / "model.safetensors")
    script = """
import resource, sys
from coldmerge.core.checkpoint import Checkpoint
from coldmerge.core.dtypes import blocks
folder = Checkpoint.open(sys.argv[1])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for start, stop in blocks(100_000_000):
    folder.block("x", start, stop)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], check=True, capture_output=True, text=True
    )
    assert int(done.stdout) < 20_000  # KiB


def test_of_two_writers_of_a_folder_the_first_wins(tmp_path: Path, save: Save) -> None:
    source = save("m", {"a": torch.ones(4)})
    with pytest.raises(ConflictError) as caught, CheckpointWriter(tmp_path / "out"):
        source.folder.rename(tmp_path / "out")
    assert caught.value.code == "checkpoint.folder_exists"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert Checkpoint.open(tmp_path / "out").array("a").tolist() == [1, 1, 1, 1]
