"""The `coldmerge` command: one file per group of verbs."""

from __future__ import annotations

from coldmerge.cli.app import main

__all__ = ["main"]
