"""Files in YAML: round policies, merge plans, training, sending, a coordinator's settings."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel

from coldmerge.core.errors import ConfigError
from coldmerge.merging.plan import parameters
from coldmerge.merging.plan import plan as plans
from coldmerge.merging.plan.adapter_methods import ADAPTER_METHODS
from coldmerge.merging.registry import method_names
from coldmerge.rounds.policy import load_yaml
from coldmerge_client.policy import SendPolicy
from coldmerge_client.training.config import TrainConfig
from coldmerge_coordinator import config
from tests.fuzz.engine import Verdict, demand
from tests.fuzz.headers import put

TOKENS = (
    *(
        b"\n- ",
        b"\n  ",
        b": ",
        b"&a ",
        b"*a",
        b"<<: *a\n",
        b"!!int ",
        b"!!timestamp x",
        b"!!set {}",
    ),
    *(b"!!python/object/apply:os.system [id]", b"!!binary AA==", b"0x", b"0x" + b"f" * 5000),
    *(b"2026-13-45", b".nan", b".inf", b"1:60:60", b"0b_", b"0o7", b"=", b"~", b"---\n", b"...\n"),
    *(b"? ", b"| ", b"> ", b"%YAML 9.9\n", b"%TAG ! x\n", b"'", b"\\x00", "\u0085".encode()),
    *(b"a: &a [*a]\n", b"{a: 1, a: 2}", b"999999999d", b"24h", b"1_0", b"y", b"No"),
)
TENSORS = (
    *("embed.weight", "layers.0.mlp.weight", "layers.0.attn.weight"),
    *("layers.1.mlp.weight", "layers.1.attn.weight", "norm.weight"),
)


def _check_keys(node: yaml.Node | None, seen: set[int]) -> None:
    """No mapping of the document, as an independent reading composes it, has a key twice."""
    if node is None or id(node) in seen:
        return
    seen.add(id(node))
    if isinstance(node, yaml.MappingNode):
        keys = [(key.tag, key.value) for key, _ in node.value]
        demand(len(set(map(str, keys))) == len(keys), "a key stands twice")
        for _, value in node.value:
            _check_keys(value, seen)
    elif isinstance(node, yaml.SequenceNode):
        for value in node.value:
            _check_keys(value, seen)


def _check_document(data: bytes, accepted: BaseModel | None) -> Verdict:
    node = yaml.compose(data.decode(), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    _check_keys(node, set())
    if accepted is not None:
        _check_model(accepted, node)
    return Verdict.ACCEPTED


def _check_model(accepted: BaseModel, node: yaml.Node | None) -> None:
    keys = {key.value for key, _ in node.value} if isinstance(node, yaml.MappingNode) else set()
    demand(keys <= {*type(accepted).model_fields, "<<"}, "an unknown key")
    values = accepted.model_dump(mode="json")
    demand(type(accepted).model_validate(values) == accepted, "another value when read again")


def round_policy(data: bytes) -> Verdict:
    """A round template, as `round open` and `model template` read it."""
    try:
        found = load_yaml(put("round.yaml", data))
    except ConfigError:
        return Verdict.REFUSED
    found.policy()
    demand(1 <= found.min_contributions <= (found.max_contributions or 10_000), "the numbers")
    demand(found.duration is None or 1 <= found.duration.total_seconds() <= 3650 * 86400, "time")
    demand(found.gate is None or -100 <= found.gate.min_mean_gain <= 100, "the gate")
    return _check_document(data, found)


def merge_plan(data: bytes) -> Verdict:
    """A merge plan, held against a model of two layers."""
    try:
        found = plans.load(put("plan.yaml", data))
        inputs = range(len(found.models))
        table = parameters.settings(found, tuple(inputs), TENSORS).table
    except ConfigError:
        return Verdict.REFUSED
    demand(set(table) == set(TENSORS), "tensors without a setting")
    demand(found.method.name in {*_methods(), *ADAPTER_METHODS}, "no such method")
    names = [model.name for model in found.models]
    demand(names and len(set(names)) == len(names), "no models, or one twice")
    return _check_document(data, None)


@cache
def _methods() -> frozenset[str]:
    return frozenset(method_names())


def train_config(data: bytes) -> Verdict:
    """A contributor's training configuration."""
    try:
        found = TrainConfig.load(put("train.yaml", data))
    except ConfigError:
        return Verdict.REFUSED
    positive: list[Any] = [found.epochs, found.lr, found.batch_size, found.lora.r, found.max_length]
    demand(all(0 < value < float("inf") for value in positive), "a number out of range")
    demand(isinstance(found.data.train, Path), "no data")
    return _check_document(data, None)


def send_policy(data: bytes) -> Verdict:
    """What may leave a contributor's machine."""
    try:
        found = SendPolicy.load(put("policy.yaml", data))
    except ConfigError:
        return Verdict.REFUSED
    demand(found.max_bytes is None or found.max_bytes > 0, "the limit")
    demand(set(found.may_send) <= {"fisher", "gram"}, "what may be sent")
    return _check_document(data, found)


def coordinator_config(data: bytes) -> Verdict:
    """A coordinator's settings, with its database's address."""
    path = put(f"coordinator/{config.FILE_NAME}", data)
    try:
        found = config.load(path.parent)
        found.database_in(path.parent)
    except ConfigError:
        return Verdict.REFUSED
    for address in (found.listen, found.enrol_listen):
        demand(0 <= int(address.rpartition(":")[2]) <= 65535, "no such port")
    return _check_document(data, found)
