"""What an attack seeks: a score per example, higher = worse for the model, and the moment the goal is reached."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from sparring.core.types import labels_of


class Objective(ABC):
    """The contract. `logits` (B, K); `target` labels (B,) or probabilities (B, K), whose label is the argmax.

    Any wrong class will do, unless `reached` says otherwise.
    """

    @abstractmethod
    def score(self, logits: Tensor, target: Tensor) -> Tensor:
        """(B,) differentiable, higher = worse for the model."""

    def reached(self, logits: Tensor, target: Tensor) -> Tensor:
        """(B,) bool: the attacker has what he wants."""
        return logits.argmax(1) != labels_of(target)

    @staticmethod
    def by_name() -> dict[str, Objective]:
        """Those that a text may name, as in `pgd:objective=margin`."""
        return {"ce": cross_entropy, "margin": margin, "dlr": dlr, "kl": kl}


@dataclass(frozen=True)
class CrossEntropy(Objective):
    """-sum_k p_k log softmax(logits)_k."""

    def score(self, logits: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(logits, target, reduction="none")


@dataclass(frozen=True)
class Margin(Objective):
    """max_{k != y} logit_k - logit_y: positive when the label is lost.

    Source: Carlini and Wagner 2017, the objective f_6 without its cut from below (we keep climbing).
    """

    def score(self, logits: Tensor, target: Tensor) -> Tensor:
        own = labels_of(target)[:, None]
        others = logits.scatter(1, own, torch.finfo(logits.dtype).min)
        return others.amax(1) - logits.gather(1, own)[:, 0]


@dataclass(frozen=True)
class DLR(Objective):
    """margin / (largest - third largest logit): does not change when the logits are shifted or scaled.

    Source: Croce and Hein 2020, eq. 6. With 2 classes there is no third logit, and the score is the margin.
    """

    def score(self, logits: Tensor, target: Tensor) -> Tensor:
        return margin.score(logits, target) / _spread(logits, last=3)


@dataclass(frozen=True, eq=False)
class TargetedDLR(Objective):
    """(logit_wanted - logit_y) / (largest - mean of third and fourth largest logit); any wrong class will do.

    `wanted`: classes (B,), towards which the score pulls. Source: Croce and Hein 2020, eq. 7. It needs four classes:
    with three, the numerator is the denominator where the wanted class comes last, and so has no gradient there; with
    fewer than four the score is logit_wanted - logit_y.
    """

    wanted: Tensor
    per_example: ClassVar[tuple[str, ...]] = ("wanted",)

    def score(self, logits: Tensor, target: Tensor) -> Tensor:
        wanted, own = self.wanted.to(logits.device)[:, None], labels_of(target)[:, None]
        gap = (logits.gather(1, wanted) - logits.gather(1, own))[:, 0]
        return gap if logits.shape[1] < 4 else gap / _spread(logits, last=4)


def _spread(logits: Tensor, last: int) -> Tensor | float:
    """The largest logit minus the mean of the third to the `last` largest; 1 with two classes."""
    if logits.shape[1] < 3:
        return 1.0
    top = logits.topk(min(last, logits.shape[1]), dim=1).values
    return top[:, 0] - top[:, 2:].mean(1) + 1e-12


@dataclass(frozen=True)
class KL(Objective):
    """KL(p || softmax(logits)) = sum_k p_k (log p_k - log softmax(logits)_k), the inner objective of TRADES and VAT.

    With labels as target it equals the cross-entropy.
    """

    def score(self, logits: Tensor, target: Tensor) -> Tensor:
        if target.ndim == 1:
            return F.cross_entropy(logits, target, reduction="none")
        # xlogy is 0 at p = 0, where p * log p would be nan
        return (torch.xlogy(target, target) - target * logits.log_softmax(1)).sum(1)


@dataclass(frozen=True, eq=False)
class Targeted(Objective):
    """-(score of `base` with the wanted class as label); reached when the wanted class is the prediction.

    `wanted`: one class for all, or (B,) classes. The minus sign is the point: the loss towards a wanted class must
    fall, and an attack always climbs.

    >>> targeted(cross_entropy, 1).reached(torch.tensor([[0.0, 5.0]]), torch.tensor([0]))
    tensor([True])
    """

    base: Objective
    wanted: int | Tensor
    per_example: ClassVar[tuple[str, ...]] = ("base", "wanted")

    def score(self, logits: Tensor, target: Tensor) -> Tensor:
        return -self.base.score(logits, self._wanted(logits))

    def reached(self, logits: Tensor, target: Tensor) -> Tensor:
        return logits.argmax(1) == self._wanted(logits)

    def _wanted(self, logits: Tensor) -> Tensor:
        if isinstance(self.wanted, int):
            if not 0 <= self.wanted < logits.shape[1]:
                raise ValueError(f"wanted={self.wanted}, but the model has the classes 0 to {logits.shape[1] - 1}")
            return torch.full((logits.shape[0],), self.wanted, device=logits.device)
        return self.wanted.to(logits.device)


cross_entropy, margin, dlr, kl, targeted = CrossEntropy(), Margin(), DLR(), KL(), Targeted


def aimed(objective: Objective, wanted: int | Tensor | None) -> Objective:
    """The objective itself, or `targeted` where a class is wanted."""
    return objective if wanted is None else targeted(objective, wanted)
