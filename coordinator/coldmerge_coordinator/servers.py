"""The three listeners: enrolment (server TLS), API (mTLS), and the admin's Unix socket."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path
from typing import Any

import grpc
from grpc_health.v1 import health_pb2_grpc
from grpc_health.v1.health import aio as health

from coldmerge.core.clock import Clock
from coldmerge.core.errors import ConfigError
from coldmerge.wire.channel import server_options, socket_target
from coldmerge.wire.v1 import (
    admin_pb2_grpc,
    audit_pb2_grpc,
    contributions_pb2_grpc,
    enrolment_pb2_grpc,
    models_pb2_grpc,
    rounds_pb2_grpc,
    screening_pb2_grpc,
)
from coldmerge_coordinator.guard import Guard, LocalGuard, OpenGuard, PeerGuard
from coldmerge_coordinator.identity import LEAF_LIFETIME, Authority
from coldmerge_coordinator.sentry import Sentry
from coldmerge_coordinator.service.admin_service import Addresses, AdminService
from coldmerge_coordinator.service.audit import AuditService
from coldmerge_coordinator.service.backend import Backend
from coldmerge_coordinator.service.contributions import ContributionsService
from coldmerge_coordinator.service.enrolment import EnrolmentService
from coldmerge_coordinator.service.intake import Intake
from coldmerge_coordinator.service.models import ModelsService
from coldmerge_coordinator.service.rounds import RoundsService
from coldmerge_coordinator.service.screening import ScreeningService
from coldmerge_coordinator.service.uploads import sweep
from coldmerge_coordinator.store import Store

SOCKET = "admin.sock"
LONGEST_SOCKET_PATH = 107
GRACE_SECONDS = 3.0


class ServerCertificate:
    """The coordinator's own certificate, made anew when a third of its life is left, and when
    there is a new intermediate. Connections that are open stay as they are.
    """

    def __init__(self, authority: Authority, hosts: tuple[str, ...], clock: Clock) -> None:
        self._authority, self._hosts, self._clock = authority, hosts, clock
        self._lock = threading.Lock()
        self._configuration = self._issue()

    def _issue(self) -> Any:
        key_pem, issued = self._authority.issue_server(self._hosts, self._clock.now())
        self._renew_at = issued.expires_at - LEAF_LIFETIME / 3
        return grpc.ssl_server_certificate_configuration(
            [(key_pem, issued.chain_pem)], root_certificates=self._authority.root_pem
        )

    def fetch(self) -> Any:
        """What gRPC asks at every handshake: a new configuration, or None for the old one."""
        with self._lock:
            if not self._authority.refresh() and self._clock.now() < self._renew_at:
                return None
            self._configuration = self._issue()
            return self._configuration

    def credentials(self, *, mutual: bool) -> Any:
        """Server credentials that follow the renewals."""
        return grpc.dynamic_ssl_server_credentials(
            self._configuration, self.fetch, require_client_authentication=mutual
        )


class Servers:
    """Start, look at `addresses`, stop. One event loop, one coordinator's folder."""

    def __init__(self, store: Store, clock: Clock) -> None:
        sweep(store)
        self._store = store
        self._authority = Authority.open(store.folder, store.federation)
        self._certificate = ServerCertificate(self._authority, store.config.hosts, clock)
        self._backend = Backend(store, clock)
        self._intake = Intake(store, clock)
        self._sentry = Sentry(store, clock)
        self._clock = clock
        self._health = health.HealthServicer()
        self._servers: list[Any] = []
        self._background: list[asyncio.Task[None]] = []
        self.addresses = Addresses()
        self.socket = store.folder / SOCKET

    async def start(self) -> None:
        """Bind all three and serve.

        Raises:
            ConfigError: an address cannot be listened on.
        """
        config, store = self._store.config, self._store
        api = self._server(PeerGuard(store, self._clock, self._sentry))
        self._add_readers(api)
        contributions_pb2_grpc.add_ContributionsServicer_to_server(  # type: ignore[no-untyped-call]
            ContributionsService(self._backend, self._intake), api
        )
        self._add_admin(api)
        enrol = self._server(OpenGuard(store, self._clock))
        enrolment_pb2_grpc.add_EnrolmentServicer_to_server(  # type: ignore[no-untyped-call]
            EnrolmentService(self._backend, self._authority), enrol
        )
        local = self._server(LocalGuard(store))
        for server in (api, enrol, local):
            health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        self._add_readers(local)
        self._add_admin(local)
        self.addresses.api = self._listen(api, config.listen, mutual=True)
        self.addresses.enrol = self._listen(enrol, config.enrol_listen, mutual=False)
        self._listen_locally(local)
        for server in self._servers:
            await server.start()
        self.socket.chmod(0o600)
        for work in (self._backend.pulse.run(), self._sentry.run()):
            self._background.append(asyncio.create_task(work))

    def _server(self, guard: Guard) -> Any:
        server = grpc.aio.server(
            interceptors=(guard,),
            options=server_options(),
            compression=grpc.Compression.NoCompression,
        )
        self._servers.append(server)
        return server

    def _add_readers(self, server: Any) -> None:
        models_pb2_grpc.add_ModelsServicer_to_server(  # type: ignore[no-untyped-call]
            ModelsService(self._backend), server
        )
        rounds_pb2_grpc.add_RoundsServicer_to_server(  # type: ignore[no-untyped-call]
            RoundsService(self._backend), server
        )
        audit_pb2_grpc.add_AuditServicer_to_server(  # type: ignore[no-untyped-call]
            AuditService(self._backend), server
        )

    def _add_admin(self, server: Any) -> None:
        service = AdminService(self._backend, self._authority, self.addresses)
        admin_pb2_grpc.add_AdminServicer_to_server(service, server)  # type: ignore[no-untyped-call]
        screening_pb2_grpc.add_ScreeningServicer_to_server(  # type: ignore[no-untyped-call]
            ScreeningService(self._backend), server
        )

    def _listen(self, server: Any, address: str, *, mutual: bool) -> str:
        credentials = self._certificate.credentials(mutual=mutual)
        try:
            port = server.add_secure_port(address, credentials)
        except RuntimeError as error:
            raise _cannot_listen(address, str(error)) from error
        if not port:
            raise _cannot_listen(address, "the port is taken, or the address is not ours")
        host = self._store.config.hosts[0]
        return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"

    def _listen_locally(self, server: Any) -> None:
        path = Path(self.socket.absolute())
        if len(str(path)) > LONGEST_SOCKET_PATH:
            raise ConfigError(
                "serve.path_too_long",
                "The path of the admin's socket is too long for a Unix socket.",
                expected=f"at most {LONGEST_SOCKET_PATH} characters",
                got=f"{len(str(path))}: {path}",
                hint="Move the coordinator's folder to a shorter path; all of it is inside.",
            )
        path.unlink(missing_ok=True)
        try:
            server.add_insecure_port(socket_target(path))
        except RuntimeError as error:
            raise _cannot_listen(str(path), str(error)) from error

    async def stop(self, grace: float = GRACE_SECONDS) -> None:
        """End streams, let short calls finish, make what came durable, close."""
        self._backend.pulse.stop()
        await self._health.enter_graceful_shutdown()
        await asyncio.gather(*(server.stop(grace) for server in self._servers))
        for task in self._background:
            task.cancel()
        await asyncio.gather(*self._background, return_exceptions=True)
        await asyncio.to_thread(self._intake.close)
        await asyncio.to_thread(self._backend.close)
        self.socket.unlink(missing_ok=True)


def _cannot_listen(address: str, why: str) -> ConfigError:
    return ConfigError(
        "serve.cannot_listen",
        f"The coordinator cannot listen on {address}: {why}.",
        hint="Change `listen` or `enrol_listen` in config.yaml, or stop what uses the port.",
    )
