"""Merge methods, and the engine that streams blocks of task vectors through them."""

from coldmerge.merging.engine import Input, Method, Source, merge, merge_tensor, merged_blocks
from coldmerge.merging.methods import METHODS, method

__all__ = [
    "METHODS",
    "Input",
    "Method",
    "Source",
    "merge",
    "merge_tensor",
    "merged_blocks",
    "method",
]
