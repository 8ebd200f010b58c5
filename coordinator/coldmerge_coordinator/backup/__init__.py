"""Keeping a coordinator elsewhere: `make` a backup, `restore` it, `verify` what is there.

    OUT/backup.json  database/<table>.jsonl  blobs/ab/<sha256>  contributions/<id>.safetensors
        config.yaml  ca/  keys/

A backup is plain files: rows as JSON lines, so that it moves between SQLite and PostgreSQL,
and blobs by their hash, so that the next backup into the same folder copies what is new.
"""

from __future__ import annotations

from coldmerge_coordinator.backup.checking import Findings, verify
from coldmerge_coordinator.backup.making import Made, make
from coldmerge_coordinator.backup.restoring import restore

__all__ = ["Findings", "Made", "make", "restore", "verify"]
