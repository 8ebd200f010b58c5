"""A coordinator's folder without its services, and contributors who write into it directly."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from coldmerge.core.documents import Manifest, Statistic
from coldmerge.core.dtypes import NUMPY, as_bytes
from coldmerge.core.header import TensorSpec
from coldmerge.core.task_vector import TaskVector, vector_header
from coldmerge.rounds.policy import RoundPolicy, RoundTemplate
from coldmerge.rounds.state import Contributed
from coldmerge_coordinator.config import CoordinatorConfig
from coldmerge_coordinator.importing import add_model
from coldmerge_coordinator.store import Store, contributions, releases, rounds
from coldmerge_coordinator.store.models import Contribution, Contributor, Release, Round
from coldmerge_coordinator.worker import run_once
from tests.backends import coordinator_config, copy_coordinator
from tests.support import DTYPES, FixedClock, write_model

Array = npt.NDArray[np.generic]


class Bench:
    """One model, and a way to do all that happens to its rounds short of the network."""

    def __init__(self, store: Store, clock: FixedClock, folder: Path) -> None:
        self.store, self.clock, self.folder = store, clock, folder

    def add_model(
        self,
        tensors: Mapping[str, Array],
        name: str = "m",
        *,
        private: tuple[str, ...] = (),
        template: RoundTemplate | None = None,
    ) -> None:
        source = write_model(self.folder / f"source-{name}", tensors)
        add_model(self.store, name, source, private, template, clock=self.clock)

    def open_round(self, model: str = "m", **policy: object) -> str:
        values = {"min_contributions": 1, "gate": None, **policy}
        with self.store.database.write() as session:
            chosen = RoundPolicy.model_validate(values)
            return rounds.open_round(session, model, chosen, self.clock.now()).id

    def contribute(
        self,
        round_id: str,
        contributor: str,
        deltas: Mapping[str, Array],
        *,
        examples: int = 100,
        scaling: Mapping[str, float] | None = None,
        statistics: Mapping[Statistic, float] | None = None,
        base: int | None = None,
    ) -> str:
        """Admit a task vector as the service would: the contribution's id."""
        contribution = f"contribution-{secrets.token_hex(8)}"
        row = self.round(round_id)
        origin = self.release(row.base_number if base is None else base, row.model)
        name = f"{contribution}.safetensors"
        entries = [
            TensorSpec(key, DTYPES[array.dtype], array.shape, 0, array.nbytes)
            for key, array in sorted(deltas.items())
        ]
        kind = "lora" if scaling else "full"
        encoding = "bf16" if entries[0].dtype == "BF16" else "fp32"
        header = vector_header(
            entries,
            kind=kind,
            encoding=encoding,
            base_digest=origin.content_digest,
            scaling=scaling or {},
            statistics=statistics,
        )
        parts = [bytes(as_bytes(np.ascontiguousarray(a))) for _, a in sorted(deltas.items())]
        self.store.payloads.add(name, header + b"".join(parts))
        vector = TaskVector.open(self.store.payloads.local(name))
        manifest = Manifest(
            federation=self.store.federation,
            model=row.model,
            round=round_id,
            contributor=contributor,
            base_digest=origin.content_digest,
            base_number=origin.number,
            nonce=secrets.token_hex(16),
            created_at=self.clock.now(),
            kind=vector.kind,
            encoding=vector.encoding,
            tensors=vector.entries(),
            scaling=dict(scaling or {}),
            statistics=dict(statistics or {}),
            examples=examples,
            norm=vector.norm(),
        )
        self._admit(contribution, row, manifest, name)
        return contribution

    def _admit(self, contribution: str, row: Round, manifest: Manifest, payload: str) -> None:
        now = self.clock.now()
        with self.store.database.write() as session:
            if session.get(Contributor, manifest.contributor) is None:
                session.add(
                    Contributor(name=manifest.contributor, role="contributor", created_at=now)
                )
                session.flush()
            session.add(
                Contribution(
                    id=contribution,
                    model=row.model,
                    round=row.id,
                    contributor=manifest.contributor,
                    manifest_digest=manifest.digest(),
                    nonce=manifest.nonce,
                    manifest=manifest.canonical(),
                    signature=b"",
                    payload=payload,
                    payload_bytes=manifest.payload_bytes,
                    examples=manifest.examples,
                    norm=manifest.norm,
                    state=contributions.ADMITTED,
                    receipt=b"",
                    receipt_signature=b"",
                    accepted_at=now,
                )
            )
            session.flush()
            current = rounds.get(session, row.id, lock=True)
            rounds.apply(session, current, Contributed(), now, self.store.signer)

    def round(self, round_id: str) -> Round:
        with self.store.database.read() as session:
            return rounds.get(session, round_id)

    def release(self, number: int | None = None, model: str = "m") -> Release:
        with self.store.database.read() as session:
            if number is None:
                return releases.latest_release(session, model)
            return releases.get_release(session, model, number)

    def masters(self, release: Release) -> dict[str, npt.NDArray[np.float32]]:
        """The fp32 master behind a release, flattened."""
        with self.store.database.read() as session:
            digests = releases.get_masters(session, release.master_digest)
        return {
            name: np.fromfile(self.store.blobs.path(sha256), "<f4")
            for name, sha256 in digests.items()
        }

    def published(self, release: Release) -> dict[str, Array]:
        """The published tensors of a release, in their own types, flattened."""
        with self.store.database.read() as session:
            content = releases.get_listing(session, release.content_digest)
        return {
            entry.name: np.fromfile(self.store.blobs.path(entry.sha256), NUMPY[entry.dtype])
            for entry in content.tensors
        }


def make_store(folder: Path, **settings: object) -> Store:
    """A coordinator's folder with a signing key and nothing else."""
    values = {"federation": "test", **coordinator_config(), **settings}
    store = Store.create(folder, CoordinatorConfig.model_validate(values))
    store.keys.mkdir(mode=0o700)
    key = store.keys / "signing.key"
    key.touch(mode=0o600)
    key.write_bytes(
        Ed25519PrivateKey.generate().private_bytes(
            Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()
        )
    )
    return store


@pytest.fixture
def clock() -> FixedClock:
    return FixedClock()


@pytest.fixture
def make_bench(tmp_path: Path, clock: FixedClock) -> Iterator[Callable[[str], Bench]]:
    """Benches in folders of their own."""
    benches: list[Bench] = []

    def make(name: str) -> Bench:
        folder = tmp_path / name
        benches.append(Bench(make_store(folder / "coordinator"), clock, folder))
        return benches[-1]

    yield make
    for each in benches:
        each.store.close()


@pytest.fixture
def bench(make_bench: Callable[[str], Bench]) -> Bench:
    return make_bench("bench")


def merged_apart(bench: Bench, clock: FixedClock, folder: Path) -> list[tuple[str | None, ...]]:
    """The sealed round merged in two copies of the coordinator: the digests of each release 2."""
    found: list[tuple[str | None, ...]] = []
    bench.store.close()
    for copy in (folder / "one", folder / "two"):
        copy_coordinator(bench.store.folder, copy)
        with Store.open(copy) as store:
            assert run_once(store, clock)
            with store.database.read() as session:
                last = releases.latest_release(session, "m")
        assert last.number == 2
        found.append((last.content_digest, last.master_digest, last.state_digest))
    return found
