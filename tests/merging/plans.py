"""Plans over tiny models, run in the test's folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from coldmerge.core.errors import ColdmergeError
from coldmerge.merging.plan import Opened, load, run
from tests.merging.models import Tensors, stored, write_plan


def plan_text(*models: str, method: str = "task_arithmetic", extra: str = "") -> str:
    listed = "".join(f"  - model: {model}\n" for model in models)
    base = "" if method == "linear" else "base_model: base\n"
    return f"merge_method: {method}\n{base}models:\n{listed}{extra}"


def merged(tmp_path: Path, text: str, **options: Any) -> tuple[Tensors, list[str]]:
    plan = load(write_plan(tmp_path, text))
    with Opened(plan, **options) as opened:
        run(plan, opened, tmp_path / "out", threads=2)
        notes = opened.notes
    return stored(tmp_path / "out"), notes


def refused(tmp_path: Path, text: str, **options: Any) -> ColdmergeError:
    with pytest.raises(ColdmergeError) as caught:
        merged(tmp_path, text, **options)
    assert not (tmp_path / "out").exists()
    return caught.value
