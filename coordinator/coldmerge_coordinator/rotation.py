"""New keys for a coordinator, while it serves: the intermediate, and the signing key.

Each rotation has one step that counts (a rename, or a row). What comes before it waits in a
file that ends in `.next`; what comes after it is finished by the next run, or read as if it
were.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, load_pem_private_key
from sqlalchemy import select

from coldmerge.core.clock import Clock, SystemClock
from coldmerge.core.errors import ConfigError
from coldmerge.core.files import fsync_path
from coldmerge.core.keys import KeyStatement
from coldmerge_coordinator import audit, config, identity
from coldmerge_coordinator.identity import (
    INTERMEDIATE,
    INTERMEDIATE_KEY,
    ROOT,
    SIGNING_KEY,
    next_path,
)
from coldmerge_coordinator.store import Signer, Store, keys
from coldmerge_coordinator.store.models import SigningKey


@dataclass(frozen=True)
class Rotated:
    """A new intermediate, and until when it holds."""

    serial: str
    expires_at: datetime


def rotate_intermediate(folder: Path, root_key: Path, clock: Clock | None = None) -> Rotated:
    """Replace the intermediate of `folder`. A coordinator that serves it takes the new one at
    its next handshake; certificates by the old one hold until they expire, within a day.

    Raises:
        ConfigError: no coordinator there, or not the key of its root certificate.
    """
    federation = config.load(folder).federation
    root, key = _root(folder, root_key)
    now = (clock or SystemClock()).now()
    new_key, certificate = identity.make_intermediate(key, root, federation, now)
    settle(folder / INTERMEDIATE_KEY, _fits(folder))
    waiting = next_path(folder / INTERMEDIATE_KEY)
    write_private(waiting, identity.private_pem(new_key))
    write_private(folder / INTERMEDIATE, certificate.public_bytes(Encoding.PEM))
    settle(folder / INTERMEDIATE_KEY, good=True)
    return Rotated(format(certificate.serial_number, "x"), certificate.not_valid_after_utc)


def rotate_signing(folder: Path, clock: Clock | None = None) -> KeyStatement:
    """Replace the signing key of `folder`; the old one signs who its successor is.

    The statement is stored before the new key signs anything, so nothing is ever signed
    with a key that clients cannot reach. The old private key is gone afterwards.

    Raises:
        ConfigError: no coordinator there, or its signing key is not the newest one.
    """
    now = (clock or SystemClock()).now()
    path = folder / SIGNING_KEY
    with Store.open(folder) as store:
        _finish_signing(store)
        new = Ed25519PrivateKey.generate()
        write_private(next_path(path), identity.private_pem(new))
        with store.database.write() as session:
            newest = keys.latest(session)
            _check_newest(newest, store.signer)
            row = keys.announce(session, store.signer, new.public_key(), now)
            statement = KeyStatement.parse(row.document)
            audit.append(
                session,
                "signing_key.rotated",
                "local admin",
                now,
                ids={"number": statement.number},
                detail={"public_key": statement.public_key, "previous": statement.previous},
            )
        settle(path, good=True)
    return statement


def _finish_signing(store: Store) -> None:
    """Put a key in place that was announced before a crash; forget one that was not."""
    waiting = next_path(store.folder / SIGNING_KEY)
    if not waiting.exists():
        return
    key = load_pem_private_key(waiting.read_bytes(), None)
    with store.database.read() as session:
        newest = session.scalars(select(SigningKey).order_by(SigningKey.number.desc())).first()
    announced = (
        newest is not None
        and isinstance(key, Ed25519PrivateKey)
        and key.public_key().public_bytes_raw() == newest.public_key
    )
    settle(store.folder / SIGNING_KEY, announced)


def _check_newest(newest: SigningKey | None, signer: Signer) -> None:
    if newest is not None and newest.public_key.hex() != signer.public_key:
        raise ConfigError(
            "rotate.stale_key",
            f"{SIGNING_KEY} is not the newest signing key of this federation.",
            expected=f"key {newest.number}, {newest.public_key.hex()}",
            got=signer.public_key,
            hint="Copy keys/signing.key from the replica where it was rotated.",
        )


def _root(folder: Path, path: Path) -> tuple[x509.Certificate, ec.EllipticCurvePrivateKey]:
    root = x509.load_pem_x509_certificate((folder / ROOT).read_bytes())
    try:
        key = load_pem_private_key(path.read_bytes(), None)
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(
            "rotate.no_root_key",
            f"The root key {path} cannot be read: {error}.",
            expected="the key that `coordinator init` put into offline/root.key",
            hint="Bring the disk that it was moved to, and name the file with --root-key.",
        ) from error
    if not isinstance(key, ec.EllipticCurvePrivateKey) or key.public_key() != root.public_key():
        raise ConfigError(
            "rotate.wrong_root_key",
            f"{path} is not the key of this federation's root certificate.",
            expected=f"the key of {folder / ROOT}",
            hint="Take the offline/root.key that was made together with this coordinator.",
        )
    return root, key


def _fits(folder: Path) -> bool:
    """Whether the key that waits is that of the certificate: a rotation was cut short."""
    waiting = next_path(folder / INTERMEDIATE_KEY)
    if not waiting.exists():
        return False
    certificate = x509.load_pem_x509_certificate((folder / INTERMEDIATE).read_bytes())
    key = load_pem_private_key(waiting.read_bytes(), None)
    return key.public_key() == certificate.public_key()


def settle(path: Path, good: bool) -> None:
    """Finish or forget what waits beside `path`."""
    waiting = next_path(path)
    if good:
        waiting.replace(path)
    else:
        waiting.unlink(missing_ok=True)
    fsync_path(path.parent)


def write_private(path: Path, content: bytes) -> None:
    """Replace `path`, readable by its owner alone, in one durable step."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    with os.fdopen(fd, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    fsync_path(path.parent)
