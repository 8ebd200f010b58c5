"""`coldmerge demo`."""

from __future__ import annotations

import typer


def register(app: typer.Typer) -> None:
    """Add these verbs to the root command."""
