from __future__ import annotations

import json
import stat
from pathlib import Path

import pytest

from coldmerge.core.errors import ConfigError, ConflictError, IntegrityError, ResourceError
from coldmerge_client.files import exclusive, require_space, write_atomic
from coldmerge_client.home import Home, Seen


def test_the_default_home_is_named_by_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLDMERGE_HOME", str(tmp_path / "here"))
    assert Home.default().path == tmp_path / "here"
    monkeypatch.delenv("COLDMERGE_HOME")
    assert Home.default().path == Path.home() / ".coldmerge"


def test_a_home_that_has_not_joined_says_how_to(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="not joined") as error:
        Home(tmp_path).membership()
    assert "coldmerge join" in error.value.hint


def test_membership_survives_saving(home: Home) -> None:
    assert Home(home.path).membership() == home.membership()
    assert home.joined


@pytest.mark.parametrize("content", ["", "[]", "{", '{"federation": "only"}'])
def test_a_damaged_membership_is_an_integrity_error(home: Home, content: str) -> None:
    (home.path / "federation.json").write_text(content)
    with pytest.raises(IntegrityError):
        home.membership()


def test_keys_are_readable_by_the_owner_alone(home: Home) -> None:
    for path in (home.identity_key_path, home.tls_key):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(home.tls_key.parent.stat().st_mode) == 0o700


def test_a_key_that_others_can_read_is_refused(home: Home) -> None:
    home.identity_key_path.chmod(0o644)
    with pytest.raises(ConfigError, match="Others can read") as error:
        home.identity_key()
    assert error.value.code == "home.open_key"


def test_missing_swapped_and_damaged_keys_are_told_apart(home: Home) -> None:
    write_atomic(home.identity_key_path, home.tls_key.read_bytes())
    with pytest.raises(IntegrityError) as error:
        home.identity_key()
    assert error.value.code == "home.wrong_key"
    write_atomic(home.tls_key, b"nonsense")
    with pytest.raises(IntegrityError):
        home.tls_private_key()
    home.tls_key.unlink()
    with pytest.raises(ConfigError) as missing:
        home.tls_private_key()
    assert missing.value.code == "home.no_key"


def test_the_last_seen_release_only_moves_forward(home: Home) -> None:
    assert home.seen("m") is None
    home.saw("m", Seen(3, "a" * 64, "b" * 64))
    home.saw("m", Seen(2, "c" * 64, "d" * 64))
    home.saw("other", Seen(9, "e" * 64, "f" * 64))
    assert home.seen("m") == Seen(3, "a" * 64, "b" * 64)


def test_local_releases_are_numbers_in_order(home: Home) -> None:
    for name in ("10", "2", "0", "3.partial-77", "notes"):
        (home.releases("m") / name).mkdir(parents=True)
    assert home.local_releases("m") == [0, 2, 10]
    assert home.local_releases("unknown") == []


def test_writing_leaves_no_temporary_file_and_replaces_whole(tmp_path: Path) -> None:
    path = tmp_path / "state.json"
    write_atomic(path, b"old")
    write_atomic(path, b"new")
    assert path.read_bytes() == b"new"
    assert [left.name for left in tmp_path.iterdir()] == ["state.json"]


def test_state_is_saved_only_when_the_block_ends_well(home: Home) -> None:
    def failing() -> None:
        with home.state() as state:
            state["x"] = 1
            raise RuntimeError

    with pytest.raises(RuntimeError):
        failing()
    with home.state() as state:
        assert "x" not in state
        state["y"] = 2
    assert json.loads((home.path / "state.json").read_text()) == {"y": 2}


def test_a_lock_is_refused_while_it_is_held(home: Home) -> None:
    with (
        exclusive(home.lock("m"), "m", wait=False),
        pytest.raises(ConflictError, match="busy with m"),
        exclusive(home.lock("m"), "m", wait=False),
    ):
        pass
    with exclusive(home.lock("m"), "m", wait=False):
        pass


def test_a_disk_that_is_too_small_is_refused_before_the_work(tmp_path: Path) -> None:
    require_space(tmp_path, 1, "this")
    with pytest.raises(ResourceError, match="too small"):
        require_space(tmp_path, 2**62, "this")
