"""How much of the coordinator one caller may hold at a time, and how long a call may stand still.

Counts are per API process: they protect its threads, descriptors and memory. What must hold
over all processes and restarts (bytes a day, open uploads) is in the database.
"""

from __future__ import annotations

import asyncio
import resource
from collections import Counter, OrderedDict
from collections.abc import AsyncIterator, Awaitable, Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta
from typing import TypeVar

import grpc

from coldmerge.core.errors import ResourceError, UnavailableError

WINDOW = timedelta(minutes=1)
REMEMBERED_ADDRESSES = 10_000

T = TypeVar("T")


class Turnstile:
    """Counts the calls that each contributor has open. Used on the event loop alone."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._open: Counter[str] = Counter()

    @contextmanager
    def enter(self, contributor: str) -> Iterator[None]:
        """Hold a place while the call goes on.

        Raises:
            ResourceError: the contributor holds as many as it may.
        """
        if self._open[contributor] >= self._most:
            raise ResourceError(
                "limit.too_many_calls",
                f"{contributor} has too many calls open.",
                expected=f"at most {self._most} at a time",
                got=self._open[contributor] + 1,
                hint="Let some end; the admin may raise limits.max_calls in config.yaml.",
                contributor=contributor,
            )
        self._open[contributor] += 1
        try:
            yield
        finally:
            self._open[contributor] -= 1
            if not self._open[contributor]:
                del self._open[contributor]


class Rate:
    """Lets an address call so often in a minute: for callers who have no identity yet."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._windows: OrderedDict[str, tuple[datetime, int]] = OrderedDict()

    def check(self, address: str, now: datetime) -> None:
        """Count a call.

        Raises:
            ResourceError: it came too soon after too many others.
        """
        since, count = self._windows.pop(address, (now, 0))
        if now - since >= WINDOW:
            since, count = now, 0
        self._windows[address] = (since, count + 1)
        if len(self._windows) > REMEMBERED_ADDRESSES:
            self._windows.popitem(last=False)
        if count >= self._most:
            raise ResourceError(
                "limit.too_often",
                "Too many calls came from this address in the last minute.",
                expected=f"at most {self._most} a minute",
                hint="Wait a minute; the admin may raise limits.enrolments_per_minute.",
            )


def address_of(peer: str) -> str:
    """The host of a gRPC peer name, such as `ipv4:10.0.0.1:5012` or `ipv6:%5B::1%5D:5012`."""
    return peer.rpartition(":")[0]


async def brisk(messages: AsyncIterator[T], seconds: float) -> AsyncIterator[T]:
    """The messages of a stream, as long as they keep coming.

    Raises:
        UnavailableError: none came for `seconds`.
    """
    while True:
        try:
            message = await asyncio.wait_for(anext(messages), seconds)
        except StopAsyncIteration:
            return
        except TimeoutError as error:
            raise _stalled(seconds) from error
        yield message


async def in_time(work: Awaitable[T], seconds: float | None) -> T:
    """What `work` gives. What it does on a thread goes on when nobody waits for it any more.

    Raises:
        UnavailableError: it took longer than `seconds`.
    """
    try:
        return await asyncio.wait_for(work, seconds)
    except TimeoutError as error:
        raise _stalled(seconds or 0.0) from error


async def taken(write: Awaitable[None], seconds: float) -> None:
    """Wait until the caller has taken a message of a stream.

    Raises:
        UnavailableError: it took nothing for `seconds`.
        CancelledError: it hung up this moment; gRPC cancels the call a moment later.
    """
    try:
        await asyncio.wait_for(write, seconds)
    except TimeoutError as error:
        raise _stalled(seconds) from error
    except grpc.aio.InternalError as error:
        raise asyncio.CancelledError from error


def _stalled(seconds: float) -> UnavailableError:
    return UnavailableError(
        "limit.stalled",
        f"This call was ended: nothing came of it for {seconds:g} seconds.",
        hint="What came is kept: call again, and go on from there.",
    )


def raise_descriptor_limit() -> None:
    """Let this process open as many files and sockets as its hard limit allows."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
