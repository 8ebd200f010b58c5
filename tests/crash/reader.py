"""`python -m tests.crash.reader HOME`: reads releases all the time and believes nothing.

A process of its own. It polls the coordinator for the latest release, and for older ones;
every record must be signed and continue the chain, numbers never go back, a release that is
listed can be read whole, and every byte has the digest that the record names. When its
standard input ends it prints one line of JSON: what it saw, and what was wrong.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import select
import subprocess
import sys
from contextlib import closing
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from coldmerge.core.documents import ReleaseRecord, verify
from coldmerge.core.errors import ColdmergeError, UnavailableError
from coldmerge.wire.convert import content_of, signed_from_proto
from coldmerge.wire.v1 import models_pb2
from coldmerge_client.home import Home
from coldmerge_client.session import Session
from tests.crash.members import MODEL
from tests.federation import environment
from tests.zygote import ROOT


@dataclass
class Seen:
    """What a reader has read."""

    polls: int = 0
    away: int = 0
    releases: int = 0
    blobs: int = 0
    wrong: list[str] = field(default_factory=list)


class Reader:
    """Reads and checks; `records` are the digests of the records it has believed."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._draw = random.Random(0)
        self._records: list[str] = []
        self._known: set[str] = set()
        self.seen = Seen()

    def poll(self) -> None:
        """The latest release; now and then an older one as well."""
        self.seen.polls += 1
        latest = self._session.release(MODEL)
        if latest.number < len(self._records) - 1:
            self._wrong(f"release {latest.number} after release {len(self._records) - 1}")
            return
        while len(self._records) <= latest.number:
            self._believe(self._session.release(MODEL, len(self._records)))
        self._read(latest)
        if self._draw.random() < 0.2:
            old = self._session.release(MODEL, self._draw.randrange(len(self._records)))
            self._record(old)
            self._known.clear()
            self._read(old)

    def _believe(self, release: models_pb2.Release) -> None:
        self._records.append(self._record(release))
        self.seen.releases += 1

    def _record(self, release: models_pb2.Release) -> str:
        key = self._session.member.verifier()
        record = verify(signed_from_proto(release.record), ReleaseRecord, key)
        number = record.number
        if (number, record.content_digest) != (release.number, release.content_digest):
            self._wrong(f"the record of release {release.number} is about another")
        if number < len(self._records):
            if self._records[number] != record.digest():
                self._wrong(f"release {number} has become another")
        elif record.previous_record != (self._records[-1] if self._records else None):
            self._wrong(f"release {number} does not continue the chain")
        return record.digest()

    def _read(self, release: models_pb2.Release) -> None:
        content = content_of(release)
        if content.digest != release.content_digest:
            self._wrong(f"the listing of release {release.number} is not what was signed")
        sizes = {entry.sha256: entry.nbytes for entry in content.tensors}
        sizes |= {entry.sha256: entry.size for entry in content.files}
        for sha256 in sizes.keys() - self._known:
            found = hashlib.sha256()
            with closing(self._session.read_blob(sha256, 0, sizes[sha256])) as chunks:  # type: ignore[type-var]
                for chunk in chunks:
                    found.update(chunk.data)
            if found.hexdigest() != sha256:
                self._wrong(f"a blob of release {release.number} is torn: {sha256}")
            self._known.add(sha256)
            self.seen.blobs += 1

    def _wrong(self, what: str) -> None:
        self.seen.wrong.append(what)


def main() -> None:
    """Poll until standard input ends."""
    with Session.open(Home(Path(sys.argv[1])), timeout=0) as session:
        reader = Reader(session)
        pause = 0.05
        while not select.select([0], [], [], pause)[0]:
            try:
                reader.poll()
            except UnavailableError:
                reader.seen.away += 1
                session.close()
            except ColdmergeError as error:
                reader.seen.wrong.append(f"{error.code}: {error}")
    sys.stdout.write(json.dumps(asdict(reader.seen)) + "\n")


def start(home: Home) -> subprocess.Popen[str]:
    """A reader in the background; `finish` ends it."""
    paths = [str(ROOT), *sys.path]
    return subprocess.Popen(
        [sys.executable, "-m", "tests.crash.reader", str(home.path)],
        cwd=ROOT,
        env=environment(PYTHONPATH=os.pathsep.join(filter(None, paths))),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen[str]) -> dict[str, Any]:
    """End a reader: what it has seen."""
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 0, said
    found: dict[str, Any] = json.loads(said)
    return found


if __name__ == "__main__":
    main()
