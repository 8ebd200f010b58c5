"""Replayed and bit-flipped manifests, by the thousands, over a real socket: none is admitted.

`python -m tests.attacks.replays --inputs 10000 --seed 1`
"""

from __future__ import annotations

import argparse
import logging
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import structlog

from coldmerge.core.documents import Manifest, Receipt, Signed
from coldmerge.core.errors import ColdmergeError
from coldmerge.wire.calls import call
from coldmerge.wire.v1 import contributions_pb2
from coldmerge_coordinator.store.models import Contribution, Upload
from coldmerge_coordinator.worker import run_once
from tests.harness import Live, MachineClient, coordinator, deltas


@dataclass
class Result:
    """How many were sent, how they were refused, and what got in."""

    sent: int = 0
    accepted: int = 0
    refused: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True)
class Scene:
    """Two organizations; genuine manifests of the first, at every stage; a round that is open."""

    live: Live
    org: MachineClient
    thief: MachineClient
    genuine: list[Signed]

    @classmethod
    def make(cls, live: Live) -> Scene:
        """Of a contribution that was merged, of one that was taken back, of one never sent."""
        org, thief = live.machine("a"), live.machine("b")
        past = live.open_round()
        merged, payload = org.manifest(past, deltas(1))
        unsent, _ = org.manifest(past, deltas(2))
        _upload(org, merged, payload)
        thief.contribute(past, deltas(3))
        run_once(live.store, live.clock)
        current = live.open_round(min_contributions=5)
        withdrawn, payload = org.manifest(current, deltas(4))
        taken_back = _upload(org, withdrawn, payload)
        call(org.contributions.Withdraw, contributions_pb2.WithdrawRequest(id=taken_back))
        never, _ = org.manifest(current, deltas(5))
        return cls(live, org, thief, [org.sign(m) for m in (merged, unsent, withdrawn, never)])

    def stored(self) -> int:
        """Uploads and contributions, whatever became of them."""
        with self.live.store.database.read() as session:
            return session.query(Upload).count() + session.query(Contribution).count()


def _upload(org: MachineClient, manifest: Manifest, payload: bytes) -> str:
    """The id of the contribution that it becomes."""
    begun = org.begin(manifest)
    org.write(begun.upload_id, payload)
    return Receipt.parse(org.commit(begun.upload_id).document).contribution


def attempts(scene: Scene, draw: random.Random) -> Iterator[tuple[MachineClient, Signed]]:
    """One forgery after another: replayed by their owner, by a thief, or with a bit flipped."""
    merged, unsent, withdrawn, never = scene.genuine
    while True:
        yield scene.org, draw.choice((unsent, withdrawn))
        yield scene.thief, draw.choice((merged, unsent, withdrawn, never))
        for genuine in (merged, never):
            yield draw.choice((scene.org, scene.thief)), _flipped(genuine, draw)


def _flipped(signed: Signed, draw: random.Random) -> Signed:
    document, signature = bytearray(signed.document), bytearray(signed.signature)
    target = draw.choice((document, signature))
    target[draw.randrange(len(target))] ^= 1 << draw.randrange(8)
    return Signed(bytes(document), bytes(signature))


def run(live: Live, inputs: int, seed: int) -> Result:
    """Send so many; what was merged already, sent again by its owner, answers the old receipt."""
    scene, result = Scene.make(live), Result()
    before = scene.stored()
    assert scene.org.begin(scene.genuine[0]).receipt.document
    for org, signed in islice(attempts(scene, random.Random(seed)), inputs):
        result.sent += 1
        try:
            org.begin(signed)
        except ColdmergeError as error:
            result.refused[error.code] += 1
        else:
            result.accepted += 1
    result.accepted += scene.stored() - before
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    """Run and print."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.attacks.replays", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--inputs", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args(arguments)
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING))
    with tempfile.TemporaryDirectory() as folder, coordinator(Path(folder) / "hub") as live:
        started = time.monotonic()
        result = run(live, options.inputs, options.seed)
        seconds = time.monotonic() - started
    refused = ", ".join(f"{code} {count}" for code, count in sorted(result.refused.items()))
    print(f"{result.sent} sent, {result.accepted} accepted in {seconds:.1f} s; refused: {refused}")
    return 1 if result.accepted else 0


if __name__ == "__main__":
    sys.exit(main())
