"""Does the released base really get better?

ColD Fusion on a folder of data sets: contributors, one for each seen set, fine-tune the current
release at home and ship task vectors, the coordinator merges them into the next release
(`coldmerge simulate`), and every release is measured on seen and unseen sets beside honest
baselines. Prints a table, or JSON with `gain`: points of the plain mean's last release over the
pretrained base, linear probe on 100 examples, mean over sets and seeds. A killed command goes on
where it stopped.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import re
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks.cold import jobs, report
from benchmarks.cold.bar import Bar
from benchmarks.cold.costs import WORKERS, Speed, cost, sizes_of
from benchmarks.cold.outcome import Outcome, Plan
from benchmarks.cold.planning import BASELINES, PROTOCOLS, Costs, Parts, choose
from benchmarks.cold.recipes import STUDIES, study
from benchmarks.cold.sets import Split, read
from benchmarks.cold.settings import federation, ruler, settings_of
from benchmarks.cold.summary import summary, text
from coldmerge.core.errors import ColdmergeError, ConfigError
from coldmerge.rounds.policy import parse_duration
from coldmerge_client.files import exclusive

EXAMPLE = """example:
  python -m benchmarks.cold --data ~/sets --rounds 3 --seeds 3 --budget 90m --out runs/cold
"""
CALIBRATION_TEXTS = 192


def main(arguments: list[str] | None = None) -> int:
    """Run, measure, and print what came of it."""
    options = _options(arguments)
    warnings.filterwarnings("ignore", module="threadpoolctl")
    try:
        found = run(options)
    except ColdmergeError as error:
        if options.format == "json":
            print(json.dumps({"error": error.as_dict()}))
        print(f"error: {error}", file=sys.stderr)
        return error.exit_status
    except KeyboardInterrupt:
        print("\nStopped; the same command goes on from here.", file=sys.stderr)
        return 130
    print(json.dumps(found, indent=1) if options.format == "json" else text(found))
    return 0


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Everything that is left of a plan, and the summary of it all.

    Raises:
        ColdmergeError: an option, the data or the model cannot be used; or a command of the
            product says so.
    """
    from coldmerge.core.checkpoint import Checkpoint
    from coldmerge.core.digests import digest_of
    from coldmerge.demo.plan import minilm

    started = time.monotonic()
    budget = None if options.budget is None else parse_duration(options.budget).total_seconds()
    split = read(options.data, options.seen, options.unseen)
    _check_held(options.held, split)
    _check_out(options.out)
    model = (options.model or minilm()).absolute()
    digest = digest_of(Checkpoint.open(model))
    outcome, bar = Outcome(options.out), Bar()
    with (
        exclusive(outcome.folder / "lock", f"the study in {outcome.folder}", wait=False),
        _pool() as pool,
    ):
        asked = Parts(
            recipes=study(options.study),
            baselines=BASELINES if options.study == "main" else (),
            protocols=options.protocols,
            seeds=options.seeds,
            rounds=options.rounds,
            cheap=options.cheap,
        )
        said = _said(options, split)
        whose = {"name": "minilm" if options.model is None else model.name, "digest": digest}
        if (outcome.folder / "plan.json").exists():
            kept = outcome.plan()
            plan = replace(kept, options=said, seen=_names(split.seen), unseen=_names(split.unseen))
            plan = outcome.claim(replace(plan, model=whose))
        else:
            bar.show(["how fast this machine is"])
            plan = _plan(asked, split, model, budget, pool, said, whose, started)
            plan = replace(plan, settings={**plan.settings, "held": list(options.held)})
            outcome.claim(plan)
        failed = _work(plan, split, model, digest, options, outcome, pool, bar)
        bar.end()
    found = {**summary(outcome, failed), **report.result(outcome.folder)}
    (outcome.folder / "gain.json").write_text(json.dumps(found, indent=1) + "\n")
    report.write(outcome.folder)
    return found


def _work(
    plan: Plan,
    split: Split,
    model: Path,
    digest: str,
    options: argparse.Namespace,
    outcome: Outcome,
    pool: ProcessPoolExecutor,
    bar: Bar,
) -> dict[str, str]:
    from benchmarks.cold.study import Study

    settings = dict(plan.settings)
    parts = _parts(settings["parts"])
    study = Study(
        parts,
        federation(split, model, parts, options.data),
        split,
        ruler(settings),
        (digest, model),
        options.seed,
        settings["tunes"],
        outcome,
        pool,
        bar,
    )
    study.run()
    return study.failed


def _parts(said: dict[str, Any]) -> Parts:
    lists = {key: tuple(value) for key, value in said.items() if isinstance(value, list)}
    return Parts(**{**said, **lists})


def _check_held(held: Sequence[str], split: Split) -> None:
    known = [*_names(split.seen), *_names(split.unseen)]
    unknown = [name for name in held if name not in known]
    if unknown:
        raise ConfigError(
            "cold.held_not_measured",
            f"The set {unknown[0]} is to be held out of a choice, and is not measured.",
            expected=", ".join(known),
            got=", ".join(unknown),
            hint="Name seen or unseen sets in --held.",
        )


def _check_out(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as error:
        raise ConfigError(
            "cold.bad_out",
            f"{out} cannot be made a folder ({error.strerror}).",
            expected="a folder of an earlier run, or a place for a new one",
            hint="Give --out another folder.",
        ) from error


def _plan(
    asked: Parts,
    split: Split,
    model: Path,
    budget: float | None,
    pool: ProcessPoolExecutor,
    said: dict[str, Any],
    whose: dict[str, str],
    started: float,
) -> Plan:
    """Measure the machine, and choose what fits; `started` is the command's, a monotonic time."""
    data = split.seen[0].folder.parent
    costs = _costs(split, model, data, pool, asked, started)
    chosen, left_out = choose(asked, costs, budget)
    settings = settings_of(split, model, chosen, data)
    libraries = ("coldmerge", "torch", "transformers", "numpy", "scikit-learn")
    return Plan(
        options=said,
        seen=_names(split.seen),
        unseen=_names(split.unseen),
        dropped=split.dropped,
        settings=settings,
        model=whose,
        versions={"python": platform.python_version(), **{n: version(n) for n in libraries}},
        machine={
            "cpu": _cpu(),
            "cores": len(os.sched_getaffinity(0)),
            "gpu": pool.submit(jobs.gpu).result(),
        },
        left_out=tuple(left_out),
        costs={
            "expected_seconds": round(costs(chosen), 1),
            "full_table_seconds": round(costs(asked), 1),
            **({} if budget is None else {"budget_seconds": budget}),
        },
    )


def _costs(
    split: Split, model: Path, data: Path, pool: ProcessPoolExecutor, asked: Parts, started: float
) -> Costs:
    """Costs of tables on this machine; each setting is measured when it is first asked for.

    What has passed since `started`, the measuring too, is part of them.
    """
    speeds: dict[bool, Speed] = {}
    spent = 0.0
    folders = [task.folder for task in (*split.seen, *split.unseen)]

    def costs(parts: Parts) -> float:
        nonlocal spent
        try:
            settings = settings_of(split, model, parts, data)
        except ConfigError:
            if parts.cheap == asked.cheap:
                raise
            return math.inf  # a model without numbered layers has no cheap setting
        if parts.cheap not in speeds:
            about = (model, settings["train"], folders, CALIBRATION_TEXTS)
            both = [pool.submit(jobs.speed, *about) for _ in range(WORKERS)]
            each = [future.result() for future in both]
            means = {key: fmean(vars(one)[key] for one in each) for key in vars(each[0])}
            speeds[parts.cheap] = Speed(**means)
            spent = time.monotonic() - started
        mine = federation(split, model, parts, data)
        return spent + cost(parts, speeds[parts.cheap], sizes_of(split, settings), mine)

    return costs


def _said(options: argparse.Namespace, split: Split) -> dict[str, Any]:
    """The options that decide the plan."""
    names = ("rounds", "seeds", "seed", "budget", "cheap", "study")
    data = {task.name: task.digest() for task in (*split.seen, *split.unseen)}
    return {
        **{name: getattr(options, name) for name in names},
        "protocols": list(options.protocols),
        "held": list(options.held),
        "data": data,
    }


def _names(tasks: Sequence[Any]) -> tuple[str, ...]:
    return tuple(task.name for task in tasks)


def _cpu() -> str:
    try:
        found = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    except OSError:
        found = None
    return found[1] if found else platform.processor() or platform.machine()


@contextmanager
def _pool() -> Iterator[ProcessPoolExecutor]:
    spawn, mine = get_context("spawn"), (os.getpid(),)
    pool = ProcessPoolExecutor(WORKERS, mp_context=spawn, initializer=jobs.start, initargs=mine)
    try:
        yield pool
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _list(said: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in said.split(",") if name.strip())


def _protocols(said: str) -> tuple[str, ...]:
    names = _list(said)
    unknown = [name for name in names if name not in PROTOCOLS]
    if unknown or "lp100" not in names:
        raise argparse.ArgumentTypeError(f"lp100 and any of {', '.join(PROTOCOLS[1:])}")
    return tuple(name for name in PROTOCOLS if name in names)


def _number(least: int) -> Any:
    def read_it(said: str) -> int:
        found = int(said)
        if found < least:
            raise argparse.ArgumentTypeError(f"at least {least}")
        return found

    return read_it


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.cold",
        description=__doc__,
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--data", type=Path, required=True, help="a folder with a folder for each set")
    add("--model", type=Path, help="a Hugging Face folder; default: all-MiniLM-L6-v2")
    add("--seen", type=_list, metavar="A,B", help="sets that train, one contributor each")
    add("--unseen", type=_list, metavar="C,D", help="sets that only measure")
    add("--rounds", type=_number(1), default=3, help="of the plain mean (default: 3)")
    add("--seeds", type=_number(1), default=3, help="how many (default: 3)")
    add("--seed", type=_number(0), default=0, metavar="FIRST", help="the first of them")
    add("--budget", metavar="TIME", help="such as 15m: what does not fit is left out, and said")
    add("--cheap", action="store_true", help="top layers only, 200 examples: minutes")
    add(
        "--held",
        type=_list,
        default=(),
        metavar="A,B",
        help="sets that take no part in choosing the best recipe",
    )
    add("--study", choices=STUDIES, default="main", help="recipes beside the mean")
    add(
        "--protocols",
        type=_protocols,
        default=PROTOCOLS,
        metavar="A,B",
        help=f"any of {', '.join(PROTOCOLS)} (default: all)",
    )
    add("--out", type=Path, required=True, help="plan, runs, scores and the report")
    add("--format", choices=("table", "json"), default="table")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    raise SystemExit(main())
