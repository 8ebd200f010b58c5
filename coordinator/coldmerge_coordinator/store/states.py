"""What outer optimizers remember between rounds: which blobs, and how many steps."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from datetime import datetime
from typing import Any

from sqlalchemy.orm import Session

from coldmerge.core import dtypes
from coldmerge.core.digests import Content
from coldmerge.core.errors import NotFoundError
from coldmerge.core.merkle import merkle_root
from coldmerge_coordinator.store import models
from coldmerge_coordinator.store.releases import insert_missing, register


@dataclass(frozen=True)
class OuterState:
    """The state after `steps` steps of the optimizer `method`.

    `slots`: slot → tensor name → sha256 of its fp32 blob. A tensor that is missing has what
    the optimizer starts with.
    """

    method: str
    steps: int = 0
    slots: Mapping[str, Mapping[str, str]] = field(default_factory=dict)

    @property
    def digest(self) -> str:
        """Merkle root over method and steps, then the blobs by slot and tensor name."""
        head = {"method": self.method, "steps": self.steps, "type": "coldmerge.state/1"}
        leaves = [_leaf(head)]
        for slot in sorted(self.slots):
            for name, sha256 in sorted(self.slots[slot].items()):
                tensor = {"name": name, "sha256": sha256, "slot": slot}
                leaves.append(_leaf({**tensor, "type": "coldmerge.state_tensor/1"}))
        return merkle_root(leaves)

    @property
    def names(self) -> frozenset[str]:
        """The tensors that the optimizer has moved."""
        return frozenset[str]().union(*self.slots.values())


def _leaf(body: dict[str, Any]) -> bytes:
    return json.dumps(body, sort_keys=True, separators=(",", ":")).encode("ascii")


def add_state(session: Session, state: OuterState, content: Content, now: datetime) -> str:
    """Write down a state and its blobs, which must be durable already: its digest.

    `content` has the shapes of the tensors.
    """
    sizes = {
        sha256: dtypes.nbytes("F32", content.by_name[name].shape)
        for tensors in state.slots.values()
        for name, sha256 in tensors.items()
    }
    register(session, sizes, public=False, now=now)
    row = {"digest": state.digest, "document": asdict(state), "created_at": now}
    insert_missing(session, models.OuterState, [row])
    return state.digest


def get_state(session: Session, digest: str) -> OuterState:
    """The state of that digest.

    Raises:
        NotFoundError: there is none.
    """
    row = session.get(models.OuterState, digest)
    if row is None:
        raise NotFoundError(
            "state.unknown",
            "Nothing here has that state digest.",
            got=digest,
            hint="The database is incomplete: restore it from a backup.",
        )
    return OuterState(**row.document)
