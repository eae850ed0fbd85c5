"""How images are trained on unless the user says otherwise."""

from __future__ import annotations

from typing import Any

from sparring.modalities.base import Dataset
from sparring.modalities.images.models import default_for

PRESETS: dict[Any, dict[str, Any]] = {
    (8, 8): {"epochs": 50, "batch_size": 64, "learning_rate": 5e-3, "weight_decay": 1e-2, "averaging": 0.99},
    (28, 28): {"epochs": 15, "model": "cnn-mnist-wide"},
    (32, 32): {
        "epochs": 30, "optimizer": "sgd", "learning_rate": 0.1, "weight_decay": 5e-4, "averaging": 0.995, "crop": 4,
        "radius_ramp": 0.0,
    },
    "cifar10": {"flip": True},  # by name: digits must not be mirrored
}  # fmt: skip
"""By height and width, or by name. (32, 32): SGD, weight decay and crop of Rice 2020, the triangle of Wong 2020 instead
of 200 epochs, averaging of Gowal 2020."""


def presets(data: Dataset) -> dict[str, Any]:
    """The settings that suit a data set, where they differ from the general defaults."""
    shape = data.shape[-2:] if len(data.shape) == 3 else None
    return {"model": default_for(data.shape), **PRESETS.get(shape, {}), **PRESETS.get(data.name, {})}
