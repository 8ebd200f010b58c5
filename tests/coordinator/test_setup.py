"""Making a coordinator's folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from coldmerge.cli.app import app
from coldmerge.core.errors import ConfigError, ConflictError
from coldmerge_coordinator import setup
from coldmerge_coordinator.config import load
from coldmerge_coordinator.store import Store
from tests import s3


def init(folder: Path, *options: str) -> Any:
    """`coldmerge coordinator init`; its error is raised as it is."""
    result = CliRunner().invoke(app, ["coordinator", "init", str(folder), *options])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result


def test_a_folder_that_was_open_to_all_is_closed(tmp_path: Path) -> None:
    folder = tmp_path / "hub"
    folder.mkdir(mode=0o755)
    setup.init(folder, federation="test")
    assert folder.stat().st_mode & 0o777 == 0o700


def test_tensors_can_be_in_s3_from_the_start(tmp_path: Path) -> None:
    prefix = s3.new_prefix()
    init(tmp_path / "hub", *s3.server().init_options(prefix))
    expected = s3.server().config(prefix)
    found = load(tmp_path / "hub")
    assert found.blobs == expected["blobs"]
    assert found.s3.model_dump(mode="json") == {**expected["s3"], "region": "us-east-1"}
    with Store.open(tmp_path / "hub") as store:
        sha256, _ = store.blobs.put(b"there")
        assert s3.server().client(prefix).head(f"blobs/{sha256[:2]}/{sha256}")["size"] == 5
    with pytest.raises(ConflictError) as caught:
        init(tmp_path / "second", *s3.server().init_options(prefix))
    assert caught.value.code == "coordinator.blobs_taken"
    assert not (tmp_path / "second").exists()


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"--blobs": "s3://no-such-bucket/hub"}, "s3.no_bucket"),
        ({"--s3-secret-key-file": "/nowhere/key"}, "s3.key_unreadable"),
        ({"--blobs": "s3://Not_A_Bucket"}, "coordinator.bad_option"),
        ({"--s3-endpoint": "localhost:9000"}, "coordinator.bad_option"),
        ({"--blobs": "blobs"}, "coordinator.no_bucket"),
    ],
)
def test_a_wrong_bucket_is_said_before_anything_is_made(
    tmp_path: Path, changes: dict[str, str], code: str
) -> None:
    options = s3.server().init_options()
    for name, value in changes.items():
        options[options.index(name) + 1] = value
    with pytest.raises(ConfigError) as caught:
        init(tmp_path / "hub", *options)
    assert caught.value.code == code
    assert not (tmp_path / "hub").exists()
