"""The Ray engine on a real cluster of this machine: two workers, started and ended here."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from coldmerge.core.errors import ConfigError
from tests.support import free_ports, write_model

RAY = Path(sys.executable).with_name("ray")
COLDMERGE = Path(sys.executable).with_name("coldmerge")
PLAN = """
merge_method: {method}
base_model: ./base
models: [{{model: ./a}}, {{model: ./b}}, {{model: ./c}}]
parameters: {parameters}
"""


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """The address of a head with two processors."""
    port = free_ports(1)[0]
    options = (
        "--block --include-dashboard=false --disable-usage-stats --num-cpus=2 "
        "--node-ip-address=127.0.0.1 --object-store-memory=100000000"
    )
    with tempfile.TemporaryDirectory(prefix="ray", dir="/tmp") as folder:
        command = [str(RAY), "start", "--head", f"--port={port}", f"--temp-dir={folder}"]
        with subprocess.Popen(
            [*command, *options.split()],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        ) as head:
            try:
                assert head.stdout is not None
                lines = iter(head.stdout.readline, "")
                assert any("Ray runtime started" in line for line in lines), "the head ended"
                yield f"127.0.0.1:{port}"
            finally:
                head.terminate()  # it ends what it started, and waits for it
                head.communicate(timeout=60)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base and three fine-tunes, of tensors large and small."""
    folder = tmp_path_factory.mktemp("models")
    rng = np.random.default_rng(5)
    shapes = {"a": (900, 300), "b": (300,), "c": (70_000,), "d": (2, 3), "e": (1,)}
    base = {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}
    write_model(folder / "base", base)
    for tuned in "abc":
        change = {name: x + rng.standard_normal(x.shape, np.float32) for name, x in base.items()}
        write_model(folder / tuned, change)
    return folder


def merge(
    models: Path, tmp_path: Path, method: str, parameters: str, engine: str, address: str
) -> Any:
    """What `coldmerge merge` prints, as JSON."""
    plan = models / f"{method}.yaml"
    plan.write_text(PLAN.format(method=method, parameters=parameters))
    done = subprocess.run(
        [COLDMERGE, "merge", plan, tmp_path / engine, "--engine", engine, "--format", "json"],
        env={**os.environ, "RAY_ADDRESS": address},
        capture_output=True,
        text=True,
        timeout=150,
    )
    assert done.stdout, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize(
    ("method", "parameters"),
    [
        pytest.param("linear", "{weight: 1.0}", marks=pytest.mark.slow),
        ("ties", "{density: 0.3, weight: 1.0, trim_scope: global}"),
    ],
)
def test_the_bytes_are_those_of_one_machine(
    cluster: str, models: Path, tmp_path: Path, method: str, parameters: str
) -> None:
    local, ray = (
        merge(models, tmp_path, method, parameters, engine, cluster) for engine in ("local", "ray")
    )
    assert ray["digest"] == local["digest"]
    name = "model.safetensors"
    assert (tmp_path / "ray" / name).read_bytes() == (tmp_path / "local" / name).read_bytes()


def test_an_error_in_a_task_is_the_error_of_the_merge(
    cluster: str, models: Path, tmp_path: Path
) -> None:
    broken = {"a": np.full((900, 300), np.nan, np.float32)}
    write_model(tmp_path / "base", {"a": np.zeros((900, 300), np.float32)})
    for name in "abc":
        write_model(tmp_path / name, broken)
    found = merge(tmp_path, tmp_path, "linear", "{weight: 1.0}", "ray", cluster)
    assert found["error"]["code"] == "merge.input_not_finite"
    assert not (tmp_path / "ray").exists()


def test_without_a_cluster_it_ends_with_an_error(models: Path, tmp_path: Path) -> None:
    address = f"127.0.0.1:{free_ports(1)[0]}"
    found = merge(models, tmp_path, "linear", "{weight: 1.0}", "ray", address)
    assert found["error"]["code"] == "ray.no_cluster"
    assert not (tmp_path / "ray").exists()


def test_an_error_survives_the_way_between_processes() -> None:
    error = ConfigError("a.b", "It is wrong.", hint="Change it.", expected=1, got=2, path="p")
    again = pickle.loads(pickle.dumps(error))  # noqa: S301 - our own bytes
    assert type(again) is ConfigError
    assert again.as_dict() == error.as_dict()
