"""The admin's commands about what waits, over the socket of a served coordinator."""

from __future__ import annotations

from pathlib import Path

from tests.attacks.test_screening import KNOWN, times
from tests.cli.conftest import Command
from tests.harness import coordinator, deltas


def test_list_accept_refuse_report_and_show(coldmerge: Command, tmp_path: Path) -> None:
    with coordinator(tmp_path / "hub") as live:
        here = ("--dir", live.folder)
        assert "Nothing waits." in coldmerge("quarantine", "list", *here).out
        round_ = live.open_round(**KNOWN)
        for name in ("loud", "louder"):
            live.machine(name).contribute(round_, times(1000.0))
        found = coldmerge("quarantine", "list", *here, "--format", "json").json
        assert [row["contributor"] for row in found] == ["loud", "louder"]
        assert "outside 0.01 to 10" in found[0]["reason"]
        first, second = (row["contribution"] for row in found)
        said = coldmerge("quarantine", "accept", first, "--reason", "known", *here)
        assert said.status == 0
        assert "ADMITTED" in said.out
        refused = coldmerge("quarantine", "refuse", second, *here, "--format", "json").json
        assert refused["state"] == "REFUSED"
        again = coldmerge("quarantine", "accept", second, *here)
        assert again.status == 7
        assert "contribution.not_quarantined" in again.err
        live.machine("b").contribute(round_, deltas(2))
        report = coldmerge("round", "report", round_.id, *here, "--format", "json").json
        assert report["reference_from"] == "policy"
        assert sorted(report["factors"].values())[-1] == 1.0
        assert "louder" in coldmerge("round", "report", round_.id, *here).out
        (entry,) = coldmerge("contributors", "show", "loud", *here, "--format", "json").json
        assert (entry["state"], entry["reason"]) == ("ADMITTED", "known")
        assert 0 < entry["factor"] < 1
        listed = coldmerge("contributors", *here, "--format", "json").json
        assert [row["contributor"] for row in listed] == ["b", "loud", "louder"]
