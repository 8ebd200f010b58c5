from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from coldmerge.core.errors import ColdmergeError
from coldmerge.merging import merger, merger_class, method_names

PLUGIN = '''
"""A merge method of somebody else."""
from typing import ClassVar
import numpy as np
from coldmerge.merging import Merger

class Loudest(Merger):
    """The largest entry wins."""
    name: ClassVar[str] = "loudest"

    def merge(self, block, facts):
        rows = block.stack()
        return np.take_along_axis(rows, np.abs(rows).argmax(0)[None], 0)[0]

class Half(Merger):
    """A method without what it does."""
    name: ClassVar[str] = "half"

not_a_merger = 5
'''
METADATA = "Metadata-Version: 2.1\nName: elsewhere\nVersion: 1.0\n"
POINTS = """[coldmerge.mergers]
loudest = elsewhere:Loudest
wrong = elsewhere:not_a_merger
gone = elsewhere:nowhere
mean2 = elsewhere:Loudest
half = elsewhere:Half
dare_ties = elsewhere:nowhere
"""


def test_each_method_is_known_by_its_name() -> None:
    assert {"linear", "mean", "ties"} <= set(method_names())
    for name in method_names():
        found = merger_class(name)
        assert found.name == name
        assert (found.__doc__ or "").strip(), f"{name} does not name its paper"


def test_an_unknown_method_lists_the_known_ones() -> None:
    with pytest.raises(ColdmergeError) as caught:
        merger("average")
    assert caught.value.code == "merge.unknown_method"
    assert "linear | " in (caught.value.expected or "")


def test_a_mistyped_method_is_guessed() -> None:
    with pytest.raises(ColdmergeError) as caught:
        merger("tise")
    assert caught.value.hint.startswith("Did you mean `ties`?")


def test_a_parameter_out_of_range_and_an_unknown_one_are_refused() -> None:
    for parameters in ({"lambda": float("nan")}, {"lamda": 1.0}):
        with pytest.raises(ColdmergeError) as caught:
            merger("ties", **parameters)
        assert caught.value.code == "merge.bad_parameter"
        assert caught.value.ids["parameter"] == next(iter(parameters))


def test_a_package_registers_a_method_of_its_own(tmp_path: Path) -> None:
    info = tmp_path / "elsewhere-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(METADATA)
    (info / "entry_points.txt").write_text(POINTS)
    (tmp_path / "elsewhere.py").write_text(PLUGIN)
    script = """
import sys
sys.path.insert(0, sys.argv[1])
from coldmerge.core.errors import ConfigError
from coldmerge.merging import merger, method_names
assert merger("loudest").name == "loudest"
assert type(merger("dare_ties")).__module__.startswith("coldmerge."), "ours cannot be replaced"
assert {"loudest", "mean"} <= set(method_names())
for name in ("wrong", "gone", "mean2", "half"):
    try:
        merger(name)
    except ConfigError as error:
        assert error.code == "merge.broken_plugin", error
    else:
        raise SystemExit(f"{name} was accepted")
"""
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
