"""The one training loop: any recipe, any optimizer, any iterable of batches; it stops and resumes at any batch."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import compress
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from sparring.core.machine import Machine
from sparring.core.model_state import aligned, aligned_weights
from sparring.core.noise import Noise
from sparring.core.types import Inputs, Model, device_of, map_inputs, size
from sparring.threats.inputs import pair_of
from sparring.training.guard import Guard, NonFinite, Rollback, Stop, first_trouble, wide, with_recipe_options
from sparring.training.recipes import Recipe
from sparring.training.schedules import Constant, Schedule

Validate = Callable[[Model], Mapping[str, float]]
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
    to read them (`figures`) or `trouble` is to wait for it. notes: the guard's memory.
    """

    model: nn.Module
    optimizer: Optimizer
    averaged: Average | None
    epoch: int = 0
    batch: int = 0
    step: int = 0
    total: int = 0  # steps of the whole run
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

    _PLAIN: ClassVar = (
        "epoch", "batch", "step", "sums", "counts", "seen", "seconds", "history", "best_epoch", "best_score", "best",
        "epoch_rng", "first_trouble", "looked", "rate_factor", "options", "rollbacks", "notes",
    )  # fmt: skip
    _LEARNED: ClassVar = ("model", "optimizer", "averaged")
    KEYS: ClassVar = {*_PLAIN, *_LEARNED, "good", "rng"}

    def to_dict(self) -> dict[str, Any]:
        """A copy that later steps do not change."""
        state = {name: getattr(self, name) for name in self._PLAIN} | self._learned()
        good = None if self.good.get("step") == self.step else self.good  # mostly after an epoch: it is all there
        return copy.deepcopy({**state, "good": good, "rng": _rng()})

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
        _set_rng(state["rng"])

    def keep(self) -> None:
        """Remembers this moment as good."""
        self.good = copy.deepcopy({"step": self.step, "sums": self.sums, "counts": self.counts, **self._learned()})

    def go_back(self) -> None:
        """To what was kept: all that was learned, and the sums of the epoch, but not the place in the data."""
        good = copy.deepcopy(self.good)
        self._learn(good)
        self.sums, self.counts, self.first_trouble = good["sums"], good["counts"], None

    def count_step(self, figures: Mapping[str, Tensor | float], num: int) -> None:
        """One more step, over `num` examples."""
        for name, value in figures.items():
            value = wide(value) * num
            self.sums[name] = self.sums[name].to(value.device) + value if name in self.sums else value
            self.counts[name] = self.counts.get(name, 0) + num
        self.seen, self.batch, self.step = self.seen + num, self.batch + 1, self.step + 1

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
        return {name: None if part is None else part.state_dict() for name, part in parts.items()}

    def _learn(self, saved: Mapping[str, Any]) -> None:
        for name in self._LEARNED:
            if getattr(self, name) is not None:
                getattr(self, name).load_state_dict(saved[name])


@dataclass(frozen=True)
class TrainingResult:
    """What a run left: weights as state dicts, one line of history per epoch, and why it stopped early (or None).

    `best` is the epoch of the highest validation figure (of the averaged weights where there are any). rollbacks: the
    guard's, as `{step, back_to, rate_factor, reason}`.
    """

    best: Weights
    last: Weights
    averaged: Weights | None
    best_epoch: int
    history: list[dict[str, float]]
    seconds: float
    stopped: str | None
    rollbacks: list[dict[str, Any]]


def train(
    model: nn.Module, batches: Iterable[tuple[Inputs, Tensor]], recipe: Recipe, optimizer: Optimizer, *,
    num_epochs: int, validate: Validate | None = None, score: str = "robust_accuracy",
    schedule: Schedule | None = None, averaging: float | None = None, seed: int = 0,
    resume: Mapping[str, Any] | None = None, save: Callable[[TrainingState], None] | None = None,
    observe: Callable[[TrainingState], bool | None] | None = None,
    guard: Guard | None = None, machine: Machine | None = None,
) -> TrainingResult:  # fmt: skip
    """Trains `model` in place (it ends with its last weights) and returns best, last and averaged weights.

    batches: (x, y) pairs, iterated once per epoch; `set_epoch(epoch)` is called where it exists, `epoch_from(batch)`
    used to resume (else batches are skipped). `machine` puts model and batches on its device; without it they are
    there. `validate` sees the model in eval mode and returns figures, of which `score` chooses the best epoch (the
    later of equals): measure on held-out TRAINING data. `schedule` multiplies each group's learning rate at a progress
    in [0, 1]; a recipe with `at` sees the progress too. `averaging` is the decay of a weight average. `save` is called
    after each epoch; `observe` after each batch, and ends the run when it returns True. `guard` looks every few dozen
    steps and may roll back or stop; the default stops when a loss or gradient is not finite. `resume` takes the
    dictionary of an earlier `TrainingState`: on a CPU the run then ends in the same bits as one never stopped.

    >>> from sparring import Linf, pgd_at
    >>> model, data = nn.Linear(4, 3), [(torch.rand(8, 4), torch.randint(3, (8,)))]
    >>> result = train(model, data, pgd_at(Linf(0.1)), torch.optim.SGD(model.parameters(), 0.1), num_epochs=2)
    >>> len(result.history)
    2
    """
    if machine:
        machine.place(model)
    state = TrainingState(model, optimizer, Average(model, averaging) if averaging else None)
    guard, schedule, stopped = guard or NonFinite(), schedule or Constant(), None
    with aligned_weights(model), _own_rates(optimizer) as rates:
        state.keep() if resume is None else state.load(resume)
        state.total = num_epochs * _count(batches)
        while state.epoch < num_epochs and not stopped:
            started = time.monotonic()
            model.train()
            for batch in _rest_of_epoch(batches, state):
                x, y = machine.place(dict(enumerate(pair_of(batch)))).values() if machine else pair_of(batch)
                current = _at_progress(state, recipe, schedule, rates)
                _step(state, current, map_inputs(aligned, x), aligned(y), seed)
                state.seconds += time.monotonic() - started
                started = time.monotonic()
                if stopped := _after_step(state, guard, observe):
                    break
            else:
                stopped = _look(state, guard) if state.looked < state.step else None
                if not stopped:
                    _finish_epoch(state, validate, score, started)
                    if save:
                        save(state)
    return TrainingResult(
        best=state.best or copy.deepcopy(state.candidate.state_dict()),
        last=copy.deepcopy(model.state_dict()),
        averaged=copy.deepcopy(state.averaged.module.state_dict()) if state.averaged else None,
        best_epoch=state.best_epoch, history=state.history, seconds=state.seconds,
        stopped=stopped, rollbacks=state.rollbacks,
    )  # fmt: skip


def _at_progress(state: TrainingState, recipe: Recipe, schedule: Schedule, rates: list[float]) -> Recipe:
    """The recipe as it is at this point of the run; the learning rates are set to theirs."""
    progress = min(1.0, state.step / state.total)
    for group, rate in zip(state.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate * schedule(progress) * state.rate_factor
    current = with_recipe_options(recipe, state.options)
    return current.at(progress) if hasattr(current, "at") else current


def _after_step(
    state: TrainingState, guard: Guard, observe: Callable[[TrainingState], bool | None] | None
) -> str | None:
    """Why the run ends here, if the guard or the observer says so."""
    stopped = _look(state, guard) if state.step % getattr(guard, "every", 50) == 0 else None
    if not stopped and observe and observe(state):
        stopped = (state.trouble and _look(state, NonFinite())) or "Training was interrupted."
    return stopped


@contextmanager
def _own_rates(optimizer: Optimizer) -> Iterator[list[float]]:
    """Yields the optimizer's own learning rates, and puts them back at the end."""
    rates = [group["lr"] for group in optimizer.param_groups]
    try:
        yield rates
    finally:
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate


def _step(state: TrainingState, recipe: Recipe, x: Inputs, y: Tensor, seed: int) -> None:
    """One step of the optimizer. Nothing here waits for the device."""
    rows = torch.arange(state.seen, state.seen + size(x))
    noise = Noise.make(seed, f"train/{state.epoch}", rows).to(device_of(x))
    try:
        found = recipe(state.model, x, y, noise=noise)
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        raise ValueError(
            f"batch {state.batch + 1} of epoch {state.epoch + 1} holds one example, and BatchNorm needs more: "
            "let the loader leave it out, DataLoader(..., drop_last=True), or choose another batch size"
        ) from error
    loss, figures = found if isinstance(found, tuple) else (found, {})
    state.optimizer.zero_grad(set_to_none=True)
    loss.backward()
    state.first_trouble = first_trouble(state.first_trouble, state.model, loss, state.step)
    state.optimizer.step()
    if state.averaged:
        state.averaged.update(state.model)
    state.count_step({**figures, "loss": loss}, size(x))


def _look(state: TrainingState, guard: Guard) -> str | None:
    """Does what the guard says; a sentence when the run must end."""
    state.looked, verdict = state.step, guard(state)
    if verdict is None and state.trouble:
        verdict = NonFinite()(state)
    if verdict is None:
        state.keep()
        return None
    if not isinstance(verdict, Rollback | Stop):
        raise TypeError(f"a guard returns Rollback, Stop or None; got {type(verdict).__name__}")
    state.go_back()
    if isinstance(verdict, Stop):
        return verdict.sentence
    state.rate_factor *= verdict.rate_factor
    state.options |= verdict.options
    line = {"back_to": state.good["step"], "rate_factor": state.rate_factor, "reason": verdict.reason}
    state.rollbacks = [*state.rollbacks, {"step": state.step, **line}]
    return None


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
        **{f"train_{name}": value for name, value in state.figures.items()},
        **figures,
        "seconds": round(state.seconds, 3),
    }
    state.history = [*state.history, line]
    state.epoch, state.batch, state.seen, state.sums, state.counts = state.epoch + 1, 0, 0, {}, {}
    state.keep()


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
