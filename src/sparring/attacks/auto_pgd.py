"""Auto-PGD as step rules: the step length halves where it stops paying, and the search goes on from the best point."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from sparring.attacks.loop import Problem, Seen
from sparring.attacks.steps import step_length
from sparring.core.geometry import per_example


class _Climb(NamedTuple):
    """What APGD remembers, per example."""

    before: Tensor  # (B, *Z) the iterate before this one
    best: Tensor  # (B, *Z)
    best_grad: Tensor  # (B, *Z)
    best_loss: Tensor  # (B,)
    last_loss: Tensor  # (B,)
    step: Tensor  # (B,) as a share of the radius
    rises: Tensor  # (B,) steps since the last checkpoint that raised the loss
    loss_then: Tensor  # (B,) best loss at the last checkpoint
    halved_then: Tensor  # (B,) bool, whether the step was halved there
    checkpoint: int
    interval: int


def _remember(state: _Climb, z: Tensor, seen: Seen) -> _Climb:
    """The best point with this look taken in."""
    assert seen.grad is not None
    better = seen.loss > state.best_loss
    return state._replace(
        best=torch.where(per_example(better, z), z, state.best),
        best_grad=torch.where(per_example(better, z), seen.grad, state.best_grad),
        best_loss=torch.where(better, seen.loss, state.best_loss),
        rises=state.rises + (seen.loss > state.last_loss),
        last_loss=seen.loss,
    )


@dataclass(frozen=True)
class APGD:
    """z+ = project(z + step * steepest(grad)); z <- project(z + 0.75 (z+ - z) + 0.25 (z - z before)).

    The first step is twice the radius. At checkpoints (after 22 % of the steps, then at intervals shorter by 3 % each
    time, at least 6 %) it halves, and the search returns to its best point, where at most `rho` of the steps since the
    last one raised the loss, or where the best loss has not risen since and the step was not halved then.

    Source: Croce and Hein 2020, "Reliable evaluation...", algorithm 1 and section 3. As in the authors' code, intervals
    are rounded down (to at least one step), the second condition waits for the second checkpoint, and after a return
    the next loss is compared with the one before it. That code compares the first step's loss with 0; like the paper
    we compare it with the start's. Raises ValueError for an infinite radius.
    """

    rho: float = 0.75
    inertia: float = 0.25
    first_step: float = 2.0
    needs_grad: ClassVar[bool] = True

    def init(self, problem: Problem, z: Tensor) -> _Climb | None:
        return None

    def step(self, problem: Problem, z: Tensor, seen: Seen, state: _Climb | None, t: int) -> tuple[Tensor, _Climb]:
        assert seen.grad is not None
        threat, x, grad, num_steps = problem.threat, problem.x, seen.grad, problem.num_steps
        radius = step_length(problem, z, 1.0, None)
        if state is None:
            step, interval = torch.full_like(seen.loss, self.first_step), max(int(0.22 * num_steps), 1)
            state = _Climb(
                z, z, grad, seen.loss, seen.loss, step, torch.zeros_like(step), seen.loss,
                torch.ones_like(seen.reached), interval, interval,
            )  # fmt: skip
        else:
            state = _remember(state, z, seen)
        if t == state.checkpoint:
            halve = state.rises <= self.rho * state.interval
            halve |= ~state.halved_then & (state.loss_then >= state.best_loss)
            z = torch.where(per_example(halve, z), state.best, z)
            grad = torch.where(per_example(halve, z), state.best_grad, grad)
            interval = max(state.interval - max(int(0.03 * num_steps), 1), max(int(0.06 * num_steps), 1))
            state = state._replace(
                step=torch.where(halve, state.step / 2, state.step), rises=torch.zeros_like(state.rises),
                loss_then=state.best_loss, halved_then=halve, interval=interval, checkpoint=t + interval,
            )  # fmt: skip
        ahead = threat.project(x, z + radius * per_example(state.step, z) * threat.steepest(x, grad))
        keep = self.inertia if t else 0.0
        moved = threat.project(x, z + (1 - keep) * (ahead - z) + keep * (z - state.before))
        return moved, state._replace(before=z)
