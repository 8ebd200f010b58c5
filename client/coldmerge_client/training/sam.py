"""Sharpness-aware minimization (SAM, Foret et al., arXiv 2010.01412): steps towards flat minima.

With g the gradient of the loss L at the weights w, a step goes against the gradient of L at
w + ρ·g/‖g‖, the worst place within ρ to first order. ‖·‖ runs over everything that is
trained, the head among it. A step takes twice the time, and memory for one more copy of
the trained weights.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch

_TINY = 1e-12
"""Keeps a gradient of zero from being divided by its length."""


@contextmanager
def ahead(parameters: Iterable[torch.Tensor], rho: float) -> Iterator[None]:
    """Within this the parameters are w + ρ·g/‖g‖ and their gradients empty, for the second pass.

    Afterwards the parameters are w again, bit for bit, and the gradients those of the second
    pass. Parameters without a gradient stay where they are.
    """
    moved = [each for each in parameters if each.grad is not None]
    kept = [each.detach().clone() for each in moved]
    with torch.no_grad():
        slopes = [each.grad for each in moved if each.grad is not None]
        length = torch.nn.utils.get_total_norm(slopes) if slopes else torch.zeros(())
        for each in moved:
            if each.grad is not None:
                each.add_(each.grad * (rho / (length + _TINY)).to(each.grad))
                each.grad = None
    try:
        yield
    finally:
        with torch.no_grad():
            for each, before in zip(moved, kept, strict=True):
                each.copy_(before)


class Chance:
    """Where the random numbers of the processor, and of a GPU, stand: the same dropout twice."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._cpu = torch.get_rng_state()
        self._gpu = torch.cuda.get_rng_state(device) if device.type == "cuda" else None

    def again(self) -> None:
        """Draw from here on what was drawn since."""
        torch.set_rng_state(self._cpu)
        if self._gpu is not None:
            torch.cuda.set_rng_state(self._gpu, self._device)
