"""`coldmerge demo`: real organizations on this machine improve a real model, measured.

A coordinator and one process for each organization run the same code as in production,
over mTLS on loopback. This process is the admin: it opens the rounds, and while the
organizations train it measures the last release on tasks seen and not seen.
"""

from __future__ import annotations

import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any, Self

import torch
from threadpoolctl import threadpool_limits

from coldmerge.core.checkpoint import Checkpoint
from coldmerge.core.documents import ReleaseRecord
from coldmerge.core.errors import ResourceError
from coldmerge.demo.page import write_page
from coldmerge.demo.plan import Options, Plan, make_plan
from coldmerge.demo.processes import Processes
from coldmerge.demo.result import DemoResult, Row, Run
from coldmerge.demo.scores import Bench
from coldmerge.demo.stage import Stage, Tell
from coldmerge.wire.v1 import common_pb2

HOME_COPIES = 5
HUB_COPIES = 3


def silent(_text: str) -> None:
    """Tell nobody."""


def run(options: Options, tell: Tell = silent) -> DemoResult:
    """Run the demo; `tell` hears a line at each step.

    Every process that was started has ended when this returns or raises, also on Ctrl-C
    or SIGTERM.

    Raises:
        ConfigError: an option is wrong.
        DataError: a task cannot be read.
        ResourceError: the disk is too small.
        UnavailableError: a process failed; the message shows the end of its log.

    """
    options.check()
    started = time.monotonic()
    with ExitStack() as cleanup:
        tell = _attentive(tell, cleanup.enter_context(_interrupted()))
        folder = _folder(options, cleanup)
        many = options.seeds > 1
        found = []
        for seed in range(options.seed, options.seed + options.seeds):
            place = folder / f"seed-{seed}" if many else folder
            found.append(_Demo(options, seed, place, tell).run())
        plan = found[0][0]
        result = DemoResult(
            model=_title(options),
            model_bytes=_nbytes(plan.model),
            seen=tuple(task.name for task in plan.seen),
            unseen=tuple(task.name for task in plan.unseen),
            runs=tuple(run for _, run, _ in found),
            seconds=time.monotonic() - started,
            folder=options.keep,
            commands=tuple(found[0][2]),
        )
        return _finish(options, result)


def _finish(options: Options, result: DemoResult) -> DemoResult:
    report = options.report_path()
    result = replace(result, report=report, next_command=_next(options))
    write_page(result, report)
    return result


class _Scorer:
    """Measures releases on a thread of its own, one after the other, while rounds go on."""

    def __init__(self, bench: Bench, tell: Tell) -> None:
        self._bench = bench
        self._tell = tell
        self._leaving = threading.Event()
        self._pool = ThreadPoolExecutor(1, "scores", torch.set_num_threads, (1,))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._leaving.set()
        self._pool.shutdown(cancel_futures=True)

    def submit(self, row: Row, folder: Path | None) -> Future[Row]:
        """The row with its scores, in a while; as it is when there is nothing to measure."""
        return self._pool.submit(self._measure, row, folder)

    def _measure(self, row: Row, folder: Path | None) -> Row:
        if folder is None:
            return row
        with threadpool_limits(1):  # the organizations need the other processors
            found = replace(row, scores=self._bench.score(folder, self._go_on))
        unseen = f", unseen {found.unseen.mean:.1f}" if found.unseen else ""
        seen = f"{found.seen.mean:.1f}" if found.seen else "unknown"
        what = "release" if row.state == "PUBLISHED" else f"{row.state.lower()} candidate"
        self._tell(f"{what} {row.number}: seen {seen}{unseen} points")
        return found

    def _go_on(self, _task: str) -> None:
        if self._leaving.is_set():
            raise CancelledError


class _Demo:
    """One seed: a federation, its rounds, and what each of its releases is worth."""

    def __init__(self, options: Options, seed: int, folder: Path, tell: Tell) -> None:
        self.options, self.seed, self.folder, self.tell = options, seed, folder, tell

    def run(self) -> tuple[Plan, Run, list[str]]:
        """All rounds; every process and thread has ended afterwards."""
        started = time.monotonic()
        self.folder.mkdir(parents=True, exist_ok=True)
        plan = make_plan(self.options, self.seed, self.folder, self.tell)
        _check_disk(self.folder, plan, self.options.rounds)
        with ExitStack() as open_:
            scorer = open_.enter_context(_Scorer(plan.bench, self.tell))
            processes = open_.enter_context(Processes(self.folder / "logs"))
            stage = Stage(self.folder, plan, processes, self.tell)
            open_.callback(stage.close)
            rows = self._rounds(stage, scorer)
        typed = [command.replace(f"{self.folder}/", "") for command in processes.commands]
        return plan, Run(self.seed, tuple(rows), time.monotonic() - started), typed

    def _rounds(self, stage: Stage, scorer: _Scorer) -> list[Row]:
        """Open round after round; each release is measured while organizations go on."""
        stage.start_coordinator()
        stage.join_all(self.seed)
        first = Row(0, stage.release(0).content_digest, "PUBLISHED")
        rows = [scorer.submit(first, stage.plan.model)]
        for number in range(1, self.options.rounds + 1):
            watcher = stage.open_round(number)
            if number == 1:
                stage.start_contributors(self.options.rounds)
            rows.append(scorer.submit(*self._ended(stage, watcher.wait())))
        stage.finish_contributors()
        return [row.result() for row in rows]

    def _ended(self, stage: Stage, found: Any) -> tuple[Row, Path | None]:
        """The row of an ended round, and the folder of what it made."""
        state = common_pb2.Round.State.Name(found.state)
        contributions, nbytes = stage.shipped(found.id)
        row = Row(
            number=found.base_number + 1,
            digest=found.candidate_digest or None,
            state=state,
            contributions=contributions,
            bytes_shipped=nbytes,
            round=found.id,
            reason=found.reason or None,
        )
        if found.state == common_pb2.Round.PUBLISHED:
            record = ReleaseRecord.parse(stage.release(found.release_number).record.document)
            row = replace(row, contributions=len(record.contributions))
            return row, stage.export(found.release_number)
        return row, stage.candidate(row.digest) if row.digest else None


def _folder(options: Options, cleanup: ExitStack) -> Path:
    if options.keep is not None:
        options.keep.mkdir(parents=True, exist_ok=True)
        return options.keep.resolve()
    folder = Path(tempfile.mkdtemp(prefix="coldmerge-demo-"))
    cleanup.callback(shutil.rmtree, folder, ignore_errors=True)
    return folder


def _nbytes(model: Path) -> int:
    return sum(spec.nbytes for spec in Checkpoint.open(model).tensors.values())


def _check_disk(folder: Path, plan: Plan, rounds: int) -> None:
    """Each organization keeps releases, a candidate and a fine-tune; the coordinator all."""
    needed = _nbytes(plan.model) * (HOME_COPIES * len(plan.seen) + HUB_COPIES + 2 * rounds)
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise ResourceError(
            "demo.disk_too_small",
            f"The demo's folder {folder} is on a disk that is too small.",
            expected=f"{needed / 1e9:.1f} GB free",
            got=f"{free / 1e9:.1f} GB",
            hint="Name a folder on another disk with --keep, or set TMPDIR; --tiny needs little.",
        )


def _title(options: Options) -> str:
    if options.tiny:
        return "digits CNN"
    return options.model.resolve().name if options.model else "all-MiniLM-L6-v2"


def _next(options: Options) -> str:
    """What to type after the demo."""
    if options.keep is None:
        return f"coldmerge demo{' --tiny' if options.tiny else ''} --keep ./kept"
    place = options.keep / f"seed-{options.seed}" if options.seeds > 1 else options.keep
    return f"coldmerge coordinator serve {place / 'coordinator'}"


@contextmanager
def _interrupted() -> Iterator[threading.Event]:
    """Make SIGTERM an interrupt as Ctrl-C is, and note either in the event.

    An interrupt that arrives while a finalizer or a callback of a library runs is swallowed
    there: whoever goes on must look at the event.
    """
    noted = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield noted
        return

    def interrupt(_number: int, _frame: FrameType | None) -> None:
        noted.set()
        raise KeyboardInterrupt

    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, interrupt) for number in numbers]
    try:
        yield noted
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)
    if noted.is_set():
        raise KeyboardInterrupt


def _attentive(tell: Tell, interrupted: threading.Event) -> Tell:
    """`tell`, which ends the main thread's work once an interrupt was noted."""

    def say(line: str) -> None:
        tell(line)
        if interrupted.is_set() and threading.current_thread() is threading.main_thread():
            raise KeyboardInterrupt

    return say
