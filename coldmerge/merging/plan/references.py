"""Where the models that a plan names are on this machine. The network is never asked."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from coldmerge.core.errors import NotFoundError
from coldmerge.merging.plan.plan import Named

_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


@dataclass(frozen=True)
class Place:
    """A model folder, an adapter folder or a task vector file; `adapter` comes on top."""

    path: Path
    adapter: Path | None = None


def resolve(model: Named, plan_folder: Path, models: Path | None = None) -> Place:
    """Find what a plan calls `model`: `path`, `owner/name`, `…@revision`, `model+adapter`.

    Looked for in the plan's folder, the current one, `models` (`DIR/owner/name`, then
    `DIR/name`), and the Hugging Face cache.

    Raises:
        NotFoundError: it is in none of them.
    """
    whole = _find(model.name, plan_folder, models)
    if whole is not None:
        return Place(whole)
    base, plus, adapter = model.name.partition("+")
    under = _find(base, plan_folder, models) if plus else None
    on_top = _find(adapter, plan_folder, models) if adapter else None
    if under is None or on_top is None:
        missing = base if under is None else adapter
        download = f"`hf download {missing.partition('@')[0]}`, or " if _is_hub(missing) else ""
        raise NotFoundError(
            "plan.model_not_found",
            f"{model.where}: the model {missing} is not on this machine.",
            expected="a folder or task vector file, or a model in the Hugging Face cache",
            got=", ".join(str(path) for path in candidates(missing, plan_folder, models)),
            hint=f"{download}name the folder that holds it with --models DIR; nothing is"
            " downloaded by itself.",
            at=model.where,
        )
    return Place(under, on_top)


def candidates(name: str, plan_folder: Path, models: Path | None) -> Iterator[Path]:
    """The paths that `name` may stand for, in order, each once."""
    path = Path(name)
    with suppress(RuntimeError):  # there is no such user: the name may have a tilde of its own
        path = path.expanduser()
    paths = [plan_folder / path, Path.cwd() / path]
    if models is not None and not path.is_absolute():
        paths += [models / path, models / path.name]
    yield from dict.fromkeys(paths)


def _find(name: str, plan_folder: Path, models: Path | None) -> Path | None:
    for path in candidates(name, plan_folder, models):
        with suppress(OSError):  # a name too long for the system
            if path.exists():
                return path.resolve()
    return _cached(name) if _is_hub(name) else None


def _is_hub(name: str) -> bool:
    return _REPOSITORY.fullmatch(name.partition("@")[0]) is not None


def _cached(name: str) -> Path | None:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    repository, _, revision = name.partition("@")
    try:
        found = snapshot_download(repository, revision=revision or None, local_files_only=True)
    except (HFValidationError, LocalEntryNotFoundError):
        return None
    return Path(found).resolve()
