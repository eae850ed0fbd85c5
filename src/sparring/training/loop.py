"""The one training loop: any recipe, any optimizer, any iterable of batches; it stops and resumes at any batch."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, repeat
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from sparring.core.machine import ONE_PROCESS, Machine
from sparring.core.model_state import aligned, aligned_weights
from sparring.core.noise import Noise
from sparring.core.speed import AtSpeed
from sparring.core.types import Inputs, Model, device_of, map_inputs, size
from sparring.threats.inputs import pair_of
from sparring.training.guard import Guard, NonFinite, Rollback, Stop, Wait, field_of, first_trouble
from sparring.training.recipes import Recipe
from sparring.training.schedules import Constant, Schedule
from sparring.training.state import Average, TrainingState, Weights, generators, set_generators

Validate = Callable[[Model], Mapping[str, float]]


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
    guard: Guard | None = None, machine: Machine | None = None, seconds: float = math.inf,
) -> TrainingResult:  # fmt: skip
    """Trains `model` in place (it ends with its last weights) and returns best, last and averaged weights.

    batches: (x, y) pairs, iterated once per epoch; `set_epoch(epoch)` is called where it exists, `epoch_from(batch)`
    used to resume (else batches are skipped). `machine` puts model and batches on its device; without it they are
    there. Of several processes each works on its part of every batch, with the noise of one that is alone; the means of
    their gradients and of BatchNorm's statistics are everybody's; the first validates, and its guard decides.
    `validate` sees the model in eval mode and returns figures, of which `score` chooses the best epoch (the later of
    equals): measure on held-out TRAINING data. `schedule` multiplies each group's learning rate at a progress in
    [0, 1]; a recipe with `at` sees the progress too. `averaging` is the decay of a weight average. `save` is called
    after each epoch; `observe` after each batch, and ends the run when it returns True (of several processes: at the
    guard's next look). `guard` looks every few dozen steps and may roll back or stop; the default stops when a loss or
    gradient is not finite. `resume` takes the dictionary of an earlier `TrainingState`: on a CPU the run then ends in
    the same bits as one never stopped. `seconds` ends it after the epoch in which they are over; two such runs differ.

    >>> from sparring import Linf, pgd_at
    >>> model, data = nn.Linear(4, 3), [(torch.rand(8, 4), torch.randint(3, (8,)))]
    >>> result = train(model, data, pgd_at(Linf(0.1)), torch.optim.SGD(model.parameters(), 0.1), num_epochs=2)
    >>> len(result.history)
    2
    """
    team, fast = _made_ready(model, num_epochs, machine)
    state = TrainingState(model, optimizer, Average(model, averaging) if averaging else None, recipe=recipe)
    state.memory, replays = field_of(recipe, "memory", {}), field_of(recipe, "replays", 1)
    state.memory.clear()
    guard, schedule, stopped = guard or NonFinite(), schedule or Constant(), None
    with aligned_weights(model), _own_rates(optimizer) as rates:
        state.keep() if resume is None else state.load(resume)
        state.total, state.limit = num_epochs * _count(batches) * replays, seconds
        while state.epoch < num_epochs and state.seconds < seconds and not stopped:
            started = time.monotonic()
            model.train()
            for batch in _rest_of_epoch(batches, state, replays):
                x, y = machine.place(dict(enumerate(pair_of(batch)))).values() if machine else pair_of(batch)
                _set_rates(state, schedule, rates)
                _step(state, state.current, map_inputs(aligned, x), aligned(y), seed, team, fast)
                state.seconds += time.monotonic() - started
                started = time.monotonic()
                if stopped := _after_step(state, guard, observe, team):
                    break
            else:
                stopped = _look(state, guard, team) if state.looked < state.step else None
                if not stopped:
                    _finish_epoch(state, validate, score, started, team)
                    if save:
                        save(state)
    return TrainingResult(
        best=state.best or copy.deepcopy(state.candidate.state_dict()),
        last=copy.deepcopy(model.state_dict()),
        averaged=copy.deepcopy(state.averaged.module.state_dict()) if state.averaged else None,
        best_epoch=state.best_epoch, history=state.history, seconds=state.seconds,
        stopped=stopped, rollbacks=state.rollbacks,
    )  # fmt: skip


def _set_rates(state: TrainingState, schedule: Schedule, rates: list[float]) -> None:
    """The learning rates become those of this point of the run."""
    for group, rate in zip(state.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate * schedule(state.progress) * state.rate_factor


def _after_step(
    state: TrainingState, guard: Guard, observe: Callable[[TrainingState], bool | None] | None, team: Machine
) -> str | None:
    """Why the run ends here, if the guard or the observer says so."""
    due = state.step % getattr(guard, "every", 50) == 0
    stopped = _look(state, guard, team) if due else None
    state.ends = bool(observe and observe(state)) or state.ends
    ends = state.ends if team.world == 1 else due and any(team.gather(state.ends))  # where all come together anyway
    if not stopped and ends:
        stopped = (state.trouble and _look(state, NonFinite(), team)) or "Training was interrupted."
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


def _made_ready(model: Any, num_epochs: Any, machine: Machine | None) -> tuple[Machine, AtSpeed]:
    """Puts the model on its device, with the weights of the first process; gives who shares the work, and how fast."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"the model is a {type(model).__name__}; expected a torch.nn.Module, whose weights can learn")
    if not isinstance(num_epochs, int) or num_epochs < 0:
        raise ValueError(f"num_epochs must be a whole number, at least 1; got {num_epochs!r}")
    if machine:
        machine.place(model)
        machine.from_first([*model.parameters(), *model.buffers()])
    team = machine or ONE_PROCESS
    return team, AtSpeed(model, team)


def _step(state: TrainingState, recipe: Recipe, x: Inputs, y: Tensor, seed: int, team: Machine, fast: AtSpeed) -> None:
    """One step of the optimizer. Nothing here waits for the device."""
    if not (num := size(x)):
        raise ValueError(f"batch {state.batch + 1} of epoch {state.epoch + 1} is empty: nothing can be learned from it")
    rows = torch.arange(state.seen, state.seen + num)
    if team.world > 1:
        part = team.rows(num)
        x, y, rows = map_inputs(lambda t: t[part], x), y[part], rows[part]
    noise = Noise.make(seed, f"train/{state.epoch}", rows).to(device_of(x))
    with fast:
        loss, figures = _loss(state, recipe, x, y, noise)
        state.optimizer.zero_grad(set_to_none=True)
        loss.backward()
    told = {**figures, "loss": loss}
    if team.world > 1:
        told = _exchanged(state.model, told, size(x) / num, team)
    state.first_trouble = first_trouble(state.first_trouble, state.model, told["loss"], state.step)
    state.optimizer.step()
    if state.averaged:
        state.averaged.update(state.model)
    state.count_step(told, num)


def _loss(
    state: TrainingState, recipe: Recipe, x: Inputs, y: Tensor, noise: Noise
) -> tuple[Tensor, Mapping[str, Tensor]]:
    """What the recipe gives for a batch: the loss, and its figures beside."""
    try:
        found = recipe(state.model, x, y, noise=noise)
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        raise ValueError(
            f"batch {state.batch + 1} of epoch {state.epoch + 1} holds one example, and BatchNorm needs more: "
            "let the loader leave it out, DataLoader(..., drop_last=True), or choose another batch size"
        ) from error
    return found if isinstance(found, tuple) else (found, {})


def _exchanged(model: nn.Module, told: Mapping[str, Tensor | float], share: float, team: Machine) -> dict[str, Tensor]:
    """Gradients, statistics of BatchNorm and figures become the means over all processes; returns the figures."""
    figures = {name: torch.as_tensor(value).detach().clone() for name, value in told.items()}
    learned = [p.grad for p in model.parameters() if p.grad is not None]
    team.mean([*learned, *(b for b in model.buffers() if b.is_floating_point()), *figures.values()], share)
    return figures


def _look(state: TrainingState, guard: Guard, team: Machine) -> str | None:
    """Does what the guard says; a sentence when the run must end."""
    verdict = guard(state) if team.rank == 0 else None
    verdict, state.notes = team.gather((verdict, state.notes))[0]
    state.looked = state.step
    if (verdict is None or isinstance(verdict, Wait)) and state.trouble:
        verdict = NonFinite()(state)
    if verdict is None:
        state.keep()
        return None
    if isinstance(verdict, Wait):
        return None
    if not isinstance(verdict, Rollback | Stop):
        raise TypeError(f"a guard returns Rollback, Stop, Wait or None; got {type(verdict).__name__}")
    state.go_back()
    if isinstance(verdict, Stop):
        return verdict.sentence
    state.rate_factor *= verdict.rate_factor
    state.options |= verdict.options
    line = {"back_to": state.good["step"], "rate_factor": state.rate_factor, "reason": verdict.reason}
    state.rollbacks = [*state.rollbacks, {"step": state.step, **line}]
    return None


def _finish_epoch(state: TrainingState, validate: Validate | None, score: str, started: float, team: Machine) -> None:
    """Validates, remembers the best, writes the line of history, and turns the page."""
    state.candidate.eval()
    measured = validate(state.candidate) if validate and team.rank == 0 else {}
    figures, state.seconds = team.gather(({name: float(v) for name, v in measured.items()}, state.seconds))[0]
    if validate and score not in figures:
        raise ValueError(f"validate returned {sorted(figures)}; it needs {score!r}, by which the best epoch is chosen")
    value = figures.get(score, float(state.epoch))
    if value >= state.best_score:
        state.best_score, state.best_epoch = value, state.epoch
        state.best = copy.deepcopy(state.candidate.state_dict())
    state.seconds += time.monotonic() - started
    line = {
        "epoch": state.epoch, "step": state.step, "learning_rate": state.optimizer.param_groups[0]["lr"],
        **{f"train_{name}": value for name, value in state.figures.items()},
        **figures, "seconds": round(state.seconds, 3),
    }  # fmt: skip
    state.history = [*state.history, line]
    state.epoch, state.batch, state.seen, state.sums, state.counts = state.epoch + 1, 0, 0, {}, {}
    if state.good["step"] == state.step:  # the guard found nothing wrong here
        state.keep()


def _rest_of_epoch(batches: Any, state: TrainingState, replays: int) -> Iterator[tuple[Inputs, Tensor]]:
    """The batches of this epoch still to come, each `replays` times in a row.

    A foreign loader redraws its order from the global generator.
    """
    start, done = divmod(state.batch, replays)
    if hasattr(batches, "set_epoch"):
        batches.set_epoch(state.epoch)
    if hasattr(batches, "epoch_from"):
        return _repeated(iter(batches.epoch_from(start)), replays, done)
    if state.batch == 0:
        state.epoch_rng = generators()
        return _repeated(_noted(iter(batches), state), replays, 0)
    now = generators()
    set_generators(state.epoch_rng)
    rest = iter(batches)
    for _ in range(start):
        next(rest, None)
    if done:  # the batch that is being repeated was drawn before
        set_generators(state.batch_rng)
        rest = chain([next(rest)], _noted(rest, state))
    set_generators(now)
    return _repeated(rest if done else _noted(rest, state), replays, done)


def _repeated(batches: Iterator[Any], replays: int, done: int) -> Iterator[Any]:
    """Each batch `replays` times, the first one as often as it is not `done`."""
    for batch in batches:
        yield from repeat(batch, replays - done)
        done = 0


def _noted(batches: Iterator[Any], state: TrainingState) -> Iterator[Any]:
    """The batches; from which generators each is drawn is written down."""
    while True:
        state.batch_rng = generators()
        try:
            yield next(batches)
        except StopIteration:
            return


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
