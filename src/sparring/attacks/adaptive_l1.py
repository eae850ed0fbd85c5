"""Auto-PGD for L1: sparse steps whose number of entries adapts, at radii that shrink to the one that counts."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from sparring.attacks.loop import Attack, Problem, Seen
from sparring.attacks.starts import Given
from sparring.attacks.steps import step_length
from sparring.core.geometry import per_example
from sparring.core.noise import Noise
from sparring.core.types import AttackResult, Inputs, Model


class _SparseClimb(NamedTuple):
    """What the rule remembers, per example."""

    best: Tensor  # (B, *Z)
    best_grad: Tensor  # (B, *Z)
    best_loss: Tensor  # (B,)
    step: Tensor  # (B,) as a share of the radius
    share: Tensor  # (B,) of the entries that a step moves
    filled: Tensor  # (B,) entries of the best z that were not zero at the last checkpoint


@dataclass(frozen=True)
class SparseAPGD:
    """z <- project(z + step * s / ||s||_1) with s the sign of the gradient on the `share` of its largest entries.

    At every checkpoint (each 4 % of the steps) the share becomes 1/1.5 of the entries in which the best z is not zero.
    Where their number fell by 5 % or more, the step goes back to the radius and the search to its best point; elsewhere
    the step shrinks by 1.5, at most to a tenth of the radius. Before the first checkpoint the share is 1/1.5 of the
    entries in which the start is not zero, and `first_share` where none is. Entries that a ball's mask forbids have no
    gradient.

    Source: Croce and Hein 2021, "Mind the box", section 3 and algorithm 1; the shares are those of the authors' code.
    Raises ValueError for an infinite radius.
    """

    first_share: float = 0.2
    needs_grad: ClassVar[bool] = True

    def init(self, problem: Problem, z: Tensor) -> None:
        return None

    def step(
        self, problem: Problem, z: Tensor, seen: Seen, state: _SparseClimb | None, t: int
    ) -> tuple[Tensor, _SparseClimb]:
        assert seen.grad is not None
        mask = getattr(problem.threat, "mask", None)
        grad, entries = seen.grad if mask is None else seen.grad * mask, z.shape[1:].numel()
        if state is None:
            started = _filled(z)
            ones = torch.ones_like(started)
            # a dense start (random) says nothing about sparsity; a start found by another run does
            share = torch.where(started < entries, started / entries / 1.5, self.first_share * ones)
            state = _SparseClimb(z, grad, seen.loss, ones, share, started)
        else:
            better = seen.loss > state.best_loss
            state = state._replace(
                best=torch.where(per_example(better, z), z, state.best),
                best_grad=torch.where(per_example(better, z), grad, state.best_grad),
                best_loss=torch.where(better, seen.loss, state.best_loss),
            )
        if t and t % max(int(0.04 * problem.num_steps), 1) == 0:
            filled = _filled(state.best)
            sparser = filled < 0.95 * state.filled
            step = torch.where(sparser, 1.0, (state.step / 1.5).clamp_min(0.1))
            state = state._replace(step=step, share=filled / entries / 1.5, filled=filled)
            z = torch.where(per_example(sparser, z), state.best, z)
            grad = torch.where(per_example(sparser, z), state.best_grad, grad)
        length = step_length(problem, z, 1.0, None) * per_example(state.step, z)
        return problem.threat.project(problem.x, z + length * _sparse_sign(grad, state.share)), state


def _filled(z: Tensor) -> Tensor:
    """(B,) number of entries that are not zero."""
    return (z != 0).flatten(1).sum(1).to(z.dtype)


def _sparse_sign(grad: Tensor, share: Tensor) -> Tensor:
    """The sign of the `share` (B,) of entries with the largest gradients, of L1 length 1."""
    size = grad.flatten(1).abs()
    last = size.shape[1] - 1
    place = ((1 - share) * size.shape[1]).long().clamp(0, last)
    bar = size.sort(1).values.gather(1, place[:, None])
    sign = torch.where(size >= bar, grad.flatten(1).sign(), 0.0)
    return (sign / sign.abs().sum(1, keepdim=True).clamp_min(1)).view_as(grad)


@dataclass(frozen=True)
class ShrinkingRadius:
    """`attack` at 3, 2 and 1 times its radius, for 30, 30 and 40 % of its steps, each from the best point before.

    Source: Croce and Hein 2021, section 3.3 ("multi-eps").

    >>> from sparring import L1, pgd
    >>> attack = ShrinkingRadius(pgd(L1(0.5), num_steps=10))
    >>> attack(torch.nn.Linear(4, 3), torch.rand(2, 4), torch.tensor([0, 2])).cost
    Cost(forwards=26, backwards=20)
    """

    attack: Attack
    factors: tuple[float, ...] = (3.0, 2.0, 1.0)
    shares: tuple[float, ...] = (0.3, 0.3, 0.4)
    per_example: ClassVar[tuple[str, ...]] = ("attack",)

    def __call__(self, model: Model, x: Inputs, target: Tensor, *, noise: Noise | None = None) -> AttackResult:
        attack, left, cost, result = self.attack, self.attack.num_steps, None, None
        for number, (factor, share) in enumerate(zip(self.factors, self.shares, strict=True), 1):
            last = number == len(self.factors)
            num = left if last else min(left, math.ceil(share * attack.num_steps))
            start = attack.start if result is None else Given(result.z)
            keep = attack.keep if last else "highest_loss"
            stage = replace(attack, threat=attack.threat.at(factor), num_steps=num, start=start, keep=keep)
            result, left = stage(model, x, target, noise=noise), left - num
            cost = result.cost if cost is None else cost.plus(result.cost)
        assert result is not None and cost is not None
        return result._replace(cost=cost)
