"""Adding a model: a Hugging Face folder becomes blobs, an fp32 master and release 0."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from sqlalchemy.exc import IntegrityError

from coldmerge.core.checkpoint import Checkpoint
from coldmerge.core.clock import Clock, SystemClock
from coldmerge.core.digests import Content
from coldmerge.core.documents import FileEntry, TensorEntry
from coldmerge.core.dtypes import FLOATS, blocks, nbytes
from coldmerge.core.errors import CheckpointError, ConfigError, ConflictError
from coldmerge.core.files import CHUNK_BYTES
from coldmerge.core.header import TensorSpec
from coldmerge.core.ids import IDENTIFIER_RULE, is_identifier
from coldmerge.core.names import is_private
from coldmerge.core.progress import Advance, Counter, Progress, silent
from coldmerge.rounds.policy import RoundTemplate
from coldmerge.wire.channel import MAX_DOCUMENT_IN_MESSAGE
from coldmerge.wire.convert import tensor_to_proto
from coldmerge_coordinator import audit
from coldmerge_coordinator.actors import LOCAL_ADMIN
from coldmerge_coordinator.merging.recipes import cautions, resolved
from coldmerge_coordinator.merging.tensor_sink import TensorSink
from coldmerge_coordinator.schedule import next_tick
from coldmerge_coordinator.store import Store, collection
from coldmerge_coordinator.store import releases as release_table
from coldmerge_coordinator.store.blobs import BlobStore
from coldmerge_coordinator.store.models import Model
from coldmerge_coordinator.store.room import check_room

ROOM_BESIDE = 64 * 2**10
"""Bytes of a message for what goes beside the tensors: files, record, metrics."""
_CODE = ("auto_map", "custom_pipelines")


@dataclass(frozen=True)
class Imported:
    """What `add_model` did; `notes` are sentences an admin should read."""

    digest: str
    tensors: int
    shared: int
    nbytes: int
    notes: tuple[str, ...]


def add_model(
    store: Store,
    name: str,
    folder: Path,
    private: Sequence[str] = (),
    template: RoundTemplate | None = None,
    *,
    clock: Clock | None = None,
    progress: Progress = silent,
) -> Imported:
    """Stream a model folder into the store and publish it as release 0.

    Tensors that match `private` patterns stay in the release and are never merged. All
    memory this needs is a block.

    Raises:
        ConfigError: the name, a pattern or the template is wrong.
        CheckpointError: no safetensors, a damaged file, nothing to merge, NaN or infinity.
        ConflictError: there is a model of that name.
        ResourceError: the disk is too small.
    """
    now = (clock or SystemClock()).now()
    chosen = template or RoundTemplate()
    _check_name(name)
    check_template(chosen, now)
    _check_new(store, name)
    checkpoint = Checkpoint.open(folder)
    shared = _shared(checkpoint, private)
    notes = (*_notes(checkpoint, private), *cautions(chosen.merge))
    _check_messages(checkpoint, shared)
    needed = sum(_stored_bytes(spec) for spec in checkpoint.tensors.values())
    check_room(store.blobs.folder, needed, "this model and its fp32 master")
    total = sum(spec.nbytes for spec in checkpoint.tensors.values())
    advance = Counter("import", total, progress).add
    content, masters = _store_content(store.blobs, checkpoint, advance)
    model = Model(
        name=name,
        private_patterns=sorted(set(private)),
        template=chosen.to_json(),
        last_scheduled_at=None,
        created_at=now,
    )
    _publish(store, model, content, masters, now)
    return Imported(content.digest, len(content.tensors), len(shared), total, notes)


def set_template(
    store: Store, name: str, template: RoundTemplate, *, clock: Clock | None = None
) -> tuple[str, ...]:
    """Replace the rules that the model's next rounds open with; its schedule counts from now.

    Gives sentences that an admin should read.

    Raises:
        ConfigError: no such merge method or outer optimizer, not with these parameters, or
            a schedule that never comes due.
        NotFoundError: there is no such model.
    """
    now = (clock or SystemClock()).now()
    check_template(template, now)
    with store.database.write() as session:
        model = release_table.get_model(session, name, lock=True)
        model.template = template.to_json()
        model.last_scheduled_at = now
        audit.append(
            session,
            "model.template_changed",
            LOCAL_ADMIN,
            now,
            ids={"model": name},
            detail={"template_sha256": _template_digest(template)},
        )
    return cautions(template.merge)


def _template_digest(template: RoundTemplate) -> str:
    text = json.dumps(template.to_json(), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _check_name(name: str) -> None:
    if not is_identifier(name):
        raise ConfigError(
            "model.bad_name",
            "A model cannot have that name.",
            expected=IDENTIFIER_RULE,
            got=repr(name[:80]),
            hint="Choose a name such as triage-encoder.",
        )


def check_template(template: RoundTemplate, now: datetime) -> None:
    """Make sure that rounds can be opened and merged by `template`.

    Raises:
        ConfigError: no such merge method or outer optimizer, not with these parameters, or
            a schedule that never comes due.
    """
    resolved(template)
    if template.schedule is not None:
        next_tick(template.schedule.cron, template.schedule.timezone, now)


def _check_new(store: Store, name: str) -> None:
    with store.database.read() as session:
        if session.get(Model, name) is not None:
            raise _exists(name)


def _exists(name: str) -> ConflictError:
    return ConflictError(
        "model.exists",
        f"There is a model {name} already.",
        hint="Choose another name; a new version of a model is made by a round.",
        model=name,
    )


def _shared(checkpoint: Checkpoint, private: Sequence[str]) -> list[str]:
    floats = [name for name, spec in checkpoint.tensors.items() if spec.dtype in FLOATS]
    shared = [name for name in floats if not is_private(name, private)]
    if not shared:
        raise CheckpointError(
            "model.nothing_to_merge",
            "The model has no tensor that contributors could improve together.",
            expected="at least one F32, F16 or BF16 tensor that no private pattern matches",
            got=f"{len(floats)} float tensors, all private" if floats else "no float tensor",
            hint="Narrow --private, or save the model in float32, bfloat16 or float16.",
            folder=checkpoint.folder,
        )
    return shared


def _notes(checkpoint: Checkpoint, private: Sequence[str]) -> tuple[str, ...]:
    notes = [
        f"The private pattern {pattern!r} matches no tensor of this folder: it only guards "
        "what contributors add, such as their heads."
        for pattern in sorted(set(private))
        if not any(is_private(name, [pattern]) for name in checkpoint.tensors)
    ]
    if not (checkpoint.folder / "config.json").is_file():
        notes.append("There is no config.json: transformers will not load this model by itself.")
    elif any(key in checkpoint.config for key in _CODE):
        notes.append("config.json names Python code: releases carry none, so it will not load.")
    return tuple(notes)


def _check_messages(checkpoint: Checkpoint, shared: Sequence[str]) -> None:
    """A release's list of tensors travels in one message, and so does a manifest's."""
    entries = {
        name: TensorEntry(
            name=name, dtype=spec.dtype, shape=spec.shape, sha256="0" * 64, nbytes=spec.nbytes
        )
        for name, spec in checkpoint.tensors.items()
    }
    listing = sum(tensor_to_proto(entry).ByteSize() + 4 for entry in entries.values())
    manifest = sum(len(entries[name].canonical()) for name in shared)
    room = MAX_DOCUMENT_IN_MESSAGE - ROOM_BESIDE
    if max(listing, manifest) > room:
        raise CheckpointError(
            "model.too_many_tensors",
            "The model has more tensors than one message can list.",
            expected=f"a list of at most {room} bytes: about {room // 200} tensors",
            got=f"{max(listing, manifest)} bytes for {len(entries)} tensors",
            hint="Save it with fewer, larger tensors: the experts of a layer stacked in one.",
            folder=checkpoint.folder,
        )


def _stored_bytes(spec: TensorSpec) -> int:
    master = nbytes("F32", spec.shape) if spec.dtype in FLOATS and spec.dtype != "F32" else 0
    return spec.nbytes + master


def _store_content(
    blobs: BlobStore, checkpoint: Checkpoint, advance: Advance
) -> tuple[Content, dict[str, str]]:
    tensors, masters = [], {}
    for name, spec in checkpoint.tensors.items():
        if spec.dtype in FLOATS:
            sha256, masters[name] = _store_float(blobs, checkpoint, spec, advance)
        else:
            sha256 = _store_buffer(blobs, checkpoint, spec, advance)
        tensors.append(
            TensorEntry(
                name=name, dtype=spec.dtype, shape=spec.shape, sha256=sha256, nbytes=spec.nbytes
            )
        )
    files = []
    for path in checkpoint.files():
        sha256, size = blobs.put_file(checkpoint.folder / path)
        files.append(FileEntry(path=path.as_posix(), size=size, sha256=sha256))
    return Content(tuple(tensors), tuple(sorted(files, key=lambda entry: entry.path))), masters


def _store_float(
    blobs: BlobStore, checkpoint: Checkpoint, spec: TensorSpec, advance: Advance
) -> tuple[str, str]:
    with TensorSink(blobs, spec.name, spec.dtype) as sink:
        for start, stop in blocks(spec.size):
            block = checkpoint.block(spec.name, start, stop)
            sink.write(block)
            advance(nbytes(spec.dtype, block.shape))
        stored = sink.commit()
    return stored.published, stored.master


def _store_buffer(
    blobs: BlobStore, checkpoint: Checkpoint, spec: TensorSpec, advance: Advance
) -> str:
    with blobs.writer() as writer:
        for start, stop in blocks(spec.nbytes, CHUNK_BYTES):
            chunk = checkpoint.raw(spec.name, start, stop)
            writer.write(bytes(chunk))
            advance(len(chunk))
        return writer.commit()[0]


def _publish(
    store: Store, model: Model, content: Content, masters: dict[str, str], now: datetime
) -> None:
    parts = {entry.sha256 for entry in content.tensors} | {file.sha256 for file in content.files}
    seen = collection.look(store.database, store.blobs, sorted(parts.union(masters.values())))
    with store.database.write() as session:
        if session.get(Model, model.name) is not None:
            raise _exists(model.name)
        try:
            with session.begin_nested():
                session.add(model)
        except IntegrityError as error:  # another has added it this instant
            raise _exists(model.name) from error
        digests = release_table.add_content(session, content, masters, now)
        collection.confirm(session, store.blobs, seen)
        audit.append(
            session,
            "model.added",
            LOCAL_ADMIN,
            now,
            ids={"model": model.name, "content": digests[0]},
        )
        release_table.publish(
            session, store.signer, model.name, *digests, now, recipe={"method": "import"}
        )
