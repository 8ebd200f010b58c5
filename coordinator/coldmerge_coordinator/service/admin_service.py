"""`coldmerge.v1.Admin`: the admin's functions on the wire."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from functools import partial
from typing import Any

from coldmerge.core.errors import ConfigError
from coldmerge.rounds import state
from coldmerge.rounds.state import Event
from coldmerge.wire.convert import timestamp
from coldmerge.wire.invitation import Invitation
from coldmerge.wire.v1 import admin_pb2, admin_pb2_grpc, common_pb2, models_pb2
from coldmerge_coordinator.auth import caller
from coldmerge_coordinator.identity import Authority
from coldmerge_coordinator.service import admin
from coldmerge_coordinator.service.backend import Backend
from coldmerge_coordinator.service.messages import (
    admitted_message,
    contributor_message,
    release_message,
    round_message,
)
from coldmerge_coordinator.store import continuous, contributions, learned, rounds


@dataclass
class Addresses:
    """Where contributors reach this coordinator; known once the ports are bound."""

    api: str = ""
    enrol: str = ""


class AdminService(admin_pb2_grpc.AdminServicer):
    """Each call is one transaction on a thread."""

    def __init__(self, backend: Backend, authority: Authority, addresses: Addresses) -> None:
        self._store = backend.store
        self._clock = backend.clock
        self._authority = authority
        self._addresses = addresses

    async def Invite(
        self, request: admin_pb2.InviteRequest, _context: Any
    ) -> admin_pb2.InviteResponse:
        """A one-time invitation."""
        invited = await asyncio.to_thread(
            admin.invite,
            self._store,
            request.contributor,
            request.role,
            request.ttl.ToTimedelta(),
            self._clock.now(),
            machine=request.machine,
            actor=caller().actor,
        )
        invitation = Invitation(
            federation=self._store.federation,
            address=self._addresses.api,
            enrol=self._addresses.enrol,
            token=invited.token,
            root=self._authority.root_pem.decode("ascii"),
        )
        return admin_pb2.InviteResponse(
            invitation=invitation.render(),
            fingerprint=self._authority.fingerprint,
            expires_at=timestamp(invited.expires_at),
        )

    async def ListContributors(
        self, _request: admin_pb2.ListContributorsRequest, _context: Any
    ) -> admin_pb2.ListContributorsResponse:
        """Organizations and their machines."""
        return await asyncio.to_thread(self._list_contributors)

    def _list_contributors(self) -> admin_pb2.ListContributorsResponse:
        with self._store.database.read() as session:
            rows = admin.list_contributors(session)
            return admin_pb2.ListContributorsResponse(
                contributors=[contributor_message(session, row) for row in rows]
            )

    async def Revoke(
        self, request: admin_pb2.RevokeRequest, _context: Any
    ) -> admin_pb2.Contributor:
        """Shut an organization or machine out."""
        return await asyncio.to_thread(self._revoke, request)

    def _revoke(self, request: admin_pb2.RevokeRequest) -> admin_pb2.Contributor:
        now = self._clock.now()
        row = admin.revoke(
            self._store,
            request.contributor,
            request.machine,
            request.reason,
            now,
            actor=caller().actor,
        )
        with self._store.database.read() as session:
            return contributor_message(session, row)

    async def OpenRound(
        self, request: admin_pb2.OpenRoundRequest, _context: Any
    ) -> common_pb2.Round:
        """Open a round."""
        row = await asyncio.to_thread(
            admin.open_round,
            self._store,
            request.model,
            request.policy_json,
            self._clock.now(),
            actor=caller().actor,
        )
        return await asyncio.to_thread(self._round, row.id)

    def _round(self, round_id: str) -> common_pb2.Round:
        with self._store.database.read() as session:
            return round_message(session, rounds.get(session, round_id), caller())

    async def _move(self, round_id: str, event: Event) -> common_pb2.Round:
        now = self._clock.now()
        move = partial(admin.move_round, actor=caller().actor)
        await asyncio.to_thread(move, self._store, round_id, event, now)
        return await asyncio.to_thread(self._round, round_id)

    async def SealRound(self, request: admin_pb2.RoundAction, _context: Any) -> common_pb2.Round:
        """Close admissions and merge."""
        return await self._move(request.round, state.Seal())

    async def AbandonRound(self, request: admin_pb2.RoundAction, _context: Any) -> common_pb2.Round:
        """End a round without a release."""
        reason = request.reason[:500] or "abandoned by the admin"
        return await self._move(request.round, state.Abandon(reason))

    async def ExtendRound(
        self, request: admin_pb2.ExtendRoundRequest, _context: Any
    ) -> common_pb2.Round:
        """Move a deadline."""
        await asyncio.to_thread(
            admin.extend_round,
            self._store,
            request.round,
            request.by.ToTimedelta(),
            self._clock.now(),
            actor=caller().actor,
        )
        return await asyncio.to_thread(self._round, request.round)

    async def ResolveRound(
        self, request: admin_pb2.ResolveRoundRequest, _context: Any
    ) -> common_pb2.Round:
        """Decide a held candidate."""
        default = "published by the admin" if request.publish else "rejected by the admin"
        event = state.Resolve(request.publish, request.reason[:500] or default)
        return await self._move(request.round, event)

    async def Rollback(
        self, request: admin_pb2.RollbackRequest, _context: Any
    ) -> models_pb2.Release:
        """Publish an old release again."""
        return await asyncio.to_thread(self._rollback, request)

    def _rollback(self, request: admin_pb2.RollbackRequest) -> models_pb2.Release:
        if request.number < 0:
            raise ConfigError(
                "rollback.bad_number",
                "Releases are numbered from 0.",
                got=request.number,
                hint=f"List them with `coldmerge release list {request.model}`.",
            )
        now = self._clock.now()
        row = admin.rollback(
            self._store,
            request.model,
            request.number,
            request.reason,
            now,
            actor=caller().actor,
        )
        with self._store.database.read() as session:
            return release_message(session, row)

    async def Remerge(self, request: admin_pb2.RemergeRequest, _context: Any) -> common_pb2.Round:
        """Make the latest release again, without some contributions."""
        row = await asyncio.to_thread(
            admin.remerge,
            self._store,
            request.model,
            tuple(request.without),
            request.reason,
            self._clock.now(),
            actor=caller().actor,
        )
        return await asyncio.to_thread(self._round, row.id)

    async def ListRoundContributions(
        self, request: admin_pb2.RoundAction, _context: Any
    ) -> admin_pb2.ListRoundContributionsResponse:
        """What one round admitted."""
        return await asyncio.to_thread(self._round_contributions, request.round)

    def _round_contributions(self, round_id: str) -> admin_pb2.ListRoundContributionsResponse:
        with self._store.database.read() as session:
            round_ = rounds.get(session, round_id)
            rows = contributions.of_round(session, round_id)
            costs = continuous.discounts(session, round_, rows)
            learnt = learned.weights_of(round_)
            weights = learnt.of if learnt else {}
            return admin_pb2.ListRoundContributionsResponse(
                contributions=[
                    admitted_message(row, costs[row.id], weights.get(row.contributor))
                    for row in rows
                ]
            )
