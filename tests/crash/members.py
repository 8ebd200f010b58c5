"""Contributors that are light enough to take part in thousands of rounds.

Each is a thread with a home and a real session. It sends vectors drawn from a seed, now and
then takes one back or replaces it, breaks streams off half way, and judges candidates. What
it was promised it remembers, to be compared with what the coordinator still has.
"""

from __future__ import annotations

import hashlib
import random
import secrets
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from coldmerge.core.documents import (
    Evaluation,
    Manifest,
    Receipt,
    Scores,
    Signed,
    TensorEntry,
    sign,
    verify,
)
from coldmerge.core.dtypes import NUMPY
from coldmerge.core.errors import ConflictError, NotFoundError, UnavailableError
from coldmerge.wire.convert import signed_from_proto
from coldmerge.wire.v1 import common_pb2, contributions_pb2
from coldmerge_client.home import Home
from coldmerge_client.session import Session

MODEL = "m"
ITEMS = 40
PIECE = 2**15
AGAIN = ("upload.lost", "upload.superseded", "upload.unknown", "upload.wrong_offset")
BAD_BELOW = 0x18
"""Candidates whose digest begins with less are judged bad by everybody."""

Kind = Literal["receipt", "asked", "withdrawn", "evaluation", "committed", "release"]
Base = dict[str, NDArray[Any]]
Deltas = dict[str, NDArray[np.float32]]
Round = common_pb2.Round


def base_tensors(elements: int = 20_000) -> Base:
    """Float32 and bfloat16 tensors."""
    draw = np.random.default_rng(0)
    return {
        "body.half": draw.standard_normal(elements // 16).astype(NUMPY["BF16"]),
        "body.large": draw.standard_normal(elements).astype(np.float32),
        "body.small": draw.standard_normal((4, 16)).astype(np.float32),
    }


def deltas(base: Base, seed: int) -> Deltas:
    """The task vector of a seed."""
    draw = np.random.default_rng(seed)
    return {
        name: np.float32(0.01) * draw.standard_normal(base[name].shape).astype(np.float32)
        for name in sorted(base)
    }


@dataclass(frozen=True)
class Told:
    """Something the coordinator has said, or (`asked`) was asked to do, and when (Unix time)."""

    at: float
    kind: Kind
    what: tuple[str, ...]
    size: int = 0


@dataclass
class Ledger:
    """What all contributors sent and what they were promised. Threads share it."""

    base: Base
    seeds: dict[str, int] = field(default_factory=dict)
    receipts: dict[str, Signed] = field(default_factory=dict)
    given_up: set[str] = field(default_factory=set)
    told: list[Told] = field(default_factory=list)
    events: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)
    changed: threading.Condition = field(default_factory=threading.Condition)

    def hears(self, kind: Kind, *what: str, size: int = 0) -> None:
        """Remember what was said this moment."""
        self.told.append(Told(time.time(), kind, what, size))

    def happens(self, event: str) -> None:
        """Say what is being done this moment."""
        with self.changed:
            self.events[event] += 1
            self.changed.notify_all()

    def wait_for(self, event: str, patience: float) -> bool:
        """Until the event happens once more."""
        with self.changed:
            before = self.events[event]
            return self.changed.wait_for(lambda: self.events[event] > before, patience)


@dataclass
class Pending:
    """A contribution that is being sent: signed once, offered until it is answered."""

    round: str
    signed: Signed
    manifest: Manifest
    payload: bytes


class Member:
    """One contributor: `step` does the next thing there is to do.

    `habit`: what it does in every round, instead of what it draws.
    """

    def __init__(
        self, home: Home, ledger: Ledger, seed: int, habit: Sequence[str] | None = None
    ) -> None:
        self.session = Session.open(home, timeout=0)
        self.name = self.session.member.contributor
        self._ledger = ledger
        self._draw = random.Random(f"{self.name} {seed}")
        self._habit = habit
        self._key = home.identity_key()
        self._pending: Pending | None = None
        self._plan: list[str] = []
        self._round = ""
        self._judged = ""

    def step(self) -> bool:
        """Do what the newest round asks for: whether there was something."""
        if self._pending is not None:
            self.send()
            return True
        found = self.session.newest_round(MODEL)
        if found is None:
            return False
        if found.id != self._round:
            self._round, self._plan = found.id, self._new_plan()
        if found.state == Round.OPEN and self._plan:
            return self._go_on(found)
        if found.state == Round.CANDIDATE and self._judged != found.candidate_digest:
            self.judge(found)
            return True
        return False

    def _new_plan(self) -> list[str]:
        if self._habit is not None:
            return list(self._habit)
        drawn = self._draw.random()
        if drawn < 0.1:
            return ["send", "take back", "send"]
        return ["send", "send"] if drawn < 0.2 else ["send"]

    def _go_on(self, found: Round) -> bool:
        if self._plan[0] == "send":
            self.prepare(found)
            self.send()
        else:
            self._take_back(found)
        self._plan.pop(0)
        return True

    def prepare(self, found: Round, seed: int | None = None) -> Pending:
        """Sign a contribution to a round."""
        seed = self._draw.getrandbits(60) if seed is None else seed
        parts = {name: a.tobytes() for name, a in deltas(self._ledger.base, seed).items()}
        manifest = Manifest(
            federation=self.session.member.federation,
            model=MODEL,
            round=found.id,
            contributor=self.name,
            base_digest=found.base_digest,
            base_number=found.base_number,
            nonce=secrets.token_hex(16),
            created_at=self.session.clock.now(),
            kind="full",
            encoding="fp32",
            tensors=tuple(
                TensorEntry(
                    name=name,
                    dtype="F32",
                    shape=self._ledger.base[name].shape,
                    sha256=hashlib.sha256(raw).hexdigest(),
                    nbytes=len(raw),
                )
                for name, raw in parts.items()
            ),
            examples=10,
            norm=1.0,
        )
        self._ledger.seeds[manifest.digest()] = seed
        signed = sign(manifest, self._key)
        self._pending = Pending(found.id, signed, manifest, b"".join(parts.values()))
        return self._pending

    def send(self) -> None:
        """Offer what is pending until there is a receipt, or the round is closed to it."""
        assert self._pending is not None
        try:
            signed = self._offered(self._pending)
        except (ConflictError, NotFoundError) as error:
            if error.code == "round.not_open":
                self._pending = None
            elif error.code not in AGAIN:
                raise
            return
        if signed is not None:
            receipt = verify(signed, Receipt, self.session.member.verifier())
            assert receipt.manifest_digest == self._pending.manifest.digest()
            self._ledger.receipts[receipt.contribution] = signed
            self._ledger.hears("receipt", receipt.contribution)
            self._ledger.happens("receipt")
            self._pending = None

    def _offered(self, pending: Pending) -> Signed | None:
        self._ledger.happens("begin")
        begun = self.session.begin(pending.signed)
        if begun.receipt.document:
            return signed_from_proto(begun.receipt)
        stop = len(pending.payload)
        if self._habit is None and begun.committed_size == 0 and self._draw.random() < 0.2:
            stop //= 2  # hang up half way, and come back
        self._ledger.happens("write")
        if begun.committed_size < stop:
            self.write(pending, begun, stop)
        if stop < len(pending.payload):
            return None
        self._ledger.happens("commit")
        return signed_from_proto(self.session.commit(begun.upload_id))

    def write(
        self, pending: Pending, begun: contributions_pb2.BeginResponse, stop: int | None = None
    ) -> int:
        """Send bytes, from where the coordinator is: the size that is durable now."""
        stop = len(pending.payload) if stop is None else stop
        size = self.session.write(_pieces(pending, begun, stop), stop)
        self._ledger.hears("committed", begun.upload_id, size=size)
        return size

    def _take_back(self, found: Round) -> None:
        ours = self.session.contributions(MODEL, found.id)
        for each in ours:
            if each.state == contributions_pb2.Contribution.ADMITTED:
                self._ledger.given_up.add(each.id)
                self._ledger.hears("asked", each.id)
                self._ledger.happens("withdraw")
                with suppress(ConflictError, NotFoundError):
                    self.session.withdraw(each.id)
                    self._ledger.hears("withdrawn", each.id)

    def judge(self, found: Round) -> None:
        """Report an evaluation: the digest alone decides what everybody finds."""
        bad = int(found.candidate_digest[:2], 16) < BAD_BELOW
        change = -10 if bad else 1
        scores = [Scores(accuracy=0.5 + c / ITEMS, macro_f1=0.5) for c in (0, change)]
        evaluation = Evaluation(
            federation=self.session.member.federation,
            model=MODEL,
            round=found.id,
            contributor=self.name,
            base_digest=found.base_digest,
            candidate_digest=found.candidate_digest,
            n=ITEMS,
            base=scores[0],
            candidate=scores[1],
            gained=max(change, 0),
            lost=max(-change, 0),
            probe_seed=found.probe_seed,
            created_at=self.session.clock.now(),
        )
        self._ledger.happens("judge")
        with suppress(ConflictError):  # the others have decided
            self.session.report_evaluation(sign(evaluation, self._key))
            self._ledger.hears("evaluation", found.id, self.name)
        self._judged = found.candidate_digest


def _pieces(
    pending: Pending, begun: contributions_pb2.BeginResponse, stop: int
) -> Iterator[contributions_pb2.WriteRequest]:
    for offset in range(begun.committed_size, stop, PIECE):
        piece = common_pb2.Chunk(
            offset=offset, data=pending.payload[offset : min(offset + PIECE, stop)]
        )
        yield contributions_pb2.WriteRequest(upload_id=begun.upload_id, chunk=piece)


class Crowd:
    """All contributors, each on a thread, until told to stop."""

    def __init__(self, members: list[Member], ledger: Ledger) -> None:
        self._ledger = ledger
        self._stop = threading.Event()
        self._threads = [
            threading.Thread(target=self._run, args=(member,), name=member.name)
            for member in members
        ]
        for thread in self._threads:
            thread.start()

    def _run(self, member: Member) -> None:
        try:
            while not self._stop.is_set():
                try:
                    busy = member.step()
                except UnavailableError:
                    member.session.close()
                    busy = False
                if not busy:
                    self._stop.wait(0.03)
        except Exception as error:  # noqa: BLE001 - the test's thread reports it
            self._ledger.failures.append(f"{member.name}: {error!r}")
        finally:
            member.session.close()

    def stop(self) -> None:
        """Let each finish the call at hand."""
        self._stop.set()
        for thread in self._threads:
            thread.join(60)
            assert not thread.is_alive()
