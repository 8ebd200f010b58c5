"""Opening what a plan names: the base, and every input as deltas or weights against it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Self

from coldmerge.core.adapters import CONFIG, is_adapter
from coldmerge.core.algebra import Delta
from coldmerge.core.checkpoint import Checkpoint, read_json
from coldmerge.core.deltas import open_vector
from coldmerge.core.digests import digest_of
from coldmerge.core.errors import CheckpointError, ConfigError, TaskVectorError
from coldmerge.core.extraction import extract
from coldmerge.core.progress import Progress, silent
from coldmerge.core.task_vector import TaskVector
from coldmerge.merging.merger import BaseRole
from coldmerge.merging.plan.fitting import Adapted, Fitter
from coldmerge.merging.plan.plan import Named, Plan
from coldmerge.merging.plan.references import Place, resolve
from coldmerge.merging.sources import Input


class Opened:
    """The base and the inputs of a plan; a context manager that holds temporary files.

    `models` is a folder of models, `scratch` where adapters are unpacked (default: the
    system's). With `by_token`, or where the plan says so, rows of the vocabulary are
    matched by their tokens.

    `places` are the inputs' places in `Plan.models`, in the order of their keys, None for a
    base that the plan does not list; `folders` those of them that are folders. `notes` are
    sentences that a person should read.

    Raises:
        NotFoundError: a model is not on this machine.
        ConfigError: the plan lacks a base, or has nothing to merge.
        CheckpointError: a folder cannot be read.
        TaskVectorError: an input does not fit the base.
    """

    def __init__(
        self,
        plan: Plan,
        models: Path | None = None,
        *,
        scratch: Path | None = None,
        by_token: bool = False,
        progress: Progress = silent,
    ) -> None:
        self._plan, self._models, self._progress = plan, models, progress
        self._by_token = by_token or plan.vocabulary is not None
        self._scratch = TemporaryDirectory(prefix=".coldmerge-", dir=scratch)
        self._folders: dict[Path, Checkpoint] = {}
        self.notes: list[str] = []

    def __enter__(self) -> Self:
        try:
            self._open()
        except BaseException:
            self._scratch.cleanup()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._scratch.cleanup()

    def _open(self) -> None:
        plan = self._plan
        folder = plan.path.absolute().parent
        found = [resolve(model, folder, self._models) for model in plan.models]
        origin = resolve(plan.base, folder, self._models) if plan.base else None
        base = origin or self._first_folder(found)
        self._check_base(base)
        self._base_place = base
        with _told_where(plan.base or plan.models[found.index(base)]):
            self.base = self._folder(base.path)
        tied = any(place.path.is_file() for place in found)  # to a release, by its digest
        self._digest = digest_of(self.base, self._progress) if tied else ""
        self._fitter = Fitter(self.base, self._digest, self._by_token, self.notes)
        counts = origin is None or plan.method.base_role is BaseRole.INPUT
        chosen: list[tuple[int | None, Named, Place]] = [
            (i, plan.models[i], place) for i, place in enumerate(found) if counts or place != base
        ]
        if counts and plan.base and base not in found:
            chosen.append((None, plan.base, base))
        self._check_chosen(chosen)
        self.places = tuple(i for i, _, _ in chosen)
        self.folders = [place.path for _, _, place in chosen if place.path.is_dir()]
        inputs = []
        for number, (_, named, place) in enumerate(chosen):
            with _told_where(named):
                source = self._source(named, place)
            inputs.append(Input(f"{number:06d}", source, label=named.name))
        self.inputs = tuple(inputs)

    def _first_folder(self, found: Sequence[Place]) -> Place:
        """What stands for the base where a method needs none: the first model folder."""
        plan = self._plan
        folder = next((p for p in found if p.path.is_dir() and not is_adapter(p.path)), None)
        if folder is None or plan.method.base_role is BaseRole.ORIGIN:
            raise ConfigError(
                "plan.base_missing",
                f"{plan.method_at}: {plan.method.name} of these models needs a base model.",
                expected="base_model",
                got="none",
                hint="Add `base_model:` with the model that the others were fine-tuned from.",
                at=plan.method_at,
            )
        return folder

    def _check_base(self, base: Place) -> None:
        named, source = self._plan.base, self._plan.vocabulary
        if named and (base.adapter or base.path.is_file() or is_adapter(base.path)):
            raise ConfigError(
                "plan.base_not_a_model",
                f"{named.where}: the base {named.name} is not a model folder.",
                expected="a folder with config.json and safetensors",
                got="an adapter" if base.path.is_dir() else "a file",
                hint="Merge the adapter into its model first, or name the model without it.",
                at=named.where,
            )
        names = {"base", (named or self._plan.models[0]).name}
        if source and source.name not in names:
            raise ConfigError(
                "plan.vocabulary_source",
                f"{source.where}: the merged model can only have the vocabulary of its base.",
                expected=" or ".join(sorted(names)),
                got=source.name,
                hint="Use `tokenizer_source: base`, or make that model the `base_model`.",
                at=source.where,
            )

    def _check_chosen(self, chosen: Sequence[object]) -> None:
        plan = self._plan
        if not chosen:
            raise ConfigError(
                "plan.no_inputs",
                f"{plan.method_at}: {plan.method.name} has nothing to merge into the base.",
                expected="at least one model other than the base",
                got=", ".join(model.name for model in plan.models),
                hint="List the fine-tuned models under `models:`.",
                at=plan.method_at,
            )

    def _folder(self, path: Path) -> Checkpoint:
        if path not in self._folders:
            self._folders[path] = Checkpoint.open(path)
        return self._folders[path]

    def _source(self, named: Named, place: Place) -> Delta:
        if place.path.is_file():
            return open_vector(self.base, place.path, self._digest)
        if is_adapter(place.path):
            return self._adapter(named, self.base, place.path)
        if place.adapter and place.path == self._base_place.path:
            return self._adapter(named, self.base, place.adapter)
        model = self._folder(place.path)
        tuned, pairs = self._fitter.tuned(named, model)
        if place.adapter is None:
            return tuned
        return Adapted(self.base, tuned, self._adapter(named, model, place.adapter), pairs)

    def _adapter(self, named: Named, under: Checkpoint, folder: Path) -> TaskVector:
        number = len(list(Path(self._scratch.name).iterdir()))
        out = Path(self._scratch.name) / f"{number}.safetensors"
        found = extract(under, folder, out, base_digest=self._digest)
        self._tell_other_base(named, folder)
        self._fitter.tell_left_out(named, found.kept_home)
        return found.task_vector

    def _tell_other_base(self, named: Named, folder: Path) -> None:
        """Note where an adapter says that it was trained on a model of another name.

        No more than a note: shapes fit, and one model goes by many names.
        """
        trained_on = read_json(folder / CONFIG).get("base_model_name_or_path")
        under, plus, _ = named.name.partition("+")
        if not plus:
            under = self._plan.base.name if self._plan.base else ""
        names = [
            str(n).partition("@")[0].rstrip("/").rpartition("/")[2] for n in (trained_on, under)
        ]
        if trained_on and under and names[0].casefold() != names[1].casefold():
            self.notes.append(
                f"{named.name}: the adapter says it was trained on {trained_on}, and goes onto"
                f" {under}."
            )


@contextmanager
def _told_where(named: Named) -> Iterator[None]:
    """Say with the line which model could not be opened.

    Raises:
        TaskVectorError: it could not.
    """
    try:
        yield
    except (TaskVectorError, CheckpointError) as error:
        if error.code.startswith("plan."):
            raise
        raise TaskVectorError(
            "plan.unusable_model",
            f"{named.where}: {named.name} cannot be merged. {error.message} [{error.code}]",
            expected=error.expected,
            got=error.got,
            hint=error.hint,
            **{"at": named.where, **error.ids},
        ) from error
