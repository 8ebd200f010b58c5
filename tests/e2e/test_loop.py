"""The whole loop as three people would run it: real processes, real sockets, a real model."""

from __future__ import annotations

from itertools import count
from pathlib import Path

import pytest
import torch
import transformers
import yaml
from safetensors.torch import load_file, save_file

from coldmerge_coordinator.store import Store
from tests.backends import query
from tests.federation import Federation, Org
from tests.support import until
from tests.tiny import write_bert, write_texts


def train_config(folder: Path, seed: int, **settings: object) -> Path:
    data = write_texts(folder / f"data-{seed}", seed)
    config = {"data": str(data), "lr": 1e-2, "epochs": 1, "batch_size": 8, **settings}
    path = folder / f"train-{seed}.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def serve_model(federation: Federation, dtype: torch.dtype = torch.float32) -> None:
    base = write_bert(federation.folder / "base", dtype)
    federation.hub.cli("model", "add", "fruit", "--from", base, "--private", "pooler.*")
    federation.hub.start()


def open_and_wait(federation: Federation, number: int) -> dict[str, object]:
    """One round from opening to its end, while contributors run in the background."""
    opened = federation.hub.cli("round", "open", "fruit", "--min", "2")
    ended = {"PUBLISHED", "REJECTED", "ABANDONED"}

    def done() -> dict[str, object] | None:
        found = federation.hub.rounds("fruit")
        assert len(found) == number
        return found[0] if found[0]["state"] in ended else None

    finished = until(f"round {opened['round']} to end", done)
    assert finished["round"] == opened["round"]
    return finished


def test_two_organizations_two_rounds(federation: Federation, tmp_path: Path) -> None:
    serve_model(federation)
    orgs = federation.join(["st-mary", "north-bank"])
    running = [
        org.spawn(
            *("contribute", "fruit", "--rounds", "2"),
            *("--config", train_config(tmp_path, seed)),
        )
        for org, seed in zip(orgs, count(1), strict=False)
    ]
    rounds = [open_and_wait(federation, number) for number in (1, 2)]
    for org, process in zip(orgs, running, strict=True):
        org.finish(process)

    assert [found["evaluations"] for found in rounds] == [2, 2]
    published = [found for found in rounds if found["state"] == "PUBLISHED"]
    releases = federation.hub.releases("fruit")
    assert len(releases) == 1 + len(published)
    assert len({release["digest"] for release in releases}) == len(releases)
    assert_exports_load(federation, len(releases) - 1)
    assert_contributors_know(orgs, releases[-1])
    assert federation.hub.stop() == 0


def assert_exports_load(federation: Federation, number: int) -> None:
    out = federation.folder / "export"
    federation.hub.cli("release", "export", "fruit", str(number), out)
    model = transformers.AutoModel.from_pretrained(out)
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    with torch.no_grad():
        hidden = model(**tokenizer("some apple", return_tensors="pt")).last_hidden_state
    assert bool(hidden.isfinite().all())
    assert "coldmerge" in (out / "README.md").read_text()


def assert_contributors_know(orgs: list[Org], release: dict[str, object]) -> None:
    for org in orgs:
        status = org.cli("status")
        assert status["models"][0]["latest"] == release["number"]
        assert {line["what"] for line in status["left"]} >= {"join", "contribution", "evaluation"}
    org, out = orgs[0], orgs[0].home / "personal"
    org.cli("pull", "fruit")
    org.cli("personal", "export", "fruit", out)
    loaded = transformers.AutoModelForSequenceClassification.from_pretrained(out)
    assert set(loaded.config.id2label.values()) == {"fruit", "metal"}


@pytest.mark.parametrize(
    "dtype",
    [pytest.param(torch.float32, marks=pytest.mark.slow), torch.bfloat16],
    ids=["fp32", "bf16"],
)
def test_master_is_base_plus_mean_to_the_last_bit(
    federation: Federation, tmp_path: Path, dtype: torch.dtype
) -> None:
    """An oracle that shares no code with the product: torch over the stored files."""
    serve_model(federation, dtype)
    hub = federation.hub
    hub.cli("model", "template", "fruit", no_gate(tmp_path))
    orgs = federation.join(["a", "b", "c"])
    hub.cli("round", "open", "fruit")
    for org, seed in zip(orgs, count(1), strict=False):
        tuned = fine_tune(tmp_path / "base", tmp_path / f"tuned-{seed}", seed)
        left = org.cli("push", "fruit", "--from", tuned, "--base", "0")
        assert left["sent"]
        assert not any(name.startswith("pooler") for name in left["tensors"])
    until("release 1", lambda: len(hub.releases("fruit")) == 2)
    hub.stop()

    base = load_file(tmp_path / "base" / "model.safetensors")
    taus = stored_contributions(hub.folder)
    assert len(taus) == 3
    published, masters = stored_release(hub.folder, 1)
    for name, tensor in base.items():
        total = torch.zeros(tensor.shape, dtype=torch.float64)
        for tau in taus:
            if name in tau:
                total += tau[name].to(torch.float64)
        master = (tensor.to(torch.float64) + total / len(taus)).to(torch.float32)
        assert torch.equal(masters[name].view(torch.int32), master.view(torch.int32)), name
        assert torch.equal(published[name], master.to(dtype)), name


def fine_tune(base: Path, out: Path, seed: int) -> Path:
    """A model that was fine-tuned elsewhere: every float tensor moved a little."""
    draw = torch.Generator().manual_seed(seed)
    tensors = load_file(base / "model.safetensors")
    moved = {
        name: (tensor + 1e-2 * torch.randn(tensor.shape, generator=draw)).to(tensor.dtype)
        for name, tensor in tensors.items()
    }
    out.mkdir()
    save_file(moved, out / "model.safetensors", {"format": "pt"})
    (out / "config.json").write_bytes((base / "config.json").read_bytes())
    return out


def no_gate(folder: Path) -> Path:
    path = folder / "template.yaml"
    path.write_text("gate: null\n")
    return path


def stored_contributions(hub: Path) -> list[dict[str, torch.Tensor]]:
    """The coordinator's task vectors. Their float64 sum is exact, so it has no order: elements
    are multiples of their weight's last place.
    """
    rows = query(hub, "SELECT payload FROM contribution WHERE state = 'ADMITTED'")
    with Store.open(hub) as store:
        return [load_file(store.payloads.local(payload)) for (payload,) in rows]


def stored_release(
    hub: Path, number: int
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Published and master tensors of a release, read from the blobs by their digests."""
    import json

    ((listing, masters),) = query(
        hub,
        "SELECT CAST(listing AS text), CAST(tensors AS text) FROM release "
        "JOIN content ON content.digest = content_digest "
        "JOIN master ON master.digest = master_digest WHERE number = :number",
        number=number,
    )
    dtypes = {"F32": torch.float32, "BF16": torch.bfloat16, "I64": torch.int64}
    published, full = {}, {}
    for entry in json.loads(listing)["tensors"]:
        name, shape = entry["name"], entry["shape"]
        published[name] = blob(hub, entry["sha256"], dtypes[entry["dtype"]], shape)
        full[name] = blob(hub, json.loads(masters)[name], torch.float32, shape)
    return published, full


def blob(hub: Path, sha256: str, dtype: torch.dtype, shape: list[int]) -> torch.Tensor:
    with Store.open(hub) as store:
        raw = bytearray(b"".join(store.blobs.chunks(sha256)))
    return torch.frombuffer(raw, dtype=dtype).reshape(shape)
