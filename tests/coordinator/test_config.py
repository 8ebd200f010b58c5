"""`config.yaml`."""

from __future__ import annotations

from pathlib import Path

import pytest

from coldmerge.core.errors import ConfigError
from coldmerge_coordinator.config import CoordinatorConfig, Limits, load, save


def test_it_survives_the_disk(tmp_path: Path) -> None:
    config = CoordinatorConfig(
        federation="fed",
        listen="[::1]:0",
        hosts=("merge.example.org", "10.0.0.7"),
        limits=Limits(max_open_uploads=9),
    )
    save(config, tmp_path)
    assert load(tmp_path) == config
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]
    assert (tmp_path / "config.yaml").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize(
    ("text", "code", "key"),
    [
        ("federation: fed\nlisten: nowhere", "config.invalid", "listen"),
        ("federation: fed\nport: 1", "config.invalid", "port"),
        ("federation: a b", "config.invalid", "federation"),
        ("federation: fed\nlimits: {max_payload_bytes: 0}", "config.invalid", None),
        ("", "config.invalid", "the top level"),
        ("federation: [", "config.unreadable", None),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, text: str, code: str, key: str | None) -> None:
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(ConfigError) as caught:
        load(tmp_path)
    assert caught.value.code == code
    assert key is None or caught.value.ids["key"] == key


def test_a_relative_database_is_in_the_folder(tmp_path: Path) -> None:
    config = CoordinatorConfig(federation="fed")
    assert config.database_in(tmp_path) == f"sqlite:///{tmp_path}/coldmerge.db"
    far = config.model_copy(update={"database_url": "sqlite:////var/lib/x.db"})
    assert far.database_in(tmp_path) == "sqlite:////var/lib/x.db"
    server = config.model_copy(update={"database_url": "postgresql+psycopg://me:pw@db/cold"})
    assert server.database_in(tmp_path) == "postgresql+psycopg://me:pw@db/cold"
    bad = config.model_copy(update={"database_url": "nonsense"})
    with pytest.raises(ConfigError) as caught:
        bad.database_in(tmp_path)
    assert caught.value.code == "config.bad_database_url"
