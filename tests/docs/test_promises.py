"""docs/promises.md: every row names a command that exists, with options that it takes."""

from __future__ import annotations

import io
import re
import runpy
import shlex
import subprocess
import sys
from contextlib import redirect_stdout, suppress
from functools import cache
from pathlib import Path

import click
import pytest
import typer.main

from coldmerge.cli.app import app

ROOT = Path(__file__).resolve().parents[2]


def commands() -> list[str]:
    """The commands in the table's second column."""
    rows = re.findall(r"^\| (.+?) \| (.+?) \|", (ROOT / "docs/promises.md").read_text(), re.M)
    return [command for _, cell in rows for command in re.findall(r"`([^`]+)`", cell)]


@cache
def options_of(program: str) -> str:
    """What `python -m ... --help` prints; in this process, which has imported most of it."""
    said = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(said):
        patch.setattr(sys, "argv", [program, "--help"])
        with suppress(SystemExit):  # what failed has said nothing about options
            runpy.run_module(program, run_name="__main__", alter_sys=True)
    return said.getvalue()


@cache
def options_of_pytest() -> str:
    """With those that tests/crash adds."""
    command = [sys.executable, "-m", "pytest", "tests/crash", "--help"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout


def check_pytest(words: list[str]) -> None:
    paths = [word for word in words if word.startswith("tests/")]
    assert paths
    for path in paths:
        file, _, name = path.partition("::")
        assert (ROOT / file).exists(), path
        assert not name or f"def {name}(" in (ROOT / file).read_text(), path
    known = options_of_pytest()
    for word in words:
        if word.startswith("--"):
            assert re.search(rf"{re.escape(word.partition('=')[0])}\b", known), word


def check_make(words: list[str]) -> None:
    assert f"\n{words[0]}: " in (ROOT / "Makefile").read_text()
    for word in words[1:]:
        assert word.partition("=")[0] in (ROOT / "Makefile").read_text(), word


def check_module(words: list[str]) -> None:
    known = options_of(words[0])
    for word in words[1:]:
        if word.startswith("--"):
            assert word in known, word


def check_coldmerge(words: list[str]) -> None:
    command: click.Command = typer.main.get_command(app)
    while isinstance(command, click.Group):
        assert words[0] in command.commands, words
        command = command.commands[words.pop(0)]
    known = {name for parameter in command.params for name in parameter.opts}
    assert {word for word in words if word.startswith("--")} <= known


@pytest.mark.filterwarnings("ignore:.*found in sys.modules after import:RuntimeWarning")
@pytest.mark.parametrize("command", commands())
def test_every_command_exists(command: str) -> None:
    words = shlex.split(command)
    if words[0] == "pytest":
        check_pytest(words[1:])
    elif words[0] == "make":
        check_make(words[1:])
    elif words[:2] == ["python", "-m"]:
        check_module(words[2:])
    else:
        assert words[0] == "coldmerge"
        check_coldmerge(words[1:])


def test_there_are_promises() -> None:
    assert len(commands()) >= 20
