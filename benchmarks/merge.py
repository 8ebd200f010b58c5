"""Time and memory of merges: ours, mergekit's, and the floor of reading and writing.

`python -m benchmarks.merge --sources 8 --dtype float32 --methods linear,ties --repeats 5`

Writes a Llama and fine-tunes of it, then runs whole processes in turn: reading all inputs and
writing the output (the floor), `coldmerge merge`, `mergekit-yaml`. Rows hold medians
of seconds and the largest peaks of memory. Our output must agree with mergekit's.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from benchmarks import llama, peers
from benchmarks.agreement import Agreement, compare
from benchmarks.llama import Llama
from benchmarks.merge_plans import DENSITY, METHODS, TRIM, Inputs, plan
from benchmarks.processes import Measured, measure
from coldmerge import __version__
from coldmerge.cli.output import Format, print_rows

COLDMERGE = (sys.executable, "-m", "coldmerge")
LIMIT = 3600.0
MB = 10**6
OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
THREADS: dict[str, dict[str, str]] = {"default": {}, "1": {"OMP_NUM_THREADS": "1"}}
SHOWN = (
    "method",
    "ours_s",
    "mergekit_s",
    "floor_s",
    "speedup",
    "floor_ratio",
    "ours_rss_mb",
    "mergekit_rss_mb",
    "rss_ratio",
    "ours_anon_mb",
    "max_diff",
)


@dataclass(frozen=True)
class Bench:
    """What all rows of one run share; `peer` is mergekit's command, None without it."""

    folder: Path
    shape: Llama
    dtype: str
    repeats: int
    peer: Path | None


def say(line: str) -> None:
    """A line of progress on standard error."""
    print(line, file=sys.stderr, flush=True)


def write_models(bench: Bench, sources: int) -> Inputs:
    """The base and its fine-tunes."""
    say(f"writing {sources + 1} models of {bench.shape.parameters} parameters, {bench.dtype}")
    base = llama.write(bench.folder / "base", bench.shape, bench.dtype, seed=0)
    tuned = [
        llama.write(bench.folder / f"tuned-{seed}", bench.shape, bench.dtype, base=base, seed=seed)
        for seed in range(1, sources + 1)
    ]
    return Inputs(base, tuned)


def task_vectors(models: Inputs) -> Inputs:
    """What contributors would ship: task vectors with their trim thresholds."""
    found = []
    for source in models.sources:
        out = source.with_name(f"{source.name}.safetensors")
        if not out.exists():
            folders = [models.base, source, out]
            measure([*COLDMERGE, "extract", *folders, "--trim", str(DENSITY)], limit=LIMIT)
        found.append(out)
    return Inputs(models.base, found)


def quoted(paths: Sequence[Path]) -> str:
    """The safetensors files of folders, and paths of files, for a shell."""
    files = [
        file
        for path in paths
        for file in (sorted(path.rglob("*.safetensors")) if path.is_dir() else [path])
    ]
    return shlex.join(str(file) for file in files)


def clear(out: Path) -> Path:
    """No folder there, and nothing left to be written back from earlier runs."""
    shutil.rmtree(out, ignore_errors=True)
    os.sync()
    return out


def floor(inputs: Sequence[Path], output: Path, copy: Path) -> Measured:
    """`cat` of the inputs to nowhere, and `dd` of the output to another file.

    Not `cat` for both: it can copy files without moving bytes.
    """
    copy.unlink(missing_ok=True)
    os.sync()
    write = f'for file in {quoted([output])}; do dd if="$file" bs=64K status=none; done'
    script = f"cat {quoted(inputs)} > /dev/null && {write} > {quoted([copy])}"
    try:
        return measure(["sh", "-c", script], limit=LIMIT)
    finally:
        copy.unlink(missing_ok=True)


@dataclass
class Runs:
    """Measurements of one row, in the order they were made."""

    ours: list[Measured]
    mergekit: list[Measured]
    floor: list[Measured]
    threads: str | None = None


def run_mergekit(
    run: Callable[[dict[str, str]], Measured], name: str, threads: str | None
) -> tuple[Measured, str]:
    """One run of mergekit; the first time under both settings of threads, the better counts."""
    if threads is not None:
        return run(THREADS[threads]), threads
    trials = {setting: run(env) for setting, env in THREADS.items()}
    better = min(trials, key=lambda setting: trials[setting].seconds)
    shown = ", ".join(f"{trial.seconds:.2f} s at {key}" for key, trial in trials.items())
    say(f"{name}: mergekit's threads: {better} ({shown})")
    return trials[better], better


def run_row(bench: Bench, name: str, models: Inputs) -> dict[str, object]:
    """One method, alternately by every program, and whether the results agree."""
    method = METHODS[name]
    models = Inputs(models.base, models.sources[: method.sources(len(models.sources))])
    inputs = task_vectors(models) if method.inputs == TRIM else models
    read = [*([inputs.base] if method.base else []), *inputs.sources]
    mine, theirs = bench.folder / "ours.yaml", bench.folder / "mergekit.yaml"
    mine.write_text(plan(method, inputs, bench.dtype))
    theirs.write_text(plan(method, models, bench.dtype))
    ours, other = bench.folder / "ours", bench.folder / "mergekit"

    def peer(env: dict[str, str]) -> Measured:
        command = [bench.peer or "", theirs, clear(other), "--no-copy-tokenizer"]
        return measure(command, limit=LIMIT, env={**OFFLINE, **env})

    runs = Runs([], [], [])
    measure(["sh", "-c", f"cat {quoted([*read, *models.sources])} > /dev/null"], limit=LIMIT)
    for number in range(bench.repeats):
        say(f"{name}: run {number + 1} of {bench.repeats}")
        runs.ours.append(measure([*COLDMERGE, "merge", mine, clear(ours)], limit=LIMIT))
        if bench.peer is not None:
            measured, runs.threads = run_mergekit(peer, name, runs.threads)
            runs.mergekit.append(measured)
        runs.floor.append(floor(read, ours, bench.folder / "copy"))
    agreement = None if bench.peer is None else compare(method, models, ours, other)
    for out in (ours, other):
        shutil.rmtree(out, ignore_errors=True)
    return row(bench, name, len(models.sources), runs, agreement)


def row(
    bench: Bench, name: str, sources: int, runs: Runs, agreement: Agreement | None
) -> dict[str, object]:
    """The figures of a method, rounded; null where mergekit did not run."""
    ours, bottom = (median(one.seconds for one in each) for each in (runs.ours, runs.floor))
    peer = median(one.seconds for one in runs.mergekit) if runs.mergekit else None
    peaks = _peaks(runs.ours, "ours") | _peaks(runs.mergekit, "mergekit")
    rss, peer_rss = peaks["ours_rss_mb"], peaks["mergekit_rss_mb"]
    return {
        "method": name,
        "sources": sources,
        "dtype": bench.dtype,
        "ours_s": round(ours, 3),
        "mergekit_s": None if peer is None else round(peer, 3),
        "floor_s": round(bottom, 3),
        "speedup": None if peer is None else round(peer / ours, 2),
        "floor_ratio": round(ours / bottom, 2),
        **peaks,
        "rss_ratio": round(peer_rss / rss, 1) if rss and peer_rss else None,
        "mergekit_threads": runs.threads,
        "max_diff": None if agreement is None else agreement.largest,
        "open_share": None if agreement is None else agreement.open_share,
        "norm_ratio": None if agreement is None else agreement.norm_ratio,
        "agrees": None if agreement is None else agreement.agrees,
        "ours_runs_s": [round(one.seconds, 3) for one in runs.ours],
        "mergekit_runs_s": [round(one.seconds, 3) for one in runs.mergekit],
        "floor_runs_s": [round(one.seconds, 3) for one in runs.floor],
    }


def _peaks(measured: Sequence[Measured], who: str) -> dict[str, float | None]:
    peaks = {"rss": [one.rss for one in measured], "anon": [one.anonymous for one in measured]}
    return {
        f"{who}_{kind}_mb": round(max(found) / MB, 1) if found else None
        for kind, found in peaks.items()
    }


def check_disk(folder: Path, shape: Llama, dtype: str, sources: int, names: Sequence[str]) -> None:
    """Refuse to begin what the disk cannot hold.

    Raises:
        SystemExit: it has too little room; with both sizes.
    """
    model = llama.size_in_bytes(shape, dtype)
    needed = (sources + 4) * model
    if any(METHODS[name].inputs == TRIM for name in names):
        needed += sources * llama.size_in_bytes(shape, "float32")
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise SystemExit(
            f"{folder} has {free / 1e9:.1f} GB free, and this run needs {needed / 1e9:.1f} GB. "
            "Name another folder with --work, or ask for fewer --sources or --parameters."
        )


def machine() -> dict[str, object]:
    """What the figures were measured on."""
    cpu = Path("/proc/cpuinfo").read_text().partition("model name")[2].partition("\n")[0]
    total = int(Path("/proc/meminfo").read_text().split()[1])
    return {
        "processor": cpu.partition(":")[2].strip() or platform.machine(),
        "processors": len(os.sched_getaffinity(0)),
        "memory_gb": round(total * 1024 / 1e9, 1),
        "system": platform.platform(),
        "python": platform.python_version(),
        "coldmerge": __version__,
    }


def benchmark(
    shape: Llama,
    dtype: str,
    sources: int,
    names: Sequence[str],
    *,
    repeats: int,
    peer: Path | None,
    work: Path | None = None,
) -> Iterator[dict[str, object]]:
    """One row per method, as each is done. Files are removed at the end."""
    with tempfile.TemporaryDirectory(prefix="coldmerge-bench-", dir=work) as folder:
        check_disk(Path(folder), shape, dtype, sources, names)
        bench = Bench(Path(folder), shape, dtype, repeats, peer)
        models = write_models(bench, max(METHODS[name].sources(sources) for name in names))
        for name in names:
            yield run_row(bench, name, models)


def _names(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    unknown = [name for name in names if name not in METHODS]
    if unknown or not names:
        raise argparse.ArgumentTypeError(
            f"unknown method {', '.join(unknown) or text!r}; known are {', '.join(METHODS)}"
        )
    return names


def _count(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected at least 1, got {number}")
    return number


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options of the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.merge", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--sources", type=_count, default=8, help="fine-tunes to merge")
    parser.add_argument("--dtype", choices=tuple(llama.DTYPES), default="float32")
    parser.add_argument("--methods", type=_names, default=["linear", "ties"], metavar="A,B")
    parser.add_argument("--repeats", type=_count, default=3)
    parser.add_argument("--parameters", type=_count, default=109_500_000, help="of one model")
    parser.add_argument("--work", type=Path, help="folder for temporary files")
    parser.add_argument("--no-peer", action="store_true", help="leave mergekit out")
    parser.add_argument("--peer-env", type=Path, help="environment that has mergekit, or will")
    parser.add_argument("--format", choices=("table", "json"), default="table")
    parser.add_argument("--list", action="store_true", help="print the methods and end")
    options = parser.parse_args(arguments)
    if not Path("/proc/self/status").is_file():
        parser.error("memory is read from /proc: Linux only")
    if options.work is not None and not options.work.is_dir():
        parser.error(f"--work: {options.work} is no folder")
    return options


def show(rows: Sequence[Mapping[str, object]], options: argparse.Namespace) -> None:
    """Print rows as they were asked for."""
    if options.format == "json":
        print(json.dumps({"rows": rows, "machine": machine()}, indent=2))
        return
    print(f"{options.sources} sources, {options.dtype}; {json.dumps(machine())}")
    print_rows([{key: one[key] for key in SHOWN} for one in rows], Format.TABLE, empty="")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run and print; 1 if any merge disagrees with mergekit's."""
    options = parse(arguments)
    if options.list:
        print("\n".join(METHODS))
        return 0
    peer = None if options.no_peer else peers.mergekit(options.peer_env)
    rows: list[dict[str, object]] = []
    try:
        rows.extend(
            benchmark(
                Llama.of(options.parameters),
                options.dtype,
                options.sources,
                options.methods,
                repeats=options.repeats,
                peer=peer,
                work=options.work,
            )
        )
    finally:
        if rows:  # also those before a method that failed
            show(rows, options)
    wrong = [str(one["method"]) for one in rows if one["agrees"] is False]
    if wrong:
        say(f"These do not agree with mergekit: {', '.join(wrong)}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
