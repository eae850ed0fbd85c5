"""Expectation over transformation: attacks on models that answer differently each time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from sparring.attacks.around import part_of, seeking
from sparring.core.model_state import attack_mode
from sparring.core.noise import Noise
from sparring.core.objectives import Objective
from sparring.core.types import AttackResult, Cost, Inputs, Model


@dataclass(frozen=True)
class MeanOver(Objective):
    """The mean of `base` over several looks, whose logits stand side by side: (B, num * K).

    Reached when the mean of the probabilities reaches the goal.
    """

    base: Objective
    num: int
    per_example: ClassVar[tuple[str, ...]] = ("base",)

    def score(self, logits: Tensor, target: Tensor) -> Tensor:
        return torch.stack([self.base.score(one, target) for one in logits.chunk(self.num, 1)]).mean(0)

    def reached(self, logits: Tensor, target: Tensor) -> Tensor:
        return self.base.reached(torch.stack([one.softmax(1) for one in logits.chunk(self.num, 1)]).mean(0), target)


@dataclass(frozen=True)
class Averaged:
    """`attack` on the mean loss over `num` looks at a stochastic model: every gradient is the mean of `num`.

    Raises TypeError for attacks whose objective it cannot reach; around `EachTarget`, which picks its own, that is so,
    too: write EachTarget(Averaged(attack, num)).

    Source: Athalye 2018, "Synthesizing robust adversarial examples"; AutoAttack's `rand` uses 20 looks.

    >>> from sparring import Linf, pgd
    >>> linear, attack = torch.nn.Linear(4, 3), Averaged(pgd(Linf(0.1), num_steps=3), 5)
    >>> attack(lambda v: linear(v + torch.rand_like(v)), torch.rand(2, 4), torch.tensor([0, 2])).cost
    Cost(forwards=40, backwards=30)
    """

    attack: Any
    num: int
    per_example: ClassVar[tuple[str, ...]] = ("attack",)

    def __post_init__(self) -> None:
        if self.num < 1:
            raise ValueError(f"the number of looks must be at least 1; got {self.num}")
        if part_of(self.attack, "objective") is None:
            raise TypeError(f"looks are averaged in the objective, and a {type(self.attack).__name__} has none")
        if part_of(self.attack, "goal") is not None:
            raise TypeError(
                "EachTarget would replace the mean over looks by its own goal; average the attack inside it"
            )

    def __call__(self, model: Model, x: Inputs, target: Tensor, *, noise: Noise | None = None) -> AttackResult:
        attack = seeking(self.attack, MeanOver(part_of(self.attack, "objective"), self.num))
        with attack_mode(model) as frozen:
            result = attack(lambda v: torch.cat([frozen(v) for _ in range(self.num)], 1), x, target, noise=noise)
        return result._replace(cost=Cost(self.num * result.cost.forwards, self.num * result.cost.backwards))
