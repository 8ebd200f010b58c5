"""Who the audit log says did it, when no enrolled machine called."""

from __future__ import annotations

COORDINATOR = "coordinator"
"""Deadlines, schedules, merges, the gate: what no caller decided."""

LOCAL_ADMIN = "local admin"
"""Whoever is on the coordinator's own machine: at its socket, or in its folder."""
