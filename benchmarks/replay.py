"""A recorded simulation, sent again: real processes, real mTLS gRPC, the same digests?

`python -m benchmarks.replay RUN --format json`

A coordinator is started with the model that the run started from. The run's contributors enrol;
each sends the task vectors that the run recorded into rounds of the same policies, and reports
the evaluations that it made. Exits with 1 if a release has another content digest.
"""

from __future__ import annotations

import argparse
import json
import secrets
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import grpc
from sqlalchemy import select

from coldmerge.cli.output import Format, print_rows
from coldmerge.core.documents import Evaluation, Manifest, sign
from coldmerge.rounds.state import State
from coldmerge.wire.calls import call
from coldmerge.wire.channel import local_channel
from coldmerge.wire.v1 import admin_pb2, admin_pb2_grpc, common_pb2
from coldmerge_client.home import Home
from coldmerge_client.outbox import PAYLOAD, Outbox
from coldmerge_client.push import send
from coldmerge_client.session import Session
from coldmerge_coordinator.store import Store, releases
from coldmerge_coordinator.store import models as tables
from coldmerge_coordinator.store.models import Contribution, Round
from tests.federation import Federation, until

MERGE_SECONDS = 300.0
_STANDING = ("ADMITTED", "QUARANTINED")


@dataclass(frozen=True)
class Compared:
    """A release of the run, and that of the coordinator. None: there is none."""

    release: int
    recorded: str | None
    replayed: str | None

    @property
    def equal(self) -> bool:
        """Whether both are there and have the same bytes."""
        return self.recorded is not None and self.recorded == self.replayed


@dataclass(frozen=True)
class Recorded:
    """A round of the run: what came, in the order in which it came, and what was said of it."""

    row: Round
    contributions: Sequence[Contribution]
    evaluations: Sequence[tables.Evaluation]


class Recording:
    """A run's hub, read."""

    def __init__(self, run: Path) -> None:
        config = json.loads((run / "simulation.json").read_text())["config"]
        self.run, self.model = run, str(config["name"])
        self.private = tuple(config["private"])
        self.store = Store.open(run / "hub")

    def rounds(self) -> list[Recorded]:
        """All rounds, the first one first.

        Raises:
            SystemExit: one searched for a culprit: its groups depend on a seed that a
                coordinator draws for itself.
        """
        with self.store.database.read() as session:
            rows = list(session.scalars(select(Round).order_by(Round.opened_at)))
            found = [self._recorded(session, row) for row in rows]
        for recorded in found:
            if recorded.row.isolation:
                raise SystemExit(f"{recorded.row.id} searched for a culprit: no replay of that")
        return found

    def _recorded(self, session: Any, row: Round) -> Recorded:
        came = select(Contribution).where(Contribution.round == row.id)
        said = select(tables.Evaluation).where(tables.Evaluation.round == row.id)
        return Recorded(
            row,
            [
                item
                for item in session.scalars(came.order_by(Contribution.accepted_at))
                if item.state in _STANDING
            ],
            list(session.scalars(said.order_by(tables.Evaluation.contributor))),
        )

    def digests(self) -> dict[int, str]:
        """The content digest of every release by its number."""
        with self.store.database.read() as session:
            found = releases.list_releases(session, self.model)
            return {row.number: row.content_digest for row in found}


class Replay:
    """The coordinator and the contributors of a replay."""

    def __init__(self, recording: Recording, federation: Federation, names: Sequence[str]) -> None:
        self._recording, self._names = recording, names
        self._federation = federation
        options = [word for pattern in recording.private for word in ("--private", pattern)]
        base = recording.run / "base"
        federation.hub.cli("model", "add", recording.model, "--from", base, *options)
        federation.hub.start()
        self._admin: grpc.Channel = local_channel(federation.hub.folder / "admin.sock")
        self._stub: Any = admin_pb2_grpc.AdminStub(self._admin)  # type: ignore[no-untyped-call]
        orgs = federation.join(names)
        self._sessions = {org.name: Session.open(Home(org.home)) for org in orgs}

    def round(self, recorded: Recorded) -> None:
        """Open a round of the same policy, send, seal, and report what was reported."""
        policy = json.dumps(recorded.row.policy)
        request = admin_pb2.OpenRoundRequest(model=self._recording.model, policy_json=policy)
        opened = call(self._stub.OpenRound, request)
        for item in recorded.contributions:
            self._send(opened, item)
        action = admin_pb2.RoundAction(round=opened.id, reason="as recorded")
        if recorded.row.state == State.ABANDONED:
            call(self._stub.AbandonRound, action)
            return
        if self._state(opened.id) == common_pb2.Round.OPEN:
            call(self._stub.SealRound, action)
        until("the merge", lambda: self._state(opened.id) not in _MERGING, MERGE_SECONDS)
        for said in recorded.evaluations:
            if self._state(opened.id) == common_pb2.Round.CANDIDATE:
                self._report(opened.id, said)
        if self._state(opened.id) == common_pb2.Round.CANDIDATE:
            publish = recorded.row.state == State.PUBLISHED
            decision = admin_pb2.ResolveRoundRequest(round=opened.id, publish=publish, reason="so")
            call(self._stub.ResolveRound, decision)

    def _state(self, round_id: str) -> int:
        return int(self._sessions[self._names[0]].round(round_id).state)

    def _send(self, opened: common_pb2.Round, item: Contribution) -> None:
        """The recorded payload under a manifest of its own, by the client's own outbox."""
        session = self._sessions[item.contributor]
        recorded = Manifest.parse(item.manifest)
        manifest = recorded.model_copy(
            update={
                "federation": session.member.federation,
                "round": opened.id,
                "nonce": secrets.token_hex(16),
                "created_at": datetime.now(recorded.created_at.tzinfo),
            }
        )
        outbox = Outbox(session.home)
        draft = outbox.draft()
        payload = self._recording.store.payloads.local(item.payload, lambda: None)
        shutil.copyfile(payload, draft / PAYLOAD)
        signed = sign(manifest, session.home.identity_key())
        send(session, outbox.commit(draft, signed, kept_home=(), unchanged=0))

    def _report(self, round_id: str, said: tables.Evaluation) -> None:
        session = self._sessions[said.contributor]
        recorded = Evaluation.parse(said.document)
        now = session.round(round_id)
        evaluation = recorded.model_copy(
            update={
                "federation": session.member.federation,
                "round": round_id,
                "probe_seed": now.probe_seed,
                "created_at": datetime.now(recorded.created_at.tzinfo),
            }
        )
        session.report_evaluation(sign(evaluation, session.home.identity_key()))

    def digests(self) -> dict[int, str]:
        """The content digest of every release by its number."""
        found = self._federation.hub.releases(self._recording.model)
        return {int(row["number"]): str(row["digest"]) for row in found}

    def close(self) -> None:
        """Hang up."""
        for session in self._sessions.values():
            session.close()
        self._admin.close()


_MERGING = frozenset({common_pb2.Round.SEALED, common_pb2.Round.MERGING})


def replay(run: Path, within: Path | None = None) -> list[Compared]:
    """Every release, recorded and replayed. Files are removed at the end."""
    recording = Recording(run)
    rounds = recording.rounds()
    names = sorted({item.contributor for found in rounds for item in found.contributions})
    if not names:
        raise SystemExit(f"nobody contributed anything in {run}")
    with (
        recording.store,
        tempfile.TemporaryDirectory(prefix="coldmerge-replay-", dir=within) as folder,
    ):
        federation = Federation.make(Path(folder))
        try:
            again = Replay(recording, federation, names)
            try:
                for found in rounds:
                    again.round(found)
                was, is_now = recording.digests(), again.digests()
            finally:
                again.close()
        finally:
            federation.close()
    return [Compared(n, was.get(n), is_now.get(n)) for n in sorted({*was, *is_now})]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run and print."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.replay", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("run", type=Path, help="a folder of `coldmerge simulate`")
    parser.add_argument("--format", choices=("table", "json"), default="table")
    parser.add_argument("--in", dest="within", type=Path, help="folder for temporary files")
    options = parser.parse_args(arguments)
    started = time.monotonic()
    found = replay(options.run.absolute(), options.within)
    same = all(release.equal for release in found)
    seconds = round(time.monotonic() - started, 1)
    if options.format == "json":
        rows = [{**asdict(release), "equal": release.equal} for release in found]
        print(json.dumps({"equal": same, "seconds": seconds, "releases": rows}, indent=2))
    else:
        print_rows(
            [{**asdict(release), "equal": release.equal} for release in found],
            Format.TABLE,
            empty="There are no releases.",
        )
        verdict = "all content digests are equal" if same else "content digests DIFFER"
        print(f"{len(found)} releases: {verdict}. Took {seconds} s.")
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
