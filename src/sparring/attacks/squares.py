"""The shapes of the Square attack: where a window lies, what fills it, how length moves from one into another.

Letters: b examples, C channels, H x W places, h x w a window; q the power of the norm, 2 or 1. z is (b, C, H * W).
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sparring.core.geometry import per_example
from sparring.core.noise import Noise
from sparring.threats.balls import L2, Ball, Linf


def start(threat: Ball, x: Tensor, noise: Noise) -> Tensor:
    """Linf: stripes of +-radius from top to bottom, their signs per channel. L2 and L1: a chessboard of humps."""
    channels, height, width = grid(x)
    if isinstance(threat, Linf):
        stripes = signs(noise.uniform((channels, 1, width)), x).expand(-1, -1, height, -1)
        return _into_set(threat, x, stripes * per_example(threat.radius, stripes))
    tiles = math.prod(n // tile(n) for n in (height, width))
    return _into_set(threat, x, chessboard(noise.uniform((tiles, 1 + channels)), x, _power(threat)))


def proposal(threat: Ball, x: Tensor, z: Tensor, u: Tensor, share: float) -> Tensor:
    """z with a window changed. u (b, 5 + C) in [0, 1): two positions, how humps are split, the channels' signs."""
    channels, height, width = grid(x)
    linf, q = isinstance(threat, Linf), _power(threat)
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
    return threat.project(x, threat.steepest(x, v) * per_example(threat.radius, x) if isinstance(threat, L2) else v)


def _power(threat: Ball) -> int:
    return 2 if isinstance(threat, L2) else 1


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
