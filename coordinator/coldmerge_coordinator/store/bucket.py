"""An S3 bucket, or a folder of one: whole objects in, whole objects or ranges out.

`put` and `put_file` return when the server has acknowledged the object and its size is the
one that was sent. Every failure is one of our own errors; secrets appear in none.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from coldmerge.core.errors import (
    ColdmergeError,
    ConfigError,
    IntegrityError,
    NotFoundError,
    ResourceError,
    UnavailableError,
)
from coldmerge.core.files import CHUNK_BYTES
from coldmerge_coordinator.config import S3Config

if TYPE_CHECKING:
    from obstore.store import S3Store

PART_BYTES = 8 * 2**20
MAX_PARTS = 9000
PARTS_AT_ONCE = 4
HEADS_AT_ONCE = 16
BEAT_SECONDS = 2.0
_CODE = re.compile(r"<Code>([A-Za-z]{1,64})</Code>")
_STATUS = re.compile(r"status code: (\d{3})")
_FULL = frozenset({"InsufficientStorage", "QuotaExceeded", "XMinioStorageFull", "EntityTooLarge"})
_DENIED = frozenset({"AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch"})


@dataclass(frozen=True)
class StoredObject:
    """What a listing says of an object. `key` starts below the prefix of the bucket."""

    key: str
    size: int
    written: datetime


class Bucket:
    """The objects below `prefix` of a bucket. Safe to share between threads."""

    def __init__(self, name: str, prefix: str, settings: S3Config) -> None:
        self.name, self.prefix = name, prefix
        self._store = _open(name, prefix, settings)

    def check(self) -> None:
        """Make sure that the bucket is there and lets us in.

        Raises:
            ConfigError: it is not, or does not.
            UnavailableError: the server does not answer.
        """
        next(iter(self.list("coldmerge-check")), None)

    def put(self, key: str, data: bytes) -> None:
        """Store an object of a few MiB.

        Raises:
            ColdmergeError: the server did not acknowledge it.
        """
        with _translated(key):
            self._store.put(key, data, use_multipart=False)
        self._confirm(key, len(data))

    def put_file(self, key: str, path: Path, beat: Callable[[], None] | None = None) -> None:
        """Store a file of any size, in parts if it is large. Memory: a few parts.

        `beat` is called every few seconds meanwhile; what it raises is raised when the transfer
        at hand has ended.

        Raises:
            ColdmergeError: the server did not acknowledge it.
        """
        size = path.stat().st_size
        part = max(PART_BYTES, -(-size // MAX_PARTS))
        with ThreadPoolExecutor(1) as thread, _translated(key):
            put = partial(self._store.put, chunk_size=part, max_concurrency=PARTS_AT_ONCE)
            sent = thread.submit(put, key, path)
            while beat is not None and wait([sent], BEAT_SECONDS).not_done:
                beat()
            sent.result()
        self._confirm(key, size)

    def _confirm(self, key: str, size: int) -> None:
        found = self.find(key)
        if found is None or found.size != size:
            raise IntegrityError(
                "s3.not_stored",
                "The S3 server acknowledged an object, and does not have it.",
                expected=f"{size} bytes",
                got="nothing" if found is None else f"{found.size} bytes",
                hint="Check the server's health; what was not stored is sent again.",
                object=key,
            )

    def find(self, key: str) -> StoredObject | None:
        """Size and time of an object; None if there is none."""
        try:
            with _translated(key):
                meta = self._store.head(key)
        except NotFoundError:
            return None
        return StoredObject(key, meta["size"], meta["last_modified"])

    def sizes(self, keys: Sequence[str]) -> dict[str, int]:
        """The sizes of those objects that are there."""
        with ThreadPoolExecutor(HEADS_AT_ONCE) as threads:
            found = [item for item in threads.map(self.find, keys) if item is not None]
        return {item.key: item.size for item in found}

    def chunks(self, key: str) -> Iterator[bytes]:
        """An object's bytes, about 1 MiB at a time.

        Raises:
            NotFoundError: there is none.
            IntegrityError: it ends before its length.
        """
        done = 0
        with _translated(key):
            answer = self._store.get(key)
            size = answer.meta["size"]
            stream = iter(answer.stream(min_chunk_size=CHUNK_BYTES))
        while True:
            with _translated(key):
                data = next(stream, None)
            if data is None:
                break
            done += len(data)
            yield bytes(data)
        if done != size:
            raise _short(key, size, done)

    def read(self, key: str, start: int, stop: int) -> bytes:
        """The bytes [start, stop) of an object.

        Raises:
            NotFoundError: there is none.
            IntegrityError: it is shorter than that.
        """
        if start == stop:
            return b""
        with _translated(key):
            data = bytes(self._store.get_range(key, start=start, end=stop))
        if len(data) != stop - start:
            raise _short(key, stop, start + len(data))
        return data

    def list(self, folder: str) -> Iterator[StoredObject]:
        """The objects below `folder`, in pages."""
        pages = iter(self._store.list(folder, chunk_size=1000))
        while True:
            with _translated(folder):
                page = next(pages, None)
            if page is None:
                return
            for meta in page:
                yield StoredObject(meta["path"], meta["size"], meta["last_modified"])

    def remove(self, keys: Sequence[str]) -> None:
        """Delete objects; those that are not there are no error."""
        if keys:
            with _translated(keys[0]):
                self._store.delete(list(keys))


def _open(name: str, prefix: str, settings: S3Config) -> S3Store:
    try:
        from obstore.store import S3Store
    except ImportError as error:
        raise ConfigError(
            "s3.not_installed",
            "Blobs are to be kept in S3, and the S3 client is not installed.",
            hint="Install it: pip install 'coldmerge[s3]'",
        ) from error
    options: dict[str, Any] = {"region": settings.region}
    if settings.endpoint is not None:
        options["endpoint"] = settings.endpoint
    if settings.access_key_file is not None:
        options["access_key_id"] = _secret(settings.access_key_file)
    if settings.secret_key_file is not None:
        options["secret_access_key"] = _secret(settings.secret_key_file)
    return S3Store(
        name,
        prefix=prefix or None,
        client_options={
            "allow_http": settings.allow_http,
            "timeout": "60s",
            "connect_timeout": "5s",
        },
        retry_config={
            "max_retries": 3,
            "retry_timeout": timedelta(seconds=20),
            "backoff": {"init_backoff": timedelta(milliseconds=200)},
        },
        **options,
    )


def _secret(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            "s3.key_unreadable",
            f"The file of an S3 key cannot be read: {type(error).__name__}.",
            hint="Name files that hold the keys in `s3.access_key_file` and `s3.secret_key_file`.",
            path=path,
        ) from error


@contextmanager
def _translated(key: str) -> Iterator[None]:
    """Turn the client's errors into ours. `FileNotFoundError` is what it raises for a 404."""
    from obstore.exceptions import BaseError

    try:
        yield
    except (BaseError, FileNotFoundError, PermissionError) as error:
        # The client's own text goes no further: it is long, and quotes headers.
        raise our_error(key, type(error).__name__, str(error)) from None


def our_error(key: str, kind: str, text: str) -> ColdmergeError:
    """The error that a failed request becomes. `text`: the client's report of it."""
    code, status = _first(_CODE, text), _first(_STATUS, text)
    for known, make in _KINDS.items():
        if code in known or status in known or kind in known:
            return make(key, code or status or kind)
    return UnavailableError(
        "s3.unavailable",
        f"The S3 server does not answer as it should: {code or status or 'no connection'}.",
        hint="Check `s3.endpoint` in config.yaml and the server; the call may be repeated.",
        object=key,
    )


def _first(pattern: re.Pattern[str], text: str) -> str | None:
    found = pattern.search(text)
    return None if found is None else found[1]


def _no_bucket(_key: str, got: str) -> ColdmergeError:
    return ConfigError(
        "s3.no_bucket",
        "The S3 server has no such bucket.",
        got=got,
        hint="Create the bucket, or correct `blobs` in config.yaml.",
    )


def _denied(key: str, got: str) -> ColdmergeError:
    return ConfigError(
        "s3.denied",
        "The S3 server does not let us in.",
        expected="keys that may list, read, write and delete in the bucket",
        got=got,
        hint="Check the files that `s3` names in config.yaml, or AWS_ACCESS_KEY_ID.",
        object=key,
    )


def _full(key: str, got: str) -> ColdmergeError:
    return ResourceError(
        "s3.full",
        "The S3 server has no room left.",
        got=got,
        hint="Free some space there, or raise the bucket's quota; nothing was lost.",
        object=key,
    )


def _missing(key: str, _got: str) -> ColdmergeError:
    return NotFoundError(
        "s3.no_object",
        "The bucket has no such object.",
        got=key,
        hint="It was removed behind our back: restore it from a backup of the bucket.",
    )


_KINDS: Mapping[frozenset[str | None], Callable[[str, str], ColdmergeError]] = {
    frozenset({"NoSuchBucket", "InvalidBucketName"}): _no_bucket,
    frozenset({*_FULL, "507"}): _full,
    frozenset({*_DENIED, "401", "403", "PermissionDeniedError", "UnauthenticatedError"}): _denied,
    frozenset({"NoSuchKey", "FileNotFoundError", "NotFoundError"}): _missing,
}


def _short(key: str, expected: int, got: int) -> IntegrityError:
    return IntegrityError(
        "s3.truncated",
        "An object in the bucket is shorter than it was.",
        expected=f"{expected} bytes",
        got=f"{got} bytes",
        hint="Restore it from a backup of the bucket.",
        object=key,
    )


def split_url(url: str) -> tuple[str, str]:
    """Bucket and prefix of `s3://bucket/prefix`."""
    name, _, prefix = url.removeprefix("s3://").partition("/")
    return name, prefix.strip("/")
