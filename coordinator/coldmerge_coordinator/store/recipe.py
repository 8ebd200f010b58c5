"""What a release record says about how its round merged."""

from __future__ import annotations

from coldmerge.rounds.policy import RoundPolicy
from coldmerge_coordinator.store import screening, trials
from coldmerge_coordinator.store.models import Round
from coldmerge_coordinator.store.releases import Recipe


def recipe_of(policy: RoundPolicy, row: Round) -> Recipe:
    """What a release record says about how a round merged."""
    merge = policy.merge
    found: Recipe = {"method": merge.method, "weights": merge.weights, "mode": policy.mode}
    found |= {f"parameters.{key}": value for key, value in merge.parameters.items()}
    if merge.outer["method"] != "none":
        found |= {f"outer.{key}": value for key, value in merge.outer.items()}
    return found | screening.in_recipe(row, policy) | trials.note(row)
