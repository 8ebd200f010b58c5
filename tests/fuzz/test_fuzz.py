"""Every target on its corpus, on inputs that hypothesis makes, and on a target that is broken."""

from __future__ import annotations

import base64
import struct
import time
import tracemalloc
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.fuzz.__main__ import main
from tests.fuzz.engine import (
    CORPUS,
    MAX_MEMORY,
    MAX_SECONDS,
    Judge,
    Result,
    Target,
    Verdict,
    WrongAcceptanceError,
    drive,
)
from tests.fuzz.headers import check_file, checkpoint
from tests.fuzz.messages import invitation
from tests.fuzz.mutate import Mutator
from tests.fuzz.papers import document
from tests.fuzz.seed_tensors import framed
from tests.fuzz.settings import merge_plan, round_policy
from tests.fuzz.targets import TARGETS

FILES = [(name, file) for name, target in sorted(TARGETS.items()) for file in target.corpus()]
EXPECTED = {"ok": Verdict.ACCEPTED, "bad": Verdict.REFUSED}


@pytest.mark.parametrize(("name", "file"), FILES)
def test_a_corpus_file_has_its_verdict(name: str, file: str) -> None:
    data = (CORPUS / name / file).read_bytes()
    assert TARGETS[name].run(data) is EXPECTED[file.split("-")[0]]


def test_the_corpus_is_small_and_every_target_has_good_and_bad() -> None:
    assert sum(path.stat().st_size for path in CORPUS.rglob("*") if path.is_file()) < 200_000
    assert {path.name for path in CORPUS.iterdir()} == set(TARGETS)
    for name in TARGETS:
        kinds = {file.split("-")[0] for target, file in FILES if target == name}
        assert kinds == {"ok", "bad"}, name


@pytest.mark.parametrize("name", sorted(TARGETS))
def test_mutated_inputs_are_refused_or_sound(name: str, tmp_path: Path) -> None:
    mutator = iter(Mutator(TARGETS[name], seed=7))
    found = drive(Judge(TARGETS[name], tmp_path), mutator, 600, None)
    assert (found.crashes, found.wrongly_accepted, found.findings) == (0, 0, [])
    assert found.sound


@pytest.mark.parametrize("name", sorted(TARGETS))
@settings(
    max_examples=40,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(st.data())
def test_no_input_of_hypothesis_breaks_a_target(name: str, data: st.DataObject) -> None:
    target = TARGETS[name]
    corpus = sorted(target.corpus().values())
    raw = data.draw(st.one_of(st.sampled_from(corpus), st.binary(max_size=200)))
    at = data.draw(st.integers(0, len(raw)))
    new = data.draw(st.one_of(st.binary(max_size=8), st.sampled_from((*target.tokens, b"{"))))
    target.run(raw[:at] + new + raw[at + data.draw(st.integers(0, 8)) :])


KEYS = b",".join(b'"%05d":"x"' % number for number in range(80_000)) + b"}"
EMPTY = b'"%d":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'


def _manifest(tensors: bytes) -> bytes:
    return b'{"tensors":[' + tensors + b'1],"type":"coldmerge.manifest/1"}'


def _document(body: bytes, kind: str = "manifest") -> bytes:
    return b"{" + body + b',"type":"coldmerge.' + kind.encode() + b'/1"}'


BOMBS: dict[str, tuple[Callable[[bytes], Verdict], Callable[[], bytes]]] = {
    "a million empty tensors": (
        checkpoint,
        lambda: framed(b"{" + b",".join(EMPTY % n for n in range(10**6)) + b"}"),
    ),
    "8 MiB of empty lists": (checkpoint, lambda: framed(b'{"a":[' + b"[]," * 2_700_000 + b"[]]}")),
    "8 MiB of empty tables": (checkpoint, lambda: framed(b'{"a":[' + b"{}," * 2_700_000 + b"1]}")),
    "8 MiB of numbers": (checkpoint, lambda: framed(b'{"a":[' + b"1," * 4_000_000 + b"1]}")),
    "a key twice among 50,000": (
        checkpoint,
        lambda: framed(b"{" + b",".join(b'"%d":1' % (n % 49_999) for n in range(50_000)) + b"}"),
    ),
    "a length of 2^63": (checkpoint, lambda: struct.pack("<Q", 2**63) + bytes(100)),
    "broken tensors": (document, lambda: _manifest(b'{"a":1},' * 450_000)),
    "tensors without fields": (document, lambda: _manifest(b'{"name":1},' * 50_000)),
    "empty lists for tensors": (document, lambda: _manifest(b"[]," * 1_300_000)),
    "numbers for tensors": (document, lambda: _manifest(b"1," * 500_000)),
    "a tensor of many fields": (document, lambda: _manifest(b"{" + KEYS + b",")),
    "many fields": (document, lambda: _document(KEYS[:-1])),
    "many scalings": (document, lambda: _document(b'"scaling":{' + KEYS)),
    "many metrics": (document, lambda: _document(b'"metrics":{' + KEYS)),
    "many statistics": (document, lambda: _document(b'"statistics":{' + KEYS)),
    "scores of many fields": (document, lambda: _document(b'"base":{' + KEYS, "evaluation")),
    "a long recipe": (document, lambda: _document(b'"recipe":{' + KEYS, "release")),
    "many parents": (
        document,
        lambda: _document(b'"parents":[' + b"1," * 500_000 + b"1]", "release"),
    ),
    "an invitation of 1 MiB": (
        invitation,
        lambda: b"coldmerge-invite:" + base64.b64encode(b"{" + KEYS),
    ),
    "YAML of many keys": (
        round_policy,
        lambda: b"".join(b"k%d: 1\n" % number for number in range(4000)),
    ),
    "a plan of many values": (merge_plan, lambda: b"models: [" + b"{a: 1}," * 4000 + b"x]"),
    "YAML of 1 MiB": (round_policy, lambda: b"a: [" + b"x," * 2**19 + b"x]"),
    "YAML of many values": (round_policy, lambda: b"a: [" + b"x," * 2**16 + b"x]"),
    "YAML, deep": (round_policy, lambda: b"a: " + b"[" * 2**17),
    "YAML, deep by dashes": (round_policy, lambda: b"- " * 2**16),
    "YAML, long key": (round_policy, lambda: b"k" * 2**17 + b": 1"),
}


@pytest.mark.parametrize("what", sorted(BOMBS))
def test_a_bomb_does_not_go_off(what: str) -> None:
    """Linear work takes tenths of a second at most, on a busy machine too; a bomb minutes."""
    run, make = BOMBS[what]
    data = make()
    run(b"")
    seconds = _timed(run, data)
    tracemalloc.start()
    assert run(data) is Verdict.REFUSED
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert seconds < 10 * MAX_SECONDS
    assert peak < MAX_MEMORY


def _timed(run: Callable[[bytes], Verdict], data: bytes) -> float:
    began = time.process_time()
    run(data)
    return time.process_time() - began


def _crash(_data: bytes) -> Verdict:
    raise KeyError("x")


def _wrong(_data: bytes) -> Verdict:
    raise WrongAcceptanceError("nobody signed this")


def _slow(_data: bytes) -> Verdict:
    until = time.process_time() + 0.12
    while time.process_time() < until:
        pass
    return Verdict.REFUSED


def _hungry(_data: bytes) -> Verdict:
    return Verdict.REFUSED if bytes([1]) * (80 * 2**20) else Verdict.ACCEPTED


def _judged(run: Callable[[bytes], Verdict], folder: Path) -> Result:
    target = Target("write", run)
    return drive(Judge(target, folder), iter(Mutator(target, 1)), 3, None)


@pytest.mark.parametrize(
    ("run", "figure"),
    [
        (_crash, "crashes"),
        (_wrong, "wrongly_accepted"),
        (_slow, "worst_seconds"),
        (_hungry, "max_memory"),
    ],
)
def test_a_broken_target_is_found(
    tmp_path: Path, run: Callable[[bytes], Verdict], figure: str
) -> None:
    found = _judged(run, tmp_path)
    assert not found.sound
    assert getattr(found, figure) > getattr(Result("write"), figure)
    saved = [Path(finding.partition(":")[0]) for finding in found.findings]
    assert saved
    assert all(path.parent == tmp_path and path.is_file() for path in saved)


def test_a_parser_that_takes_any_file_is_found(tmp_path: Path) -> None:
    def careless(data: bytes) -> Verdict:
        check_file(data)
        return Verdict.ACCEPTED

    target = TARGETS["checkpoint"]
    broken = Target("checkpoint", careless, target.tokens, target.repair)
    found = drive(Judge(broken, tmp_path), iter(Mutator(broken, 1)), 500, None)
    assert found.wrongly_accepted > 100


def test_the_same_seed_gives_the_same_inputs() -> None:
    def first(seed: int) -> list[bytes]:
        mutator = Mutator(TARGETS["checkpoint"], seed)
        return [mutator.input() for _ in range(200)]

    assert first(1) == first(1) != first(2)


def test_the_command_answers_in_both_formats(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = partial(["write", "--inputs", "50", "--findings", str(tmp_path)].__add__)
    assert main(command(["--format", "json"])) == 0
    assert '"inputs": 50' in capsys.readouterr().out
    assert main(command(["--jobs", "2", "--format", "json"])) == 0
    assert '"inputs": 50' in capsys.readouterr().out
    assert main(command(["--seconds", "0.1"])) == 0
    assert "wrongly accepted" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("name", ["payload", "checkpoint"])
def test_atheris_is_guided_through_a_target(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("atheris", reason="make fuzz installs it")
    command = [name, "--engine", "atheris", "--inputs", "2000", "--seconds", "300"]
    assert main([*command, "--findings", str(tmp_path), "--format", "json"]) == 0
    assert '"inputs": 2000' in capsys.readouterr().out
