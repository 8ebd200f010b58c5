"""The outbox: contributions between "trained" and "acknowledged", safe against crashes.

`outbox/<id>/` holds manifest.json and manifest.sig (what was signed), task_vector.safetensors
(whose data section is the payload) and state.json. A folder appears by one rename when it is
complete, so a crash while preparing leaves nothing to send. States:

    prepared → sending → sent       (the task vector is removed, the receipt stays)
    prepared | sending → refused    (with the reason; nothing more is sent)
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

from coldmerge.core.documents import Manifest, Receipt, Signed, verify
from coldmerge.core.errors import IntegrityError, ManifestError, NotFoundError
from coldmerge.core.files import fsync_path, make_folder
from coldmerge.core.ids import new_id
from coldmerge_client.files import read_json, write_atomic, write_json
from coldmerge_client.home import Home

State = Literal["prepared", "sending", "sent", "refused"]
PAYLOAD = "task_vector.safetensors"


@dataclass(frozen=True)
class OutboxEntry:
    """One contribution on this machine. `kept_home` pairs names with the reason."""

    folder: Path
    signed: Signed
    manifest: Manifest
    state: State
    kept_home: tuple[tuple[str, str], ...] = ()
    unchanged: int = 0
    approved: bool = False
    logged: bool = False
    reason: str | None = None
    receipt: Receipt | None = None

    @property
    def id(self) -> str:
        """Name of the entry's folder."""
        return self.folder.name

    @property
    def payload(self) -> Path:
        """The task vector; gone once the contribution is sent or refused."""
        return self.folder / PAYLOAD

    @property
    def pending(self) -> bool:
        """Whether there is still something to send."""
        return self.state in ("prepared", "sending")


class Outbox:
    """The entries of one home."""

    def __init__(self, home: Home) -> None:
        self._home = home
        self._folder = home.outbox

    def draft(self) -> Path:
        """A fresh folder to build an entry in; `commit` makes it an entry."""
        folder = self._folder / f".draft-{new_id('contribution')}"
        make_folder(folder)
        return folder

    def commit(
        self,
        draft: Path,
        signed: Signed,
        *,
        kept_home: tuple[tuple[str, str], ...],
        unchanged: int,
    ) -> OutboxEntry:
        """Turn a draft that holds its task vector into an entry, in one step."""
        write_atomic(draft / "manifest.json", signed.document)
        write_atomic(draft / "manifest.sig", signed.signature)
        write_json(
            draft / "state.json",
            {
                "state": "prepared",
                "kept_home": [list(pair) for pair in kept_home],
                "unchanged": unchanged,
                "approved": False,
                "logged": False,
                "reason": None,
            },
        )
        final = self._folder / draft.name.removeprefix(".draft-")
        draft.rename(final)
        fsync_path(self._folder)
        fsync_path(self._folder.parent)  # whoever made the outbox may have been killed
        return self.get(final.name)

    def tidy(self) -> None:
        """Remove what a crash left behind. Call it while holding the outbox."""
        for draft in self._folder.glob(".draft-*"):
            shutil.rmtree(draft)
        for name in self._names():
            payload = self._folder / name / PAYLOAD
            if payload.exists() and not self.get(name).pending:
                payload.unlink(missing_ok=True)  # its sender may be just about to

    def get(self, entry: str) -> OutboxEntry:
        """One entry, its signature checked.

        Raises:
            NotFoundError: there is no such entry.
            ManifestError: the manifest on disk is not what this machine signed.
            IntegrityError: the state file is damaged.
        """
        folder = self._folder / entry
        if entry.startswith(".") or not (folder / "state.json").exists():
            raise NotFoundError(
                "outbox.no_such_entry",
                "There is no such contribution in the outbox.",
                hint="List them with `coldmerge status`.",
                entry=entry,
            )
        signed = _read_signed(folder, "manifest")
        return _with_state(
            OutboxEntry(folder, signed, self._ours(signed), "prepared"),
            read_json(folder / "state.json"),
            self._receipt(folder),
        )

    def _ours(self, signed: Signed) -> Manifest:
        """The manifest, if a key of this machine signed it: today's, or one before it."""
        today, *retired = self._home.identities()
        for key in retired:
            with suppress(ManifestError):
                return verify(signed, Manifest, key)
        return verify(signed, Manifest, today)

    def _receipt(self, folder: Path) -> Receipt | None:
        if not (folder / "receipt.json").exists():
            return None
        return self._home.keyring().verify(_read_signed(folder, "receipt"), Receipt)

    def entries(self) -> tuple[OutboxEntry, ...]:
        """All entries, oldest first, each opened and its signature checked."""
        return self._opened(self._names())

    def pending(self) -> tuple[OutboxEntry, ...]:
        """The entries that are still to be sent, oldest first. Others are not even opened."""
        names = (name for name in self._names() if not self._is_over(name))
        return tuple(entry for entry in self._opened(names) if entry.pending)

    def for_round(self, round_id: str) -> OutboxEntry | None:
        """The newest entry for a round that was not refused."""
        fitting = [
            entry
            for entry in self.naming(round_id)
            if entry.manifest.round == round_id and entry.state != "refused"
        ]
        return fitting[-1] if fitting else None

    def naming(self, identifier: str) -> tuple[OutboxEntry, ...]:
        """The entries whose manifest says `identifier` somewhere, oldest first.

        Others are not opened: to check the signatures of years takes long.
        """
        said = identifier.encode()
        return self._opened(
            name
            for name in self._names()
            if said in (self._folder / name / "manifest.json").read_bytes()
        )

    def _is_over(self, name: str) -> bool:
        return read_json(self._folder / name / "state.json").get("state") in ("sent", "refused")

    def _names(self) -> list[str]:
        folders = self._folder.iterdir() if self._folder.is_dir() else ()
        return [folder.name for folder in folders if not folder.name.startswith(".")]

    def _opened(self, names: Iterable[str]) -> tuple[OutboxEntry, ...]:
        found = [self.get(name) for name in names]
        return tuple(sorted(found, key=lambda entry: (entry.manifest.created_at, entry.id)))

    def mark(self, entry: OutboxEntry, **changes: Any) -> OutboxEntry:
        """Store new values of `state`, `approved`, `logged` or `reason`, durably."""
        state = {**read_json(entry.folder / "state.json"), **changes}
        write_json(entry.folder / "state.json", state)
        return _with_state(entry, state, entry.receipt)

    def acknowledge(self, entry: OutboxEntry, signed: Signed, receipt: Receipt) -> OutboxEntry:
        """Keep the receipt, drop the task vector."""
        write_atomic(entry.folder / "receipt.sig", signed.signature)
        write_atomic(entry.folder / "receipt.json", signed.document)
        entry = self.mark(replace(entry, receipt=receipt), state="sent")
        entry.payload.unlink(missing_ok=True)
        return entry

    def refuse(self, entry: OutboxEntry, reason: str) -> OutboxEntry:
        """Give the entry up; its manifest and the reason stay."""
        entry = self.mark(entry, state="refused", reason=reason)
        entry.payload.unlink(missing_ok=True)
        return entry


def _read_signed(folder: Path, name: str) -> Signed:
    return Signed((folder / f"{name}.json").read_bytes(), (folder / f"{name}.sig").read_bytes())


def _with_state(
    entry: OutboxEntry, state: Mapping[str, Any], receipt: Receipt | None
) -> OutboxEntry:
    if state.get("state") not in get_args(State):
        raise IntegrityError(
            "outbox.damaged_state",
            "The state of a contribution in the outbox cannot be read.",
            expected=" or ".join(get_args(State)),
            got=state.get("state"),
            hint="Remove its folder and push again.",
            entry=entry.id,
        )
    return replace(
        entry,
        state=state["state"],
        kept_home=tuple((name, reason) for name, reason in state["kept_home"]),
        unchanged=state["unchanged"],
        approved=state["approved"],
        logged=state["logged"],
        reason=state["reason"],
        receipt=receipt,
    )
