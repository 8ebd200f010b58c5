"""What attackers of a simulation send goes through the real admission, and only theirs changes."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import pytest

from coldmerge.core.documents import Manifest
from coldmerge_coordinator.store import Store
from coldmerge_coordinator.store.models import Contribution
from coldmerge_simulation import simulate
from tests.simulation.settings import settings

ATTACKS: list[dict[str, Any]] = [
    {"names": ["org-1"], "kind": "sign_flip"},
    {"names": ["org-2"], "kind": "scale", "strength": 100},
    {"names": ["org-3"], "kind": "noise", "strength": 2},
    {"names": ["org-4"], "kind": "label_flip"},
    {"names": ["org-5"], "kind": "scale", "from_round": 2},
]


class Sent(NamedTuple):
    """What a contributor signed, and what the coordinator made of it."""

    state: str
    norm: float
    tensors: tuple[str, ...]


def sent(folder: Path) -> dict[tuple[int, str], Sent]:
    """Everything that a run's coordinator keeps, by round and contributor."""
    with Store.open(folder / "hub") as store, store.database.read() as session:
        rows = sorted(session.query(Contribution), key=lambda row: row.accepted_at)
        order = list(dict.fromkeys(row.round for row in rows))
        found = {}
        for row in rows:
            manifest = Manifest.parse(row.manifest)
            tensors = tuple(entry.sha256 for entry in manifest.tensors)
            key = (order.index(row.round) + 1, row.contributor)
            found[key] = Sent(str(row.state), manifest.norm, tensors)
        return found


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    """The same two rounds without and with attackers."""
    place = tmp_path_factory.mktemp("attackers")
    plain = settings(contributors=6)
    simulate(plain, out=place / "honest")
    simulate({**plain, "attackers": ATTACKS}, out=place / "attacked")
    return sent(place / "honest"), sent(place / "attacked")


def test_the_honest_send_what_they_would_have_sent(both: tuple[Any, Any]) -> None:
    honest, attacked = both
    for name in ("org-5", "org-6"):
        assert attacked[1, name] == honest[1, name]


def test_each_attack_is_admitted_as_what_it_is(both: tuple[Any, Any]) -> None:
    honest, attacked = both
    factors = {"org-1": 1.0, "org-2": 100.0, "org-3": 5**0.5}
    for name, factor in factors.items():
        assert attacked[1, name].norm == pytest.approx(factor * honest[1, name].norm, rel=0.05)
    for name in ("org-1", "org-2", "org-3", "org-4"):
        assert attacked[1, name].tensors != honest[1, name].tensors, name
    assert attacked[1, "org-4"].norm != honest[1, "org-4"].norm


def test_what_is_far_out_of_the_band_waits_in_quarantine(both: tuple[Any, Any]) -> None:
    _, attacked = both
    assert attacked[2, "org-2"].state == "QUARANTINED"
    assert attacked[2, "org-6"].state == "ADMITTED"
    assert attacked[2, "org-5"].norm > 4 * attacked[2, "org-6"].norm


def test_the_last_release_is_measured_though_the_last_round_published_none(tmp_path: Path) -> None:
    everybody = [{"count": 4, "kind": "nan", "from_round": 2}]
    changes = {"attackers": everybody, "evaluate": {"every": 2}}
    found = simulate(settings(**changes), out=tmp_path / "run").values
    assert [line["state"] for line in found["rounds"]] == ["PUBLISHED", "ABANDONED"]
    assert [len(row["seen"]["tasks"]) for row in found["releases"]] == [2, 2]
