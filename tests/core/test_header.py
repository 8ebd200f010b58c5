from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from coldmerge.core.dtypes import NUMPY
from coldmerge.core.errors import ColdmergeError
from coldmerge.core.header import MAX_HEADER_BYTES, TensorSpec, layout, read_header, render_header

names = st.from_regex(r"\A[A-Za-z0-9_][A-Za-z0-9_.-]{0,20}\Z")
shapes = st.lists(st.integers(0, 5), max_size=3).map(tuple)
entries = st.lists(
    st.builds(
        TensorSpec,
        names,
        st.sampled_from(["F32", "BF16", "F16", "I64", "U8", "BOOL"]),
        shapes,
        st.just(0),
        st.just(0),
    ),
    max_size=8,
    unique_by=lambda spec: spec.name,
)
in_tmp = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)


def raw_file(path: Path, header: str | bytes, data: bytes = b"") -> Path:
    text = header.encode() if isinstance(header, str) else header
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def entry(start: int = 0, stop: int = 4, **changes: Any) -> dict[str, Any]:
    return {"dtype": "F32", "shape": [1], "data_offsets": [start, stop]} | changes


@in_tmp
@given(entries, st.dictionaries(st.text(max_size=5), st.text(max_size=5), max_size=3))
def test_what_we_render_we_read_and_so_does_safetensors(
    tmp_path: Path, drawn: list[TensorSpec], metadata: dict[str, str]
) -> None:
    specs = layout(drawn)
    header = render_header(specs, metadata)
    assert len(header) % 8 == 0
    assert header == render_header(specs, dict(reversed(metadata.items())))
    path = tmp_path / "f.safetensors"
    path.write_bytes(header + bytes(specs[-1].stop if specs else 0))
    read = read_header(path)
    assert read.tensors == {spec.name: spec for spec in specs}
    assert read.metadata == metadata
    assert read.data_start == len(header)
    if "BF16" not in {spec.dtype for spec in specs}:
        theirs = load_file(path)
        assert {n: a.shape for n, a in theirs.items()} == {s.name: s.shape for s in specs}


def test_what_safetensors_writes_we_read(tmp_path: Path) -> None:
    tensors: dict[str, np.ndarray] = {
        "a": np.arange(6, dtype=np.float32).reshape(2, 3),
        "b": np.array(3, np.int64),
        "c": np.zeros((0, 2), np.float16),
    }
    save_file(tensors, tmp_path / "f", {"format": "pt"})
    header = read_header(tmp_path / "f")
    assert header.metadata == {"format": "pt"}
    raw = (tmp_path / "f").read_bytes()[header.data_start :]
    for name, array in tensors.items():
        spec = header.tensors[name]
        assert spec.shape == array.shape
        assert NUMPY[spec.dtype] == array.dtype
        assert raw[spec.start : spec.stop] == array.tobytes()


def test_a_header_can_be_reserved_first_and_written_last() -> None:
    long = render_header(layout([TensorSpec("a" * 50, "F32", (3,), 0, 0)]), {})
    short = render_header([], {}, pad_to=len(long))
    assert len(short) == len(long)
    assert struct.unpack("<Q", short[:8])[0] == len(long) - 8


BAD: list[tuple[str, str | bytes, bytes]] = [
    ("safetensors.bad_json", "{x", b""),
    ("safetensors.bad_json", b'{"\xff": 1}', b""),
    ("safetensors.bad_json", '{"a": 1, "a": 2}', b""),
    ("safetensors.bad_json", "[" * 100_000, b""),
    ("safetensors.bad_json", '{"a":' + "9" * 5000 + "}", b""),
    ("safetensors.not_a_table", "[1]", b""),
    ("safetensors.bad_metadata", '{"__metadata__": {"a": 1}}', b""),
    ("safetensors.bad_metadata", '{"__metadata__": "x"}', b""),
    ("safetensors.bad_name", json.dumps({"../../etc/passwd": entry()}), b"1234"),
    ("safetensors.bad_name", json.dumps({"": entry()}), b"1234"),
    ("safetensors.bad_name", json.dumps({"a\n": entry()}), b"1234"),
    ("safetensors.bad_name", json.dumps({"a" * 256: entry()}), b"1234"),
    ("safetensors.bad_entry", json.dumps({"a": [1]}), b""),
    ("safetensors.bad_entry", json.dumps({"a": entry(extra=1)}), b"1234"),
    ("safetensors.bad_entry", json.dumps({"a": entry(shape=[-1])}), b"1234"),
    ("safetensors.bad_entry", json.dumps({"a": entry(shape=[True])}), b"1234"),
    ("safetensors.bad_entry", json.dumps({"a": entry(shape=[1.0])}), b"1234"),
    ("safetensors.bad_entry", json.dumps({"a": entry(shape=[1] * 17)}), b"1234"),
    ("safetensors.bad_entry", json.dumps({"a": entry(4, 0)}), b"1234"),
    ("safetensors.bad_entry", json.dumps({"a": entry(data_offsets=[0])}), b"1234"),
    ("safetensors.bad_entry", json.dumps({"a": entry(shape=[2**41])}), b"1234"),
    ("safetensors.unknown_dtype", json.dumps({"a": entry(dtype="F4")}), b"1234"),
    ("safetensors.size_mismatch", json.dumps({"a": entry(0, 8)}), b"12345678"),
    ("safetensors.gap_or_overlap", json.dumps({"a": entry(4, 8)}), b"12345678"),
    ("safetensors.gap_or_overlap", json.dumps({"a": entry(), "b": entry()}), b"1234"),
    ("safetensors.gap_or_overlap", json.dumps({"a": entry(), "b": entry(8, 12)}), b"1" * 12),
    ("safetensors.wrong_length", json.dumps({"a": entry()}), b"123"),
    ("safetensors.wrong_length", json.dumps({"a": entry()}), b"12345"),
]


@pytest.mark.parametrize(("code", "header", "data"), BAD, ids=range(len(BAD)))
def test_a_bad_header_is_refused_with_its_code(
    tmp_path: Path, code: str, header: str | bytes, data: bytes
) -> None:
    with pytest.raises(ColdmergeError) as caught:
        read_header(raw_file(tmp_path / "f", header, data))
    assert caught.value.code == code
    assert caught.value.hint


@pytest.mark.parametrize("raw", [b"", b"1234567", struct.pack("<Q", 2), struct.pack("<Q", 2**63)])
def test_a_file_too_short_for_its_header_is_refused(tmp_path: Path, raw: bytes) -> None:
    (tmp_path / "f").write_bytes(raw)
    with pytest.raises(ColdmergeError) as caught:
        read_header(tmp_path / "f")
    assert caught.value.code == "safetensors.bad_length"


def test_a_huge_header_is_refused_before_it_is_read(tmp_path: Path) -> None:
    with (tmp_path / "f").open("wb") as file:
        file.write(struct.pack("<Q", MAX_HEADER_BYTES + 1))
        file.truncate(2**30)
    with pytest.raises(ColdmergeError) as caught:
        read_header(tmp_path / "f")
    assert caught.value.code == "safetensors.bad_length"


def test_too_many_tensors_are_refused(tmp_path: Path) -> None:
    empty = '{"dtype":"U8","shape":[0],"data_offsets":[0,0]}'
    text = "{" + ",".join(f'"{number}":{empty}' for number in range(100_001)) + "}"
    with pytest.raises(ColdmergeError) as caught:
        read_header(raw_file(tmp_path / "f", text))
    assert caught.value.code == "safetensors.too_many_tensors"


def test_no_file_is_our_error_too(tmp_path: Path) -> None:
    with pytest.raises(ColdmergeError) as caught:
        read_header(tmp_path / "none")
    assert caught.value.code == "file.unreadable"


@in_tmp
@given(st.binary(max_size=200), st.integers(0, 300))
def test_arbitrary_bytes_never_get_past_us_with_another_error(
    tmp_path: Path, noise: bytes, at: int
) -> None:
    good = render_header(layout([TensorSpec("a.weight", "F32", (2, 3), 0, 0)]), {"k": "v"})
    raw = bytearray(good + bytes(24))
    raw[at % len(raw) : at % len(raw) + len(noise)] = noise
    (tmp_path / "f").write_bytes(raw)
    try:
        header = read_header(tmp_path / "f")
    except ColdmergeError:
        return
    assert sum(spec.nbytes for spec in header.tensors.values()) == len(raw) - header.data_start
