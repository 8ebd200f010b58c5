"""coldmerge: organizations improve one shared model together without ever sharing data.

The library reads and writes model folders, extracts what a fine-tune changed, and merges:

    base = coldmerge.Checkpoint.open("base")
    digest = coldmerge.content_entries(base).digest
    change = coldmerge.extract(base, "tuned", "tuned.safetensors", base_digest=digest)
    coldmerge.apply(base, [(change.task_vector, 0.5)], "out")

Names are imported when they are first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from coldmerge.core.algebra import add, apply, negate, scale
    from coldmerge.core.checkpoint import Checkpoint
    from coldmerge.core.checkpoint_writer import CheckpointWriter
    from coldmerge.core.digests import Content, content_digest, content_entries
    from coldmerge.core.errors import ColdmergeError
    from coldmerge.core.extraction import Extraction, extract
    from coldmerge.core.task_vector import TaskVector
    from coldmerge.merging import Input, merge, merger
    from coldmerge_simulation import simulate

__version__ = "0.1.0"

__all__ = [
    "Checkpoint",
    "CheckpointWriter",
    "ColdmergeError",
    "Content",
    "Extraction",
    "Input",
    "TaskVector",
    "__version__",
    "add",
    "apply",
    "content_digest",
    "content_entries",
    "extract",
    "merge",
    "merger",
    "negate",
    "scale",
    "simulate",
]

_HOMES = {
    "coldmerge.core.algebra": ("add", "apply", "negate", "scale"),
    "coldmerge.core.checkpoint": ("Checkpoint",),
    "coldmerge.core.checkpoint_writer": ("CheckpointWriter",),
    "coldmerge.core.digests": ("Content", "content_digest", "content_entries"),
    "coldmerge.core.errors": ("ColdmergeError",),
    "coldmerge.core.extraction": ("Extraction", "extract"),
    "coldmerge.core.task_vector": ("TaskVector",),
    "coldmerge.merging": ("Input", "merge", "merger"),
    "coldmerge_simulation": ("simulate",),
}


def __getattr__(name: str) -> object:
    for home, names in _HOMES.items():
        if name in names:
            return getattr(import_module(home), name)
    raise AttributeError(f"module 'coldmerge' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
