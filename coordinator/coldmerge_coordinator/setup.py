"""Making a coordinator's folder: keys, certificates, configuration, an empty database."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding
from pydantic import ValidationError

from coldmerge.core.clock import Clock, SystemClock
from coldmerge.core.errors import ConfigError, ConflictError
from coldmerge.core.files import fsync_path, make_folder
from coldmerge.core.validation import first_problem
from coldmerge_coordinator import identity
from coldmerge_coordinator.config import BLOBS, SQLITE, CoordinatorConfig, S3Config
from coldmerge_coordinator.store import Store
from coldmerge_coordinator.store.bucket import Bucket, split_url


@dataclass(frozen=True)
class Made:
    """What `init` made; the fingerprint is what contributors are told."""

    federation: str
    fingerprint: str
    offline_key: Path


def init(
    folder: Path,
    *,
    federation: str | None = None,
    hosts: Sequence[str] = ("localhost",),
    listen: str = "127.0.0.1:7443",
    enrol_listen: str = "127.0.0.1:7444",
    database_url: str = SQLITE,
    blobs: str = BLOBS,
    s3: Mapping[str, object] | None = None,
    clock: Clock | None = None,
    **settings: object,
) -> Made:
    """Make a coordinator in `folder`, which must be new or empty.

    `federation` defaults to the folder's name; `s3` are keys of `s3` (None: its default), and
    `settings` further keys of `config.yaml`, which is written last: a folder without it holds
    no coordinator.

    Raises:
        ConflictError: the folder holds something, or the database or the bucket's prefix does.
        ConfigError: a name or address is malformed, or the bucket lets us not in.
        UnavailableError: the database or the S3 server does not answer.
    """
    if folder.exists() and any(folder.iterdir()):
        raise ConflictError(
            "coordinator.folder_not_empty",
            f"{folder} is not empty.",
            expected="a new or empty folder",
            hint="Choose another folder, or remove this one if nothing in it matters.",
        )
    config = _config(
        federation=federation or _name_of(folder),
        hosts=tuple(hosts),
        listen=listen,
        enrol_listen=enrol_listen,
        database_url=database_url,
        blobs=blobs,
        s3={key: value for key, value in (s3 or {}).items() if value is not None},
        **settings,
    )
    _check_blobs(config)
    for part in ("", "keys", "offline", "ca"):
        make_folder(folder / part)
    folder.chmod(0o700)  # it may have been there, open to all
    fingerprint = _make_keys(folder, config, clock or SystemClock())
    Store.create(folder, config).close()
    return Made(config.federation, fingerprint, folder / identity.ROOT_KEY)


def _config(**values: object) -> CoordinatorConfig:
    try:
        return CoordinatorConfig.model_validate(values)
    except ValidationError as error:
        problem = first_problem(error)
        raise ConfigError(
            "coordinator.bad_option",
            f"The coordinator's `{problem.key}` is wrong: {problem.text}.",
            got=problem.got,
            hint="See `coldmerge coordinator init --help`.",
        ) from error


def _check_blobs(config: CoordinatorConfig) -> None:
    """Nothing of another coordinator is where our tensors go: collections would remove it."""
    if not config.blobs.startswith("s3://"):
        if config.s3 != S3Config():
            raise ConfigError(
                "coordinator.no_bucket",
                "An S3 server is given, and no bucket to keep tensors in.",
                expected="blobs at s3://bucket/prefix",
                got=config.blobs,
                hint="Add `--blobs s3://bucket/prefix`, or leave the options of S3 out.",
            )
        return
    bucket = Bucket(*split_url(config.blobs), config.s3)
    bucket.check()
    for folder in ("blobs", "contributions", "uploads"):
        if next(iter(bucket.list(folder)), None) is not None:
            raise ConflictError(
                "coordinator.blobs_taken",
                f"There are tensors or task vectors in {config.blobs} already.",
                expected=f"nothing below {folder}/",
                hint="Give each coordinator a prefix of its own; a replica is made as "
                "docs/replicas.md says, and a backup is restored with `coordinator restore`.",
            )


def _name_of(folder: Path) -> str:
    name = re.sub(r"[^a-zA-Z0-9._-]+", "-", folder.resolve().name).strip("._-")
    return name[:64] or "coldmerge"


def _make_keys(folder: Path, config: CoordinatorConfig, clock: Clock) -> str:
    now = clock.now()
    root_key, root = identity.make_root(config.federation, now)
    key, intermediate = identity.make_intermediate(root_key, root, config.federation, now)
    for path, content in (
        (identity.ROOT_KEY, identity.private_pem(root_key)),
        (identity.ROOT, root.public_bytes(Encoding.PEM)),
        (identity.INTERMEDIATE_KEY, identity.private_pem(key)),
        (identity.INTERMEDIATE, intermediate.public_bytes(Encoding.PEM)),
        (identity.SIGNING_KEY, identity.private_pem(Ed25519PrivateKey.generate())),
    ):
        _write_private(folder / path, content)
    return root.fingerprint(hashes.SHA256()).hex()


def _write_private(path: Path, content: bytes) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with os.fdopen(fd, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    fsync_path(path.parent)
