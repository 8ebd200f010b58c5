"""The folder: created once, opened again, keys guarded."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from sqlalchemy import inspect

from coldmerge.core.errors import ConfigError, ConflictError
from coldmerge_coordinator.config import CoordinatorConfig
from coldmerge_coordinator.store import Store
from coldmerge_coordinator.store.database import downgrade
from coldmerge_coordinator.store.models import Contributor
from tests.backends import in_s3, on_postgresql


def test_the_folder_is_laid_out(folder: Path) -> None:
    made = {"config.yaml", "cache" if in_s3() else "blobs", "contributions", "uploads"}
    assert {path.name for path in folder.iterdir()} >= made
    assert (folder / "coldmerge.db").exists() != on_postgresql()
    assert folder.stat().st_mode & 0o777 == 0o700
    with Store.open(folder) as store:
        assert store.federation == "fed"
        assert store.signer.federation == "fed"
        assert "round" in inspect(store.database.engine).get_table_names()


def test_an_existing_coordinator_is_not_overwritten(folder: Path) -> None:
    before = (folder / "config.yaml").read_bytes()
    with pytest.raises(ConflictError) as caught:
        Store.create(folder, CoordinatorConfig(federation="other"))
    assert caught.value.code == "store.exists"
    assert (folder / "config.yaml").read_bytes() == before


def test_opening_brings_the_schema_up(folder: Path) -> None:
    with Store.open(folder) as store:
        url = store.database_url
    downgrade(url, "base")
    with Store.open(folder) as store:
        assert "round" in inspect(store.database.engine).get_table_names()


def test_no_coordinator_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        Store.open(tmp_path)
    assert caught.value.code == "config.no_coordinator"
    assert list(tmp_path.iterdir()) == []


def pem_of_another_kind() -> bytes:
    key = ec.generate_private_key(ec.SECP256R1())
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


@pytest.mark.parametrize(
    ("content", "mode", "code"),
    [
        (None, 0o644, "store.key_exposed"),
        (b"not a key", 0o600, "store.no_signing_key"),
        (pem_of_another_kind(), 0o600, "store.wrong_key"),
    ],
)
def test_the_signing_key_is_guarded(
    folder: Path, content: bytes | None, mode: int, code: str
) -> None:
    path = folder / "keys" / "signing.key"
    if content is not None:
        path.write_bytes(content)
    path.chmod(mode)
    with Store.open(folder) as store, pytest.raises(ConfigError) as caught:
        _ = store.signer
    assert caught.value.code == code


def test_a_missing_signing_key_is_said(folder: Path) -> None:
    (folder / "keys" / "signing.key").unlink()
    with Store.open(folder) as store, pytest.raises(ConfigError) as caught:
        _ = store.signer
    assert caught.value.code == "store.no_signing_key"


def test_a_database_that_is_taken_is_refused(folder: Path, tmp_path: Path) -> None:
    with Store.open(folder) as store, store.database.write() as session:
        session.add(Contributor(name="a", role="contributor", created_at=datetime.now(UTC)))
        url = store.database_url
    with pytest.raises(ConflictError) as caught:
        Store.create(tmp_path / "other", CoordinatorConfig(federation="o", database_url=url))
    assert caught.value.code == "store.database_taken"
    assert not (tmp_path / "other" / "config.yaml").exists()
