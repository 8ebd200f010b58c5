"""A small call stays fast beside uploads: hashing and disk work are off the event loop."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import numpy as np

from coldmerge.wire.calls import call
from coldmerge.wire.v1 import models_pb2
from tests.harness import coordinator

ELEMENTS = 12 * 2**20


def test_ping_beside_two_uploads(tmp_path: Path) -> None:
    tensors = {"w": np.zeros(ELEMENTS, np.float32)}
    with coordinator(tmp_path / "hub", tensors) as live:
        round_ = live.open_round(min_contributions=3)
        change = {"w": np.ones(ELEMENTS, np.float32)}
        uploads = [
            threading.Thread(target=live.machine(name).contribute, args=(round_, change))
            for name in "ab"
        ]
        pinger = live.machine("c")
        call(pinger.models.ListModels, models_pb2.ListModelsRequest())
        for upload in uploads:
            upload.start()
        times = []
        while any(upload.is_alive() for upload in uploads):
            started = time.monotonic()
            call(pinger.models.ListModels, models_pb2.ListModelsRequest())
            times.append(time.monotonic() - started)
        assert len(times) > 3
        # The client's own threads share this process: the bound is loose, a blocked
        # event loop would still break it (one upload takes longer than that).
        assert np.median(times) < 0.25
