"""The coordinator's settings: `config.yaml` in its folder."""

from __future__ import annotations

import os
from datetime import timedelta
from pathlib import Path
from typing import Annotated

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from sqlalchemy import make_url
from sqlalchemy.exc import ArgumentError

from coldmerge.core import yaml_file
from coldmerge.core.documents import Identifier
from coldmerge.core.errors import ConfigError
from coldmerge.core.files import fsync_path
from coldmerge.core.ids import ADDRESS
from coldmerge.core.validation import first_problem
from coldmerge.rounds.policy import Duration

FILE_NAME = "config.yaml"
SQLITE = "sqlite:///coldmerge.db"
"""The embedded database: a file in the coordinator's folder."""

Address = Annotated[str, Field(pattern=rf"^{ADDRESS}$")]
Host = Annotated[str, Field(pattern=r"^[A-Za-z0-9:._-]{1,253}$")]

BLOBS = "blobs"
_BLOBS = r"^(s3://[a-z0-9][a-z0-9.-]{1,61}[a-z0-9](/[A-Za-z0-9._-]+)*/?|[^\s:]+)$"


class Limits(BaseModel):
    """What one contributor may take, and how much of the disk no upload may touch.

    `max_calls`: calls open at a time, per contributor and API process. `idle_seconds`: how
    long a stream may stand still. `call_seconds`: how long any other call may take.
    `enrolments_per_minute`: per address, since those callers have no identity yet.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    max_payload_bytes: int = Field(default=200 * 2**30, ge=1)
    max_open_uploads: int = Field(default=4, ge=1)
    bytes_per_day: int = Field(default=800 * 2**30, ge=1)
    keep_free_bytes: int = Field(default=256 * 2**20, ge=0)
    max_calls: int = Field(default=64, ge=1)
    idle_seconds: float = Field(default=60, gt=0)
    call_seconds: float = Field(default=900, gt=0)
    enrolments_per_minute: int = Field(default=30, ge=1)


class AuditSettings(BaseModel):
    """For how long a client may believe a checkpoint of the audit log."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    checkpoint_lifetime: Duration = timedelta(hours=24)


class Retention(BaseModel):
    """For how long what is no longer needed is kept; releases and records stay for ever.

    `grace`: bytes that no row names. `uploads`: since they last moved. `candidates`: of rounds
    that were not published, since they ended. `contributions`: task vectors, since their
    round ended; without it for ever, and with it `release verify` cannot merge again.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    grace: Duration = timedelta(hours=24)
    uploads: Duration = timedelta(days=7)
    candidates: Duration = timedelta(days=30)
    contributions: Duration | None = None


class S3Config(BaseModel):
    """How to reach the S3 server of `blobs: s3://…`.

    Keys come from files that hold nothing else, or from the AWS_* environment variables.
    Without `endpoint` it is Amazon's, of that region.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    endpoint: str | None = Field(default=None, pattern=r"^https?://[^\s/]+/?$")
    region: str = Field(default="us-east-1", pattern=r"^[a-z0-9-]{1,64}$")
    access_key_file: Path | None = None
    secret_key_file: Path | None = None
    allow_http: bool = False


class CoordinatorConfig(BaseModel):
    """Who we are, where we listen, where the truth is kept.

    `hosts` are the names in the server certificate; the first is the one invitations
    give. A relative SQLite path in `database_url` starts at the coordinator's folder, and so
    does a relative path in `blobs`, which may also be `s3://bucket/prefix`; `cache_bytes` is
    about how much of that is copied below the folder.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    federation: Identifier
    listen: Address = "127.0.0.1:7443"
    enrol_listen: Address = "127.0.0.1:7444"
    hosts: tuple[Host, ...] = Field(default=("localhost",), min_length=1)
    database_url: str = SQLITE
    blobs: str = Field(default=BLOBS, pattern=_BLOBS)
    s3: S3Config = S3Config()
    cache_bytes: int = Field(default=32 * 2**30, ge=0)
    min_protocol: int = Field(default=1, ge=1)
    limits: Limits = Limits()
    audit: AuditSettings = AuditSettings()
    retention: Retention = Retention()

    def database_in(self, folder: Path) -> str:
        """The database URL, with a relative SQLite path resolved against `folder`.

        Raises:
            ConfigError: not a database URL.
        """
        try:
            url = make_url(self.database_url)
        except (ArgumentError, ValueError) as error:
            raise ConfigError(
                "config.bad_database_url",
                "The database URL cannot be read.",
                expected="sqlite:///coldmerge.db or postgresql+psycopg://user@host/name",
                hint="Correct `database_url` in config.yaml.",
            ) from error
        if url.get_backend_name() == "sqlite" and url.database:
            url = url.set(database=str(folder.resolve() / url.database))
        return url.render_as_string(hide_password=False)


def load(folder: Path) -> CoordinatorConfig:
    """Read `config.yaml` of a coordinator's folder.

    Raises:
        ConfigError: no such file, bad YAML, or a wrong key.
    """
    path = folder / FILE_NAME
    try:
        values = yaml_file.load(path)
        return CoordinatorConfig.model_validate(values)
    except FileNotFoundError as error:
        raise ConfigError(
            "config.no_coordinator",
            f"There is no coordinator in {folder}.",
            expected=f"a file {FILE_NAME}",
            hint=f"Make one with `coldmerge coordinator init {folder}`.",
        ) from error
    except ValidationError as error:
        problem = first_problem(error)
        raise ConfigError(
            "config.invalid",
            f"{path} is wrong at {problem.key}: {problem.text}.",
            hint=f"The keys are {', '.join(CoordinatorConfig.model_fields)}.",
            key=problem.key,
        ) from error
    except (OSError, yaml.YAMLError) as error:
        raise ConfigError(
            "config.unreadable",
            f"{path} cannot be read: {error}",
            hint="Check its permissions, and its indentation.",
        ) from error


def save(config: CoordinatorConfig, folder: Path) -> None:
    """Write `config.yaml` into `folder`, whole or not at all."""
    temporary = folder / f".{FILE_NAME}.{os.getpid()}"
    text = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)
    temporary.touch(mode=0o600)  # the database URL may hold a password
    temporary.write_text(text, encoding="utf-8")
    fsync_path(temporary)
    temporary.rename(folder / FILE_NAME)
    fsync_path(folder)
