from __future__ import annotations

from datetime import UTC, datetime

import yaml

from coldmerge.core.documents import Evaluation, ReleaseRecord, Scores, TensorEntry
from coldmerge.report.model_card import CardFacts, model_card

AT = datetime(2026, 5, 4, 12, 30, tzinfo=UTC)


def record(number: int, **changes: object) -> ReleaseRecord:
    values: dict[str, object] = {
        "federation": "fed",
        "model": "encoder",
        "number": number,
        "content_digest": f"{number:064x}",
        "master_digest": "f" * 64,
        "previous_record": None,
        "parents": (),
        "round": f"round-{number}" if number else None,
        "recipe": {"method": "mean", "weights": "uniform"} if number else {},
        "contributions": ("b" * 64, "a" * 64) if number else (),
        "created_at": AT,
    }
    return ReleaseRecord.model_validate(values | changes)


def evaluation(contributor: str, base: float, candidate: float) -> Evaluation:
    return Evaluation(
        federation="fed",
        model="encoder",
        round="round-1",
        contributor=contributor,
        base_digest="0" * 64,
        candidate_digest="1" * 64,
        n=100,
        base=Scores(accuracy=base, macro_f1=base),
        candidate=Scores(accuracy=candidate, macro_f1=candidate),
        gained=7,
        lost=3,
        probe_seed=1,
        created_at=AT,
    )


TENSORS = [TensorEntry(name="w", dtype="F32", shape=(4, 2), sha256="c" * 64, nbytes=32)]


def test_a_published_release_says_how_it_was_made() -> None:
    card = model_card(
        CardFacts(
            record=record(1),
            tensors=TENSORS,
            config={"model_type": "bert"},
            private_patterns=["classifier.*"],
            lineage=[record(0)],
            evaluations=[evaluation("a", 0.5, 0.54), evaluation("b", 0.6, 0.62)],
        )
    )
    head, body = card.split("---\n", 2)[1:]
    meta = yaml.safe_load(head)
    assert meta["library_name"] == "transformers"
    assert "coldmerge" in meta["tags"]
    assert "# encoder, release 1" in body
    assert "merged 2 signed task vectors" in body
    assert body.index("`" + "a" * 64) < body.index("`" + "b" * 64)
    assert "| accuracy | 55.0 | 58.0 | +3.0 |" in body
    assert "14 examples only this release gets right, 6 only" in body
    assert body.index(f"{1:064x}") < body.index(f"{0:064x}")
    assert "8 parameters" in body
    assert "`classifier.*`" in body
    assert card.endswith("\n")


def test_the_card_is_the_same_for_any_order_of_the_same_facts() -> None:
    evaluations = [evaluation("a", 0.5, 0.54), evaluation("b", 0.6, 0.62)]
    one = CardFacts(record(2), TENSORS, lineage=[record(0), record(1)], evaluations=evaluations)
    two = CardFacts(
        record(2), TENSORS, lineage=[record(1), record(0)], evaluations=evaluations[::-1]
    )
    assert model_card(one) == model_card(two)


def test_an_imported_base_claims_no_round_and_no_scores() -> None:
    card = model_card(CardFacts(record(0), TENSORS))
    assert "imported" in card
    assert "Scores" not in card
    assert "transformers" not in card


def test_flags_are_shown_and_no_contributor_is_named() -> None:
    card = model_card(
        CardFacts(
            record(1, flags=("unchecked",)),
            TENSORS,
            evaluations=[evaluation("acme-hospital", 0.5, 0.5)],
        )
    )
    assert "Flagged: unchecked" in card
    assert "acme-hospital" not in card
