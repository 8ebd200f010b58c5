"""Everybody whom the authorization matrix knows, on one live coordinator, with what they own."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from contextlib import AbstractContextManager, closing, nullcontext
from datetime import timedelta
from typing import Any

from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass

from coldmerge.core.documents import Document, sign
from coldmerge.rounds.state import Abandon
from coldmerge.wire.calls import call
from coldmerge.wire.channel import local_channel, secure_channel
from coldmerge.wire.convert import signed_to_proto
from coldmerge.wire.v1 import models_pb2
from coldmerge_coordinator import identity
from coldmerge_coordinator.identity import Authority, Issued
from coldmerge_coordinator.service import admin
from coldmerge_coordinator.store.models import Contribution, Contributor
from tests.attacks.matrix import (
    ENROLMENT,
    NONE,
    OTHER,
    OUTSIDERS,
    ROLES,
    SOCKET,
    methods,
)
from tests.harness import MODEL, Keys, Live, MachineClient, chunk, deltas
from tests.support import evaluation, until

METHODS = methods()
NOBODY = "nobody"
HANDSHAKES = [caller for caller, answer in OUTSIDERS.items() if answer == "handshake"]


class Party:
    """An organization with a contribution, an open upload and a spare machine."""

    def __init__(self, world: World, name: str) -> None:
        self.name, self._live, self._round = name, world.live, world.round
        self.machine = world.live.machine(name)
        world.live.machine(name, name="spare")
        self.machine.contribute(world.round, deltas())
        with world.live.store.database.read() as session:
            found = session.query(Contribution).filter_by(contributor=name).one()
            self.contribution = found.id
        manifest, self.payload = self.machine.manifest(world.round, deltas())
        self.upload = self.machine.begin(manifest).upload_id

    def manifest(self, keys: Keys) -> Any:
        """A new manifest in this organization's name, signed with `keys`."""
        manifest, _ = self.machine.manifest(self._round, deltas())
        return _signed(manifest, keys)

    def evaluation(self, keys: Keys) -> Any:
        """An evaluation in this organization's name, signed with `keys`."""
        judged = evaluation(self._round, self.name, self._live.clock.now())
        return _signed(judged, keys)


def _signed(document: Document, keys: Keys) -> Any:
    return signed_to_proto(sign(document, keys.identity))


class World:
    """All callers. Each one but the two listeners owns what a contributor owns."""

    def __init__(self, live: Live) -> None:
        self.live = live
        ended = live.open_round()
        admin.move_round(live.store, ended.id, Abandon("test"), live.clock.now())
        self.ended = ended.id
        self.round = live.open_round(min_contributions=500)
        self.stranger = Party(self, "stranger")
        self.parties = {caller: Party(self, _name(caller)) for caller in (*ROLES, *OUTSIDERS)}
        release = call(
            self.stranger.machine.models.GetRelease, models_pb2.GetReleaseRequest(model=MODEL)
        )
        self.blob = release.tensors[0].sha256
        self._set_roles()
        self._shut_out()
        self._reissue()

    def _set_roles(self) -> None:
        with self.live.store.database.write() as session:
            for role in ROLES:
                session.get_one(Contributor, _name(role)).role = role
            session.get_one(Contributor, _name("role taken from it")).role = NOBODY

    def _shut_out(self) -> None:
        live, now = self.live, self.live.clock.now()
        admin.revoke(live.store, _name("revoked organization"), "", "test", now)
        admin.revoke(live.store, _name("revoked machine"), "box", "test", now)
        replaced = _name("replaced key")
        admin.revoke(live.store, replaced, "box", "test", now)
        live.machine(replaced)

    def _reissue(self) -> None:
        """Certificates that are not, or soon not, good."""
        live, now = self.live, self.live.clock.now()
        self._give("expired certificate", live.authority, now - timedelta(days=2))
        self._give("other federation's certificate", _another_authority(live), now)
        signed_by_us = Authority.open(live.folder, "elsewhere")
        self._give("certificate that names another federation", signed_by_us, now)
        late = "expired on an open connection"
        soon = self._give(late, live.authority, now, timedelta(seconds=2))
        call(self.parties[late].machine.models.ListModels, models_pb2.ListModelsRequest())
        until("the certificate to expire", lambda: live.clock.now() > soon.expires_at)

    def _give(
        self, caller: str, authority: Authority, now: Any, life: timedelta = timedelta(hours=1)
    ) -> Issued:
        party = self.parties[caller]
        issued = authority.issue_client(
            party.machine.keys.csr(),
            contributor=party.name,
            machine="box",
            identity_public_key=party.machine.keys.public,
            now=now,
            lifetime=life,
        )
        party.machine = MachineClient(
            self.live, party.name, "box", party.machine.keys, issued.chain_pem
        )
        return issued

    def channel(self, caller: str) -> AbstractContextManager[Any]:
        """A connection of that caller; a new one for who does not survive the handshake."""
        if caller in self.parties and caller not in HANDSHAKES:
            return nullcontext(self.parties[caller].machine.channel)
        return closing(self._connect(caller))

    def _connect(self, caller: str) -> Any:
        live, addresses = self.live, self.live.servers.addresses
        if caller == SOCKET:
            return local_channel(live.servers.socket)
        if caller == ENROLMENT:
            return secure_channel(addresses.enrol, live.authority.root_pem)
        if caller == "no certificate":
            return secure_channel(addresses.api, live.authority.root_pem)
        machine = self.parties[caller].machine
        return secure_channel(
            addresses.api, live.authority.root_pem, machine.chain_pem, machine.keys.tls_pem
        )

    def requests(self, caller: str, method: str, owner: str) -> list[Message]:
        """What to send: about the caller's own, somebody else's, or nothing that exists."""
        me = self.parties.get(caller, self.stranger)
        about = None if owner == NONE else self.stranger if owner == OTHER else me
        made = GetMessageClass(METHODS[method].input_type)()
        special = _SPECIAL.get(method)
        if special is not None:
            special(made, self, me, about)
        else:
            self._fill(made, method, about)
        return self._stream(about) if method == "Contributions/Write" else [made]

    def _fill(self, made: Message, method: str, about: Party | None) -> None:
        """Set the fields that name something."""
        moves = method.startswith("Admin/")
        names = {
            "model": MODEL,
            "round": self.ended if moves and about else self.round.id,
            "sha256": self.blob,
            "upload_id": about.upload if about else "",
            "contribution": about.contribution if about else "",
            "contributor": about.name if about else "",
            "id": "" if about is None else about.contribution,
        }
        if method == "Rounds/Get":
            names["id"] = self.round.id
        for field in METHODS[method].input_type.fields:
            if field.name in names:
                found = names[field.name] if about else f"none-{secrets.token_hex(4)}"
                setattr(made, field.name, found)
            if field.name == "by":
                made.by.CopyFrom(Duration(seconds=60))  # type: ignore[attr-defined]
            if field.name == "after_number":
                setattr(made, field.name, -1)

    def _stream(self, about: Party | None) -> list[Message]:
        if about is None:
            return [chunk("upload-none", 0, b"x")]
        return [chunk(about.upload, 0, about.payload)]


def _name(caller: str) -> str:
    return "org-" + "".join(letter if letter.isalnum() else "-" for letter in caller)


def _another_authority(live: Live) -> Authority:
    now = live.clock.now()
    root_key, root = identity.make_root("test", now)
    key, intermediate = identity.make_intermediate(root_key, root, "test", now)
    return Authority("test", key, intermediate, root)


def _begin(made: Any, world: World, me: Party, about: Party | None) -> None:
    keys = me.machine.keys if about else world.stranger.machine.keys
    made.manifest.CopyFrom((about or me).manifest(keys))


def _report(made: Any, world: World, me: Party, about: Party | None) -> None:
    keys = me.machine.keys if about else world.stranger.machine.keys
    made.evaluation.CopyFrom((about or me).evaluation(keys))


def _revoke(made: Any, _world: World, _me: Party, about: Party | None) -> None:
    made.contributor = about.name if about else "none"
    made.machine = "spare"
    made.reason = "test"


def _invite(made: Any, _world: World, _me: Party, about: Party | None) -> None:
    made.contributor = "guest" if about else ""
    made.role = "contributor"
    made.ttl.CopyFrom(Duration(seconds=60))


def _list(made: Any, world: World, _me: Party, about: Party | None) -> None:
    made.round = world.round.id if about else "none"


def _empty(_made: Any, _world: World, _me: Party, _about: Party | None) -> None:
    return


_SPECIAL: dict[str, Callable[[Any, World, Party, Party | None], None]] = {
    "Contributions/Begin": _begin,
    "Contributions/List": _list,
    "Rounds/ReportEvaluation": _report,
    "Admin/Revoke": _revoke,
    "Admin/Invite": _invite,
    "Enrolment/Enrol": _empty,
    "Enrolment/Renew": _empty,
}
