"""The researcher's side: a federation of simulated contributors, driven through Flower.

    result = coldmerge.simulate("simulate.yaml", engine="local")
    result.releases                         # pandas data frames: releases, scores, contributions

Names are imported when they are first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from coldmerge.core.errors import ConfigError

if TYPE_CHECKING:
    from coldmerge_simulation.config import SimulationConfig
    from coldmerge_simulation.flower.strategy import ColdFusion
    from coldmerge_simulation.grid.contribution_grid import ContributionGrid
    from coldmerge_simulation.results.sweeping import Sweep, sweep, variants
    from coldmerge_simulation.run import Simulation, simulate

__all__ = [
    "ColdFusion",
    "ContributionGrid",
    "Simulation",
    "SimulationConfig",
    "Sweep",
    "simulate",
    "sweep",
    "variants",
]

_HOMES = {
    "ColdFusion": "flower.strategy",
    "ContributionGrid": "grid.contribution_grid",
    "Simulation": "run",
    "SimulationConfig": "config",
    "Sweep": "results.sweeping",
    "simulate": "run",
    "sweep": "results.sweeping",
    "variants": "results.sweeping",
}


def __getattr__(name: str) -> object:
    """Import what is asked for.

    Raises:
        ConfigError: a package that simulations need is not installed.
    """
    if name not in _HOMES:
        raise AttributeError(f"module 'coldmerge_simulation' has no attribute {name!r}")
    try:
        import_module("coldmerge_simulation.flower.compat")
        return getattr(import_module(f"coldmerge_simulation.{_HOMES[name]}"), name)
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("coldmerge"):
            raise
        raise ConfigError(
            "simulation.missing_extra",
            f"Simulations need the package {error.name}, which is not installed.",
            hint="pip install 'coldmerge[simulation]'",
        ) from error
