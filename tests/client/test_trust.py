"""What the client believes about a release before it writes a byte of it."""

from __future__ import annotations

import pytest

from coldmerge.core.digests import Content
from coldmerge.core.documents import FileEntry, TensorEntry
from coldmerge.core.errors import IntegrityError
from coldmerge.wire.convert import put_content
from coldmerge.wire.v1 import models_pb2
from coldmerge_client.trust import checked_content

TENSOR = TensorEntry(name="w", dtype="F32", shape=(2,), sha256="a" * 64, nbytes=8)
CONFIG = FileEntry(path="config.json", size=2, sha256="b" * 64)


def release(tensors: list[TensorEntry], files: list[FileEntry]) -> models_pb2.Release:
    message = models_pb2.Release(model="m")
    put_content(Content(tuple(tensors), tuple(files)), message)
    return message


def test_a_sound_listing_is_taken() -> None:
    files = [FileEntry(path="1_Pooling/config.json", size=1, sha256="c" * 64), CONFIG]
    content = checked_content(release([TENSOR], files))
    assert [entry.path for entry in content.files] == [entry.path for entry in files]


@pytest.mark.parametrize(
    "path",
    [
        "modeling_evil.py",
        "pytorch_model.bin",
        "model.safetensors",
        "model.safetensors.index.json",
        "coldmerge-release.json",
        "a/b/config.json",
        "1_Pooling/evil.py",
        "config.json.py",
    ],
)
def test_files_that_no_release_may_hold(path: str) -> None:
    with pytest.raises(IntegrityError) as error:
        checked_content(release([TENSOR], [FileEntry(path=path, size=1, sha256="b" * 64)]))
    assert error.value.code == "release.forbidden_content"


@pytest.mark.parametrize("path", ["../evil", "/etc/passwd", "a/../../b", ".hidden"])
def test_paths_that_leave_the_folder(path: str) -> None:
    message = release([TENSOR], [CONFIG])
    message.files[0].path = path
    with pytest.raises(IntegrityError):
        checked_content(message)


@pytest.mark.parametrize(
    "change",
    [{"dtype": "F7"}, {"nbytes": 12}, {"shape": (3,)}, {"shape": (2**20, 2**20)}],
)
def test_tensors_that_cannot_be(change: dict[str, object]) -> None:
    with pytest.raises(IntegrityError):
        checked_content(release([TENSOR.model_copy(update=change)], []))


def test_one_name_twice() -> None:
    with pytest.raises(IntegrityError):
        checked_content(release([TENSOR, TENSOR], []))
    with pytest.raises(IntegrityError):
        checked_content(release([TENSOR], [CONFIG, CONFIG]))


def test_a_listing_with_another_digest() -> None:
    message = release([TENSOR], [CONFIG])
    message.tensors[0].sha256 = "d" * 64
    with pytest.raises(IntegrityError) as error:
        checked_content(message)
    assert error.value.code == "release.wrong_digest"
