"""Merge methods, and the engine that streams blocks of task vectors through them."""

from coldmerge.merging.engine import Input, Merger, Source, merge, merge_tensor, merged_blocks
from coldmerge.merging.methods import MERGERS, merger

__all__ = [
    "MERGERS",
    "Input",
    "Merger",
    "Source",
    "merge",
    "merge_tensor",
    "merged_blocks",
    "merger",
]
