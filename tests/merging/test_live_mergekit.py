"""mergekit itself, in an environment of its own, beside ours on the same plans and models."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

EXACT = (
    "linear,slerp,nuslerp,multislerp,karcher,task_arithmetic,ties,breadcrumbs,breadcrumbs_ties,"
    "sce,model_stock"
)
RANDOM = "dare_linear,dare_ties,della,della_linear"
METHODS = f"{EXACT},{RANDOM}"


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_our_merges_agree_with_mergekit(dtype: str) -> None:
    command = [sys.executable, "-m", "benchmarks.merge", "--methods", METHODS, "--dtype", dtype]
    options = ["--sources", "3", "--repeats", "1", "--parameters", "2000000", "--format", "json"]
    done = subprocess.run([*command, *options], capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr
    rows = {row["method"]: row for row in json.loads(done.stdout)["rows"]}
    assert set(rows) == set(METHODS.split(","))
    assert all(rows[method]["max_diff"] is not None for method in EXACT.split(","))
