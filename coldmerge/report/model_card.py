"""The model card (README.md) of an exported release: what it is, how it was made, how to check it.

The card is derived from signed documents alone, so the same release always gets the
same card. It names no contributor: scores are summed over the evaluators.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import prod

from huggingface_hub import ModelCard, ModelCardData

from coldmerge.core.documents import Evaluation, ReleaseRecord, TensorEntry

SHOWN_RELEASES = 20


@dataclass(frozen=True)
class CardFacts:
    """What the card of one release is made from.

    Attributes:
        record: the signed record of the release.
        tensors: its tensors.
        config: the model's `config.json`.
        private_patterns: names of tensors that contributors keep at home.
        lineage: records of the earlier releases of the model, in any order.
        evaluations: the paired evaluations that the gate decided on, if any.
    """

    record: ReleaseRecord
    tensors: Sequence[TensorEntry]
    config: Mapping[str, object] = field(default_factory=dict)
    private_patterns: Sequence[str] = ()
    lineage: Sequence[ReleaseRecord] = ()
    evaluations: Sequence[Evaluation] = ()


def model_card(facts: CardFacts) -> str:
    """The whole README.md: metadata block, then Markdown, ending in one newline."""
    sections = [
        _title(facts),
        _made(facts),
        _scores(facts.evaluations),
        _lineage(facts),
        _use(facts),
    ]
    data = ModelCardData(
        library_name="transformers" if "model_type" in facts.config else None,
        tags=["coldmerge", "model-merging", "federated-learning"],
        model_name=facts.record.model,
        eval_results=None,
    )
    body = "\n\n".join(section for section in sections if section)
    return str(ModelCard(f"---\n{data.to_yaml(line_break=chr(10))}\n---\n\n{body}\n"))


def _title(facts: CardFacts) -> str:
    record = facts.record
    kind = facts.config.get("model_type", "model")
    floats = sum(prod(t.shape) for t in facts.tensors)
    dtypes = ", ".join(sorted({t.dtype for t in facts.tensors}))
    flags = f"\n\n> Flagged: {', '.join(record.flags)}." if record.flags else ""
    return (
        f"# {record.model}, release {record.number}\n\n"
        f"A {kind} of {floats:,} parameters in {len(facts.tensors)} tensors ({dtypes}), improved "
        f"by organizations of the federation `{record.federation}` that never shared their data. "
        f"Published {record.created_at:%Y-%m-%d %H:%M} UTC.{flags}"
    )


def _made(facts: CardFacts) -> str:
    record = facts.record
    if record.round is None:
        origin = "It was not made by a round: it was imported, or an old release was restored."
    elif "remerged" in record.flags:
        origin = (
            f"Round `{record.round}` merged {len(record.contributions)} signed task vectors of "
            "earlier rounds again, in their order. Other updates were removed. They are not "
            "unlearned: later ones were trained on releases that held them."
        )
    else:
        origin = (
            f"Round `{record.round}` merged {len(record.contributions)} signed task vectors, each "
            "the difference between a model fine-tuned at home and the release before this one."
        ) + _stale(record)
    lines = ["## How it was made", "", origin]
    if record.recipe:
        lines += ["", "| recipe | |", "|---|---|"]
        lines += [f"| {key} | {_cell(record.recipe[key])} |" for key in sorted(record.recipe)]
    if facts.private_patterns:
        patterns = ", ".join(f"`{pattern}`" for pattern in sorted(facts.private_patterns))
        lines += ["", f"Kept at home by every contributor: {patterns}."]
    if record.contributions:
        lines += ["", "Manifests of the contributions (sha256):", ""]
        lines += [f"- `{digest}`" for digest in sorted(record.contributions)]
    return "\n".join(lines)


def _stale(record: ReleaseRecord) -> str:
    count = sum(key.startswith("continuous.staleness.") for key in record.recipe)
    if not count:
        return ""
    were = "was" if count == 1 else "were"
    return (
        f" {count} of them {were} trained on an older release and multiplied by less than 1 for it."
    )


def _scores(evaluations: Sequence[Evaluation]) -> str:
    if not evaluations:
        return ""
    ordered = sorted(evaluations, key=lambda evaluation: evaluation.digest())
    count = len(ordered)
    rows = []
    for label, name in (("accuracy", "accuracy"), ("macro-F1", "macro_f1")):
        base = sum(float(getattr(e.base, name)) for e in ordered) / count
        candidate = sum(float(getattr(e.candidate, name)) for e in ordered) / count
        gain = 100 * (candidate - base)
        rows.append(f"| {label} | {100 * base:.1f} | {100 * candidate:.1f} | {gain:+.1f} |")
    return "\n".join(
        [
            "## Scores at home",
            "",
            f"{count} evaluators refitted the same seeded probe on this release and on the one "
            f"before it, over {sum(e.n for e in ordered):,} private examples. Means over "
            "evaluators, in points:",
            "",
            "| metric | before | this release | gain |",
            "|---|---|---|---|",
            *rows,
            "",
            f"{sum(e.gained for e in ordered):,} examples only this release gets right, "
            f"{sum(e.lost for e in ordered):,} only the one before.",
        ]
    )


def _lineage(facts: CardFacts) -> str:
    records = {record.number: record for record in (*facts.lineage, facts.record)}
    shown = [records[number] for number in sorted(records, reverse=True)][:SHOWN_RELEASES]
    rows = [
        f"| {r.number} | {r.created_at:%Y-%m-%d %H:%M} | {len(r.contributions)} "
        f"| `{r.content_digest}` |"
        for r in shown
    ]
    return "\n".join(
        [
            "## Lineage",
            "",
            "| release | published (UTC) | contributions | content digest |",
            "|---|---|---|---|",
            *rows,
        ]
    )


def _use(facts: CardFacts) -> str:
    lines = ["## Use", ""]
    if "model_type" in facts.config:
        lines += [
            "```python",
            "from transformers import AutoModel",
            "",
            'model = AutoModel.from_pretrained("path/to/this/folder")',
            "```",
            "",
        ]
    lines += [
        "`coldmerge-release.json` beside this card holds the signed record and the sha256 of "
        "every tensor and file."
    ]
    return "\n".join(lines)


def _cell(value: object) -> str:
    return str(value).replace("|", "\\|").replace("\n", " ")
