"""Attacks made of attacks."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sparring.geometry import per_example
from sparring.noise import Noise
from sparring.types import Attacker, AttackResult, Inputs, Model, map_inputs, size, take


@dataclass(frozen=True)
class Restarts:
    """`attack` up to `num` times from other random starts; per example the worst result is kept.

    Worst: one that reaches the goal, else the highest loss. An example that has fallen is not attacked again, which
    costs one wait for the device per restart.

    >>> from sparring import Linf, pgd
    >>> Restarts(pgd(Linf(0.1), num_steps=2), 3)(torch.nn.Linear(4, 3), torch.rand(2, 4), torch.tensor([0, 2])).z.shape
    torch.Size([2, 4])
    """

    attack: Attacker
    num: int

    def __post_init__(self) -> None:
        if self.num < 1:
            raise ValueError(f"restarts must be at least 1; got {self.num}")

    def __call__(self, model: Model, x: Inputs, target: Tensor, *, noise: Noise | None = None) -> AttackResult:
        noise = noise or Noise.make(0, "attack", torch.arange(size(x)))
        worst = self.attack(model, x, target, noise=noise)
        if worst.loss is None or worst.reached is None:
            raise ValueError(
                'restarts keep the worst result and so need its loss; build the attack without keep="last"'
            )
        for number in range(1, self.num):
            standing = (~worst.reached).nonzero()[:, 0]
            if not len(standing):
                break
            again = take(self.attack, standing)(
                model, take(x, standing), target[standing], noise=noise.restart(number).take(standing)
            )
            worst = _merge(worst, again, standing)
        return worst

    def take(self, index: Tensor) -> Restarts:
        """The same for some of the examples."""
        return replace(self, attack=take(self.attack, index))


def _merge(worst: AttackResult, again: AttackResult, rows: Tensor) -> AttackResult:
    """`worst` with those of `rows` replaced where `again` did better."""
    assert worst.loss is not None and again.loss is not None and again.reached is not None
    better = again.reached | (again.loss > worst.loss[rows]) | worst.loss[rows].isnan()

    def put(old: Tensor, new: Tensor) -> Tensor:
        return old.index_copy(0, rows, torch.where(per_example(better, new), new, old[rows]))

    fields = {name: put(getattr(worst, name), getattr(again, name)) for name in ("z", "size", "loss", "reached")}
    return AttackResult(map_inputs(put, worst.x_adv, again.x_adv), cost=worst.cost.plus(again.cost), **fields)
