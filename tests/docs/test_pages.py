"""The docs say what the program does."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import click
import pytest
import typer.main
import yaml

from coldmerge import __version__
from coldmerge.cli.app import app
from coldmerge.rounds.policy import (
    CoefficientsPolicy,
    ContinuousPolicy,
    GatePolicy,
    MergePolicy,
    RoundTemplate,
    Schedule,
    load_yaml,
)
from coldmerge.screening.policy import ScreeningPolicy
from coldmerge_client.training import TrainConfig

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"


def test_generated_pages_are_fresh() -> None:
    result = subprocess.run(
        [sys.executable, DOCS / "build.py", "--check"], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, f"run `python docs/build.py`: {result.stdout}{result.stderr}"


def test_every_error_has_a_hint_and_a_sentence() -> None:
    page = (DOCS / "errors.md").read_text()
    entries = [line for line in page.splitlines() if line.startswith("  ")]
    assert len(entries) > 40
    for entry in entries:
        sentence, _, hint = entry.strip().rstrip("*").partition(" *")
        assert sentence, entry
        assert hint, f"no hint: {entry}"


def test_the_sample_round_is_a_valid_template() -> None:
    template = load_yaml(DOCS / "samples" / "round.yaml")
    assert template.schedule is not None
    written = yaml.safe_load((DOCS / "samples" / "round.yaml").read_text())
    assert set(written) | {"mode", "continuous"} == set(RoundTemplate.model_fields)


def test_the_sample_of_continuous_rounds_is_a_valid_template() -> None:
    path = DOCS / "samples" / "continuous.yaml"
    rule = load_yaml(path).continuous
    assert rule is not None
    assert set(yaml.safe_load(path.read_text())["continuous"]) == set(type(rule).model_fields)


def test_the_sample_of_learned_coefficients_is_a_valid_template() -> None:
    path = DOCS / "samples" / "coefficients.yaml"
    rules = load_yaml(path).merge.coefficients
    assert rules is not None
    written = yaml.safe_load(path.read_text())["merge"]["coefficients"]
    assert set(written) == set(type(rules).model_fields)


@pytest.mark.parametrize(
    ("prefix", "policy"),
    [
        ("", RoundTemplate),
        ("merge.coefficients.", CoefficientsPolicy),
        ("continuous.", ContinuousPolicy),
        ("gate.", GatePolicy),
        ("merge.", MergePolicy),
        ("schedule.", Schedule),
        ("screening.", ScreeningPolicy),
    ],
)
def test_every_policy_key_is_documented(prefix: str, policy: type[RoundTemplate]) -> None:
    page = (DOCS / "rounds.md").read_text()
    groups = {"merge", "schedule"}
    missing = [
        key for key in policy.model_fields if key not in groups and f"`{prefix}{key}`" not in page
    ]
    assert missing == []


def test_changelog_names_this_version() -> None:
    assert f"## {__version__} " in (ROOT / "CHANGELOG.md").read_text()


def test_every_training_key_is_documented() -> None:
    page = (DOCS / "training.md").read_text()
    assert [key for key in TrainConfig.model_fields if f"`{key}`" not in page] == []


def test_the_sample_training_configuration_is_valid() -> None:
    config = TrainConfig.load(DOCS / "samples" / "train.yaml")
    assert config.data.columns.text == "note"


def command_tree() -> dict[str, set[str]]:
    root = typer.main.get_command(app)
    assert isinstance(root, click.Group)
    return {
        name: _verbs(command) if isinstance(command, click.Group) else set()
        for name, command in root.commands.items()
    }


def _verbs(group: click.Group) -> set[str]:
    return {*group.commands, *([""] if group.invoke_without_command else [])}


@pytest.mark.parametrize(
    "page",
    [
        "README.md",
        "docs/audit.md",
        "docs/deploy.md",
        "docs/errors.md",
        "docs/leaving.md",
        "docs/merging.md",
        "docs/replicas.md",
        "docs/rounds.md",
        "docs/screening.md",
        "docs/security.md",
        "docs/storage.md",
        "docs/training.md",
    ],
)
def test_every_command_that_is_named_exists(page: str) -> None:
    tree = command_tree()
    named = re.findall(r"(?:`|\n|: )coldmerge ([a-z]+)(?: ([a-z]+))?", (ROOT / page).read_text())
    unknown = [
        f"{verb} {word}"
        for verb, word in named
        if verb not in tree or (tree[verb] and word not in tree[verb])
    ]
    assert named
    assert unknown == []


def test_every_promise_names_tests_that_exist() -> None:
    page = (DOCS / "security.md").read_text()
    named = re.findall(r"`(tests/[\w/.]+)`", page)
    assert len(named) > 8
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_every_page_that_a_hint_names_exists() -> None:
    sources = (
        path
        for part in ("coldmerge", "coordinator", "client")
        for path in (ROOT / part).rglob("*.py")
    )
    named = {page for path in sources for page in re.findall(r"docs/[\w/]+\.md", path.read_text())}
    assert named
    assert [page for page in sorted(named) if not (ROOT / page).is_file()] == []
