"""See `coldmerge.core.progress`."""

from __future__ import annotations

from coldmerge.core.progress import Counter as Counter
from coldmerge.core.progress import Progress as Progress
from coldmerge.core.progress import silent as silent
