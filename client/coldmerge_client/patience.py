"""Transfers that go on where they broke off, as long as they get anywhere."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from coldmerge.core.errors import UnavailableError
from coldmerge.wire.calls import OnRetry, with_patience

T = TypeVar("T")


class _MovedError(Exception):
    """The link broke, but not before some bytes went over it."""


def persist(
    attempt: Callable[[], T],
    done: Callable[[], int],
    *,
    patience: float,
    on_retry: OnRetry | None = None,
) -> T:
    """Run `attempt` until it succeeds; each time `done()` has grown, patience starts anew.

    Raises:
        UnavailableError: nothing moved for `patience` seconds.
    """
    while True:
        before = done()

        def once(before: int = before) -> T:
            try:
                return attempt()
            except UnavailableError as error:
                if done() > before:
                    raise _MovedError from error
                raise

        try:
            result: T = with_patience(once, patience=patience, on_retry=on_retry)
        except _MovedError:
            continue
        return result
