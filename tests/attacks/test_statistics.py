"""Statistics that were not asked for, are missing, forged or cannot be: refused, not counted."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from coldmerge.core.dtypes import Floats32
from coldmerge.core.errors import ColdmergeError, TaskVectorError
from coldmerge.core.selection import kept
from coldmerge.core.task_vector import TaskVector
from coldmerge.core.vector_writer import VectorWriter
from coldmerge.wire.calls import call
from coldmerge.wire.v1 import admin_pb2
from coldmerge_coordinator.statistics import check_stored
from coldmerge_coordinator.store.models import Contribution, Round, Upload
from tests.harness import BF16, Array, Live, MachineClient, coordinator, deltas

DENSITY = 0.2
POLICIES: dict[str, dict[str, Any]] = {
    "trim": {"method": "ties", "parameters": {"thresholds": "shipped", "density": DENSITY}},
    "fisher": {"method": "fisher"},
    "gram": {"method": "regmean"},
    "none": {"method": "mean"},
}
COUNTS = {"trim": DENSITY, "fisher": 12.0, "gram": 340.0}


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    with coordinator(tmp_path_factory.mktemp("statistics") / "hub") as live:
        yield live


class Org:
    """A contributor in a round that asks for one kind of statistic."""

    def __init__(self, machine: MachineClient, round_: Round, kind: str) -> None:
        self.machine, self.round, self.kind = machine, round_, kind

    def refused(self, tensors: dict[str, Array], **changes: Any) -> ColdmergeError:
        """The error of a contribution of which nothing may be left."""
        facts = {"statistics": {self.kind: COUNTS[self.kind]}} if self.kind in COUNTS else {}
        with pytest.raises(ColdmergeError) as caught:
            self.machine.contribute(self.round, tensors, **{**facts, **changes})
        live = self.machine.live
        with live.store.database.read() as session:
            assert session.query(Upload).count() == 0
            assert session.query(Contribution).filter_by(round=self.round.id).count() == 0
            counted = session.query(Contribution).count()
        assert list(live.store.uploads.iterdir()) == []
        assert len(list(live.store.payloads.listed())) == counted
        return caught.value


Enter = Callable[[str], Org]


@pytest.fixture(scope="module")
def machine(hub: Live) -> MachineClient:
    return hub.machine("a")


@pytest.fixture
def enter(hub: Live, machine: MachineClient) -> Iterator[Enter]:
    """Open a round of a kind; it is abandoned, and what was counted withdrawn, at the end."""
    opened: list[Round] = []

    def make(kind: str) -> Org:
        opened.append(hub.open_round(min_contributions=5, merge=POLICIES[kind]))
        return Org(machine, opened[-1], kind)

    yield make
    for round_ in opened:
        call(hub.local_admin.AbandonRound, admin_pb2.RoundAction(round=round_.id))


def times(values: Array, factor: float) -> Array:
    return values.astype(np.float32) * np.float32(factor)


def trimmed(tensors: dict[str, Array], density: float = DENSITY) -> dict[str, Array]:
    found = dict(tensors)
    for name, values in tensors.items():
        flat = np.abs(values.astype(np.float32)).reshape(-1)
        k = kept(density, flat.size)
        found[f"{name}.trim"] = np.sort(flat)[-k:][:1].astype(np.float32)
    return found


def fishered() -> dict[str, Array]:
    found = deltas()
    return {**found, **{f"{n}.fisher": np.square(x) + np.float32(1e-8) for n, x in found.items()}}


def grammed() -> dict[str, Array]:
    inputs = np.random.default_rng(3).standard_normal((40, 4)).astype(np.float32)
    return {**deltas(), "layer.weight.gram": inputs.T @ inputs}


MAKE = {"trim": lambda: trimmed(deltas()), "fisher": fishered, "gram": grammed, "none": deltas}


@pytest.mark.parametrize("kind", sorted(POLICIES))
def test_what_is_asked_is_accepted_and_readable(tmp_path: Path, kind: str) -> None:
    with coordinator(tmp_path / "hub") as live:
        org = live.machine("a")
        round_ = live.open_round(merge=POLICIES[kind])
        tensors = MAKE[kind]()
        statistics = {kind: COUNTS[kind]} if kind in COUNTS else {}
        org.contribute(round_, tensors, statistics=statistics)
        with live.store.database.read() as session:
            row = session.query(Contribution).one()
        vector = TaskVector.open(live.store.payloads.local(row.payload))
        assert vector.statistics == statistics
        assert vector.names == set(deltas())
        for key in set(tensors) - set(deltas()):
            name, _, _ = key.rpartition(".")
            found = vector.statistic(name, kind, 0, tensors[key].size)
            np.testing.assert_array_equal(found, tensors[key].reshape(-1))
        total = np.sqrt(sum(float(np.square(x).sum()) for x in deltas().values()))
        assert row.norm == pytest.approx(total)


def test_a_forged_trim_threshold(enter: Enter) -> None:
    org = enter("trim")
    tensors = trimmed(deltas())
    for factor in (0.5, 0.999, 1.001, 3.0, 0.0):
        forged = {**tensors, "layer.weight.trim": times(tensors["layer.weight.trim"], factor)}
        error = org.refused(forged)
        assert error.code == "contribution.trim_wrong"
        assert "layer.weight" in error.message
    assert org.refused(trimmed(deltas(), 0.5)).code == "contribution.trim_wrong"


def test_a_trim_threshold_for_another_density(enter: Enter) -> None:
    error = enter("trim").refused(trimmed(deltas(), 0.5), statistics={"trim": 0.5})
    assert (error.code, error.expected, error.got) == ("manifest.wrong_density", "0.2", "0.5")


def test_thresholds_of_rounded_deltas(enter: Enter) -> None:
    org = enter("trim")
    rounded = {name: values.astype(BF16) for name, values in deltas().items()}
    facts: dict[str, Any] = {"encoding": "bf16", "statistics": {"trim": DENSITY}}
    of_exact = {**rounded, **{k: v for k, v in trimmed(deltas()).items() if k.endswith(".trim")}}
    assert org.refused(of_exact, **facts).code == "contribution.trim_wrong"
    receipt = org.machine.contribute(org.round, trimmed(rounded), **facts)
    assert receipt.document


def test_a_threshold_of_a_lora_product(enter: Enter) -> None:
    org = enter("trim")
    a = np.random.default_rng(1).standard_normal((2, 4)).astype(np.float32)
    b = np.random.default_rng(2).standard_normal((4, 2)).astype(np.float32)
    product = (0.5 * b.astype(np.float64) @ a).astype(np.float32)
    key = "layer.weight"
    tensors = {f"{key}.lora_A": a, f"{key}.lora_B": b}
    facts: dict[str, Any] = {"kind": "lora", "scaling": {key: 0.5}}
    right = trimmed({key: product})[f"{key}.trim"]
    error = org.refused({**tensors, f"{key}.trim": times(right, 1.01)}, **facts)
    assert error.code == "contribution.trim_wrong"
    statistics = {"trim": DENSITY}
    receipt = org.machine.contribute(
        org.round, {**tensors, f"{key}.trim": right}, statistics=statistics, **facts
    )
    assert receipt.document


def test_negative_fisher_information(enter: Enter) -> None:
    org = enter("fisher")
    tensors = fishered()
    tensors["embeddings.weight.fisher"][7, 2] = -1e-6
    error = org.refused(tensors)
    assert (type(error), error.code) == (TaskVectorError, "payload.negative_statistic")
    assert "embeddings.weight.fisher" in error.message


def test_a_statistic_that_is_not_finite(enter: Enter) -> None:
    tensors = grammed()
    tensors["layer.weight.gram"][1, 1] = np.nan
    assert enter("gram").refused(tensors).code == "payload.not_finite"


WRONG_ENTRIES: dict[str, tuple[str, str, Array]] = {
    "gram of the outputs": ("gram", "embeddings.weight.gram", np.eye(16, dtype=np.float32)),
    "gram of a vector": ("gram", "layer.bias.gram", np.eye(4, dtype=np.float32)),
    "gram in two bytes": ("gram", "layer.weight.gram", np.eye(4).astype(BF16)),
    "fisher, transposed": ("fisher", "embeddings.weight.fisher", np.ones((4, 16), np.float32)),
    "two thresholds": ("trim", "layer.weight.trim", np.ones(2, np.float32)),
    "of a tensor at rest": ("fisher", "layer.bias.fisher", np.ones(4, np.float32)),
    "of a private tensor": ("fisher", "classifier.weight.fisher", np.ones((2, 4), np.float32)),
    "of nothing": ("fisher", "fishing.fisher", np.ones(4, np.float32)),
}


@pytest.mark.parametrize("case", sorted(WRONG_ENTRIES))
def test_a_statistic_that_does_not_fit(enter: Enter, case: str) -> None:
    kind, key, value = WRONG_ENTRIES[case]
    error = enter(kind).refused({**MAKE[kind](), key: value})
    assert error.code in {"manifest.wrong_statistic", "manifest.wrong_dtype"}
    assert key in error.message


def test_a_statistic_that_nobody_asked_for(enter: Enter) -> None:
    org = enter("none")
    error = org.refused(grammed(), statistics={"gram": 340.0})
    assert (error.code, error.expected) == ("manifest.unasked_statistic", "no statistics")
    assert org.refused(grammed()).code == "manifest.unknown_tensor"


def test_another_statistic_than_the_one_asked_for(enter: Enter) -> None:
    error = enter("fisher").refused({**fishered(), **grammed()}, statistics=dict(COUNTS))
    assert error.code == "manifest.unasked_statistic"


@pytest.mark.parametrize("kind", ["trim", "fisher", "gram"])
def test_a_statistic_that_is_missing(enter: Enter, kind: str) -> None:
    org = enter(kind)
    error = org.refused(deltas(), statistics={})
    assert (error.code, error.expected) == ("manifest.no_statistics", kind)
    assert org.refused(deltas()).code == "manifest.missing_statistic"
    if kind != "gram":
        part = MAKE[kind]()
        del part[f"embeddings.weight.{kind}"]
        error = org.refused(part)
        assert error.code == "manifest.missing_statistic"
        assert "embeddings.weight" in error.message


def _negative_diagonal(gram: Array) -> None:
    gram[2, 2] *= -1


def _not_symmetric(gram: Array) -> None:
    gram[0, 3] += gram[0, 0] / 100


def _too_large(gram: Array) -> None:
    gram[1, 2] = gram[2, 1] = 2 * gram.max()


@pytest.mark.parametrize("harm", [_negative_diagonal, _not_symmetric, _too_large])
def test_a_matrix_that_is_no_gram(enter: Enter, harm: Callable[[Array], None]) -> None:
    tensors = grammed()
    harm(tensors["layer.weight.gram"])
    assert enter("gram").refused(tensors).code == "contribution.not_a_gram"


def test_large_gram_matrices_are_looked_at_in_places(tmp_path: Path) -> None:
    """One of 700 columns: the diagonal throughout, tiles by the seed, the same twice."""
    inputs = np.random.default_rng(0).standard_normal((800, 700)).astype(np.float32)

    def check(harm: tuple[slice, slice], seed: bytes) -> str:
        gram: Floats32 = inputs.T @ inputs
        gram += gram.T.copy()
        gram[harm] -= 100
        keys = {"w": (2, 700), "w.gram": (700, 700)}
        with VectorWriter(
            tmp_path / "v",
            keys.items(),
            kind="full",
            encoding="fp32",
            base_digest="0" * 64,
            scaling={},
            statistics={"gram": 800},
        ) as writer:
            writer.append(np.ones(1400, np.float32))
            writer.keep("w", keys["w"])
            writer.append_statistic(gram.reshape(-1))
            writer.keep("w.gram", keys["w.gram"])
        try:
            check_stored(writer.open(), seed)
        except TaskVectorError as error:
            return error.code
        return "sound"

    nothing = (slice(0, 0), slice(0, 0))
    half = (slice(0, 350), slice(350, 700))
    corner = (slice(640, 641), slice(3, 4))
    assert [check(nothing, bytes([n])) for n in range(3)] == ["sound"] * 3
    assert [check(half, bytes([n])) for n in range(5)] == ["contribution.not_a_gram"] * 5
    assert check(corner, b"x") == check(corner, b"x")
