"""What `coldmerge push --dry-run` says of statistics."""

from __future__ import annotations

import json

import pytest

from coldmerge.cli.leaving import print_leaving
from coldmerge.cli.output import Format
from coldmerge_client.prepare import Leaving

LEAVING = Leaving(
    model="triage",
    base_number=3,
    kind="full",
    encoding="fp32",
    tensors=(("layer.weight", 64), ("layer.weight.gram", 64), ("layer.weight.trim", 4)),
    payload_bytes=132,
    norm=1.0,
    numbers={"examples": 7},
    kept_home=(),
    unchanged=0,
    statistics={"gram": 51200, "trim": 0.2},
)


def test_each_statistic_is_named_with_what_it_was_made_of(
    capsys: pytest.CaptureFixture[str],
) -> None:
    print_leaving(LEAVING, Format.TABLE, sent=False)
    said = " ".join(capsys.readouterr().out.split())
    assert "layer.weight.gram 64 B" in said
    assert "Statistic: gram, which activations go together over 51200 tokens" in said
    assert "Statistic: trim, the threshold of each tensor at density 0.2" in said


def test_json_has_them_too(capsys: pytest.CaptureFixture[str]) -> None:
    print_leaving(LEAVING, Format.JSON, sent=False)
    assert json.loads(capsys.readouterr().out)["statistics"] == {"gram": 51200, "trim": 0.2}
