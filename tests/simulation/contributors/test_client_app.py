"""What nodes that share no folder with the server keep, and get again."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from coldmerge_simulation import SimulationConfig
from coldmerge_simulation.contributors import client_app
from coldmerge_simulation.coordinator.driver import Setting, drive
from coldmerge_simulation.engines.local_grid import LocalGrid
from coldmerge_simulation.flower.compat import ClientApp, Context, Message
from coldmerge_simulation.folder import RunFolder
from coldmerge_simulation.run import prepare, result
from tests.simulation.settings import settings


class Nodes:
    """Nodes that share no folder with the server; the order number `lost` loses their models."""

    def __init__(self, folder: Path, lost: int | None = None) -> None:
        self.folder, self.lost = folder, lost
        self.orders, self.kept = 0, set[str]()

    def app(self) -> ClientApp:
        app = ClientApp()
        app.query()(client_app.hello)
        app.train()(self.train)
        return app

    def train(self, message: Message, context: Context) -> Message:
        context.node_config["home"] = str(self.folder)
        context.node_config["data"] = str(self.folder.parent / "run" / "data")
        self.orders += 1
        if self.orders == self.lost:
            shutil.rmtree(self.folder / "models")
            raise MemoryError("no more")
        reply = client_app.train(message, context)
        self.kept = {path.name for path in (self.folder / "models").iterdir()}
        return reply


def of_messages(tmp_path: Path, nodes: Nodes, config: SimulationConfig) -> dict[str, Any]:
    folder = RunFolder(tmp_path / "run")
    prepare(folder, config, resume=True)
    grid = LocalGrid(nodes.app(), 1)
    with grid.running():
        drive(grid, folder, Setting(shared=False, at_a_time=1))
    return result(folder, "federation")


def test_a_node_keeps_no_model_that_is_done_with_and_gets_again_what_it_lost(
    tmp_path: Path,
) -> None:
    nodes = Nodes(tmp_path / "node", lost=6)
    config = SimulationConfig.parse(settings(rounds=3))
    rounds = of_messages(tmp_path, nodes, config)["rounds"]
    assert [len(line["failed"]) for line in rounds] == [0, 1, 0]
    assert [len(line["accepted"]) for line in rounds] == [4, 3, 4]
    assert len(nodes.kept) == 1


def test_a_head_that_is_elsewhere_is_no_new_beginning(tmp_path: Path) -> None:
    nodes = Nodes(tmp_path / "node")
    values = settings(round={"min_contributions": 4, "gate": None})
    of_messages(tmp_path, nodes, SimulationConfig.parse({**values, "rounds": 1}))
    shutil.move(tmp_path / "node" / "homes" / "org-1", tmp_path / "elsewhere")
    RunFolder(tmp_path / "run").write(
        "simulation.json", {"config": SimulationConfig.parse(values).to_json()}
    )
    line = of_messages(tmp_path, nodes, SimulationConfig.parse(values))["rounds"][1]
    codes = [(item["contributor"], item["code"]) for item in line["failed"]]
    assert codes == [("org-1", "simulation.no_head")]
