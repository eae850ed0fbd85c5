"""Square: a random search over square windows that never asks for a gradient.

Letters: B batch, b examples that still stand, K classes, *X one input.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from sparring.attacks.around import restarted
from sparring.attacks.squares import grid, proposal, start
from sparring.core.geometry import per_example
from sparring.core.model_state import attack_mode, private_rng
from sparring.core.noise import Noise
from sparring.core.objectives import margin
from sparring.core.types import Attacker, AttackResult, Cost, Inputs, Model, labels_of, take
from sparring.threats.balls import L1, L2, Linf
from sparring.threats.base import ThreatModel

HALVINGS = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)
"""The share of a window halves after these queries."""
BLOCK = 32  # queries whose random numbers are drawn at once; one by one costs as much as a pass of a small network


@dataclass(frozen=True, kw_only=True)
class Square:
    """The search as a record, see `square`; called like an attack. Restarts are `combine.Restarts` around it."""

    threat: Any
    num_queries: int = 5000
    p: float = 0.8
    rescale: bool = False
    needs_grad: ClassVar[bool] = False
    per_example: ClassVar[tuple[str, ...]] = ("threat",)

    def __post_init__(self) -> None:
        if not isinstance(self.threat, (Linf, L2, L1)):
            raise TypeError(
                f"square searches in Linf, L2 and L1 balls, whose windows and signs it knows; got a "
                f"{type(self.threat).__name__}. Take an attack that asks the threat model alone, such as pgd"
            )
        if not bool(torch.as_tensor(self.threat.radius).isfinite().all()):
            raise ValueError("square puts windows on the edge of the ball and so needs a finite radius")
        if self.num_queries < 0 or not 0 < self.p <= 1:
            raise ValueError(f"expected num_queries >= 0 and 0 < p <= 1; got {self.num_queries} and {self.p}")

    def __call__(self, model: Model, x: Inputs, target: Tensor, *, noise: Noise | None = None) -> AttackResult:
        if not isinstance(x, Tensor):
            raise TypeError(f"square changes windows of a tensor (B, *X); x is a {type(x).__name__}")
        threat, num, device = self.threat, len(x), x.device
        noise = (noise or Noise.make(0, "attack", torch.arange(num))).to(device)
        label = labels_of(target.detach().clone())
        if label.shape != (num,) or label.is_floating_point():
            raise ValueError(f"target has shape {tuple(target.shape)} for {num} examples; expected (B,) or (B, K)")
        with attack_mode(model) as frozen, private_rng(noise.seed, device), torch.inference_mode(False):
            x = x.detach().clone()
            z = start(threat, x, noise)
            loss, hit = _look(frozen, threat, x, z, label)
            reached, rows, cost = hit.clone(), torch.arange(num, device=device), num
            for t in range(self.num_queries):
                if t == 0 or bool(hit.any()):  # a wait for the device per query; what fell costs no further pass
                    rows = rows[~hit]
                    part, near, own = take(threat, rows), x[rows], label[rows]
                if not len(rows):
                    break
                if t % BLOCK == 0:
                    draws = noise.uniform((BLOCK, 5 + grid(x)[0]), draw=1 + t // BLOCK)
                old_z, old = z[rows], loss[rows]
                trial = proposal(part, near, old_z, draws[rows, t % BLOCK], self.share(t))
                found, hit = _look(frozen, part, near, trial, own)
                better = hit | (found > old) | old.isnan()
                z[rows] = torch.where(per_example(better, trial), trial, old_z)
                loss[rows], reached[rows] = torch.where(better, found, old), hit
                cost += len(rows)
            return AttackResult(threat.realize(x, z), z, threat.size(x, z), loss, reached, Cost(cost))

    def share(self, t: int) -> float:
        """The part of the input's H x W places that the window of query t covers."""
        step = int(t / self.num_queries * 10_000) if self.rescale else t
        return self.p / 2 ** bisect_left(HALVINGS, step)


@torch.no_grad()
def _look(model: Model, threat: Any, x: Tensor, z: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
    """The margin (b,), not a number where a logit is not finite; and whether the label is lost (b,)."""
    logits = model(threat.realize(x, z))
    if logits.ndim != 2:
        raise ValueError(f"the model returned shape {tuple(logits.shape)}; an attack needs logits (B, K)")
    finite = logits.isfinite().all(1)
    return margin.score(logits, label).where(finite, torch.nan), margin.reached(logits, label) & finite


def square(
    threat: ThreatModel, *, num_queries: int = 5000, p: float = 0.8, restarts: int = 1, rescale: bool = False
) -> Attacker:
    """A search without gradients: a random window is changed, and the change stays where it raises the margin.

    Linf: from stripes of +-radius on, windows of +-radius, one sign per channel. L2 and L1: from a chessboard of humps
    on, what lies in two windows, and what is left up to the radius, goes into one of them, as humps on what was there.

    num_queries: passes per example after that of the start; none once it has fallen (label lost, logits finite).
    p: the share of the H x W places in a window, in (0, 1]. It halves after query 10, 50, 200, 500, 1,000, 2,000,
    4,000, 6,000 and 8,000; `rescale` stretches that schedule from 10,000 to num_queries.
    Images are (B, C, H, W); (B, D) is one row, whose windows are segments; (B, C, L) are C rows; further leading axes
    are channels. Raises TypeError for threats other than Linf, L2 and L1, ValueError where the radius is infinite.

    Source: Andriushchenko 2020, algorithms 1 to 3; L1 and all constants as in the AutoAttack of Croce and Hein.
    Deviations: each example draws windows and signs of its own, theirs share them. Windows reach the last row and
    column as in the paper; both codes stop short of it, so small images fall more often here. Windows higher than the
    input get wider instead. The chessboard is centred, its tiles a fifth of the height and of the width. Windows do not
    know of a mask, it takes away what lies outside.

    >>> from sparring import Linf
    >>> square(Linf(0.1), num_queries=20)(torch.nn.Linear(4, 3), torch.rand(2, 4), torch.tensor([0, 2])).z.shape
    torch.Size([2, 4])
    """
    attack = Square(threat=threat, num_queries=num_queries, p=p, rescale=rescale)
    return restarted(attack, restarts)
