"""The one training loop: any recipe, any optimizer, any iterable of batches; it stops and resumes at any batch."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel

from sparring.core.model_state import aligned, aligned_weights
from sparring.core.noise import Noise
from sparring.core.types import Inputs, Model, map_inputs, size
from sparring.training.guard import trouble
from sparring.training.recipes import Recipe
from sparring.training.schedules import Constant, Schedule
from sparring.training.weights import averaged_copy

Validate = Callable[[Model], Mapping[str, float]]
Weights = dict[str, Tensor]


@dataclass
class TrainingState:
    """All that changes during a run; `to_dict` gives tensors and plain values only (safe to load), for `load`."""

    model: nn.Module
    optimizer: Optimizer
    averaged: AveragedModel | None
    epoch: int = 0
    batch: int = 0
    step: int = 0
    total: int = 0  # steps of the whole run
    loss_sum: float = 0.0
    seen: int = 0
    seconds: float = 0.0
    history: list[dict[str, float]] = field(default_factory=list)
    best_epoch: int = -1
    best_score: float = -math.inf
    best: Weights = field(default_factory=dict)
    epoch_rng: list[Tensor] = field(default_factory=list)

    _PLAIN: ClassVar = (
        "epoch", "batch", "step", "loss_sum", "seen", "seconds", "history", "best_epoch", "best_score", "best",
    )  # fmt: skip
    KEYS: ClassVar = {*_PLAIN, "epoch_rng", "model", "optimizer", "averaged", "rng"}

    def to_dict(self) -> dict[str, Any]:
        """A copy that later steps do not change."""
        state = {name: getattr(self, name) for name in (*self._PLAIN, "epoch_rng")}
        state |= {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(), "rng": _rng()}
        state["averaged"] = self.averaged.state_dict() if self.averaged else None
        return copy.deepcopy(state)

    def load(self, state: Mapping[str, Any]) -> None:
        """Puts a saved state back; raises ValueError when it was made with other averaging."""
        if (state["averaged"] is None) != (self.averaged is None):
            raise ValueError(
                "the checkpoint and this run disagree about weight averaging; resume with the same settings"
            )
        state = copy.deepcopy(dict(state))
        for name in (*self._PLAIN, "epoch_rng"):
            setattr(self, name, state[name])
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.averaged:
            self.averaged.load_state_dict(state["averaged"])
        _set_rng(state["rng"])

    @property
    def candidate(self) -> nn.Module:
        """What is validated and may become the best: the average where there is one."""
        return self.averaged.module if self.averaged else self.model


@dataclass(frozen=True)
class TrainingResult:
    """What a run left: weights as state dicts, one line of history per epoch, and why it stopped early (or None).

    `best` is the epoch of the highest validation figure (of the averaged weights where there are any).
    """

    best: Weights
    last: Weights
    averaged: Weights | None
    best_epoch: int
    history: list[dict[str, float]]
    seconds: float
    stopped: str | None


def train(
    model: nn.Module,
    batches: Iterable[tuple[Inputs, Tensor]],
    recipe: Recipe,
    optimizer: Optimizer,
    *,
    num_epochs: int,
    validate: Validate | None = None,
    score: str = "robust_accuracy",
    schedule: Schedule | None = None,
    averaging: float | None = None,
    seed: int = 0,
    resume: Mapping[str, Any] | None = None,
    save: Callable[[TrainingState], None] | None = None,
    observe: Callable[[TrainingState], bool | None] | None = None,
) -> TrainingResult:
    """Trains `model` in place (it ends with its last weights) and returns best, last and averaged weights.

    batches: (x, y) pairs on the model's device, iterated once per epoch; `set_epoch(epoch)` is called where it
    exists, `epoch_from(batch)` used to resume (else batches are skipped). `validate` sees the model in eval mode and
    returns figures, of which `score` chooses the best epoch (the later of equals): measure on held-out TRAINING data.
    `schedule` multiplies each group's learning rate at a progress in [0, 1]; a recipe with `at` sees the progress too.
    `averaging` is the decay of a weight average. `save` is called after each epoch; `observe` after each batch, and
    ends the run when it returns True. `resume` takes the dictionary of an earlier `TrainingState`: on a CPU the run
    then ends in the same bits as one that was never stopped. A loss or gradient that is not finite ends the run too.

    >>> from sparring import Linf, pgd_at
    >>> model, data = nn.Linear(4, 3), [(torch.rand(8, 4), torch.randint(3, (8,)))]
    >>> result = train(model, data, pgd_at(Linf(0.1)), torch.optim.SGD(model.parameters(), 0.1), num_epochs=2)
    >>> len(result.history)
    2
    """
    averaged = averaged_copy(model, averaging) if averaging else None
    state = TrainingState(model, optimizer, averaged)
    with aligned_weights(model), _own_rates(optimizer) as rates:
        if resume:
            state.load(resume)
        state.total = num_epochs * _count(batches)
        schedule = schedule or Constant()
        good, stopped = _weights(state), None
        while state.epoch < num_epochs and not stopped:
            started = time.monotonic()
            model.train()
            for x, y in _rest_of_epoch(batches, state):
                x, y = map_inputs(aligned, x), aligned(y)
                progress = min(1.0, state.step / state.total)
                for group, rate in zip(optimizer.param_groups, rates, strict=True):
                    group["lr"] = rate * schedule(progress)
                noise = Noise.make(seed, f"train/{state.epoch}", torch.arange(state.seen, state.seen + size(x)))
                now = recipe.at(progress) if hasattr(recipe, "at") else recipe
                found = now(model, x, y, noise=noise)
                loss = found[0] if isinstance(found, tuple) else found
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                if stopped := trouble(model, loss, state.epoch, state.step):
                    model.load_state_dict(good[0])
                    if averaged:
                        averaged.load_state_dict(good[1])
                    break
                optimizer.step()
                _count_step(state, loss.item() * size(x), size(x), started)
                started = time.monotonic()
                if observe and observe(state):
                    stopped = "Training was interrupted."
                    break
            else:
                _finish_epoch(state, validate, score, started)
                good = _weights(state)
                if save:
                    save(state)
    return TrainingResult(
        best=state.best or copy.deepcopy(state.candidate.state_dict()),
        last=copy.deepcopy(model.state_dict()),
        averaged=copy.deepcopy(averaged.module.state_dict()) if averaged else None,
        best_epoch=state.best_epoch,
        history=state.history,
        seconds=state.seconds,
        stopped=stopped,
    )


@contextmanager
def _own_rates(optimizer: Optimizer) -> Iterator[list[float]]:
    """Yields the optimizer's own learning rates, and puts them back at the end."""
    rates = [group["lr"] for group in optimizer.param_groups]
    try:
        yield rates
    finally:
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate


def _weights(state: TrainingState) -> tuple[Weights, Weights]:
    """Copies of the live and the averaged weights, to go back to."""
    return copy.deepcopy((state.model.state_dict(), state.averaged.state_dict() if state.averaged else {}))


def _count_step(state: TrainingState, loss: float, num: int, started: float) -> None:
    if state.averaged:
        state.averaged.update_parameters(state.model)
    state.loss_sum += loss
    state.seen += num
    state.batch += 1
    state.step += 1
    state.seconds += time.monotonic() - started


def _finish_epoch(state: TrainingState, validate: Validate | None, score: str, started: float) -> None:
    """Validates, remembers the best, writes the line of history, and turns the page."""
    state.candidate.eval()
    figures = {name: float(v) for name, v in validate(state.candidate).items()} if validate else {}
    if validate and score not in figures:
        raise ValueError(f"validate returned {sorted(figures)}; it needs {score!r}, by which the best epoch is chosen")
    value = figures.get(score, float(state.epoch))
    if value >= state.best_score:
        state.best_score, state.best_epoch = value, state.epoch
        state.best = copy.deepcopy(state.candidate.state_dict())
    state.seconds += time.monotonic() - started
    line = {
        "epoch": state.epoch,
        "step": state.step,
        "learning_rate": state.optimizer.param_groups[0]["lr"],
        "train_loss": state.loss_sum / max(1, state.seen),
        **figures,
        "seconds": round(state.seconds, 3),
    }
    state.history = [*state.history, line]
    state.epoch, state.batch, state.seen, state.loss_sum = state.epoch + 1, 0, 0, 0.0


def _rest_of_epoch(batches: Any, state: TrainingState) -> Iterator[tuple[Inputs, Tensor]]:
    """The batches of this epoch still to come. A foreign loader redraws its order from the global generator."""
    if hasattr(batches, "set_epoch"):
        batches.set_epoch(state.epoch)
    if hasattr(batches, "epoch_from"):
        return iter(batches.epoch_from(state.batch))
    if state.batch == 0:
        state.epoch_rng = _rng()
        return iter(batches)
    now = _rng()
    _set_rng(state.epoch_rng)
    rest = iter(batches)
    for _ in range(state.batch):
        next(rest, None)
    _set_rng(now)
    return rest


def _count(batches: Any) -> int:
    """Batches in an epoch."""
    try:
        num = len(batches)
    except TypeError:
        raise TypeError(
            f"batches ({type(batches).__name__}) have no length; schedules need it: give a list or a DataLoader"
        ) from None
    if num == 0:
        raise ValueError("there is not one batch to train on; is the batch size larger than the data?")
    return num


def _rng() -> list[Tensor]:
    """The global generators, CPU first."""
    return [torch.get_rng_state(), *(torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [])]


def _set_rng(states: list[Tensor]) -> None:
    torch.set_rng_state(states[0])
    if len(states) > 1 and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(states[1:])
