"""Attacks made of attacks."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from sparring.core.geometry import per_example
from sparring.core.model_state import attack_mode, private_rng
from sparring.core.noise import Noise
from sparring.core.objectives import Objective, TargetedDLR
from sparring.core.types import (
    Attacker,
    AttackResult,
    Cost,
    Inputs,
    Model,
    device_of,
    labels_of,
    map_inputs,
    size,
    take,
)


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
    per_example: ClassVar[tuple[str, ...]] = ("attack",)

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


@dataclass(frozen=True)
class EachTarget:
    """`attack` towards the `num` likeliest wrong classes of the clean input, one after the other.

    `goal` makes the objective from the wanted classes (B,). The attack goes on only on what still stands; per example
    the worst result is kept. With K classes there are at most K - 1 targets.

    Source: Croce and Hein 2020, section 5: the nine classes with the largest logits at the clean input.

    >>> from sparring import Linf, pgd
    >>> attack = EachTarget(pgd(Linf(0.1), num_steps=2), 2)
    >>> attack(torch.nn.Linear(4, 3), torch.rand(2, 4), torch.tensor([0, 2])).z.shape
    torch.Size([2, 4])
    """

    attack: Any
    num: int = 9
    goal: Callable[[Tensor], Objective] = TargetedDLR
    per_example: ClassVar[tuple[str, ...]] = ("attack",)

    def __post_init__(self) -> None:
        if self.num < 1:
            raise ValueError(f"targets must be at least 1; got {self.num}")
        if part_of(self.attack, "objective") is None:
            raise TypeError(f"targets are sought through the objective, and a {type(self.attack).__name__} has none")

    def __call__(self, model: Model, x: Inputs, target: Tensor, *, noise: Noise | None = None) -> AttackResult:
        noise, worst = noise or Noise.make(0, "attack", torch.arange(size(x))), None
        with attack_mode(model) as frozen, private_rng(noise.seed, device_of(x)), torch.inference_mode(False):
            order = self._order(frozen, x, target)
            rows = torch.arange(size(x), device=order.device)
            for number in range(min(self.num, order.shape[1] - 1)):
                attack = seeking(take(self.attack, rows), self.goal(order[rows, number]))
                result = attack(frozen, take(x, rows), target[rows], noise=noise.restart(number).take(rows))
                if result.reached is None:
                    raise ValueError(
                        'targets keep the worst result and so need its loss; build the attack without keep="last"'
                    )
                worst = result if worst is None else _merge(worst, result, rows)
                assert worst.reached is not None
                rows = (~worst.reached).nonzero()[:, 0]
                if not len(rows):
                    break
        assert worst is not None
        return worst._replace(cost=worst.cost.plus(Cost(forwards=size(x))))

    @torch.no_grad()
    def _order(self, model: Model, x: Inputs, target: Tensor) -> Tensor:
        """The classes (B, K), the likeliest wrong one first, the label last."""
        threat = part_of(self.attack, "threat")
        logits = model(threat.apply(x, threat.null(x)))
        if logits.ndim != 2 or logits.shape[1] < 2:
            raise ValueError(
                f"the model returned shape {tuple(logits.shape)}; targets need logits (B, K), K at least 2"
            )
        return logits.scatter(1, labels_of(target)[:, None], -math.inf).argsort(dim=1, descending=True, stable=True)


def restarted(attack: Attacker, num: int) -> Attacker:
    """`attack`, or the worst of `num` runs of it."""
    return attack if num == 1 else Restarts(attack, num)


def needs_grad(attack: Any) -> bool:
    """Whether an attack asks for gradients, however deep it lies; what does not say so is taken to."""
    return part_of(attack, "needs_grad") is not False


def seeking(attack: Any, objective: Objective) -> Any:
    """The same attack with another objective, however deep it lies in attacks made of attacks."""
    if hasattr(attack, "objective"):
        return replace(attack, objective=objective)
    return replace(attack, attack=seeking(attack.attack, objective))


def part_of(attack: Any, name: str) -> Any:
    """The `objective` (or another field) of an attack, however deep; None where it has none."""
    while not hasattr(attack, name) and hasattr(attack, "attack"):
        attack = attack.attack
    return getattr(attack, name, None)


def _merge(worst: AttackResult, again: AttackResult, rows: Tensor) -> AttackResult:
    """`worst` with those of `rows` replaced where `again` did better."""
    assert worst.loss is not None and again.loss is not None and again.reached is not None
    better = again.reached | (again.loss > worst.loss[rows]) | worst.loss[rows].isnan()

    def put(old: Tensor, new: Tensor) -> Tensor:
        return old.index_copy(0, rows, torch.where(per_example(better, new), new, old[rows]))

    fields = {name: put(getattr(worst, name), getattr(again, name)) for name in ("z", "size", "loss", "reached")}
    return AttackResult(map_inputs(put, worst.x_adv, again.x_adv), cost=worst.cost.plus(again.cost), **fields)
