"""Training and evaluation at home. Nothing here touches the network.

Importing this package is light; torch and transformers come with the trainer that
`load_trainer` loads.
"""

from __future__ import annotations

from coldmerge_client.training.config import TrainConfig
from coldmerge_client.training.trainer import (
    EvaluateJob,
    Measures,
    Predictions,
    Slopes,
    Trained,
    Trainer,
    TrainJob,
    load_trainer,
)

__all__ = [
    "EvaluateJob",
    "Measures",
    "Predictions",
    "Slopes",
    "TrainConfig",
    "TrainJob",
    "Trained",
    "Trainer",
    "load_trainer",
]
