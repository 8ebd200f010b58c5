"""The home folder: everything coldmerge keeps on a contributor's machine.

    federation.json   where the coordinator is and who we are there
    root.pem          the federation's root certificate: the only one trusted
    keys/             tls.key and identity.key, made here, readable by the owner alone
    signing-keys.json statements about the coordinator's signing keys
    certificate.pem   our certificate chain, renewed by itself
    state.json        the newest release seen per model; the last checkpoint of the audit log;
                      the head of the sent log
    sent.jsonl        signed log of everything that ever left
    policy.yaml       what may leave (optional)
    models/           training configurations        head/      private heads
    releases/         pulled releases                candidates/ pulled candidates
    outbox/           contributions not yet acknowledged, and their receipts
    work/             training in progress           cache/     partial downloads

Keys, state and log are readable by the owner alone.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from coldmerge.core.documents import Signed
from coldmerge.core.errors import ConfigError, IntegrityError
from coldmerge.core.keys import Keyring
from coldmerge_client.files import exclusive, read_json, write_json


@dataclass(frozen=True)
class Membership:
    """Where the coordinator is, and who this machine is there. `signing_key` is hexadecimal."""

    federation: str
    address: str
    enrol: str
    contributor: str
    role: str
    machine: str
    signing_key: str

    def verifier(self) -> Ed25519PublicKey:
        """The key that checks receipts and release records."""
        return Ed25519PublicKey.from_public_bytes(bytes.fromhex(self.signing_key))


@dataclass(frozen=True)
class Seen:
    """The newest release this home has verified."""

    number: int
    content_digest: str
    record_digest: str


class Home:
    """Paths and small state below one folder. Nothing is created before it is needed."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def default(cls) -> Self:
        """The folder named by COLDMERGE_HOME, else ~/.coldmerge."""
        return cls(Path(os.environ.get("COLDMERGE_HOME") or Path.home() / ".coldmerge"))

    @property
    def root_pem(self) -> Path:
        """The federation's root certificate."""
        return self.path / "root.pem"

    @property
    def certificate(self) -> Path:
        """Our certificate chain, leaf first."""
        return self.path / "certificate.pem"

    @property
    def tls_key(self) -> Path:
        """ECDSA key of the TLS certificate."""
        return self.path / "keys" / "tls.key"

    @property
    def identity_key_path(self) -> Path:
        """Ed25519 key that signs manifests and evaluations."""
        return self.path / "keys" / "identity.key"

    @property
    def next_keys(self) -> Path:
        """Keys that the coordinator does not know yet, while they are being changed."""
        return self.path / "keys" / "next"

    @property
    def sent_log(self) -> Path:
        """Everything that ever left."""
        return self.path / "sent.jsonl"

    @property
    def outbox(self) -> Path:
        """Contributions waiting to be acknowledged."""
        return self.path / "outbox"

    @property
    def cache(self) -> Path:
        """Partial downloads."""
        return self.path / "cache"

    @property
    def policy(self) -> Path:
        """What may leave; optional."""
        return self.path / "policy.yaml"

    def config(self, model: str) -> Path:
        """Training configuration of a model."""
        return self.path / "models" / f"{model}.yaml"

    def head(self, model: str) -> Path:
        """The private head that is kept between rounds."""
        return self.path / "head" / model

    def work(self, model: str) -> Path:
        """Training in progress."""
        return self.path / "work" / model

    def releases(self, model: str) -> Path:
        """All pulled releases of a model, one folder per number."""
        return self.path / "releases" / model

    def release(self, model: str, number: int) -> Path:
        """One pulled release: a Hugging Face folder."""
        return self.releases(model) / str(number)

    def candidates(self, model: str) -> Path:
        """All pulled candidates of a model, one folder per content digest."""
        return self.path / "candidates" / model

    def local_releases(self, model: str) -> list[int]:
        """Numbers of the complete releases on this machine, ascending."""
        folder = self.releases(model)
        found = (entry.name for entry in folder.iterdir()) if folder.is_dir() else ()
        return sorted(int(name) for name in found if name.isdecimal())

    @property
    def joined(self) -> bool:
        """Whether this home belongs to a federation."""
        return (self.path / "federation.json").exists()

    def membership(self) -> Membership:
        """Who we are.

        Raises:
            ConfigError: this home has not joined a federation.
        """
        if not self.joined:
            raise ConfigError(
                "home.not_joined",
                f"{self.path} has not joined a federation.",
                hint="Ask the admin for an invitation, then run `coldmerge join INVITATION "
                "--fingerprint …`, or set COLDMERGE_HOME to the right folder.",
                home=self.path,
            )
        found = read_json(self.path / "federation.json")
        try:
            return Membership(**found)
        except TypeError as error:
            raise IntegrityError(
                "home.damaged_membership",
                "federation.json does not say where the coordinator is.",
                expected=", ".join(sorted(Membership.__dataclass_fields__)),
                got=", ".join(sorted(found)),
                hint="Restore it from a backup, or join again in a fresh COLDMERGE_HOME.",
                home=self.path,
            ) from error

    def save_membership(self, membership: Membership) -> None:
        """Written last when joining: its presence means joined."""
        write_json(self.path / "federation.json", asdict(membership))

    def keyring(self, member: Membership | None = None) -> Keyring:
        """The coordinator's signing keys that are believed here, from the one we were told on.

        Raises:
            ConfigError: this home has not joined a federation.
        """
        member = member or self.membership()
        path = self.path / "signing-keys.json"
        known = read_json(path)["statements"] if path.exists() else ()
        said = (
            Signed(bytes.fromhex(one["document"]), bytes.fromhex(one["signature"])) for one in known
        )
        return Keyring(member.federation, member.signing_key, said)

    def save_keyring(self, keyring: Keyring) -> None:
        """Remember what led to the keys of `keyring`."""
        said = [
            {"document": one.document.hex(), "signature": one.signature.hex()}
            for one in keyring.statements
        ]
        write_json(self.path / "signing-keys.json", {"statements": said})

    def root(self) -> bytes:
        """The root certificate in PEM.

        Raises:
            IntegrityError: the file is missing or holds no certificate.
        """
        try:
            raw = self.root_pem.read_bytes()
            x509.load_pem_x509_certificate(raw)
        except (OSError, ValueError) as error:
            raise IntegrityError(
                "home.no_root",
                "The federation's root certificate cannot be read: nothing would be trusted.",
                hint="Restore root.pem from a backup, or join again in a fresh COLDMERGE_HOME.",
                path=self.root_pem,
            ) from error
        return raw

    def identity_key(self) -> Ed25519PrivateKey:
        """The key that signs for this machine."""
        key = load_key(self.identity_key_path)
        if not isinstance(key, Ed25519PrivateKey):
            raise _wrong_key(self.identity_key_path, "an Ed25519 key")
        return key

    def identities(self) -> tuple[Ed25519PublicKey, ...]:
        """The keys that signed for this machine: today's, then those before it."""
        retired = self._state().get("retired_identities", [])
        before = (Ed25519PublicKey.from_public_bytes(bytes.fromhex(key)) for key in retired)
        return (self.identity_key().public_key(), *before)

    def retire_identity(self) -> None:
        """Remember today's key as one that signed for this machine."""
        today = self.identity_key().public_key().public_bytes_raw().hex()
        with self.state() as state:
            retired = state.setdefault("retired_identities", [])
            if today not in retired:
                retired.append(today)

    def tls_private_key(self) -> EllipticCurvePrivateKey:
        """The key of our certificate."""
        key = load_key(self.tls_key)
        if not isinstance(key, EllipticCurvePrivateKey):
            raise _wrong_key(self.tls_key, "an ECDSA key")
        return key

    def seen(self, model: str) -> Seen | None:
        """The newest release of `model` that this home has verified."""
        found = self._state().get("models", {}).get(model)
        return Seen(**found) if found else None

    def saw(self, model: str, seen: Seen) -> None:
        """Remember a verified release; an older one than the last changes nothing."""
        with self.state() as state:
            models = state.setdefault("models", {})
            if model not in models or models[model]["number"] < seen.number:
                models[model] = asdict(seen)

    def checkpoint(self) -> Signed | None:
        """The last checkpoint of the audit log that this home has verified."""
        found = self._state().get("checkpoint")
        if not found:
            return None
        return Signed(found["document"].encode("ascii"), bytes.fromhex(found["signature"]))

    @contextmanager
    def state(self) -> Iterator[dict[str, Any]]:
        """The state file, locked against other processes and saved at the end."""
        with exclusive(self.path / ".lock", "the home folder", wait=True):
            state = self._state()
            yield state
            write_json(self.path / "state.json", state)

    def _state(self) -> dict[str, Any]:
        path = self.path / "state.json"
        return read_json(path) if path.exists() else {}

    def lock(self, what: str) -> Path:
        """The lock file of `what`, for `files.exclusive`."""
        return self.path / "locks" / what


def load_key(path: Path) -> object:
    """The private key in a file that only its owner may read.

    Raises:
        ConfigError: it is missing, or open to others.
        IntegrityError: it holds no key.
    """
    if not path.exists():
        raise ConfigError(
            "home.no_key",
            f"The key {path.name} is missing.",
            hint="Restore it from a backup; if it is lost, ask the admin for a new invitation.",
            path=path,
        )
    mode = stat.S_IMODE(path.stat().st_mode)
    if mode & 0o077:
        raise ConfigError(
            "home.open_key",
            f"Others can read the key {path.name}.",
            expected="mode 600",
            got=f"mode {mode:o}",
            hint=f"Run `chmod 600 {path}`; if others were on this machine, join again.",
            path=path,
        )
    try:
        return serialization.load_pem_private_key(path.read_bytes(), password=None)
    except ValueError as error:
        raise _wrong_key(path, "a PEM private key") from error


def _wrong_key(path: Path, expected: str) -> IntegrityError:
    return IntegrityError(
        "home.wrong_key",
        f"The file {path.name} does not hold the key it should.",
        expected=expected,
        hint="Restore it from a backup; if it is lost, ask the admin for a new invitation.",
        path=path,
    )
