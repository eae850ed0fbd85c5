"""Auto-PGD, whose step length halves where it stops paying, as AutoAttack runs it; on L1 balls its sparse form.

Source: Croce and Hein 2020, "Reliable evaluation of adversarial robustness with an ensemble of diverse parameter-free
attacks"; for L1 Croce and Hein 2021, "Mind the box". Budgets are those of the authors' `autoattack.py`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from sparring.attacks.around import Averaged, EachTarget, SmoothBackward, merged, restarted
from sparring.attacks.loop import Attack, Problem, Seen, StepRule
from sparring.attacks.starts import Corner, Gaussian, Given, OnTheEdge, Start
from sparring.attacks.steps import step_length
from sparring.core.geometry import per_example
from sparring.core.noise import Noise
from sparring.core.objectives import Objective, aimed, cross_entropy, margin
from sparring.core.types import Attacker, AttackResult, Cost, Inputs, Model, take
from sparring.threats.base import ThreatModel


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


def _best(state: Any, z: Tensor, loss: Tensor, grad: Tensor) -> Any:
    """The state with the best point so far, this one taken in."""
    better = loss > state.best_loss
    return state._replace(
        best=torch.where(per_example(better, z), z, state.best),
        best_grad=torch.where(per_example(better, z), grad, state.best_grad),
        best_loss=torch.where(better, loss, state.best_loss),
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

    def init(self, problem: Problem, z: Tensor) -> None:
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
            rises = state.rises + (seen.loss > state.last_loss)
            state = _best(state, z, seen.loss, grad)._replace(rises=rises, last_loss=seen.loss)
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
            state = _best(state, z, seen.loss, grad)
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
        attack, left, cost, result = self.attack, self.attack.num_steps, Cost(), None
        for number, (factor, share) in enumerate(zip(self.factors, self.shares, strict=True), 1):
            last = number == len(self.factors)
            num = left if last else min(left, math.ceil(share * attack.num_steps))
            start = attack.start if result is None else Given(result.z)
            keep = attack.keep if last else "highest_loss"
            stage = replace(attack, threat=attack.threat.at(factor), num_steps=num, start=start, keep=keep)
            result, left = stage(model, x, target, noise=noise), left - num
            cost = cost.plus(result.cost)
        assert result is not None
        return result._replace(cost=cost)


@dataclass(frozen=True)
class Polished:
    """`attack`, and on what stands after it `num_steps` of APGD with small steps and the true gradient from its end.

    first_step: as a share of the radius. An attack whose steps or gradients are coarse ends near a kink of the loss,
    and short steps of the true gradient go on from there. Per example the worst of both is kept. Ours.

    >>> from sparring import Linf, pgd
    >>> attack = Polished(pgd(Linf(0.1), num_steps=2), num_steps=3)
    >>> attack(torch.nn.Linear(4, 3), torch.rand(2, 4), torch.tensor([0, 2])).z.shape
    torch.Size([2, 4])
    """

    attack: Any
    num_steps: int
    first_step: float = 0.05
    per_example: ClassVar[tuple[str, ...]] = ("attack",)

    def __post_init__(self) -> None:
        if self.num_steps < 1:
            raise ValueError(f"polish takes at least 1 step; got {self.num_steps}. Leave it out for none")

    def __call__(self, model: Model, x: Inputs, target: Tensor, *, noise: Noise | None = None) -> AttackResult:
        found = self.attack(model, x, target, noise=noise)
        if found.loss is None or found.reached is None:
            raise ValueError('polishing needs the loss of what was found; build the attack without keep="last"')
        rows = (~found.reached).nonzero()[:, 0]
        if not len(rows):
            return found
        inner = take(self.attack, rows)
        while hasattr(inner, "attack"):
            inner = inner.attack
        rule, start = APGD(first_step=self.first_step), Given(found.z[rows])
        then = replace(inner, rule=rule, start=start, num_steps=self.num_steps)
        again = then(model, take(x, rows), target[rows], noise=noise.take(rows) if noise else None)
        return merged(found, again, rows, again.reached | (again.loss > found.loss[rows]))


def apgd(
    threat: ThreatModel, *, num_steps: int = 100, rho: float = 0.75, eot: int = 1, restarts: int = 1,
    objective: Objective = cross_entropy, wanted: int | Tensor | None = None,
) -> Attacker:  # fmt: skip
    """PGD that finds its own step length, from a random start on the edge of the set.

    `eot` averages every gradient over that many looks, for stochastic models. On L1 balls: sparse steps, at 3, 2 and 1
    times the radius, where `rho` has no say. `wanted` (one class, or (B,)) makes it targeted; that is not `apgd_t`.

    Source: Croce and Hein 2020, algorithm 1; for L1 Croce and Hein 2021.

    >>> from sparring import L1
    >>> attack = apgd(L1(12.0), num_steps=50, restarts=5)
    """
    attack = _single(threat, num_steps, rho, aimed(objective, wanted))
    return restarted(attack if eot == 1 else Averaged(attack, eot), restarts)


def apgd_t(
    threat: ThreatModel, *, num_steps: int = 100, rho: float = 0.75, targets: int = 9, nearest: bool = False
) -> Attacker:
    """APGD on the targeted DLR loss towards each of the likeliest wrong classes, on what still stands.

    `nearest`: towards the classes whose linearised boundary is nearest; see `EachTarget`.

    Source: Croce and Hein 2020, section 5; there the likeliest.

    >>> from sparring import Linf
    >>> result = apgd_t(Linf(0.1), num_steps=4)(torch.nn.Linear(4, 3), torch.rand(2, 4), torch.tensor([0, 2]))
    """
    return EachTarget(_single(threat, num_steps, rho, cross_entropy), targets, nearest=nearest)


def _single(threat: ThreatModel, num_steps: int, rho: float, objective: Objective) -> Any:
    """One run; on L1 balls the sparse form."""
    sparse = threat.norm == "l1"
    rule: StepRule = SparseAPGD() if sparse else APGD(rho)
    start: Start = Gaussian(1.0) if sparse else OnTheEdge()
    attack = Attack(threat=threat, rule=rule, num_steps=num_steps, objective=objective, start=start)
    return ShrinkingRadius(attack) if sparse else attack


def smooth(
    threat: ThreatModel, *, num_steps: int = 20, slope: float = 10.0, restarts: int = 5, polish: int = 0,
    objective: Objective = margin,
) -> Attacker:  # fmt: skip
    """APGD through a smoothed backward pass, from random corners of the set; on L1 balls its sparse form.

    `polish`: so many small steps of the true gradient after each start (see `Polished`); not on L1 balls.

    Ours; measured in docs/results.md. The slope is that of a sigmoid in place of ReLU's step.

    >>> from sparring import Linf
    >>> relu = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
    >>> smooth(Linf(0.1), num_steps=3, restarts=2)(relu, torch.rand(2, 4), torch.tensor([0, 2])).z.shape
    torch.Size([2, 4])
    """
    attack = _single(threat, num_steps, APGD().rho, objective)
    if threat.norm != "l1":
        attack = replace(attack, start=Corner())
    smoothed: Attacker = SmoothBackward(attack, slope)
    if polish:
        if threat.norm == "l1":
            raise ValueError(f"polish={polish} takes dense steps, which go nowhere on an L1 ball; leave it out there")
        smoothed = Polished(smoothed, polish)
    return restarted(smoothed, restarts)
