"""The coordinator's truth: tables, migrations, blobs, and the folder that holds them."""

from __future__ import annotations

from contextlib import closing, suppress
from pathlib import Path
from typing import Self

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from sqlalchemy import select

from coldmerge.core.errors import ConfigError, ConflictError
from coldmerge.core.files import fsync_path, make_folder
from coldmerge_coordinator import config as settings
from coldmerge_coordinator.config import CoordinatorConfig
from coldmerge_coordinator.store.blobs import BlobStore
from coldmerge_coordinator.store.bucket import Bucket, split_url
from coldmerge_coordinator.store.cache import Cache
from coldmerge_coordinator.store.database import HEAD, Database, migrate, schema_revision
from coldmerge_coordinator.store.engine import shown
from coldmerge_coordinator.store.models import Contributor, Model
from coldmerge_coordinator.store.payloads import Payloads, S3Payloads
from coldmerge_coordinator.store.releases import Signer
from coldmerge_coordinator.store.s3_blobs import S3Blobs

__all__ = ["Database", "Signer", "Store", "lay_out"]

_FOLDERS = ("contributions", "uploads")


class Store:
    """A coordinator's folder: settings, database, blobs, signing key.

    ```
    DIR/config.yaml  coldmerge.db  blobs/ab/<sha256>  contributions/<id>.safetensors
        uploads/<id>.part  keys/signing.key
    ```

    Blobs and contributions may be in S3 instead; then `cache/` holds copies.
    """

    def __init__(self, folder: Path, config: CoordinatorConfig) -> None:
        self.folder = folder
        self.config = config
        self.database_url = config.database_in(folder)
        self.database = Database(self.database_url, config.federation)
        self.bucket: Bucket | None = None
        if config.blobs.startswith("s3://"):
            self.bucket = Bucket(*split_url(config.blobs), config.s3)
        self.blobs, self.payloads = self._stores()
        self._signer: tuple[int, Signer] | None = None

    def _stores(self) -> tuple[BlobStore, Payloads]:
        if self.bucket is None:
            return BlobStore(self.folder / self.config.blobs), Payloads(self.folder)
        cache = Cache(self.folder / "cache", self.config.cache_bytes)
        return S3Blobs(self.bucket, cache), S3Payloads(self.folder, self.bucket, cache)

    @classmethod
    def create(cls, folder: Path, config: CoordinatorConfig) -> Self:
        """Lay out `folder` (which may hold keys already) and an empty database.

        Raises:
            ConflictError: there is a coordinator in it, or in the database.
        """
        if (folder / settings.FILE_NAME).exists():
            raise ConflictError(
                "store.exists",
                f"There is already a coordinator in {folder}.",
                hint="Choose another folder, or run this one with `coldmerge coordinator serve`.",
            )
        lay_out(folder)
        migrate(config.database_in(folder))
        _check_empty(config.database_in(folder))
        settings.save(config, folder)
        return cls(folder, config)

    @classmethod
    def open(cls, folder: Path) -> Self:
        """Open a coordinator's folder, and bring its database to this version's schema.

        Raises:
            ConfigError: no coordinator there, a setting is wrong, or there is no such bucket.
            ConflictError: the database was made by a newer coldmerge.
            UnavailableError: the database or the S3 server does not answer.
        """
        store = cls(folder, settings.load(folder))
        if store.bucket is not None:
            store.bucket.check()
        for name in _FOLDERS:
            (folder / name).mkdir(exist_ok=True, mode=0o700)
        fsync_path(folder)  # whoever made one of them may have been killed before this
        if schema_revision(store.database) != HEAD:
            migrate(store.database_url)
        return store

    @property
    def federation(self) -> str:
        """The federation's name."""
        return self.config.federation

    @property
    def contributions(self) -> Path:
        """Folder of the admitted task vectors."""
        return self.folder / "contributions"

    @property
    def uploads(self) -> Path:
        """Folder of the uploads that go on."""
        return self.folder / "uploads"

    @property
    def keys(self) -> Path:
        """Folder of the private keys."""
        return self.folder / "keys"

    @property
    def signer(self) -> Signer:
        """The coordinator's name and signing key, read again when the key was rotated.

        Raises:
            ConfigError: the key is missing, open to others, or not an Ed25519 key.
        """
        path = self.keys / "signing.key"
        with suppress(FileNotFoundError):
            written = path.stat().st_mtime_ns
            if self._signer is not None and self._signer[0] == written:
                return self._signer[1]
            self._signer = (written, Signer(self.federation, _load_key(path)))
            return self._signer[1]
        return Signer(self.federation, _load_key(path))

    def close(self) -> None:
        """Give the database connections back."""
        self.database.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def lay_out(folder: Path) -> None:
    """Make a coordinator's folder, and those in it that task vectors need."""
    make_folder(folder)
    for name in _FOLDERS:
        make_folder(folder / name)


def _check_empty(url: str) -> None:
    with closing(Database(url)) as database, database.read() as session:
        taken = any(
            session.scalars(select(table).limit(1)).first() for table in (Model, Contributor)
        )
    if taken:
        raise ConflictError(
            "store.database_taken",
            f"There is already a coordinator in the database {shown(url)}.",
            expected="a database without contributors and models",
            hint="Give it a database of its own; a replica is made as docs/replicas.md says.",
        )


def _load_key(path: Path) -> Ed25519PrivateKey:
    try:
        if path.stat().st_mode & 0o077:
            raise ConfigError(
                "store.key_exposed",
                f"The signing key {path} can be read by others.",
                expected="mode 0600",
                got=f"mode {path.stat().st_mode & 0o777:04o}",
                hint=f"If nobody has read it: chmod 600 {path}",
            )
        key = load_pem_private_key(path.read_bytes(), password=None)
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(
            "store.no_signing_key",
            f"The signing key {path} cannot be read: {error}",
            hint="Restore it from a backup: contributors know its public half.",
        ) from error
    if not isinstance(key, Ed25519PrivateKey):
        raise ConfigError(
            "store.wrong_key",
            f"The signing key {path} is of another kind.",
            expected="Ed25519",
            got=type(key).__name__,
            hint="Restore it from a backup: contributors know its public half.",
        )
    return key
