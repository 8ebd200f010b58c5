"""Plain Flower: FedAvg over clients that return what they got, plus a constant.

A round begins when the strategy configures it and ends when it has aggregated the replies; the
seconds of each are written to the file that the run's configuration names.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

TENSORS = 8
WIDTH = 1024


class Timed(FedAvg):
    """FedAvg that knows how long its rounds took."""

    def __init__(self, clients: int) -> None:
        super().__init__(
            min_train_nodes=clients, min_available_nodes=clients, fraction_evaluate=0.0
        )
        self.started = 0.0
        self.seconds: list[float] = []

    def configure_train(self, *args: Any, **named: Any) -> Iterable[Message]:
        """The round begins."""
        self.started = time.monotonic()
        messages: Iterable[Message] = super().configure_train(*args, **named)
        return messages

    def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> Any:
        """The round ends."""
        found = super().aggregate_train(server_round, replies)
        self.seconds.append(time.monotonic() - self.started)
        return found


def serve(grid: Grid, context: Context) -> None:
    """The rounds of one run, all from new weights or from those of the round before."""
    said = context.run_config
    rows, clients = int(said["bytes"]) // TENSORS // 4 // WIDTH, int(said["clients"])
    generator = np.random.default_rng(0)
    initial = {
        f"layer-{number}": Array(generator.random((rows, WIDTH), np.float32))
        for number in range(TENSORS)
    }
    strategy = Timed(clients)
    found = strategy.start(grid, ArrayRecord(initial), num_rounds=int(said["rounds"]))
    moved = [float(np.mean(found.arrays[name].numpy() - initial[name].numpy())) for name in initial]
    Path(str(said["out"])).write_text(
        json.dumps({"seconds": strategy.seconds, "moved": sum(moved) / len(moved)})
    )


def train(message: Message, context: Context) -> Message:
    """What came, plus a constant of the node's own."""
    constant = np.float32(1e-3) * np.float32(1 + int(context.node_config["partition-id"]))
    arrays = message.content["arrays"]
    moved = {name: Array(array.numpy() + constant) for name, array in arrays.items()}
    metrics = MetricRecord({"num-examples": 1})
    content = RecordDict({"arrays": ArrayRecord(moved), "metrics": metrics})
    return Message(content, reply_to=message)


server = ServerApp()
server.main()(serve)
client = ClientApp()
client.train()(train)
