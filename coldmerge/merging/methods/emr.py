"""EMR-Merging: elect a sign and take the largest entry that has it."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np

from coldmerge.core.dtypes import Floats32
from coldmerge.merging.block import Block
from coldmerge.merging.merger import Merger, PerInput, Share


class Emr(Merger):
    """EMR-Merging (arXiv 2405.17461): the elected vector, of majority signs and largest entries.

    This is the unified vector, one model for all tasks. The paper's masks and rescalers, by
    which each task takes its own model out of it, are not applied. Where positive and
    negative mass balance, minus wins, as in the authors' code.
    """

    name: ClassVar[str] = "emr"
    Each: ClassVar[type[PerInput]] = Share

    def merge(self, block: Block, facts: Any) -> Floats32:
        """The elected entries of one block."""
        total, largest, smallest, room = np.zeros((4, block.size), np.float32)
        for i, tau in block.rows():
            total += np.multiply(tau, np.float32(block.weights[i]), out=room)
            np.maximum(largest, tau, out=largest)
            np.minimum(smallest, tau, out=smallest)
        plus = total > 0
        largest *= plus
        smallest *= ~plus
        largest += smallest
        return largest
