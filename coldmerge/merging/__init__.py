"""Merge methods, and the engine that streams blocks of task vectors through them."""

from coldmerge.core.deltas import Tuned
from coldmerge.merging.block import Block, View
from coldmerge.merging.engine import Job
from coldmerge.merging.folder import merge
from coldmerge.merging.merger import Cut, Merger, PerInput, Scope, Space
from coldmerge.merging.pool import Pool
from coldmerge.merging.recipe import Recipe, Setting, Uniform, uniform
from coldmerge.merging.registry import merger, merger_class, method_names
from coldmerge.merging.sources import Input, Source

__all__ = [
    "Block",
    "Cut",
    "Input",
    "Job",
    "Merger",
    "PerInput",
    "Pool",
    "Recipe",
    "Scope",
    "Setting",
    "Source",
    "Space",
    "Tuned",
    "Uniform",
    "View",
    "merge",
    "merger",
    "merger_class",
    "method_names",
    "uniform",
]
