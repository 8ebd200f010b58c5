"""Rules of the house that no linter knows."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from itertools import pairwise
from pathlib import Path

import pytest
from google.protobuf.descriptor import FieldDescriptor

import coldmerge
from coldmerge.wire.v1 import (
    admin_pb2,
    common_pb2,
    contributions_pb2,
    enrolment_pb2,
    models_pb2,
    rounds_pb2,
)

ROOT = Path(__file__).resolve().parents[1]
PROTOS = (admin_pb2, common_pb2, contributions_pb2, enrolment_pb2, models_pb2, rounds_pb2)
PACKAGES = ("coldmerge", "coordinator", "client", "simulation")


def sources() -> list[Path]:
    found = [path for package in PACKAGES for path in (ROOT / package).rglob("*.py")]
    return [path for path in found if "_pb2" not in path.name]


def test_generated_protos_are_fresh(tmp_path: Path) -> None:
    names = sorted((ROOT / "protos/coldmerge/v1").glob("*.proto"))
    subprocess.run(
        [
            *(sys.executable, "-m", "grpc_tools.protoc"),
            *(f"-Icoldmerge/wire/v1={ROOT}/protos/coldmerge/v1", f"-I{ROOT}/protos"),
            *(f"--python_out={tmp_path}", f"--pyi_out={tmp_path}"),
            *(f"--grpc_python_out={tmp_path}", *map(str, names)),
        ],
        check=True,
    )
    made = sorted((tmp_path / "coldmerge/wire/v1").iterdir())
    assert len(made) == 3 * len(names)
    stale = [
        path.name
        for path in made
        if path.read_bytes() != (ROOT / "coldmerge/wire/v1" / path.name).read_bytes()
    ]
    assert stale == [], "run `make protos`"


def test_every_method_and_service_is_documented() -> None:
    for path in (ROOT / "protos/coldmerge/v1").glob("*.proto"):
        lines = path.read_text().splitlines()
        for before, line in pairwise(lines):
            if re.match(r"\s+rpc ", line):
                assert before.strip().startswith("//"), f"{path.name}: {line.strip()}"


@pytest.mark.parametrize("module", PROTOS, ids=lambda module: module.DESCRIPTOR.name)
def test_no_message_could_carry_private_data(module: object) -> None:
    """Every bytes field is a known one; no field is named after what must stay home."""
    known_bytes = {
        *("SignedDocument.document", "SignedDocument.signature", "Chunk.data"),
        *("EnrolRequest.csr_der", "EnrolRequest.identity_public_key", "EnrolRequest.proof"),
        *("EnrolResponse.certificate_chain_pem", "EnrolResponse.signing_public_key"),
        *("RenewRequest.new_identity_public_key", "RenewRequest.new_proof"),
        *("RenewRequest.csr_der", "RenewRequest.proof", "RenewResponse.certificate_chain_pem"),
    }
    for message in module.DESCRIPTOR.message_types_by_name.values():  # type: ignore[attr-defined]
        for field in message.fields:
            forbidden = {"text", "texts", "label", "labels", "data_path", "dataset", "rows"}
            assert field.name not in forbidden, f"{message.name}.{field.name}"
            if field.type == FieldDescriptor.TYPE_BYTES:
                assert f"{message.name}.{field.name}" in known_bytes


def test_modules_stay_small() -> None:
    reasons = (ROOT / "ARCHITECTURE.md").read_text()
    long = {
        str(path.relative_to(ROOT)): lines
        for path in sources()
        if (lines := len(path.read_text().splitlines())) > 400
    }
    assert [name for name in long if name not in reasons] == []


def test_one_version() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["version"] == coldmerge.__version__
