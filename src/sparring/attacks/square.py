"""Square: a random search over square windows that never asks for a gradient.

Letters: B batch, b examples that still stand, K classes, *X one input. Of the shapes below, where a window lies, what
fills it, how length moves from one into another: C channels, H x W places, h x w a window; q the power of the norm, 2
or 1; z is (b, C, H * W).
"""

from __future__ import annotations

import math
from bisect import bisect_left
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from sparring.attacks.around import restarted
from sparring.attacks.starts import crafting
from sparring.core.geometry import per_example
from sparring.core.noise import Noise
from sparring.core.objectives import margin
from sparring.core.types import Attacker, AttackResult, Cost, Inputs, Model, labels_of, take
from sparring.threats.balls import Ball
from sparring.threats.base import ThreatModel

HALVINGS = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)
"""The share of a window halves after these queries."""
QUERIES_AT_ONCE = 32
"""Whose random numbers are drawn at once; one by one costs as much as a pass of a small network."""


@dataclass(frozen=True, kw_only=True)
class Square:
    """The search as a record, see `square`; called like an attack. Restarts are `Restarts` around it."""

    threat: Any
    num_queries: int = 5000
    p: float = 0.8
    rescale: bool = False
    needs_grad: ClassVar[bool] = False
    norms: ClassVar[tuple[str, ...]] = ("linf", "l2", "l1")
    per_example: ClassVar[tuple[str, ...]] = ("threat",)

    def __post_init__(self) -> None:
        if not isinstance(self.threat, Ball) or self.threat.norm not in self.norms:
            raise TypeError(
                f"square searches in Linf, L2 and L1 balls, whose windows and signs it knows; got a "
                f"{type(self.threat).__name__}. Take an attack that asks the threat model alone, such as pgd"
            )
        if not bool(torch.as_tensor(self.threat.radius).isfinite().all()):
            raise ValueError("square puts windows on the edge of the ball and so needs a finite radius")
        if self.num_queries < 0 or not 0 < self.p <= 1:
            raise ValueError(f"expected num_queries >= 0 and 0 < p <= 1; got {self.num_queries} and {self.p}")

    def __call__(self, model: Model, x: Inputs, target: Tensor, *, noise: Noise | None = None) -> AttackResult:
        threat = self.threat
        with crafting(threat, model, x, target, noise) as (frozen, x, target, noise):
            assert isinstance(x, Tensor)  # a ball refuses others
            num, label = len(x), labels_of(target)
            z = start(threat, x, noise)
            loss, hit = _look(frozen, threat, x, z, label)
            reached, rows, cost = hit.clone(), torch.arange(num, device=x.device), num
            for t in range(self.num_queries):
                if t == 0 or bool(hit.any()):  # a wait for the device per query; what fell costs no further pass
                    rows = rows[~hit]
                    part, near, own = take(threat, rows), x[rows], label[rows]
                if not len(rows):
                    break
                if t % QUERIES_AT_ONCE == 0:
                    draws = noise.uniform((QUERIES_AT_ONCE, 5 + grid(x)[0]), draw=1 + t // QUERIES_AT_ONCE)
                old_z, old = z[rows], loss[rows]
                trial = proposal(part, near, old_z, draws[rows, t % QUERIES_AT_ONCE], self.share(t))
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


def start(threat: Ball, x: Tensor, noise: Noise) -> Tensor:
    """Linf: stripes of +-radius from top to bottom, their signs per channel. L2 and L1: a chessboard of humps."""
    channels, height, width = grid(x)
    if threat.norm == "linf":
        stripes = signs(noise.uniform((channels, 1, width)), x).expand(-1, -1, height, -1)
        return _into_set(threat, x, stripes * per_example(threat.radius, stripes))
    tiles = math.prod(n // tile(n) for n in (height, width))
    return _into_set(threat, x, chessboard(noise.uniform((tiles, 1 + channels)), x, _power(threat)))


def proposal(threat: Ball, x: Tensor, z: Tensor, u: Tensor, share: float) -> Tensor:
    """z with a window changed. u (b, 5 + C) in [0, 1): two positions, how humps are split, the channels' signs."""
    channels, height, width = grid(x)
    linf, q = threat.norm == "linf", _power(threat)
    h, w = window(share, height, width, least=1 if linf else 3)
    flat = z.reshape(-1, channels, height * width)
    sign, radius = signs(u[:, 5:, None], z), per_example(threat.radius, flat)
    into = cells(u[:, :2], height, width, h, w).expand(-1, channels, -1)
    if linf:
        return _into_set(threat, x, flat.scatter(2, into, (sign * radius).expand(into.shape)))
    out_of = cells(u[:, 2:4], height, width, h, w).expand(-1, channels, -1)
    pattern = sign * humps(h, w, q).to(z)[(u[:, 4] < 0.5).long()][:, None]
    return _into_set(threat, x, moved(flat, radius, q, into, out_of, pattern))


def _into_set(threat: Ball, x: Tensor, v: Tensor) -> Tensor:
    """Projected; L2 goes to the sphere first."""
    v = v.reshape(x.shape)
    return threat.project(x, threat.steepest(x, v) * per_example(threat.radius, x) if threat.norm == "l2" else v)


def _power(threat: Ball) -> int:
    return 2 if threat.norm == "l2" else 1


def grid(x: Tensor) -> tuple[int, int, int]:
    """(C, H, W) that one input is seen as: (D,) is (1, 1, D), (C, L) is (C, 1, L), leading axes are channels."""
    *channels, height, width = (x.shape[1], 1, x.shape[2]) if x.ndim == 3 else (1, 1, *x.shape[1:])
    return math.prod(channels), height, width


def window(share: float, height: int, width: int, least: int) -> tuple[int, int]:
    """(h, w) of the square that covers `share` of the places; it gets longer where the input is too low for it.

    least: 1; or 3, for sides that are odd, too, unless they span the input.
    """
    short = min(height, width)
    side = _side(math.sqrt(share * height * width), least)
    if side <= short:
        return side, side
    length = min(max(_side(share * height * width / short, least), short), max(height, width))
    return (short, length) if height <= width else (length, short)


def _side(length: float, least: int) -> int:
    side = max(round(length), least)
    return side if least == 1 else side | 1


def cells(u: Tensor, height: int, width: int, h: int, w: int) -> Tensor:
    """(b, 1, h * w) the places of a window, each position as likely, from numbers u (b, 2) in [0, 1)."""
    # u has 24 bits, so that u * n stays below n when rounded to 24 bits, too: no window leaves the grid
    top, left = (u[:, 0] * (height - h + 1)).long(), (u[:, 1] * (width - w + 1)).long()
    rows = top[:, None] + torch.arange(h, device=u.device)
    columns = left[:, None] + torch.arange(w, device=u.device)
    return (rows[:, :, None] * width + columns[:, None, :]).view(len(u), 1, h * w)


def signs(u: Tensor, like: Tensor) -> Tensor:
    """-1 or 1, each as likely, from numbers in [0, 1)."""
    return (u >= 0.5).to(like) * 2 - 1


@lru_cache(maxsize=64)
def humps(h: int, w: int, q: int) -> Tensor:
    """(2, h * w) float64 of norm 1: one hump up, one down, in the halves of the rows, or in those of the columns."""
    return torch.stack([_pair(h, w, q).flatten(), _pair(w, h, q).T.flatten()])


def _pair(h: int, w: int, q: int) -> Tensor:
    pair = torch.cat([_hump(h // 2, w, q), -_hump(h - h // 2, w, q)])
    return pair / torch.linalg.vector_norm(pair, q)


def _hump(h: int, w: int, q: int) -> Tensor:
    """Norm 1; falls in square rings around the middle: ring r = 0, 1, ... has the height sum_{k > r} k^-(4 / q)."""
    rows, columns = (torch.arange(n) - n // 2 for n in (h, w))
    ring = torch.maximum(rows.abs()[:, None], columns.abs())
    steps = torch.arange(1, max(h, w) // 2 + 2, dtype=torch.float64) ** -(4 // q)
    hump = steps.flip(0).cumsum(0).flip(0)[ring]
    return hump / torch.linalg.vector_norm(hump, q)


def tile(length: int) -> int:
    """The side of a tile of the chessboard: a fifth."""
    return max(length // 5, 1)


def chessboard(u: Tensor, like: Tensor, q: int) -> Tensor:
    """(b, C, H, W) humps of random sign in every tile of a centred grid; tiles are a fifth as high and as wide.

    u (b, tiles, 1 + C) in [0, 1) says how each tile is split, and the sign of each channel.
    """
    channels, height, width = grid(like)
    h, w = tile(height), tile(width)
    down, across = height // h, width // w
    split = humps(h, w, q).to(like)[(u[:, :, 0] < 0.5).long()]
    tiles = split[:, None] * signs(u[:, :, 1:], like).transpose(1, 2)[..., None]  # (b, C, tiles, h * w)
    tiles = tiles.view(-1, channels, down, across, h, w).transpose(3, 4).reshape(-1, channels, down * h, across * w)
    top, left = (height - down * h) // 2, (width - across * w) // 2
    return F.pad(tiles, (left, width - across * w - left, top, height - down * h - top))


def moved(z: Tensor, radius: Any, q: int, into: Tensor, out_of: Tensor, pattern: Tensor) -> Tensor:
    """z with the length that lies in two windows, and what is left up to the radius, put into one of them.

    into, out_of (b, C, h * w): places. pattern (b, C, h * w) of norm 1 is added to the direction that was there.
    """
    there = z.gather(2, into)
    rest = z.scatter(2, into, 0.0)
    powers = [v.abs().pow(q).sum(2, keepdim=True) for v in (there, rest.gather(2, out_of))]
    left = (radius**q - z.abs().pow(q).sum((1, 2), keepdim=True)).clamp_min(0) / z.shape[1]
    length = (left + powers[0] + powers[1]) ** (1 / q)
    if q == 1:
        length = length * z.shape[1]  # as published; the projection that follows takes back what is too much
    filled = F.normalize(pattern + F.normalize(there, q, 2), q, 2) * length
    return rest.scatter(2, out_of, 0.0).scatter(2, into, filled)
