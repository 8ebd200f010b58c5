"""Scores of predictions, and the paired comparison of two releases on the same items."""

from __future__ import annotations

from coldmerge.evaluation.metrics import PairedScores, accuracy, macro_f1, paired, scores

__all__ = ["PairedScores", "accuracy", "macro_f1", "paired", "scores"]
