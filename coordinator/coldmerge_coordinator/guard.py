"""The interceptors in front of every handler: who comes in, and how errors go out."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from contextlib import AbstractContextManager, aclosing, contextmanager, nullcontext
from datetime import datetime, timedelta
from typing import Any

import grpc
import structlog

from coldmerge.core.clock import Clock
from coldmerge.core.errors import ColdmergeError, ResourceError, UnauthenticatedError
from coldmerge.core.files import raise_if_full
from coldmerge.wire.errors import to_status
from coldmerge.wire.version import CLIENT_KEY
from coldmerge_coordinator.actors import LOCAL_ADMIN
from coldmerge_coordinator.auth import (
    ALLOWED,
    Caller,
    check_machine,
    check_protocol,
    check_role,
    set_caller,
)
from coldmerge_coordinator.identity import read_peer
from coldmerge_coordinator.limits import Rate, Turnstile, address_of, in_time, taken
from coldmerge_coordinator.sentry import Sentry
from coldmerge_coordinator.store import Store
from coldmerge_coordinator.store.models import Machine

log = structlog.get_logger(__name__)

SEEN_EVERY = timedelta(seconds=30)
UNGUARDED = "/grpc.health.v1.Health/"
NOT_SERVED = "This is not served here."


class Guard(grpc.aio.ServerInterceptor):
    """Stands before every handler: protocol, identity, revocation, role; and errors after.

    Subclasses say how a caller is found.
    """

    def __init__(self, store: Store) -> None:
        self.store = store

    async def identify(self, _context: Any) -> Caller | None:
        """Who calls; None where callers have no identity yet."""
        raise NotImplementedError

    async def intercept_service(
        self, continuation: Callable[[Any], Awaitable[Any]], details: Any
    ) -> Any:
        """Wrap the handler that gRPC found."""
        handler = await continuation(details)
        if details.method.startswith(UNGUARDED):
            return handler
        if handler is None:
            return self.not_served(details)
        if handler.response_streaming:
            stream = _guarded_stream(self, details, handler.unary_stream)
            return grpc.unary_stream_rpc_method_handler(
                stream, handler.request_deserializer, handler.response_serializer
            )
        if handler.request_streaming:
            return grpc.stream_unary_rpc_method_handler(
                _guarded(self, details, handler.stream_unary, None),
                handler.request_deserializer,
                handler.response_serializer,
            )
        return grpc.unary_unary_rpc_method_handler(
            _guarded(self, details, handler.unary_unary, self.store.config.limits.call_seconds),
            handler.request_deserializer,
            handler.response_serializer,
        )

    def not_served(self, details: Any) -> Any:
        """The handler of a method that this listener does not have: first, who may call it."""
        return _not_served(self, details) if details.method in ALLOWED else None

    async def admit(self, details: Any, context: Any) -> AbstractContextManager[None]:
        """Let the call in, or raise. It goes on inside the context that comes back.

        Raises:
            ColdmergeError: the reason it may not come in.
        """
        metadata = dict(details.invocation_metadata or ())
        check_protocol(metadata, self.store.config.min_protocol)
        found = await self.identify(context)
        if found is None:
            return nullcontext()
        check_role(found, details.method)
        set_caller(found)
        await self.seen(found, str(metadata.get(CLIENT_KEY, ""))[:64])
        return self.hold(found, details.method)

    def hold(self, _found: Caller, _method: str) -> AbstractContextManager[None]:
        """What a call occupies while it goes on."""
        return nullcontext()

    async def seen(self, found: Caller, client_version: str) -> None:
        """Told who was let in, and with which client."""


class PeerGuard(Guard):
    """The guard of the mTLS port."""

    def __init__(self, store: Store, clock: Clock, sentry: Sentry) -> None:
        super().__init__(store)
        self._clock = clock
        self._sentry = sentry
        self._turnstile = Turnstile(store.config.limits.max_calls)
        self._last_seen: dict[tuple[str, str], datetime] = {}

    async def identify(self, _context: Any) -> Caller:
        """Who the client certificate names, as the database knows them now."""
        certificates = _context.auth_context().get("x509_pem_cert") or ()
        peer = next((read_peer(bytes(pem)) for pem in certificates), None)
        if peer is None:
            raise UnauthenticatedError(
                "auth.no_certificate",
                "The call came without a certificate of a machine of this federation.",
                hint="Enrol this machine with `coldmerge join`.",
            )
        return await asyncio.to_thread(check_machine, self.store, peer, self._clock.now())

    @contextmanager
    def hold(self, found: Caller, method: str) -> Iterator[None]:
        """One of the calls that the contributor may have open, under the sentry's eyes."""
        with self._turnstile.enter(found.contributor), self._sentry.watching(found, method):
            yield

    async def seen(self, found: Caller, client_version: str) -> None:
        """Write down, at most every 30 seconds, that the machine called."""
        now, key = self._clock.now(), (found.contributor, found.machine)
        last = self._last_seen.get(key)
        if last is not None and now - last < SEEN_EVERY:
            return
        self._last_seen[key] = now
        try:
            await asyncio.to_thread(_write_seen, self.store, key, now, client_version)
        except ColdmergeError as error:  # a full disk must not stop those who only read
            log.warning("seen.not_written", contributor=found.contributor, code=error.code)


def _write_seen(store: Store, key: tuple[str, str], now: datetime, client_version: str) -> None:
    with store.database.write() as session:
        machine = session.get(Machine, key)
        if machine is not None:
            machine.last_seen_at = now
            machine.client_version = client_version or None


class LocalGuard(Guard):
    """The guard of the Unix socket: who may open it is the admin of this coordinator."""

    async def identify(self, _context: Any) -> Caller:
        """The admin."""
        return Caller(contributor=LOCAL_ADMIN, machine="", role="admin")


class OpenGuard(Guard):
    """The guard of the enrolment port, whose callers prove themselves inside the call."""

    def __init__(self, store: Store, clock: Clock) -> None:
        super().__init__(store)
        self._clock = clock
        self._rate = Rate(store.config.limits.enrolments_per_minute)

    def not_served(self, _details: Any) -> None:
        """Nothing but enrolment is here, for anybody."""

    async def identify(self, _context: Any) -> None:
        """Nobody yet; an address may try only so often."""
        self._rate.check(address_of(_context.peer()), self._clock.now())


def _guarded(
    guard: Guard, details: Any, handle: Callable[..., Any], seconds: float | None
) -> Callable[..., Any]:
    async def run(request: Any, context: Any) -> Any:
        try:
            with await guard.admit(details, context):
                return await in_time(handle(request, context), seconds)
        except Exception as error:
            await refuse(context, details.method, error)
            raise

    return run


def _guarded_stream(guard: Guard, details: Any, handle: Callable[..., Any]) -> Callable[..., Any]:
    async def run(request: Any, context: Any) -> None:
        idle = guard.store.config.limits.idle_seconds
        try:
            with await guard.admit(details, context):
                async with aclosing(handle(request, context)) as responses:
                    async for response in responses:
                        await taken(context.write(response), idle)
        except Exception as error:
            await refuse(context, details.method, error)
            raise

    return run


def _not_served(guard: Guard, details: Any) -> Any:
    """For a method of the contract that this listener does not serve: whoever may not call it
    learns nothing else.
    """

    async def run(_requests: Any, context: Any) -> None:
        try:
            with await guard.admit(details, context):
                pass
        except Exception as error:
            await refuse(context, details.method, error)
            raise
        await context.abort(grpc.StatusCode.UNIMPLEMENTED, NOT_SERVED)

    return grpc.stream_stream_rpc_method_handler(run)


async def refuse(context: Any, method: str, error: Exception) -> None:
    """End a call with the status and details of `error`."""
    if isinstance(error, grpc.aio.AbortError):
        raise error
    if isinstance(error, NotImplementedError):
        await context.abort(grpc.StatusCode.UNIMPLEMENTED, NOT_SERVED)
    if isinstance(error, OSError) and not isinstance(error, ColdmergeError):
        error = _disk_error(error)
    if not isinstance(error, ColdmergeError):
        log.error("call.crashed", method=method, exc_info=error)
        await context.abort(
            grpc.StatusCode.INTERNAL, "The coordinator met an unexpected error; see its log."
        )
        return
    log.info("call.refused", method=method, code=error.code)
    status, text, metadata = to_status(error)
    await context.abort(status, text, metadata)


def _disk_error(error: OSError) -> Exception:
    try:
        raise_if_full(error)
    except ResourceError as full:
        return full
    return error
