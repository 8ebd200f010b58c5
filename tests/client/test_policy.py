from __future__ import annotations

from pathlib import Path

import pytest

from coldmerge.core.errors import ConfigError
from coldmerge_client.policy import SendPolicy


def test_without_a_file_the_defaults_hold(tmp_path: Path) -> None:
    assert SendPolicy.load(tmp_path / "policy.yaml") == SendPolicy()


def test_an_empty_file_changes_nothing(tmp_path: Path) -> None:
    (tmp_path / "policy.yaml").write_text("# nothing yet\n")
    assert SendPolicy.load(tmp_path / "policy.yaml") == SendPolicy()


def test_a_file_is_read(tmp_path: Path) -> None:
    (tmp_path / "policy.yaml").write_text(
        "require_approval: true\nprivate: ['encoder.layer.11.*']\n"
        "encoding: bf16\nmax_bytes: 1000\nmetrics: false\n"
    )
    found = SendPolicy.load(tmp_path / "policy.yaml")
    assert found == SendPolicy(
        require_approval=True,
        private=("encoder.layer.11.*",),
        encoding="bf16",
        max_bytes=1000,
        metrics=False,
    )


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ("require_aproval: true", "require_aproval"),
        ("encoding: int3", "encoding"),
        ("max_bytes: 0", "max_bytes"),
        ("private: [", "private"),
        ("- a\n- b", "valid dictionary"),
    ],
)
def test_a_wrong_file_stops_everything(tmp_path: Path, content: str, named: str) -> None:
    (tmp_path / "policy.yaml").write_text(content)
    with pytest.raises(ConfigError) as error:
        SendPolicy.load(tmp_path / "policy.yaml")
    assert named in str(error.value)
    assert error.value.code == "policy.bad_file"


def test_narrowing_never_loosens_approval() -> None:
    strict = SendPolicy(require_approval=True)
    assert strict.narrowed().require_approval
    assert SendPolicy().narrowed(require_approval=True).require_approval
    assert SendPolicy().narrowed(encoding="bf16").encoding == "bf16"
