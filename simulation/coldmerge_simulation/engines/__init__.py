"""What carries messages between the ServerApp and the ClientApp. None of them changes a result.

`local`: function calls in this process. `ray`: Flower's simulation runtime. `federation`:
a SuperLink and SuperNodes over TLS.
"""

from __future__ import annotations

from importlib import import_module
from typing import Protocol, cast

from coldmerge.core.errors import ConfigError
from coldmerge.core.progress import Progress
from coldmerge_simulation.config import ENGINES
from coldmerge_simulation.folder import RunFolder


class Engine(Protocol):
    """Runs what is left of a run."""

    def __call__(self, folder: RunFolder, nodes: int, progress: Progress) -> None:
        """Return when the run is over.

        Raises:
            ColdmergeError: it could not be started, or ended before its end.
        """
        ...


def engine(name: str) -> Engine:
    """The engine of that name.

    Raises:
        ConfigError: there is none.
    """
    if name not in ENGINES:
        raise ConfigError(
            "simulation.unknown_engine",
            f"There is no engine {name}.",
            expected=" or ".join(ENGINES),
            got=name,
            hint="Give one of them to --engine.",
        )
    return cast("Engine", import_module(f"coldmerge_simulation.engines.{name}").run)
