"""Kills the coordinator, all of its processes, at one chosen step of one transaction.

Python runs this file at its start wherever the folder is on PYTHONPATH. CRASH_TABLE names
the table whose INSERT marks the transaction; CRASH_POINT is one of POINTS. The signal is
SIGKILL to the process group: nothing of ours runs afterwards.
"""

from __future__ import annotations

import os
import re
import signal
import threading
from typing import Any

POINTS = ("before", "after", "commit", "committed")
"""Before and after the INSERT is executed, before COMMIT, and when COMMIT has returned."""


class Killer:
    """Listens to every statement and commit of this process."""

    def __init__(self, table: str, point: str) -> None:
        self._insert = re.compile(rf'INSERT INTO "?{table}"? ')
        self._point = point
        self._thread = threading.local()

    def reached(self, point: str) -> None:
        """Die here, if this is the place."""
        if point == self._point:
            os.kill(0, signal.SIGKILL)

    def before(self, _link: Any, _cursor: Any, statement: str, *_: Any) -> None:
        """Before a statement is executed."""
        if self._insert.match(statement):
            self.reached("before")

    def after(self, _link: Any, _cursor: Any, statement: str, *_: Any) -> None:
        """After a statement was executed."""
        if self._insert.match(statement):
            self._thread.inserted = True
            self.reached("after")

    def commit(self, _link: Any) -> None:
        """Before COMMIT."""
        if getattr(self._thread, "inserted", False):
            self.reached("commit")

    def committed(self, _session: Any) -> None:
        """After COMMIT."""
        if getattr(self._thread, "inserted", False):
            self.reached("committed")


def arm(killer: Killer) -> None:
    """Let `killer` hear everything."""
    from sqlalchemy import Engine, event
    from sqlalchemy.orm import Session

    event.listen(Engine, "before_cursor_execute", killer.before)
    event.listen(Engine, "after_cursor_execute", killer.after)
    event.listen(Engine, "commit", killer.commit)
    event.listen(Session, "after_commit", killer.committed)


if "CRASH_TABLE" in os.environ:
    arm(Killer(os.environ["CRASH_TABLE"], os.environ["CRASH_POINT"]))
