"""Fitting a model folder to the base of a plan: names, shapes, vocabulary."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from coldmerge.core.algebra import Delta
from coldmerge.core.checkpoint import Checkpoint
from coldmerge.core.deltas import Tuned
from coldmerge.core.dtypes import FLOATS, Floats32
from coldmerge.core.errors import CheckpointError, TaskVectorError
from coldmerge.core.matching import Matching, match_folder, sort_out
from coldmerge.merging.plan import vocabulary
from coldmerge.merging.plan.plan import Named

MOST_OTHER_TOKENS = 0.1
"""Share of rows with other tokens above which two vocabularies are different ones."""


class Adapted:
    """A model folder with an adapter of its own on top: θ = tuned + s·B@A."""

    def __init__(
        self, base: Checkpoint, tuned: Tuned, adapter: Delta, pairs: dict[str, str]
    ) -> None:
        self._base, self._tuned, self._adapter, self._pairs = base, tuned, adapter, pairs
        self.base_digest = tuned.base_digest
        self.names = tuned.names

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of the tensor."""
        return self._tuned.shape(name)

    def theta(self, name: str, start: int, stop: int) -> Floats32:
        """Elements [start, stop) of the tensor with the adapter merged in."""
        theta = self._tuned.theta(name, start, stop)
        if self._pairs[name] in self._adapter.names:
            with np.errstate(over="ignore", invalid="ignore"):
                theta += self._adapter.block(self._pairs[name], start, stop)
        return theta

    def block(self, name: str, start: int, stop: int) -> Floats32:
        """Elements [start, stop) of τ = θ − base."""
        theta = self.theta(name, start, stop)
        with np.errstate(over="ignore", invalid="ignore"):
            return np.subtract(theta, self._base.block(name, start, stop), out=theta)


@dataclass(frozen=True)
class Fitter:
    """Fits models to `base`, and adds what a person should know to `notes`.

    `by_token`: rows of the vocabulary are matched by their tokens.
    """

    base: Checkpoint
    base_digest: str
    by_token: bool
    notes: list[str]

    def tuned(self, named: Named, model: Checkpoint) -> tuple[Tuned, dict[str, str]]:
        """The model against the base, and the model's name for each of the base's tensors.

        Raises:
            TaskVectorError: shapes or vocabularies differ, or tensors are missing.
        """
        if model is self.base:
            pairs = {n: n for n, spec in model.tensors.items() if spec.dtype in FLOATS}
            return Tuned(self.base, model, pairs, self.base_digest), pairs
        rows, names = self._rows(named, model)
        found = self._matched(model, names)
        self._check_missing(named, model, found)
        self.tell_left_out(named, found.kept_home)
        if rows is None:
            return Tuned(self.base, model, found.pairs, self.base_digest), found.pairs
        recoded = vocabulary.Recoded(
            self.base, model, found.pairs, self.base_digest, rows, frozenset(names)
        )
        return recoded, found.pairs

    def _matched(self, model: Checkpoint, names: dict[str, str]) -> Matching:
        if not names:
            return match_folder(self.base, model, ())
        specs = vocabulary.as_in_base(self.base, model, names)
        return sort_out(self.base, specs, model.folder, ())

    def _rows(
        self, named: Named, model: Checkpoint
    ) -> tuple[vocabulary.Rows | None, dict[str, str]]:
        """The model's row for each of the base's, and the tensors that have such rows.

        (None, {}) where rows correspond as they stand.
        """
        sizes = vocabulary.vocabulary_size(self.base), vocabulary.vocabulary_size(model)
        share, example = vocabulary.disagreement(self.base.folder, model.folder)
        if sizes[0] == sizes[1] and not share:
            return None, {}
        names = vocabulary.recoded_names(self.base, model)
        if not self.by_token:
            if names and (sizes[0] != sizes[1] or share > MOST_OTHER_TOKENS):
                raise self._vocabularies_differ(named, sizes, example)
            if share:
                self.notes.append(
                    f"{named.name}: {share:.2%} of the vocabulary's rows stand for other tokens"
                    f" ({example}); `--vocabulary base` matches them by token."
                )
            return None, {}
        ours, theirs = vocabulary.tokens(self.base.folder), vocabulary.tokens(model.folder)
        if ours is None or theirs is None:
            raise CheckpointError(
                "plan.no_vocabulary",
                f"{named.where}: rows of {named.name} cannot be matched by their tokens.",
                expected=" or ".join(vocabulary.FILES),
                got="no such file in " + str(self.base.folder if ours is None else model.folder),
                hint="Save the tokenizer beside the model with `save_pretrained`.",
                at=named.where,
            )
        rows = vocabulary.rows_of(ours, theirs, sizes[0] or 0, sizes[1] or 0)
        lacking = sum(1 for row in ours.values() if row < len(rows) and rows[row] < 0)
        if lacking:
            self.notes.append(
                f"{named.name}: {lacking} tokens of the base are not in its vocabulary and count"
                " as unchanged."
            )
        return rows, names

    def _vocabularies_differ(
        self, named: Named, sizes: tuple[int | None, int | None], example: str
    ) -> TaskVectorError:
        return TaskVectorError(
            "plan.vocabularies_differ",
            f"{named.where}: {named.name} has another vocabulary than the base.",
            expected=f"{sizes[0]} tokens, the same in every row",
            got=f"{sizes[1]} tokens" + (f"; {example}" if example else ""),
            hint="Add `tokenizer_source: base` to the plan, or give --vocabulary base: rows are"
            " then matched by their tokens.",
            at=named.where,
        )

    def _check_missing(self, named: Named, model: Checkpoint, found: Matching) -> None:
        if found.missing:
            first = ", ".join(found.missing[:3])
            tensors = "a tensor" if len(found.missing) == 1 else f"{len(found.missing)} tensors"
            raise TaskVectorError(
                "plan.tensors_missing",
                f"{named.where}: {named.name} lacks {tensors} of the base:"
                f" {first}{', …' if len(found.missing) > 3 else ''}.",
                expected=f"all {len(self.base.tensors)} tensors of {self.base.folder}",
                got=f"{len(model.tensors)} tensors, {len(found.pairs)} of them the base's",
                hint="Merge models of one architecture; a part of a model goes in as a task"
                " vector, which `coldmerge extract` makes.",
                folder=model.folder,
            )

    def tell_left_out(self, named: Named, kept: Sequence[tuple[str, str]]) -> None:
        """Note which tensors of a model are not merged."""
        if kept:
            names = ", ".join(name for name, _ in kept[:3]) + (", …" if len(kept) > 3 else "")
            self.notes.append(
                f"{named.name}: left out, since the base has no such floats: {names}."
            )
