"""Sound and malformed safetensors files: what `tests.fuzz.seeds` writes of them."""

from __future__ import annotations

import json
import struct

from tests.fuzz.headers import safetensors_file
from tests.fuzz.papers import DIGEST

Files = dict[str, bytes]


def framed(body: bytes, data: bytes = b"") -> bytes:
    """A safetensors file with this very header."""
    return struct.pack("<Q", len(body)) + body + data


def _tensor(name: str, rest: str = '"dtype":"F32","shape":[1],"data_offsets":[0,4]') -> bytes:
    return f"{{{json.dumps(name)}:{{{rest}}}}}".encode()


def checkpoint() -> Files:
    two = safetensors_file({"a.weight": ("F32", [2, 3], 24), "b": ("BF16", [4], 8)})
    kinds = {"x": ("I64", [1], 8), "y": ("BOOL", [3], 3), "z": ("F8_E4M3", [], 1)}
    entry = '"dtype":"F32","shape":[1],"data_offsets":[0,4]'
    wide = '"dtype":"F32","shape":[1099511627776,1099511627776,0],"data_offsets":[0,0]'
    return {
        "ok-two": two,
        "ok-kinds": safetensors_file(kinds, {"format": "pt"}),
        "ok-empty": framed(b"{}"),
        "ok-empty-tensor": safetensors_file({"a": ("F32", [0, 3], 0), "b": ("F16", [1], 2)}),
        "bad-name": framed(_tensor("../../etc/passwd"), bytes(4)),
        "bad-twice": framed(f'{{"a":{{{entry}}},"a":{{{entry}}}}}'.encode(), bytes(4)),
        "bad-key-twice": framed(_tensor("a", entry + ',"dtype":"F32"'), bytes(4)),
        "bad-nan": framed(_tensor("a", entry.replace("[1]", "[NaN]")), bytes(4)),
        "bad-minus-zero": framed(_tensor("a", entry.replace("[0,", "[-0,")), bytes(4)),
        "bad-float": framed(_tensor("a", entry.replace("[1]", "[1.0]")), bytes(4)),
        "bad-huge-number": framed(_tensor("a", entry.replace("[1]", f"[{'9' * 5000}]")), bytes(4)),
        "bad-deep": framed(b'{"a":' + b"[" * 5000, b""),
        "bad-bom": framed(b"\xef\xbb\xbf" + _tensor("a"), bytes(4)),
        "bad-space-first": framed(b" " + _tensor("a"), bytes(4)),
        "bad-surrogate": framed(b'{"__metadata__":{"a":"\\ud800"}}'),
        "bad-line-separator": framed(_tensor("a\u2028"), bytes(4)),
        "bad-utf8": framed(b'{"\xed\xa0\x80":1}'),
        "bad-overlap": framed(f'{{"a":{{{entry}}},"b":{{{entry}}}}}'.encode(), bytes(4)),
        "bad-gap": framed(_tensor("a", entry.replace("[0,4]", "[4,8]")), bytes(8)),
        "bad-overflow": framed(_tensor("a", wide)),
        "bad-length": struct.pack("<Q", 2**63) + b"{}",
        "bad-metadata": framed(b'{"__metadata__":{"a":1}}'),
        "bad-cut": two[:-1],
        "bad-nothing": b"",
    }


def shards() -> Files:
    good = {"weight_map": {"a": "a.safetensors", "b": "b.safetensors"}}
    lies = {"weight_map": {"a": "b.safetensors", "b": "a.safetensors"}}
    return {
        "ok-index": json.dumps({"metadata": {"total_size": 16}, **good}).encode(),
        "ok-one-shard": b'{"weight_map":{"b":"b.safetensors"}}',
        "bad-long": json.dumps({"weight_map": {"a": "a" * 300}}).encode(),
        "bad-lies": json.dumps(lies).encode(),
        "bad-path": json.dumps({"weight_map": {"a": "../../etc/passwd"}}).encode(),
        "bad-twice": json.dumps(good).encode().replace(b'{"a"', b'{"a":"b.safetensors","a"'),
        "bad-deep": b'{"weight_map":' + b"[" * 3000,
        "bad-list": b"[]",
        "bad-bom": b"\xef\xbb\xbf{}",
        "bad-surrogate": b'{"weight_map":{"\\ud800":"a.safetensors"}}',
    }


def task_vector() -> Files:
    def metadata(**changes: str) -> dict[str, str]:
        first = {"kind": "full", "encoding": "fp32", "base_digest": DIGEST, "scaling": "{}"}
        return {f"coldmerge.{key}": value for key, value in {**first, **changes}.items()}

    full = {"a": ("F32", [2, 3], 24), "b": ("F32", [1], 4)}
    pair = {"a.lora_A": ("BF16", [2, 3], 12), "a.lora_B": ("BF16", [4, 2], 16)}
    lora = {"kind": "lora", "encoding": "bf16"}
    counted = {"a": ("F32", [2, 3], 24), "a.fisher": ("F32", [2, 3], 24), "a.trim": ("F32", [1], 4)}
    both = metadata(statistics='{"fisher":10,"trim":0.5}')
    return {
        "ok-full": safetensors_file(full, metadata()),
        "ok-lora": safetensors_file(pair, metadata(**lora, scaling='{"a":0.5}')),
        "ok-statistics": safetensors_file(counted, both),
        "bad-nan": safetensors_file(pair, metadata(**lora, scaling='{"a":NaN}')),
        "bad-text": safetensors_file(pair, metadata(**lora, scaling='{"a":"0.5"}')),
        "bad-true": safetensors_file(pair, metadata(**lora, scaling='{"a":true}')),
        "bad-twice": safetensors_file(pair, metadata(**lora, scaling='{"a":1,"a":2}')),
        "bad-deep": safetensors_file(pair, metadata(**lora, scaling="[" * 3000)),
        "bad-half": safetensors_file({"a.lora_A": ("F32", [2, 3], 24)}, metadata(kind="lora")),
        "bad-base": safetensors_file(full, metadata(base_digest="../../etc/passwd")),
        "bad-kind": safetensors_file(full, metadata(kind="expert")),
        "bad-unsorted": safetensors_file(dict(reversed(full.items())), metadata()),
        "bad-statistic": safetensors_file(full, metadata(statistics='{"fisher":true}')),
        "bad-plain": safetensors_file(full),
    }


def adapter() -> Files:
    plain = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "bias": "none"}
    stem = "base_model.model.layers.0.q_proj"
    pair = safetensors_file(
        {f"{stem}.lora_A.weight": ("F32", [2, 3], 24), f"{stem}.lora_B.weight": ("F32", [4, 2], 32)}
    )

    def folder(weights: bytes = pair, **changes: object) -> bytes:
        return json.dumps({**plain, **changes}).encode() + b"\x00\x00\x00\x01" + weights

    slow = {".*a.*a.*a.*a.*a.*a.*a.*a.*a.*b": 2}
    return {
        "ok-plain": folder(),
        "ok-pattern": folder(rank_pattern={"q_proj": 2}, r=16, use_rslora=True),
        "bad-rank": folder(r=3),
        "bad-dora": folder(use_dora=True),
        "bad-alpha": json.dumps(plain).replace("4", "NaN").encode() + b"\x00\x00\x00\x01" + pair,
        "bad-pattern": folder(rank_pattern={"(a+)+b": 2}),
        "bad-slow-pattern": folder(rank_pattern=slow),
        "bad-optional-pattern": folder(rank_pattern={"l?" * 40 + "l" * 40: 2}),
        "bad-half": folder(safetensors_file({f"{stem}.lora_A.weight": ("F32", [2, 3], 24)})),
        "bad-twice": b'{"r":2,' + folder()[1:],
        "bad-huge": folder(lora_alpha=10**400),
        "bad-deep": b'{"a":' * 3000 + folder(),
        "bad-table": folder(rank_pattern=[1]),
    }
