"""The partitioners that come with coldmerge."""

from __future__ import annotations

import numpy as np
from pydantic import Field

from coldmerge.core.errors import DataError
from coldmerge_simulation.data.partition import LEAST, Partitioner, Parts, Pool, deal_again


class Iid(Partitioner):
    """Equal parts, drawn at random."""

    name = "iid"

    def deal(self, pool: Pool, count: int, draw: np.random.Generator) -> Parts:
        """Shuffle and cut."""
        order = draw.permutation(len(pool.rows))
        return deal_again([part.tolist() for part in np.array_split(order, count)], pool.labels)


class ByTask(Iid):
    """Each contributor has one of the source's tasks; those with the same share it equally."""

    name = "task"


class Dirichlet(Partitioner):
    """Of each label, shares drawn from Dirichlet(alpha): the smaller alpha, the more unlike.

    Whoever would get fewer than `minimum` examples, or one label only, gets some from others.
    """

    name = "dirichlet"

    alpha: float = Field(default=0.5, gt=0, le=1e6)
    minimum: int = Field(default=LEAST, ge=LEAST)

    def deal(self, pool: Pool, count: int, draw: np.random.Generator) -> Parts:
        """Cut each label's examples by shares of its own."""
        check_room(pool, count, self.minimum)
        parts: Parts = [[] for _ in range(count)]
        for label in np.unique(pool.labels):
            positions = draw.permutation(np.flatnonzero(pool.labels == label))
            shares = _dirichlet(self.alpha, count, draw)
            cuts = np.rint(np.cumsum(shares)[:-1] * len(positions)).astype(int)
            for part, more in zip(parts, np.split(positions, cuts), strict=True):
                part += more.tolist()
        return deal_again(parts, pool.labels, self.minimum)


class Shards(Partitioner):
    """Examples sorted by label and cut into shards, of which each contributor gets `each`."""

    name = "shards"

    each: int = Field(default=2, ge=1)

    def deal(self, pool: Pool, count: int, draw: np.random.Generator) -> Parts:
        """Sort, cut and deal."""
        check_room(pool, count, max(LEAST, self.each))
        order = draw.permutation(len(pool.rows))
        order = order[np.argsort(pool.labels[order], kind="stable")]
        shards = np.array_split(order, count * self.each)
        dealt = draw.permutation(len(shards)).reshape(count, self.each)
        parts = [np.concatenate([shards[one] for one in sorted(some)]).tolist() for some in dealt]
        return deal_again(parts, pool.labels)


class ByColumn(Partitioner):
    """All rows with one value of `column` go to one contributor, none elsewhere."""

    name = "column"

    column: str

    def deal(self, pool: Pool, count: int, draw: np.random.Generator) -> Parts:
        """Give the largest group that is left to whoever has least."""
        groups: dict[str, list[int]] = {}
        for position, row in enumerate(pool.rows):
            if self.column not in row:
                raise DataError(
                    "simulation.no_column",
                    f"The task {pool.task} has a row without the column {self.column}.",
                    expected=self.column,
                    got=", ".join(map(str, row)),
                    hint="Name one of its columns in data.partition.column.",
                )
            groups.setdefault(str(row[self.column]), []).append(position)
        if len(groups) < count:
            raise DataError(
                "simulation.too_few_values",
                f"The column {self.column} of {pool.task} has fewer values than contributors.",
                expected=f"at least {count} different values",
                got=len(groups),
                hint="Take fewer contributors, or another column.",
            )
        ties = dict(zip(groups, draw.permutation(len(groups)).tolist(), strict=True))
        parts: Parts = [[] for _ in range(count)]
        for value in sorted(groups, key=lambda value: (-len(groups[value]), ties[value])):
            min(parts, key=len).extend(groups[value])
        return parts


def check_room(pool: Pool, count: int, minimum: int) -> None:
    """Refuse more contributors than the examples of a task can serve.

    Raises:
        DataError: there are fewer than `minimum` for each.
    """
    if len(pool.rows) < count * minimum:
        raise DataError(
            "simulation.too_few_examples",
            f"The task {pool.task} has too few examples for its contributors.",
            expected=f"at least {count * minimum}: {minimum} for each of {count} contributors",
            got=len(pool.rows),
            hint="Take fewer contributors, a lower `minimum`, or more data.",
        )


def _dirichlet(
    alpha: float, count: int, draw: np.random.Generator
) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    """Shares that add up to 1, for any alpha: where all of them underflow, one takes all."""
    shares = draw.dirichlet(np.full(count, alpha))
    if not np.isfinite(shares).all() or shares.sum() == 0:
        shares = np.zeros(count)
        shares[draw.integers(count)] = 1.0
    return shares


PARTITIONERS: dict[str, type[Partitioner]] = {
    kind.name: kind for kind in (ByTask, Iid, Dirichlet, Shards, ByColumn)
}
"""Ours, by name."""
