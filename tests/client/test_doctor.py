from __future__ import annotations

import json
from pathlib import Path

import pytest

from coldmerge_client.doctor import Check, examine
from coldmerge_client.home import Home
from tests.client.conftest import Coordinator, tuned_tensors
from tests.client.conftest import base_tensors as tensors
from tests.support import free_ports, write_model


def checks(home: Home) -> dict[str, Check]:
    return {check.name: check for check in examine(home, timeout=2)}


def test_a_healthy_home(coordinator: Coordinator, tmp_path: Path) -> None:
    found = checks(coordinator.join(tmp_path / "home"))
    assert {check.status for check in found.values()} <= {"ok", "warn"}
    for name in ("home", "keys", "sent log", "outbox", "enrolment port", "api port"):
        assert found[name].status == "ok", found[name]
    assert found["root"].detail == coordinator.fingerprint
    assert "clocks agree" in found["certificate"].detail
    assert "m (release 0)" in found["coordinator"].detail
    assert "TLSv1.3" in found["api port"].detail


def test_a_home_that_has_not_joined_says_so_and_goes_no_further(tmp_path: Path) -> None:
    found = checks(Home(tmp_path / "home"))
    assert found["home"].status == "fail"
    assert "coldmerge join" in found["home"].hint
    assert "coordinator" not in found
    assert not (tmp_path / "home").exists()


def test_a_coordinator_that_is_down(coordinator: Coordinator, tmp_path: Path) -> None:
    home = coordinator.join(tmp_path / "home")
    coordinator.stop()
    found = checks(home)
    assert found["api port"].status == found["enrolment port"].status == "fail"
    assert "certificate" not in found


def test_an_address_that_does_not_resolve(coordinator: Coordinator, tmp_path: Path) -> None:
    joined = coordinator.join(tmp_path / "joined")
    place = joined.path / "federation.json"
    member = json.loads(place.read_text()) | {"address": "no-such-host.invalid:7443"}
    place.write_text(json.dumps(member))
    check = checks(joined)["api port"]
    assert check.status == "fail"
    assert "no address" in check.detail


def test_a_coordinator_of_another_federation(coordinator: Coordinator, tmp_path: Path) -> None:
    from cryptography.hazmat.primitives.serialization import Encoding

    from coldmerge.core.clock import SystemClock
    from coldmerge_coordinator.identity import make_root

    joined = coordinator.join(tmp_path / "joined")
    root = make_root("fed", SystemClock().now())[1]
    joined.root_pem.write_bytes(root.public_bytes(Encoding.PEM))
    check = checks(joined)["api port"]
    assert check.status == "fail"
    assert "not by this federation" in check.detail


def test_proxies_are_shown_without_their_passwords(
    home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("https_proxy", "http://me:secret@proxy.example:3128")
    monkeypatch.setenv("no_proxy", "localhost")
    detail = checks(home)["proxies"].detail
    assert "proxy.example:3128" in detail
    assert "secret" not in detail
    assert "no_proxy=localhost" in detail


def test_a_nearly_unreachable_coordinator_behind_a_proxy_is_a_warning(
    monkeypatch: pytest.MonkeyPatch, coordinator: Coordinator, tmp_path: Path
) -> None:
    joined = coordinator.join(tmp_path / "joined")
    place = joined.path / "federation.json"
    place.write_text(
        json.dumps(json.loads(place.read_text()) | {"address": f"127.0.0.1:{free_ports(1)[0]}"})
    )
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    assert checks(joined)["api port"].status == "warn"


def test_keys_policy_and_log_are_looked_at(home: Home) -> None:
    home.identity_key_path.chmod(0o644)
    home.policy.write_text("nonsense: 1")
    found = checks(home)
    assert found["keys"].status == found["policy"].status == "fail"
    assert found["sent log"].status == found["root"].status == "fail"
    home.identity_key_path.chmod(0o600)
    home.tls_key.parent.chmod(0o755)
    assert checks(home)["keys"].status == "warn"


def test_data_is_read_by_the_configuration(home: Home, tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    rows = [{"text": f"text {i}", "label": "even" if i % 2 == 0 else "odd"} for i in range(8)]
    for name in ("train", "validation"):
        (data / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    home.config("m").parent.mkdir()
    home.config("m").write_text(f"data: {data}\n")
    check = checks(home)["data of m"]
    assert check.status == "ok", check
    assert check.detail == "8 training and 8 validation items, 2 labels"
    (data / "train.jsonl").write_text('{"words": "a", "label": "x"}\n')
    assert checks(home)["data of m"].status == "fail"
    home.config("m").write_text("trainer: own:create\ndata: nowhere\n")
    assert "own:create" in checks(home)["data of m"].detail
    home.config("m").write_text("epochs: many\n")
    assert checks(home)["data of m"].status == "fail"


def test_what_waits_in_the_outbox_is_said(coordinator: Coordinator, tmp_path: Path) -> None:
    from coldmerge_client.prepare import Facts, prepare
    from coldmerge_client.session import Session

    home = coordinator.join(tmp_path / "home")
    with Session.open(home) as session:
        tuned = write_model(tmp_path / "tuned", tuned_tensors(tensors(), 1))
        entry = prepare(session, coordinator.open_round(), tuned, Facts(1))
    check = checks(home)["outbox"]
    assert check.status == "warn"
    assert entry.id in check.detail
