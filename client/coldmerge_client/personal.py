"""A release and the contributor's private head, together as one model to use."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from coldmerge.core.errors import ConfigError, ConflictError, NotFoundError

if TYPE_CHECKING:
    from coldmerge_client.training.heads import Head


def export(release: Path, head: Path, out: Path) -> Path:
    """Write one Hugging Face folder: the release's body, the head, its labels, the tokenizer.

    `AutoModelForSequenceClassification.from_pretrained(out)` (or the token classification
    class) loads it. A mean-pooled head fits no class of transformers: the folder then holds
    the body and `head/`, and `classify` uses both.

    Raises:
        NotFoundError: there is no head yet.
        ConflictError: `out` exists already.
        ConfigError: the head does not fit the release.
        IntegrityError: the head is damaged.
    """
    if not head.is_dir():
        raise NotFoundError(
            "personal.no_head",
            "There is no private head for this model yet.",
            hint="Run `coldmerge train` first; a causal LM has none, use its release as it is.",
            head=head,
        )
    if out.exists():
        raise ConflictError(
            "personal.out_exists",
            f"{out} exists already.",
            hint="Name a folder that does not exist.",
            out=out,
        )
    from coldmerge_client.training import heads, models, pooled

    kept = heads.Head.load(head)
    model = _model(release, kept)
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    with models.quiet():
        model.save_pretrained(str(partial))
        models.load_tokenizer(release).save_pretrained(str(partial))
    if kept.task == pooled.TASK:
        kept.save(partial / "head")
    return partial.rename(out)


def classify(folder: Path, texts: Sequence[str], max_length: int = 128) -> list[str]:
    """The label of each text, by a folder that `export` wrote for sequence classification."""
    import torch

    from coldmerge_client.training import batches, heads, models

    head = folder / "head"
    kept = heads.Head.load(head) if head.is_dir() else None
    if kept is None:
        import transformers

        model = models.load(transformers.AutoModelForSequenceClassification, folder)
        labels = [model.config.id2label[place] for place in range(model.config.num_labels)]
    else:
        model, labels = _model(folder, kept), list(kept.labels)
    tokenizer = models.load_tokenizer(folder)
    examples = batches.tokenize(tokenizer, texts, [None] * len(texts), max_length)
    found = [""] * len(texts)
    collate = batches.Collator(tokenizer)
    with torch.inference_mode():
        for group in batches.by_length(examples, 32):
            logits = model.eval()(**collate([examples[place] for place in group])).logits
            for place, best in zip(group, logits.argmax(-1).tolist(), strict=True):
                found[place] = labels[best]
    return found


def _model(release: Path, head: Head) -> Any:
    """The model that `head` belongs to, with the body of `release`."""
    import transformers

    from coldmerge_client.training import models, pooled
    from coldmerge_client.training.huggingface import label_settings

    kinds = {
        "sequence-classification": transformers.AutoModelForSequenceClassification,
        "token-classification": transformers.AutoModelForTokenClassification,
    }
    if head.task == pooled.TASK:
        body = models.load(transformers.AutoModel, release, dtype="auto")
        model: Any = pooled.MeanPooled(body, head.labels)
    elif head.task in kinds:
        settings = label_settings(head.labels)
        model = models.load(kinds[head.task], release, dtype="auto", **settings)
    else:
        raise ConfigError(
            "personal.no_class",
            "There is no class of models for this head.",
            expected=", ".join(sorted([*kinds, pooled.TASK])),
            got=head.task,
            hint="A head from a trainer of your own is put together by your own code.",
        )
    filled = head.fill(dict(model.named_parameters()), head.labels)
    if filled < len(head.tensors):
        raise ConfigError(
            "personal.head_does_not_fit",
            "The private head belongs to another architecture than the release.",
            expected=", ".join(sorted(head.tensors)[:3]),
            got=f"{filled} of {len(head.tensors)} tensors fit",
            hint="Export with the release that the head was trained on, or train again.",
            release=release,
        )
    return model
