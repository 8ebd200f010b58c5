"""Plans: merges described in YAML with mergekit's words."""

from coldmerge.merging.plan.inputs import Opened
from coldmerge.merging.plan.plan import Plan, load
from coldmerge.merging.plan.run import run

__all__ = ["Opened", "Plan", "load", "run"]
