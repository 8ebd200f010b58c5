"""Two rounds with Nesterov momentum as people would run them, against torch over stored files."""

from __future__ import annotations

import json
import subprocess
from functools import partial
from itertools import count
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from tests.backends import query
from tests.e2e.test_loop import fine_tune, serve_model, stored_release
from tests.federation import COLDMERGE, Federation, Hub, environment
from tests.support import until

OUTER = {"method": "nesterov", "lr": 0.7, "momentum": 0.9}


@pytest.mark.slow
def test_two_rounds_step_as_torch_does(federation: Federation, tmp_path: Path) -> None:
    serve_model(federation)
    hub = federation.hub
    template = tmp_path / "template.yaml"
    template.write_text(yaml.safe_dump({"gate": None, "merge": {"outer": OUTER}}))
    hub.cli("model", "template", "fruit", template)
    orgs = federation.join(["a", "b", "c"])
    base, seeds = tmp_path / "base", count(1)
    for number in (1, 2):
        hub.cli("round", "open", "fruit")
        for org in orgs:
            tuned = fine_tune(base, tmp_path / f"tuned-{number}-{org.name}", next(seeds))
            org.cli("push", "fruit", "--from", tuned, "--base", str(number - 1))
        until(f"release {number}", partial(has_release, hub, number))
        base = tmp_path / f"release-{number}"
        hub.cli("release", "export", "fruit", str(number), base)
    hub.stop()

    weights = {
        name: torch.nn.Parameter(tensor.double())
        for name, tensor in load_file(tmp_path / "base" / "model.safetensors").items()
    }
    optimizer = torch.optim.SGD(weights.values(), lr=0.7, momentum=0.9, nesterov=True)
    for number in (1, 2):
        taus = stored_taus(hub.folder, number)
        for name, parameter in weights.items():
            parameter.grad = torch.zeros_like(parameter)
            for tau in taus:
                if name in tau:
                    parameter.grad -= tau[name].double() / 3
        optimizer.step()
        published, _ = stored_release(hub.folder, number)
        for name, parameter in weights.items():
            torch.testing.assert_close(
                published[name].double(), parameter.detach(), rtol=3e-7, atol=1e-8
            )
    record = json.loads((tmp_path / "release-2" / "coldmerge-release.json").read_text())
    assert "state_digest" in json.dumps(record)
    assert "| outer.method | nesterov |" in (tmp_path / "release-2" / "README.md").read_text()


def has_release(hub: Hub, number: int) -> bool:
    return len(hub.releases("fruit")) == number + 1


def stored_taus(hub: Path, number: int) -> list[dict[str, torch.Tensor]]:
    """The task vectors of release `number` on the coordinator's disk, by manifest digest."""
    rows = query(
        hub,
        "SELECT payload FROM contribution JOIN round ON round.id = contribution.round "
        "WHERE release_number = :number ORDER BY manifest_digest",
        number=number,
    )
    assert len(rows) == 3
    return [load_file(hub / "contributions" / payload) for (payload,) in rows]


def test_whoever_opens_a_round_hears_the_methods_caution(
    federation: Federation, tmp_path: Path
) -> None:
    serve_model(federation)
    policy = tmp_path / "dare.yaml"
    policy.write_text("merge:\n  method: dare_ties\n  parameters: {density: 0.5}\n")
    command = [*COLDMERGE, "round", "open", "fruit", "--policy", str(policy), "--format", "json"]
    env = environment(COLDMERGE_DIR=str(federation.hub.folder))
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["state"] == "OPEN"
    assert "note: dare_ties: each round drops anew" in " ".join(done.stderr.split())
