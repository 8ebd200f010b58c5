"""Rounds of a served coordinator, driven from its own folder: what a `ContributionGrid` asks.

What an admin does goes over the admin's socket, and the audit log says so. Releases and the
task vectors of sealed rounds are read where they lie: no call gives out a task vector, and
none is added for this.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from coldmerge.core.digests import Content
from coldmerge.core.documents import Evaluation
from coldmerge.core.dtypes import FLOATS, Floats32, blocks, size
from coldmerge.core.errors import ConfigError, ConflictError, NotFoundError, UnavailableError
from coldmerge.core.names import is_private
from coldmerge.core.task_vector import TaskVector
from coldmerge.rounds.policy import parse_template
from coldmerge.screening.scaled import scaled
from coldmerge.wire.calls import call
from coldmerge.wire.channel import local_channel
from coldmerge.wire.v1 import (
    admin_pb2,
    admin_pb2_grpc,
    common_pb2,
    models_pb2,
    models_pb2_grpc,
    rounds_pb2,
    rounds_pb2_grpc,
)
from coldmerge_coordinator.servers import SOCKET
from coldmerge_coordinator.store import Store, contributions, releases, rounds, screening

_State = common_pb2.Round
ENDED = frozenset({_State.PUBLISHED, _State.REJECTED, _State.ABANDONED})

Arrays = dict[str, Floats32]
"""Float tensors that contributors improve together, by name, in their shapes."""


@dataclass(frozen=True)
class Latest:
    """The model's latest release: its number, its content's digest, and the types of `Arrays`."""

    number: int
    digest: str
    dtypes: Mapping[str, str]


@dataclass(frozen=True)
class Contributed:
    """One merged contribution: the release it started from plus what is counted of it."""

    arrays: Arrays
    examples: int
    metrics: Mapping[str, float]


@dataclass(frozen=True)
class Standing:
    """A round now, and the state of each contributor's last contribution, with the reason."""

    round: common_pb2.Round
    contributions: Mapping[str, tuple[str, str]]

    @property
    def admitted(self) -> int:
        """How many contributions count."""
        return sum(state == contributions.ADMITTED for state, _ in self.contributions.values())


class Rounds:
    """One model of the coordinator in `folder`, whose processes serve it.

    `patience`: seconds that a call waits for a coordinator that is away.

    Raises:
        ConfigError: there is no coordinator in `folder`, or it has several models and none
            is named.
        NotFoundError: there is no such model.
    """

    def __init__(self, folder: Path, model: str | None, patience: float) -> None:
        self._socket = folder / SOCKET
        self._patience = patience
        self.store = Store.open(folder)
        try:
            self.model = self._model(model)
        except BaseException:
            self.store.close()
            raise
        self._channel = local_channel(self._socket)

    def close(self) -> None:
        """Hang up."""
        self._channel.close()
        self.store.close()

    def _model(self, name: str | None) -> str:
        with self.store.database.read() as session:
            found = [row.name for row in releases.list_models(session)]
        if name in found or (name is None and len(found) == 1):
            return name or found[0]
        if name is None and found:
            raise ConfigError(
                "grid.which_model",
                "The federation has several models.",
                expected=", ".join(found),
                hint="Name one: ContributionGrid(folder, model=...).",
            )
        raise NotFoundError(
            "model.unknown",
            f"There is no model {name or 'yet'}.",
            expected=", ".join(found) or None,
            got=name,
            hint="Add one with `coldmerge model add`.",
        )

    def check_windowed(self, policy: Mapping[str, Any]) -> None:
        """A strategy's round is one that it opened: continuous ones open by themselves.

        Raises:
            ConfigError: `policy` or the model's template asks for continuous rounds.
        """
        with self.store.database.read() as session:
            template = releases.get_model(session, self.model).template
        asked = "policy" if policy.get("continuous") is not None else None
        if parse_template(template, f"of model {self.model}").continuous is not None:
            asked = "the model's template"
        if asked is not None:
            raise ConfigError(
                "grid.continuous",
                "Continuous rounds cannot be driven by a strategy: the coordinator opens them, "
                "for everybody, and they take task vectors on older releases.",
                expected="no `continuous`",
                got=f"`continuous` in {asked}",
                hint=f"`coldmerge model template {self.model}` sets a template without it; or "
                "leave the rounds to the coordinator, without a ServerApp.",
                model=self.model,
            )

    def _call(self, method: str, request: object) -> Any:
        """Ask over the admin's socket.

        Raises:
            UnavailableError: nobody serves the folder.
        """
        stubs: dict[str, Any] = {
            "Get": rounds_pb2_grpc.RoundsStub,
            "GetRelease": models_pb2_grpc.ModelsStub,
        }
        stub = stubs.get(method, admin_pb2_grpc.AdminStub)(self._channel)
        try:
            return call(getattr(stub, method), request, patience=self._patience)
        except UnavailableError as error:
            raise UnavailableError(
                "grid.no_coordinator",
                "The coordinator does not answer on its admin socket.",
                expected=f"`coldmerge coordinator serve {self._socket.parent}` on this machine",
                got=error.message,
                hint="Start it; what was admitted is durable, and its rounds go on.",
                socket=self._socket,
            ) from error

    def contributors(self) -> list[str]:
        """Enrolled contributors that are active: neither they nor all their machines revoked."""
        answer = self._call("ListContributors", admin_pb2.ListContributorsRequest())
        return sorted(
            one.name
            for one in answer.contributors
            if one.role == "contributor"
            and not one.revoked
            and any(not machine.revoked for machine in one.machines)
        )

    def nodes(self) -> dict[int, str]:
        """The active contributors by node id.

        Raises:
            NotFoundError: there is none: FedAvg would wait for ever.
        """
        names = self.contributors()
        if not names:
            raise NotFoundError(
                "grid.no_contributor",
                "The federation has no active contributor.",
                expected="at least one enrolled contributor that is not revoked",
                got=0,
                hint="Invite one with `coldmerge invite`; then it runs `coldmerge contribute`.",
            )
        return {node_of(self.store.federation, name): name for name in names}

    def latest(self) -> Latest:
        """The latest release."""
        request = models_pb2.GetReleaseRequest(model=self.model, latest=True)
        found = self._call("GetRelease", request)
        listing, names = self._listing(found.content_digest)
        types = {name: listing.by_name[name].dtype for name in names}
        return Latest(found.number, found.content_digest, types)

    def _listing(self, digest: str) -> tuple[Content, list[str]]:
        """The content of a release or candidate, and the names of what is merged of it."""
        with self.store.database.read() as session:
            listing = releases.get_listing(session, digest)
            private = releases.get_model(session, self.model).private_patterns
        return listing, [
            entry.name
            for entry in listing.tensors
            if entry.dtype in FLOATS and not is_private(entry.name, private)
        ]

    def arrays(self, digest: str) -> Arrays:
        """The merged tensors of a release or candidate, as it is published, in float32."""
        listing, names = self._listing(digest)
        found: Arrays = {}
        for name in names:
            entry = listing.by_name[name]
            out = np.empty(size(entry.shape), np.float32)
            for start, stop in blocks(out.size):
                out[start:stop] = self.store.blobs.block(entry.sha256, entry.dtype, start, stop)
            found[name] = out.reshape(entry.shape)
        return found

    def open(self, policy: Mapping[str, Any]) -> common_pb2.Round:
        """Open a round; `policy` replaces keys of the model's template."""
        request = admin_pb2.OpenRoundRequest(model=self.model, policy_json=json.dumps(policy))
        opened: common_pb2.Round = self._call("OpenRound", request)
        return opened

    def get(self, round_id: str) -> common_pb2.Round:
        """A round as it is now."""
        found: common_pb2.Round = self._call("Get", rounds_pb2.GetRoundRequest(id=round_id))
        return found

    def standing(self, round_id: str) -> Standing:
        """A round with who has contributed."""
        request = admin_pb2.RoundAction(round=round_id)
        listed = self._call("ListRoundContributions", request).contributions
        return Standing(
            self.get(round_id), {one.contributor: (one.state, one.reason) for one in listed}
        )

    def seal(self, round_id: str) -> None:
        """Merge what is there; nothing if the round has moved on by itself."""
        self._end("SealRound", admin_pb2.RoundAction(round=round_id))

    def abandon(self, round_id: str, reason: str) -> None:
        """End a round without a release; nothing if it has moved on by itself."""
        self._end("AbandonRound", admin_pb2.RoundAction(round=round_id, reason=reason))

    def _end(self, method: str, request: admin_pb2.RoundAction) -> None:
        try:
            self._call(method, request)
        except ConflictError as error:
            if error.code not in {"round.wrong_state", "round.moved"}:
                raise

    def contributed(self, round_id: str) -> dict[str, Contributed]:
        """What a sealed round merges, by contributor: base + clip factor · task vector.

        Each value is float32(float64(base) + float64(delta)), rounded once.
        """
        with self.store.database.read() as session:
            row = rounds.get(session, round_id)
            base_digest = row.base_digest
            inputs = contributions.of_digests(session, row, row.sealed_inputs or ())
            factors = screening.factors_of(session, inputs)
            merged = [
                (contributions.get_manifest(item), item.payload, factors[item.manifest_digest])
                for item in inputs
            ]
        base = self.arrays(base_digest)
        found = {}
        for manifest, payload, factor in merged:
            vector = scaled(TaskVector.open(self.store.payloads.local(payload, _no_beat)), factor)
            arrays = {name: _moved(array, vector, name) for name, array in base.items()}
            found[manifest.contributor] = Contributed(arrays, manifest.examples, manifest.metrics)
        return found

    def evaluations(self, round_id: str) -> dict[str, Evaluation]:
        """The signed evaluations of the candidate at hand, by contributor."""
        with self.store.database.read() as session:
            rows = rounds.evaluations_of(session, rounds.get(session, round_id))
            return {row.contributor: Evaluation.parse(row.document) for row in rows}


class Overdue:
    """Notices a round that the coordinator should have moved on by now."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._since = time.monotonic()

    def is_(self, now: common_pb2.Round) -> bool:
        """Whether it is being merged for too long. A gate has its window, and an open round a
        deadline of its own.
        """
        if now.state not in {_State.SEALED, _State.MERGING}:
            self._since = time.monotonic()
        return time.monotonic() - self._since > self._seconds


def goes_on(now: common_pb2.Round) -> ConflictError:
    """The error of who does not wait any longer for a round to end."""
    held = ", held for an admin" if now.held else ""
    return ConflictError(
        "grid.round_goes_on",
        "The last round has not ended.",
        expected="PUBLISHED, REJECTED or ABANDONED",
        got=_State.State.Name(now.state) + held + (f": {now.reason}" if now.reason else ""),
        hint=f"`coldmerge round show {now.id}`; see that the coordinator's worker runs and has "
        "disk; an admin may decide or abandon the round.",
        round=now.id,
    )


def _no_beat() -> None:
    """Nothing has to be kept alive while a payload is fetched."""


def _moved(base: Floats32, vector: Any, name: str) -> Floats32:
    if name not in vector.names:
        return base
    flat = base.reshape(-1)
    out = np.empty_like(flat)
    for start, stop in blocks(flat.size):
        delta = vector.block(name, start, stop)
        np.add(flat[start:stop], delta, out=out[start:stop], dtype=np.float64, casting="same_kind")
    return out.reshape(base.shape)


def round_policy(
    policy: Mapping[str, Any], contributors: Sequence[str], seconds: float
) -> dict[str, Any]:
    """The policy of a driven round: the caller's, for these contributors, with a deadline.

    Without a word about it the merge is the mean by examples, which is what FedAvg computes.

    Raises:
        ConfigError: fewer contributors than the round must have.
    """
    least = policy.get("min_contributions", 3)
    if isinstance(least, int) and len(contributors) < least:
        raise ConfigError(
            "grid.too_few",
            "The strategy asks fewer contributors than a round must have.",
            expected=f"at least {least}",
            got=len(contributors),
            hint='Enrol more, or give policy={"min_contributions": ...}: with two, each can '
            "compute the other's task vector from the release.",
        )
    return {
        "merge": {"method": "mean", "weights": "examples"},
        "min_contributions": least,
        **policy,
        "max_contributions": len(contributors),
        "contributors": sorted(contributors),
        "duration": f"{max(1, round(seconds))}s",
        "on_quorum_missed": "abandon",
        "continuous": None,
    }


def node_of(federation: str, contributor: str) -> int:
    """The node id of a contributor: 63 bits of a hash, the same whenever it is asked."""
    digest = hashlib.sha256(f"{federation}/{contributor}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1 | 2  # 0 and 1 are Flower's own
