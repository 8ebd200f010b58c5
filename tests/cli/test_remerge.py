"""`coldmerge round remerge` and `coldmerge release verify`, on a coordinator that serves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from coldmerge_coordinator.store import releases
from coldmerge_coordinator.worker import run_once
from tests.cli.conftest import Command
from tests.harness import MODEL, Live, coordinator, deltas

NAMES = ("st-mary", "north", "south")


def release_of_three(live: Live) -> None:
    round_ = live.open_round(min_contributions=3)
    for seed, name in enumerate(NAMES):
        live.machine(name).contribute(round_, deltas(seed))
    assert run_once(live.store, live.clock)


def master(live: Live, number: int) -> Any:
    with live.store.database.read() as session:
        row = releases.get_release(session, MODEL, number)
        sha256 = releases.get_masters(session, row.master_digest)["layer.weight"]
    return np.fromfile(live.store.blobs.path(sha256), "<f4").astype("f8")


def test_a_release_is_made_again_without_an_organization(
    coldmerge: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with coordinator(tmp_path / "hub") as live:
        release_of_three(live)
        capsys.readouterr()  # what the worker logs
        here = ("--dir", live.folder)
        json = (*here, "--format", "json")
        asked = ("round", "remerge", MODEL, "--without", NAMES[0], "--reason", "left")
        opened = coldmerge(*asked, *json)
        assert opened.status == 0, opened.err
        assert (opened.json["state"], opened.json["remerge"]) == ("SEALED", True)
        assert "can compute it from the difference" in " ".join(opened.err.split())
        busy = coldmerge(*asked, *here)
        assert busy.status == 7
        assert "round.already_active" in busy.err
        assert run_once(live.store, live.clock)
        capsys.readouterr()
        shown = coldmerge("round", "show", opened.json["round"], *json).json
        assert (shown["state"], shown["release"]) == ("PUBLISHED", 2)
        kept = [deltas(seed)["layer.weight"].astype("f8").ravel() for seed in (1, 2)]
        np.testing.assert_allclose(master(live, 2), master(live, 0) + np.mean(kept, 0), atol=1e-6)
        with live.store.database.read() as session:
            record = releases.get_record(releases.get_release(session, MODEL, 2))
        assert "remerged" in record.flags
        assert len(record.contributions) == 2
        verified = coldmerge("release", "verify", MODEL, "2", *json).json
        assert (verified["answer"], verified["merged"]) == ("exact", 2)
        assert coldmerge("audit", "verify", *here).status == 0
        again = coldmerge(*asked, *here)
        assert again.status == 7
        assert "remerge.nothing_there" in again.err


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        ((MODEL, "--without", "st-marry"), 6, "remerge.unknown"),
        (("triag", "--without", "st-mary"), 6, "model.unknown"),
        ((MODEL,), 2, "--without"),
    ],
    ids=["organization", "model", "nobody"],
)
def test_a_mistake_is_said_and_opens_no_round(
    coldmerge: Command,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: tuple[str, ...],
    status: int,
    said: str,
) -> None:
    with coordinator(tmp_path / "hub") as live:
        release_of_three(live)
        capsys.readouterr()
        refused = coldmerge("round", "remerge", *arguments, "--dir", live.folder)
        assert refused.status == status
        assert said in refused.err
        listed = ("round", "list", MODEL, "--dir", live.folder, "--format", "json")
        (only,) = coldmerge(*listed).json
        assert (only["state"], only["remerge"]) == ("PUBLISHED", False)
