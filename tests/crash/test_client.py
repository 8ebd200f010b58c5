"""kill -9 of `coldmerge push` in mid-upload, and broken links: little is sent again."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
import yaml

from coldmerge.core.task_vector import TaskVector
from coldmerge_client import sent_log
from coldmerge_client.home import Home
from coldmerge_client.outbox import Outbox
from tests.client.conftest import Relay, through
from tests.crash.conftest import moved, tensors
from tests.federation import Federation, Org, until
from tests.support import write_model

pytestmark = pytest.mark.xdist_group("crash-client")

MiB = 2**20
TENSOR_BYTES = 8 * MiB
ALLOWED = 64 * MiB


@dataclass
class Line:
    """An organization whose every byte to the coordinator is counted."""

    federation: Federation
    org: Org
    relay: Relay
    payload: int

    def command(self) -> tuple[str | Path, ...]:
        """The same push, however often it is started."""
        tuned = self.federation.folder / "tuned"
        return ("push", "m", "--from", tuned, "--base", "0", "--examples", "10")

    def again(self) -> tuple[str, ...]:
        """How the outbox's pending entry is sent."""
        return ("push", "m")

    def kill_at(self, share: float, *command: str | Path) -> None:
        """Start a push and kill it as soon as that share of the payload went over the line."""
        process = self.org.spawn(*command)
        until("a part of the upload", partial(self.over, share * self.payload), every=0.001)
        process.kill()
        process.wait()
        assert Outbox(Home(self.org.home)).entries()[-1].state == "sending"

    def over(self, nbytes: float) -> bool:
        """Whether that much went up."""
        return self.relay.up >= nbytes

    def sent_again(self) -> int:
        """Bytes beyond the payload, protocol and all."""
        return self.relay.up - self.payload

    def check_complete(self) -> None:
        """One contribution, byte for byte what was signed, logged once."""
        (entry,) = Outbox(Home(self.org.home)).entries()
        assert entry.receipt is not None
        name = f"{entry.receipt.contribution}.safetensors"
        stored = TaskVector.open(self.federation.hub.folder / "contributions" / name)
        assert stored.entries() == entry.manifest.tensors
        events = [line.event for line in sent_log.read(Home(self.org.home))]
        assert events == ["join", "contribution", "receipt"]


@pytest.fixture
def make_line(federation: Federation) -> Iterator[Callable[[int], Line]]:
    """An organization that has pulled release 0, with a fine-tune of so many tensors."""
    relays: list[Relay] = []

    def make(count: int) -> Line:
        base, folder, hub = tensors(count, TENSOR_BYTES // 4), federation.folder, federation.hub
        hub.cli("model", "add", "m", "--from", write_model(folder / "base", base))
        write_model(folder / "tuned", moved(base, 1))
        hub.start()
        (org,) = federation.join(["a"])
        rules = folder / "rules.yaml"
        rules.write_text(yaml.safe_dump({"min_contributions": 2, "gate": None}))
        hub.cli("round", "open", "m", "--policy", rules)
        org.cli("pull", "m")
        relays.append(Relay(Home(org.home).membership().address))
        through(Home(org.home), relays[-1])
        return Line(federation, org, relays[-1], count * TENSOR_BYTES)

    yield make
    for relay in relays:
        relay.close()


def test_a_push_that_was_killed_sends_little_again(make_line: Callable[[int], Line]) -> None:
    line = make_line(26)
    assert line.payload >= 200 * MiB
    line.kill_at(0.6, *line.command())
    assert line.org.cli(*line.again())["sent"]
    line.check_complete()
    print(f"sent again: {line.sent_again() / MiB:.1f} MiB of {line.payload / MiB:.0f} MiB")
    assert line.sent_again() <= ALLOWED


@pytest.mark.slow
def test_killed_again_and_again_over_a_line_that_breaks(make_line: Callable[[int], Line]) -> None:
    line = make_line(64)
    line.kill_at(0.2, *line.command())
    for share in (0.4, 0.6):
        line.kill_at(share, *line.again())
    with closing(line.relay):
        line.relay.cut_after(up=line.payload // 8)
        assert line.org.cli(*line.again())["sent"]
    line.check_complete()
    assert line.relay.cuts >= 1
    print(f"sent again: {line.sent_again() / MiB:.1f} MiB of {line.payload / MiB:.0f} MiB")
    assert line.sent_again() <= 4 * ALLOWED
