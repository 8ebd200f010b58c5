"""The engine `local`: everything in this process, one contributor after the other."""

from __future__ import annotations

from coldmerge.core.progress import Progress
from coldmerge_simulation.contributors.client_app import app
from coldmerge_simulation.coordinator.driver import Setting, drive
from coldmerge_simulation.engines.local_grid import LocalGrid
from coldmerge_simulation.folder import RunFolder


def run(folder: RunFolder, nodes: int, progress: Progress) -> None:
    """See `Engine`."""
    grid = LocalGrid(app, nodes)
    with grid.running():
        # One at a time: none is trained in vain when a round seals before everybody was asked.
        drive(grid, folder, Setting(at_a_time=1), progress)
