"""What a simulation cannot do is said before it begins."""

from __future__ import annotations

import pytest

from coldmerge.core.errors import ConfigError
from coldmerge_simulation.config import SimulationConfig


def test_continuous_rounds_are_refused_by_name() -> None:
    with pytest.raises(ConfigError, match=r"round\.continuous is not simulated yet"):
        SimulationConfig.parse({"round": {"min_contributions": 2, "continuous": {}}})
