"""The order of the work: what is run after what, two processes at a time, resumable.

Everything that is finished is written down at once. Started again, only what has no line in
`runs.jsonl` or `scores.jsonl` is done; simulations go on in the round they were in.
"""

from __future__ import annotations

import heapq
import itertools
import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from benchmarks.cold import jobs, multitask, simulations
from benchmarks.cold.bar import Bar
from benchmarks.cold.costs import WORKERS
from benchmarks.cold.measuring import Ruler, Subject
from benchmarks.cold.outcome import ALONE, BASE, MEAN, MULTITASK, ONESHOT, Outcome, Protocol, Run
from benchmarks.cold.planning import Parts
from benchmarks.cold.recipes import ONESHOT as MERGES
from benchmarks.cold.recipes import Federation, policies
from benchmarks.cold.records import Records
from benchmarks.cold.sets import Split
from coldmerge.core.errors import ColdmergeError

Then = Callable[[Any], None]
PROBES: tuple[Protocol, ...] = ("lp100", "frozen")


@dataclass(order=True)
class _Job:
    stage: tuple[int, ...]
    number: int
    weight: float = field(compare=False)
    work: Callable[..., Any] = field(compare=False)
    about: tuple[Any, ...] = field(compare=False)
    then: Then = field(compare=False)
    title: str = field(compare=False)
    variant: str | None = field(compare=False, default=None)


class Study:
    """One table in the making. `failed` says which variants did not come about, and why."""

    def __init__(
        self,
        parts: Parts,
        federation: Federation,
        split: Split,
        ruler: Ruler,
        base: tuple[str, Path],
        first_seed: int,
        tunes: int,
        outcome: Outcome,
        pool: ProcessPoolExecutor,
        bar: Bar,
    ) -> None:
        self.parts, self.federation, self.split, self.ruler = parts, federation, split, ruler
        self.outcome, self.pool, self.bar, self.tunes = outcome, pool, bar, tunes
        self.base_digest, self.base = base
        self.seeds = tuple(range(first_seed, first_seed + parts.seeds))
        self.work = outcome.folder.absolute() / "scratch"
        self.failed: dict[str, str] = {}
        self._queue: list[_Job] = []
        self._count = itertools.count()
        self._chosen = False
        self._known = {score.key for score in outcome.scores()}
        self._measured: list[jobs.Measured] = [
            *((task.folder, "seen") for task in split.seen),
            *((task.folder, "unseen") for task in split.unseen),
        ]

    def run(self) -> None:
        """Do what is left.

        Raises:
            ColdmergeError: the base or the plain mean did not come about.
        """
        self.work.mkdir(parents=True, exist_ok=True)
        complete = self.work / "complete"
        if complete.exists():
            return
        self._begin()
        under_way: dict[Future[Any], _Job] = {}
        try:
            while self._queue or under_way or self._tune_best():
                while self._queue and len(under_way) < WORKERS:
                    job = heapq.heappop(self._queue)
                    under_way[self.pool.submit(job.work, *job.about)] = job
                self.bar.show([job.title for job in under_way.values()])
                done, _ = wait(under_way, timeout=1.0, return_when=FIRST_COMPLETED)
                for future in done:
                    self._finish(under_way.pop(future), future)
        finally:
            for future in under_way:
                future.cancel()
        if not self.failed:  # what failed is tried again by the same command
            for name in ("features", "merges", "pooled", "releases", "sent"):
                shutil.rmtree(self.work / name, ignore_errors=True)
            complete.touch()

    def left(self) -> list[str]:
        """What is queued, in order; with an empty queue what follows when everything is probed."""
        if not self._queue:
            self._tune_best()
        return [job.title for job in sorted(self._queue)]

    def _finish(self, job: _Job, future: Future[Any]) -> None:
        try:
            job.then(future.result())
        except ColdmergeError as error:
            if job.variant is None:
                raise
            self.failed[job.variant] = f"{error.message} [{error.code}]"
        self.bar.did(job.weight)

    def _add(
        self,
        stage: tuple[int, ...],
        weight: float,
        title: str,
        work: Callable[..., Any],
        about: tuple[Any, ...],
        then: Then,
        variant: str | None = None,
    ) -> None:
        self.bar.expect(weight)
        number = next(self._count)
        heapq.heappush(self._queue, _Job(stage, number, weight, work, about, then, title, variant))

    def _begin(self) -> None:
        base = Subject(BASE, 0, self.base_digest, self.base, self.seeds)
        known = {(run.variant, run.seed) for run in self.outcome.runs()}
        for seed in self.seeds:
            if (BASE, seed) not in known:
                self.outcome.note(Run(BASE, seed, 0, self.base_digest))
        self._probe((0,), base, self._measured)
        self._tune((5,), base)
        for place, seed in enumerate(self.seeds):
            self._simulate((1, place), MEAN, seed, self.federation.simulation(MEAN, seed))
            if "oneshot" in self.parts.baselines:
                self._simulate(
                    (3, place), f"{ONESHOT}mean", seed, self.federation.oneshot(seed), sent=True
                )
            if "multitask" in self.parts.baselines:
                most = self.federation.at_once()["max_examples"]
                pooled = self.work / "pooled" / str(seed)
                place_of = multitask.write(self.split.seen, most, seed, pooled)
                self._simulate(
                    (3, place), MULTITASK, seed, self.federation.multitask(place_of, seed)
                )
            for turn, recipe in enumerate(self.parts.recipes):
                if not self._is_measured(recipe, seed):
                    settings = self.federation.simulation(recipe, seed)
                    self._simulate((6, place, turn), recipe, seed, settings)

    def _simulate(
        self,
        stage: tuple[int, ...],
        variant: str,
        seed: int,
        settings: dict[str, Any],
        sent: bool = False,
    ) -> None:
        """Run a simulation, unless it was run and what it left is still there."""

        def then(found: simulations.Simulated) -> None:
            mine = self.work / "done" / f"{variant}-{seed}"
            known = {(run.variant, run.seed, run.release) for run in self.outcome.runs()}
            self.outcome.note(
                *(run for run in found.runs if (variant, seed, run.release) not in known)
            )
            mine.parent.mkdir(exist_ok=True)
            simulations.remember(found, mine)
            simulations.tidy(variant, seed, self.work)
            self._simulated(stage, variant, seed, found)

        recipe = variant in self.parts.recipes
        done = simulations.recall(self.work / "done" / f"{variant}-{seed}", last=recipe)
        if done is not None:
            self._simulated(stage, variant, seed, done)
            return
        weight = 10.0 * settings["rounds"] * settings["contributors"]
        about = (variant, settings, self.work)
        needed = None if variant == MEAN else variant
        title = f"{variant}, seed {seed}"
        work = simulations.simulate_and_keep if sent else simulations.simulate
        self._add(stage, weight, title, work, about, then, needed)

    def _simulated(
        self, stage: tuple[int, ...], variant: str, seed: int, found: simulations.Simulated
    ) -> None:
        last = max((run.release for run in found.runs), default=0)
        for run in found.runs:
            folder = found.folders[run.digest]
            subject = Subject(variant, run.release, run.digest, folder, (seed,))
            recipe = variant in self.parts.recipes
            if recipe and run.release < last:
                shutil.rmtree(folder, ignore_errors=True)  # only the last one is measured
            else:
                tidy = recipe and variant not in self._tunable
                self._probe((*stage, 0), subject, self._tasks_of(variant), tidy=tidy)
            if variant == MEAN and run.release == last:
                self._tune((5, *stage[1:]), subject)
        if variant == f"{ONESHOT}mean":
            self._merges(stage, seed, found)

    def _tasks_of(self, variant: str) -> list[jobs.Measured]:
        """A federation of fewer contributors has seen fewer sets: the others are left out."""
        if not variant.startswith("cohort"):
            return self._measured
        names = self.federation.simulation(variant, 0)["data"]["tasks"]
        return [one for one in self._measured if one[1] == "unseen" or one[0].name in names]

    def _merges(self, stage: tuple[int, ...], seed: int, found: simulations.Simulated) -> None:
        """Other one-shot merges of the same contributions, and each of them alone."""
        base, vectors = found.folders[found.base], [found.sent[task] for task in sorted(found.sent)]
        whole = found.runs[0]
        wanted: list[tuple[Run, str, dict[str, Any], list[Path]]] = []
        if "merges" in self.parts.baselines:
            for method, parameters in MERGES.items():
                run = replace(whole, variant=ONESHOT + method, release=1)
                wanted.append((run, method, parameters, vectors))
        if "alone" in self.parts.baselines:
            for task, path in sorted(found.sent.items()):
                run = replace(found.spent[task], variant=ALONE, release=1)
                wanted.append((run, "task_arithmetic", {"weight": 1.0}, [path]))
        for run, method, parameters, paths in wanted:
            self._merge(stage, seed, run, method, parameters, base, paths)

    def _merge(
        self,
        stage: tuple[int, ...],
        seed: int,
        run: Run,
        method: str,
        parameters: dict[str, Any],
        base: Path,
        paths: list[Path],
    ) -> None:
        tasks = [one for one in self._measured if run.task is None or one[0].name == run.task]
        if self._keys(run.variant, seed, run.release, tasks) <= self._known:
            return

        def then(made: jobs.Merged) -> None:
            self.outcome.note(made.run)
            about = made.run
            subject = Subject(about.variant, about.release, about.digest, made.folder, (seed,))
            self._probe((*stage, 0), subject, tasks, tidy=True)

        about = (run, method, parameters, base, paths, self.work)
        title = " ".join(filter(None, [run.variant, run.task, f"seed {seed}"]))
        # Measured and removed before the next one is made: each takes the room of a model.
        self._add((*stage, 1), 5.0, title, jobs.merge, about, then, run.variant)

    def _keys(
        self, variant: str, seed: int, release: int, tasks: Sequence[jobs.Measured]
    ) -> set[Any]:
        """Keys of all the probes of a release."""
        return {
            (variant, seed, release, folder.name, protocol, number)
            for folder, _ in tasks
            for protocol in self._probes
            for number in range(self.ruler.draws if protocol == "lp100" else 1)
        }

    def _is_measured(self, recipe: str, seed: int) -> bool:
        """Whether a recipe was run before and its last release probed: nothing is left of it."""
        ran = [r.release for r in self.outcome.runs() if (r.variant, r.seed) == (recipe, seed)]
        tasks = self._tasks_of(recipe)
        return bool(ran) and self._keys(recipe, seed, max(ran), tasks) <= self._known

    @property
    def _probes(self) -> tuple[Protocol, ...]:
        return tuple(one for one in PROBES if one in self.parts.protocols)

    def _probe(
        self,
        stage: tuple[int, ...],
        subject: Subject,
        tasks: Sequence[jobs.Measured],
        tidy: bool = False,
    ) -> None:
        """Probe a release on sets, in two halves: both workers have something to do."""
        halves = [half for half in (tasks[::2], tasks[1::2]) if half]
        left = len(halves)
        for half in halves:

            def then(found: Any) -> None:
                nonlocal left
                self.outcome.note(*found)
                left -= 1
                if tidy and not left:
                    shutil.rmtree(subject.folder, ignore_errors=True)

            known = {key for key in self._known if key[0] == subject.variant}
            about = (subject, self.ruler, half, self._probes, known, self.work / "features")
            title = f"measuring {subject.variant} {subject.release}"
            variant = None if subject.variant in (BASE, MEAN) else subject.variant
            self._add(stage, 3.0 * len(half), title, jobs.probe, about, then, variant)

    @property
    def _tunable(self) -> list[str]:
        """Round policies, of which the best one is fine-tuned in the end: all stay till then."""
        return policies(self.parts.recipes) if "ft100" in self.parts.protocols else []

    def _tune_best(self) -> bool:
        """100-shot fine-tuning of the best round policy; whether that leaves anything to do.

        Asked when everything is probed. Where no policy beats the mean there is nothing.
        """
        if self._chosen or not self._tunable:
            return False
        self._chosen = True
        choice = Records.read(self.outcome.folder).choice
        best = choice.chosen if choice else MEAN
        ran = [run for run in self.outcome.runs() if run.variant == best and best != MEAN]
        for place, seed in enumerate(self.seeds):
            mine = max((r for r in ran if r.seed == seed), key=lambda r: r.release, default=None)
            folder = simulations.release_folder(self.work, mine) if mine else None
            if mine and folder and folder.exists():
                subject = Subject(best, mine.release, mine.digest, folder, (seed,))
                self._tune((7, place), subject, ("ft100",))
        return bool(self._queue)

    def _tune(
        self, stage: tuple[int, ...], subject: Subject, how: Sequence[str] = ("ft100", "full")
    ) -> None:
        """Fine-tune a release on every set: unseen ones first."""
        for protocol, draws in (("ft100", self.tunes), ("full", 1)):
            if protocol not in self.parts.protocols or protocol not in how:
                continue
            for number, one in itertools.product(range(draws), self._measured):
                key = (subject.variant, subject.seeds[0], subject.release, one[0].name, protocol)
                if (*key, number) in self._known:
                    continue
                order = (stage[0], protocol == "full", number, one[1] == "seen", *stage[1:])
                about = (subject, self.ruler, one, protocol, number)
                title = f"{protocol} {subject.variant} {subject.release} {one[0].name}"
                variant = None if subject.variant in (BASE, MEAN) else subject.variant
                self._add(
                    order, 14.0, title, jobs.tune, about, lambda f: self.outcome.note(*f), variant
                )
