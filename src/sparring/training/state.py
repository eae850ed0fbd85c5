"""All that changes during a run, in one record that is saved, loaded and rolled back; and the average of weights."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import compress
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from sparring.training.guard import wide, with_recipe_options

Weights = dict[str, Tensor]


class Average:
    """An exponential moving average of a model, `module`; call `update(model)` after each step.

    decay_n = min(decay, (1 + n) / (10 + n)) after n updates (the first update copies), so that the start is soon
    forgotten. BatchNorm's running statistics are averaged like the weights: they are the average's own. Source: Gowal
    2020 (model weight averaging); the code of Wang 2023 (0.995 with a ramp) copies the live statistics instead.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        if not 0 < decay < 1:
            raise ValueError(f"averaging decay must be in (0, 1), usually 0.99 to 0.9999; got {decay}")
        self.module, self.decay, self.updates = copy.deepcopy(model), decay, 0

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """The average with one more model. Unlike torch's AveragedModel it does not wait for the device."""
        n, self.updates = self.updates, self.updates + 1
        weight = 1 - min(self.decay, (1 + n) / (10 + n)) if n else 1.0
        ours, theirs = ([*m.parameters(), *m.buffers()] for m in (self.module, model))
        lerp = [bool(n) and t.is_floating_point() for t in ours]  # BatchNorm's count of batches is copied
        for old, new in ((old, new) for old, new, mixed in zip(ours, theirs, lerp, strict=True) if not mixed):
            old.copy_(new)
        if any(lerp):
            torch._foreach_lerp_(list(compress(ours, lerp)), list(compress(theirs, lerp)), weight)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint holds."""
        return {"updates": self.updates, "module": self.module.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from there."""
        self.updates = state["updates"]
        self.module.load_state_dict(state["module"])


@dataclass
class TrainingState:
    """All that changes during a run; `to_dict` gives tensors and plain values only (safe to load), for `load`.

    sums: of the loss and of the recipe's figures over the epoch so far, on the device, each over `counts` examples;
    to read them (`figures`) or `trouble` is to wait for it. notes: the guard's memory. memory: the recipe's, one
    dictionary from beginning to end.
    """

    model: nn.Module
    optimizer: Optimizer
    averaged: Average | None
    epoch: int = 0
    batch: int = 0
    step: int = 0
    total: int = 0  # steps of the whole run
    limit: float = math.inf  # seconds of the whole run
    sums: dict[str, Tensor] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    seen: int = 0
    seconds: float = 0.0
    history: list[dict[str, float]] = field(default_factory=list)
    best_epoch: int = -1
    best_score: float = -math.inf
    best: Weights = field(default_factory=dict)
    epoch_rng: list[Tensor] = field(default_factory=list)
    first_trouble: Tensor | None = None
    looked: int = 0  # the step of the guard's last look
    good: dict[str, Any] = field(default_factory=dict)  # where a rollback goes
    rate_factor: float = 1.0
    options: dict[str, Any] = field(default_factory=dict)  # of the recipe, changed by rollbacks
    rollbacks: list[dict[str, Any]] = field(default_factory=list)
    notes: dict[str, Any] = field(default_factory=dict)
    memory: dict[str, Any] = field(default_factory=dict)
    batch_rng: list[Tensor] = field(default_factory=list)
    ends: bool = False  # the observer has asked for it; not kept
    recipe: Any = None  # as it was given to the loop; not kept

    _PLAIN: ClassVar = (
        "epoch", "batch", "step", "sums", "counts", "seen", "seconds", "history", "best_epoch", "best_score", "best",
        "epoch_rng", "first_trouble", "looked", "rate_factor", "options", "rollbacks", "notes", "batch_rng",
    )  # fmt: skip
    _LEARNED: ClassVar = ("model", "optimizer", "averaged", "memory")
    KEYS: ClassVar = {*_PLAIN, *_LEARNED, "good", "rng"}

    def to_dict(self) -> dict[str, Any]:
        """A copy that later steps do not change."""
        state = {name: getattr(self, name) for name in self._PLAIN} | self._learned()
        good = None if self.good.get("step") == self.step else self.good  # mostly after an epoch: it is all there
        return copy.deepcopy({**state, "good": good, "rng": generators()})

    def load(self, state: Mapping[str, Any]) -> None:
        """Puts a saved state back; raises ValueError when it was made with other averaging."""
        if (state["averaged"] is None) != (self.averaged is None):
            raise ValueError(
                "the checkpoint and this run disagree about weight averaging; resume with the same settings"
            )
        state = copy.deepcopy(dict(state))
        for name in self._PLAIN:
            setattr(self, name, state[name])
        self._learn(state)
        if state["good"] is None:
            self.keep()
        else:
            self.good = state["good"]
        set_generators(state["rng"])

    def keep(self) -> None:
        """Remembers this moment as good."""
        place = {"step": self.step, "epoch": self.epoch, "sums": self.sums, "counts": self.counts}
        self.good = copy.deepcopy({**place, **self._learned()})

    def go_back(self) -> None:
        """To what was kept: all that was learned, and the sums of the epoch, but not the place in the data."""
        good = copy.deepcopy(self.good)
        self._learn(good)
        same = good["epoch"] == self.epoch  # the sums of an earlier epoch are in its line of history
        self.sums, self.counts = (good["sums"], good["counts"]) if same else ({}, {})
        self.first_trouble = None

    def count_step(self, figures: Mapping[str, Tensor | float], num: int) -> None:
        """One more step, over `num` examples."""
        for name, value in figures.items():
            value = wide(value) * num
            self.sums[name] = self.sums[name].to(value.device) + value if name in self.sums else value
            self.counts[name] = self.counts.get(name, 0) + num
        self.seen, self.batch, self.step = self.seen + num, self.batch + 1, self.step + 1

    @property
    def progress(self) -> float:
        """From 0 to 1: the share of the steps, or of the seconds where those will be over first."""
        return min(1.0, max(self.step / self.total, self.seconds / self.limit))

    @property
    def current(self) -> Any:
        """The recipe at this moment of the run, with what guards changed of it."""
        changed = with_recipe_options(self.recipe, self.options)
        return changed.at(self.progress) if hasattr(changed, "at") else changed

    @property
    def figures(self) -> dict[str, float]:
        """The mean `loss`, and those of the recipe's figures, over this epoch so far but for what was taken back."""
        return {name: total.item() / max(1, self.counts[name]) for name, total in self.sums.items()}

    @property
    def trouble(self) -> str | None:
        """None when all was finite since the last rollback, else a sentence: what was not first, and where."""
        step, loss, norm = (-1.0, 0.0, 0.0) if self.first_trouble is None else self.first_trouble.tolist()
        if step < 0:
            return None
        what = f"the gradient's norm is {norm}" if math.isfinite(loss) else f"the loss is {loss}"
        return f"Training stopped in epoch {self.epoch + 1}, step {int(step) + 1}: {what}."

    @property
    def candidate(self) -> nn.Module:
        """What is validated and may become the best: the average where there is one."""
        return self.averaged.module if self.averaged else self.model

    def _learned(self) -> dict[str, Any]:
        parts = {name: getattr(self, name) for name in self._LEARNED}
        return {n: part.state_dict() if hasattr(part, "state_dict") else part for n, part in parts.items()}

    def _learn(self, saved: Mapping[str, Any]) -> None:
        for name in self._LEARNED:
            if hasattr(part := getattr(self, name), "load_state_dict"):
                part.load_state_dict(saved[name])
        self.memory.clear()
        self.memory.update(copy.deepcopy(saved["memory"]))


def generators() -> list[Tensor]:
    """The global generators, CPU first."""
    return [torch.get_rng_state(), *(torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [])]


def set_generators(states: list[Tensor]) -> None:
    torch.set_rng_state(states[0])
    if len(states) > 1 and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(states[1:])
