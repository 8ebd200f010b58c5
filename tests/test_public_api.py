from __future__ import annotations

import subprocess
import sys

import pytest

import coldmerge


def test_all_is_sorted_and_each_name_exists() -> None:
    assert coldmerge.__all__ == sorted(coldmerge.__all__)
    assert dir(coldmerge) == coldmerge.__all__
    for name in coldmerge.__all__:
        assert getattr(coldmerge, name) is not None
    with pytest.raises(AttributeError, match="nothing"):
        _ = coldmerge.nothing


def test_every_public_callable_has_a_docstring() -> None:
    for name in coldmerge.__all__:
        assert getattr(coldmerge, name).__doc__


@pytest.mark.parametrize("names", [[], ["extract", "merge", "Checkpoint"]])
def test_the_import_is_light(names: list[str]) -> None:
    """No torch, no server, no terminal; and before first use not even numpy."""
    script = (
        "import sys, coldmerge\n"
        f"for name in {names!r}: getattr(coldmerge, name)\n"
        "print(*sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], check=True, capture_output=True, text=True
    )
    loaded = {module.partition(".")[0] for module in done.stdout.split()}
    assert not loaded & {
        "torch",
        "transformers",
        "peft",
        "sklearn",
        "pandas",
        "grpc",
        "sqlalchemy",
        "typer",
        "rich",
    }
    assert names or "numpy" not in loaded
