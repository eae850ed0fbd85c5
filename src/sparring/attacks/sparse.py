"""The sparse attack: PGD for L1, where one coordinate a step is too few and all of them are too many."""

from __future__ import annotations

from typing import Any

from sparring.attacks.catalogue import _compose
from sparring.attacks.starts import uniform
from sparring.attacks.steps import SparseAscent
from sparring.core.types import Attacker
from sparring.threats.base import ThreatModel


def slide(
    threat: ThreatModel, *, num_steps: int = 40, step: float = 0.25, share: float = 0.01,
    absolute_step: float | None = None, **options: Any,
) -> Attacker:  # fmt: skip
    """PGD whose steps move the `share` of the coordinates with the largest gradient that can still move.

    For L1; the other options are those of the catalogue. `share` matters: near radius / inputs is a good choice, where
    inputs are the numbers of one image with values in [0, 1]; see `SparseAscent`.

    Source: Tramer and Boneh 2019, SLIDE; the start is `pgd`'s, uniform in the ball. Theirs is random on its surface
    (Laplace), their steps are 0.1 of the radius with 10 steps (MNIST), 0.26 with 100 (CIFAR-10), their share is 0.01.

    >>> from sparring import L1
    >>> slide(L1(12.0), num_steps=3, share=0.5)(torch.nn.Linear(4, 3), torch.rand(2, 4), torch.tensor([0, 2])).z.shape
    torch.Size([2, 4])
    """
    return _compose(threat, SparseAscent(step, share, absolute_step), num_steps, uniform, **options)
