"""kill -9 of the coordinator and its worker: restarted, it comes to the release it would have.

The contributions are signed once. One copy of the coordinator's folder and the homes goes
on undisturbed; every test kills another copy and compares the signed release records.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import partial
from itertools import count
from pathlib import Path

import pytest

from coldmerge.core.checkpoint import Checkpoint
from tests.crash.conftest import (
    NO_GATE,
    WITH_GATE,
    Maker,
    Paused,
    injected,
    published,
    remains,
    rows,
    tensors,
    wait_killed,
)
from tests.crash.inject.sitecustomize import POINTS
from tests.crash.trace import faults
from tests.federation import Federation, Hub, until

pytestmark = pytest.mark.xdist_group("crash-coordinator")

MiB = 2**20
TENSOR_BYTES = 8 * MiB
SMALL = tensors(3, 1000)
MODELS = ("judged", "large", "small")

Copy = Callable[[Paused], Federation]

SMALL_IS_ENOUGH = pytest.mark.parametrize("paused", [8], indirect=True, ids=["64MiB"])
LARGE_TOO = pytest.mark.parametrize(
    "paused", [8, pytest.param(64, marks=pytest.mark.slow)], indirect=True, ids=["64MiB", "512MiB"]
)
"""Tensors of the model `large`; the other models are small."""


@pytest.fixture(scope="module")
def paused(
    request: pytest.FixtureRequest, pause: Callable[[Callable[[Maker], None]], Paused]
) -> Paused:
    """`large` and `small` wait for a third contribution, `judged` for a third evaluation."""

    def prepare(maker: Maker) -> None:
        large = tensors(request.param, TENSOR_BYTES // 4)
        maker.add("large", large, NO_GATE)
        maker.contribute("large", large, send=2)
        maker.add("small", SMALL, NO_GATE)
        maker.contribute("small", SMALL, send=2)
        maker.add("judged", SMALL, WITH_GATE)
        maker.contribute("judged", SMALL, send=3)
        maker.judge("judged", reports=2)

    return pause(prepare)


@pytest.fixture(scope="module")
def undisturbed(
    paused: Paused, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, dict[str, object]]:
    """The release of each model when nobody kills anything."""
    federation = paused.copy(tmp_path_factory.mktemp("undisturbed"))
    try:
        federation.hub.start()
        last = federation.orgs[2]
        last.cli("push", "large")
        last.cli("push", "small")
        last.cli("evaluate", "judged")
        found = {model: published(federation.hub, model) for model in MODELS}
        assert federation.hub.stop() == 0
    finally:
        federation.close()
    small, judged = found["small"], found["judged"]
    assert small["content_digest"] == judged["content_digest"], "the same bytes, another model"
    return found


def bytes_of(paused: Paused, model: str) -> int:
    """Bytes of a model's tensors, which are a contribution's, too."""
    folder = paused.federation.folder / f"base-{model}"
    return sum(spec.nbytes for spec in Checkpoint.open(folder).tensors.values())


def received(hub: Hub, nbytes: int) -> bool:
    """Whether an upload is durable up to there."""
    return any(size >= nbytes for (size,) in rows(hub, "SELECT committed_size FROM upload"))


def merged(hub: Hub, before: int, count: int) -> bool:
    """Whether the worker has finished `count` tensors and is writing another."""
    return (
        len(list(hub.folder.glob("blobs/??/*"))) >= before + count
        and any((hub.folder / "blobs" / "incoming").iterdir())
        and rows(hub, "SELECT 1 FROM round WHERE model = 'large' AND state = 'MERGING'") != []
    )


@LARGE_TOO
def test_killed_during_an_upload(
    paused: Paused, undisturbed: dict[str, dict[str, object]], copy: Copy, tmp_path: Path
) -> None:
    federation = copy(paused)
    hub, last = federation.hub, federation.orgs[2]
    size = bytes_of(paused, "large")
    hub.start()
    pushing = last.spawn("push", "large")
    for share in (0.2, 0.5):
        until("a part of the upload", partial(received, hub, int(share * size)), every=0.002)
        hub.kill()
        ((durable, state),) = remains(
            hub,
            "SELECT committed_size, state FROM upload JOIN round ON round.id = upload.round",
            tmp_path / "remains",
        )
        assert state == "OPEN"
        assert share * size <= durable < size
        hub.start()
    last.finish(pushing)
    assert published(hub, "large") == undisturbed["large"]


@SMALL_IS_ENOUGH
@pytest.mark.slow
def test_killed_while_an_upload_becomes_a_contribution(
    paused: Paused, undisturbed: dict[str, dict[str, object]], copy: Copy, tmp_path: Path
) -> None:
    federation = copy(paused)
    hub, last = federation.hub, federation.orgs[2]
    admitted = (
        "SELECT count(*) FROM contribution JOIN round ON round.id = contribution.round "
        "WHERE contribution.model = 'small'"
    )
    hub.start(**injected("contribution", POINTS[0]))
    pushing = last.spawn("push", "small")
    for point, following in zip(POINTS, [*POINTS[1:], None], strict=True):
        wait_killed(hub)
        ((count,),) = remains(hub, admitted, tmp_path / "remains")
        assert count == (3 if point == "committed" else 2), point
        hub.start(**(injected("contribution", following) if following else {}))
    last.finish(pushing)
    assert last.cli("status")["outbox"] != []
    assert published(hub, "small") == undisturbed["small"]


@LARGE_TOO
@pytest.mark.slow
def test_killed_while_merging(
    paused: Paused, undisturbed: dict[str, dict[str, object]], copy: Copy, tmp_path: Path
) -> None:
    federation = copy(paused)
    hub, last = federation.hub, federation.orgs[2]
    hub.start()
    before = len(list(hub.folder.glob("blobs/??/*")))
    pushing = last.spawn("push", "large")
    last_tensor = bytes_of(paused, "large") // TENSOR_BYTES - 1
    for finished in (0, last_tensor // 2, last_tensor):
        until("the merge", partial(merged, hub, before, finished), every=0.002)
        hub.kill()
        ((state, attempts),) = remains(
            hub, "SELECT state, merge_attempts FROM round WHERE model = 'large'", tmp_path / "r"
        )
        assert (state, attempts) == ("MERGING", 0)
        hub.start()
    last.finish(pushing)
    assert published(hub, "large") == undisturbed["large"]


def releases_of(hub: Hub, model: str, scratch: Path) -> tuple[int, str]:
    """Number of releases and state of the round, of a killed coordinator."""
    ((count, state),) = remains(
        hub,
        f"SELECT (SELECT count(*) FROM release WHERE model = '{model}'), state "  # noqa: S608
        f"FROM round WHERE model = '{model}'",
        scratch,
    )
    return int(count), str(state)


@SMALL_IS_ENOUGH
@pytest.mark.slow
def test_killed_while_the_merge_publishes(
    paused: Paused, undisturbed: dict[str, dict[str, object]], copy: Copy, tmp_path: Path
) -> None:
    """Without a gate the worker publishes in the transaction that ends the merge."""
    federation = copy(paused)
    hub, last = federation.hub, federation.orgs[2]
    hub.start(**injected("release", POINTS[0]))
    pushing = last.spawn("push", "small")
    for point, following in zip(POINTS, [*POINTS[1:], None], strict=True):
        wait_killed(hub)
        expected = (2, "PUBLISHED") if point == "committed" else (1, "MERGING")
        assert releases_of(hub, "small", tmp_path / "remains") == expected, point
        hub.start(**(injected("release", following) if following else {}))
    last.finish(pushing)
    assert published(hub, "small") == undisturbed["small"]


@SMALL_IS_ENOUGH
def test_killed_while_the_gate_publishes(
    paused: Paused, undisturbed: dict[str, dict[str, object]], copy: Copy, tmp_path: Path
) -> None:
    """The last evaluation publishes, in one transaction; one command outlives all kills."""
    federation = copy(paused)
    hub, last = federation.hub, federation.orgs[2]
    hub.start(**injected("release", POINTS[0]))
    judging = last.spawn("evaluate", "judged")
    for point, following in zip(POINTS, [*POINTS[1:], None], strict=True):
        wait_killed(hub)
        expected = (2, "PUBLISHED") if point == "committed" else (1, "CANDIDATE")
        assert releases_of(hub, "judged", tmp_path / "remains") == expected, point
        hub.start(**(injected("release", following) if following else {}))
    assert published(hub, "judged") == undisturbed["judged"]
    last.finish(judging)


@SMALL_IS_ENOUGH
@pytest.mark.slow
@pytest.mark.skipif(
    shutil.which("strace") is None,
    reason="strace is not installed; the kills between statements have run all the same",
)
def test_killed_at_any_write_of_the_publishing_transaction(
    paused: Paused, undisturbed: dict[str, dict[str, object]], copy: Copy, tmp_path: Path
) -> None:
    """Torn in the middle of a commit, too: the log is written in pieces."""
    federation = copy(paused)
    hub, last = federation.hub, federation.orgs[2]
    found: list[tuple[int, str]] = []
    for write in count(1, 3):
        hub.start()
        assert hub.process is not None
        log, killed = hub.folder / "coldmerge.db-wal", f"signal=SIGKILL:when={write}"
        with faults(hub.process.pid, "pwrite64", killed, "-P", str(log)):
            last.cli("evaluate", "judged", "--timeout", "0", check=False)
        assert hub.process is not None
        if hub.process.poll() is None:
            break
        hub.kill()
        found.append(releases_of(hub, "judged", tmp_path / "remains"))
        assert found[-1] in {(1, "CANDIDATE"), (2, "PUBLISHED")}
        if found[-1][0] == 2:
            hub.start()
            break
    assert len(found) > 3
    assert published(hub, "judged") == undisturbed["judged"]
