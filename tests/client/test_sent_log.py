from __future__ import annotations

import json
import stat
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import pytest

from coldmerge.core.errors import IntegrityError
from coldmerge_client import enrol, sent_log
from coldmerge_client.home import Home

AT = datetime(2026, 3, 2, 12, 0, tzinfo=UTC)


@pytest.fixture
def log(home: Home) -> Home:
    for number in range(4):
        sent_log.record(home, "contribution", {"payload_bytes": number, "round": "r"}, AT)
    return home


def lines(home: Home) -> list[bytes]:
    return home.sent_log.read_bytes().splitlines(keepends=True)


def test_lines_come_back_in_order(log: Home) -> None:
    found = sent_log.read(log)
    assert [line.number for line in found] == [0, 1, 2, 3]
    assert [line.body["payload_bytes"] for line in found] == [0, 1, 2, 3]
    assert {line.at for line in found} == {AT}
    assert {line.event for line in found} == {"contribution"}


def test_an_empty_log_reads_as_nothing(home: Home) -> None:
    assert sent_log.read(home) == ()


def edited(all_lines: list[bytes]) -> list[bytes]:
    return [line.replace(b'"payload_bytes":1', b'"payload_bytes":7') for line in all_lines]


TAMPERING: dict[str, Callable[[list[bytes]], list[bytes]]] = {
    "a value edited": edited,
    "a line removed": lambda found: found[:1] + found[2:],
    "two lines swapped": lambda found: [found[1], found[0], *found[2:]],
    "a line repeated": lambda found: [*found, found[-1]],
    "the tail cut": lambda found: found[:-1],
    "everything cut": lambda _found: [],
    "the last line cut in half": lambda found: [*found[:-1], found[-1][:20]],
    "a foreign line added": lambda found: [*found, b'{"number":4,"signature":"00"}\n'],
    "an empty line added": lambda found: [*found, b"\n"],
}


@pytest.mark.parametrize("how", TAMPERING)
def test_tampering_shows(log: Home, how: str) -> None:
    log.sent_log.write_bytes(b"".join(TAMPERING[how](lines(log))))
    with pytest.raises(IntegrityError) as error:
        sent_log.read(log)
    assert error.value.code == "sent_log.tampered"
    assert "line" in error.value.ids


def test_every_single_byte_counts(log: Home) -> None:
    raw = log.sent_log.read_bytes()
    for place in range(0, len(raw), 7):
        log.sent_log.write_bytes(raw[:place] + bytes([raw[place] ^ 1]) + raw[place + 1 :])
        with pytest.raises(IntegrityError):
            sent_log.read(log)


def test_a_log_signed_by_another_key_is_refused(log: Home, tmp_path: Path) -> None:
    other = Home(tmp_path / "other")
    enrol._make_keys(other)
    other.sent_log.write_bytes(log.sent_log.read_bytes())
    with pytest.raises(IntegrityError):
        sent_log.read(other)


def test_a_tampered_log_takes_no_more_lines(log: Home) -> None:
    log.sent_log.write_bytes(b"".join(lines(log)[:-1]))
    with pytest.raises(IntegrityError):
        sent_log.record(log, "contribution", {}, AT)


def test_a_line_half_written_in_a_crash_is_dropped_and_the_log_goes_on(log: Home) -> None:
    with log.sent_log.open("ab") as file:
        file.write(b'{"at":"2026-03-02T12:00')
    sent_log.record(log, "receipt", {}, AT)
    assert [line.event for line in sent_log.read(log)] == ["contribution"] * 4 + ["receipt"]


def test_a_line_written_just_before_a_crash_counts(log: Home) -> None:
    before = (log.path / "state.json").read_bytes()
    sent_log.record(log, "receipt", {"contribution": "c"}, AT)
    (log.path / "state.json").write_bytes(before)
    sent_log.record(log, "evaluation", {}, AT)
    assert [line.event for line in sent_log.read(log)][4:] == ["receipt", "evaluation"]


def test_each_line_is_plain_json(log: Home) -> None:
    assert all(set(json.loads(line)) >= {"at", "event", "body"} for line in lines(log))


def test_only_its_owner_reads_it_wherever_the_home_is(tmp_path: Path) -> None:
    open_to_all = Home(tmp_path / "home")
    open_to_all.path.mkdir(mode=0o755)
    enrol._make_keys(open_to_all)
    sent_log.record(open_to_all, "contribution", {"round": "r"}, AT)
    assert stat.S_IMODE(open_to_all.sent_log.stat().st_mode) == 0o600
