"""Recipes that train something else than a classifier under a threat: what the loop is given then, and what is said."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from sparring.adapters.files import runs_a_file
from sparring.app.settings import TrainingSettings
from sparring.modalities import find, find_data
from sparring.modalities.base import Dataset, Task


class LoopParts(NamedTuple):
    """Recipe, optimizer, validation and its figure that chooses, guard: what differs between kinds of training."""

    recipe: Any
    optimizer: torch.optim.Optimizer
    validate: Callable[[Any], Any]
    score: str
    guard: Any = None


def refuse_for_task(settings: TrainingSettings) -> None:
    """ValueError for settings that mean something for classifiers alone."""
    for name in ("model", "weights", "extra", "class_weights", "awp", "guard"):
        if getattr(settings, name) not in (None, "none", 0.0):
            raise ValueError(f"recipe {settings.recipe} brings its own network and loss; leave out {name}")


def task_of(settings: TrainingSettings) -> Task | None:
    """What the recipe of these settings brings; None where it trains a classifier."""
    return find_data(settings.data).modality.task(settings.recipe)


def kept_task(settings: TrainingSettings, kind: str) -> Task | None:
    """`task_of` of a run folder, whose data need not be there. ValueError where its recipe is a file's: a folder does
    not decide what code runs."""
    if settings.threat != "none":
        return None
    if runs_a_file(settings.recipe):
        raise ValueError(
            f"this run's task comes from {settings.recipe}, and a folder decides about no code; build the module in "
            "Python, and load its weights with sparring.adapters.files.load_weights"
        )
    return find(kind).task(settings.recipe)


def parts_of_task(task: Task, data: Dataset, model: nn.Module, settings: TrainingSettings, out: Path) -> LoopParts:
    """The task's own; all training examples are used, since none chooses a classifier."""
    assert settings.learning_rate
    validate, guard = task.judge(data, (data.x_train, data.y_train), out, settings.seed)
    return LoopParts(task.recipe, task.optimizer(model, settings.learning_rate), validate, task.score, guard)


def next_step(settings: TrainingSettings) -> str:
    """What to do with the run folder {run}; {model} is how the command names a network of the user's own."""
    task = task_of(settings) if settings.threat == "none" else None
    return task.advice if task else "sparring evaluate {run}{model}"


def best_in_words(best: Mapping[str, float]) -> str:
    """What the validation found at the best epoch."""
    if "clean_accuracy" in best:
        robust = f"{best['robust_accuracy']:.1%} under a light attack"
        sure = f", {best['certified_accuracy']:.1%} certified" if "certified_accuracy" in best else ""
        return f"{best['clean_accuracy']:.1%} clean, {robust}{sure} (held-out data)"
    loop = ("epoch", "step", "learning_rate", "seconds")
    return ", ".join(f"{k} {v:.3g}" for k, v in best.items() if k not in loop and not k.startswith("train_"))
