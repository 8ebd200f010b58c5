"""Between the library's values and the messages that carry them."""

from __future__ import annotations

from datetime import UTC, datetime

from google.protobuf.timestamp_pb2 import Timestamp

from coldmerge.core.digests import Content
from coldmerge.core.documents import FileEntry, Signed, TensorEntry
from coldmerge.core.errors import IntegrityError
from coldmerge.wire.v1 import common_pb2, models_pb2


def signed_to_proto(signed: Signed) -> common_pb2.SignedDocument:
    """A signed document as its message."""
    return common_pb2.SignedDocument(document=signed.document, signature=signed.signature)


def signed_from_proto(message: common_pb2.SignedDocument) -> Signed:
    """The signed document in a message; nothing is verified yet."""
    return Signed(message.document, message.signature)


def timestamp(moment: datetime) -> Timestamp:
    """A time with zone as its message."""
    message = Timestamp()
    message.FromDatetime(moment)
    return message


def instant(message: Timestamp) -> datetime:
    """The UTC time in a message."""
    return message.ToDatetime(UTC)


def tensor_to_proto(entry: TensorEntry) -> common_pb2.Tensor:
    """A tensor's entry as its message."""
    return common_pb2.Tensor(
        name=entry.name,
        dtype=entry.dtype,
        shape=list(entry.shape),
        sha256=entry.sha256,
        nbytes=entry.nbytes,
    )


def file_to_proto(entry: FileEntry) -> common_pb2.File:
    """A file's entry as its message."""
    return common_pb2.File(path=entry.path, size=entry.size, sha256=entry.sha256)


def put_content(content: Content, release: models_pb2.Release) -> None:
    """Write the listing of `content` and its digest into a release message."""
    release.content_digest = content.digest
    release.tensors.extend(tensor_to_proto(entry) for entry in content.tensors)
    release.files.extend(file_to_proto(entry) for entry in content.files)


def content_of(release: models_pb2.Release) -> Content:
    """The content a release message lists, checked against the digest it claims.

    Raises:
        IntegrityError: the listing is malformed, or has another digest.
    """
    content = Content.from_json(
        {
            "tensors": [
                {
                    "name": tensor.name,
                    "dtype": tensor.dtype,
                    "shape": list(tensor.shape),
                    "sha256": tensor.sha256,
                    "nbytes": tensor.nbytes,
                }
                for tensor in release.tensors
            ],
            "files": [
                {"path": file.path, "size": file.size, "sha256": file.sha256}
                for file in release.files
            ],
        }
    )
    if content.digest != release.content_digest:
        raise IntegrityError(
            "release.wrong_digest",
            "The listing of a release does not have the digest the release claims.",
            expected=release.content_digest,
            got=content.digest,
            hint="Do not use this release; ask the coordinator's admin.",
            model=release.model,
            number=release.number,
        )
    return content
