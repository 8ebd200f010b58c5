"""Values and their messages."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta, timezone

import pytest

from coldmerge.core.digests import Content
from coldmerge.core.documents import FileEntry, Signed, TensorEntry
from coldmerge.core.errors import IntegrityError
from coldmerge.wire import convert
from coldmerge.wire.v1 import models_pb2

CONTENT = Content(
    tensors=tuple(
        TensorEntry(name=name, dtype="F32", shape=(2, 3), sha256=name * 64, nbytes=24)
        for name in ("a", "b")
    ),
    files=(FileEntry(path="config.json", size=2, sha256="c" * 64),),
)


def _message() -> models_pb2.Release:
    message = models_pb2.Release(model="m")
    convert.put_content(CONTENT, message)
    return message


def test_content_there_and_back() -> None:
    assert convert.content_of(_message()) == CONTENT


def test_a_listing_that_lies_is_refused() -> None:
    message = _message()
    message.tensors[0].sha256 = "d" * 64
    with pytest.raises(IntegrityError) as caught:
        convert.content_of(message)
    assert caught.value.code == "release.wrong_digest"


@pytest.mark.parametrize("path", ["../../.ssh/config", "/etc/passwd", "a//b", ".bashrc", ""])
def test_a_listing_with_a_path_that_escapes_is_refused(path: str) -> None:
    message = _message()
    message.files[0].path = path
    with pytest.raises(IntegrityError):
        convert.content_of(message)


def test_a_listing_out_of_order_or_with_doubles_is_refused() -> None:
    for order in ((1, 0), (0, 0)):
        message = _message()
        tensors = [message.tensors[index] for index in order]
        release = models_pb2.Release(content_digest=message.content_digest, tensors=tensors)
        with pytest.raises(IntegrityError):
            convert.content_of(release)


def test_times() -> None:
    moment = datetime(2026, 3, 2, 12, 0, 0, 123456, tzinfo=timezone(timedelta(hours=5)))
    assert convert.instant(convert.timestamp(moment)) == moment
    assert convert.instant(convert.timestamp(moment)).tzinfo is UTC


def test_signed_documents() -> None:
    signed = Signed(b"document", b"signature")
    assert convert.signed_from_proto(convert.signed_to_proto(signed)) == signed
