"""Pure maths of norm balls on batches (B, *X). Radii are a number or (B,)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from sparring.core.noise import Noise


def per_example(value: Any, like: Tensor) -> Any:
    """A number stays one; (B,) becomes (B, 1, ..., 1), ready to multiply `like` (B, *X)."""
    if not isinstance(value, Tensor) or value.ndim == 0:
        return value
    value = value if value.dtype == torch.bool else value.to(like)
    return value.view(-1, *[1] * (like.ndim - 1))


def laid_out(draw: Tensor, like: Tensor) -> Tensor:
    """The numbers in the type, on the device and in the memory layout of `like`: channels last stay last."""
    draw = draw.to(like)
    return draw if draw.stride() == like.stride() else torch.empty_like(like).copy_(draw)


def l1_norm(v: Tensor) -> Tensor:
    """(B,) sums of absolute entries."""
    return v.abs().flatten(1).sum(1)


def l2_norm(v: Tensor) -> Tensor:
    """(B,) Euclidean norms."""
    return torch.linalg.vector_norm(v.flatten(1), dim=1)


def linf_norm(v: Tensor) -> Tensor:
    """(B,) largest absolute entries."""
    return torch.linalg.vector_norm(v.flatten(1), ord=math.inf, dim=1)


def unit_l2(v: Tensor) -> Tensor:
    """v / ||v||_2 per example; zero stays zero."""
    # scaled by the largest entry first: gradients of confident models underflow when squared in float32
    scaled = v / per_example(linf_norm(v).clamp_min(torch.finfo(v.dtype).tiny), v)
    return scaled / per_example(l2_norm(scaled).clamp_min(torch.finfo(v.dtype).tiny), v)


def shrink_linf(v: Tensor, radius: float | Tensor) -> Tensor:
    """The nearest point with largest entry <= radius; a new tensor."""
    r = per_example(radius, v)
    return torch.clamp(v, -r, r)


def shrink_l2(v: Tensor, radius: float | Tensor) -> Tensor:
    """The nearest point with Euclidean norm <= radius; a new tensor."""
    norm = l2_norm(v).clamp_min(torch.finfo(v.dtype).tiny)
    return v * per_example((per_example(radius, norm) / norm).clamp_max(1.0), v)


def shrink_l1(v: Tensor, radius: float | Tensor) -> Tensor:
    """The nearest point with sum of absolute entries <= radius; a new tensor.

    Source: Duchi 2008, figure 1, for a batch.
    """
    return project_l1_box(v, radius, None, None)


def project_l1_box(v: Tensor, radius: float | Tensor, low_room: Tensor | None, high_room: Tensor | None) -> Tensor:
    """The nearest point of {||z||_1 <= radius, low_room <= z <= high_room}, to rounding; a new tensor.

    The rooms (B, *X), low_room <= 0 <= high_room, say how far each entry may go down and up; None for no bound.
    z_i = sign(v_i) clip(h - d_i, 0, c_i): water of height h over columns whose ground is at d_i = max|v| - |v_i| and
    which hold c_i, what the room leaves of |v_i|. The amount of water is piecewise linear in h, so one sort of grounds
    and brims finds the h that makes it the radius. Heights count from max|v|, so that small radii keep their digits.

    Source: Croce and Hein 2021 ("Mind the Box"), who project onto the same set by sorting, for the box [0, 1].

    >>> v, x = torch.tensor([[3.0, 1.0, 0.5]]), torch.tensor([[0.5, 0.5, 0.5]])
    >>> [round(number, 3) for number in project_l1_box(v, 1.0, -x, 1 - x)[0].abs().tolist()]
    [0.5, 0.5, 0.0]
    """
    unbounded = low_room is None and high_room is None
    boxed = v.clone() if unbounded else v.clamp(low_room, high_room)
    if not isinstance(radius, Tensor) and math.isinf(radius):
        return boxed
    far, room = v.abs().flatten(1), boxed.abs().flatten(1)
    depth = far.amax(1, keepdim=True) - far
    limit = torch.zeros_like(depth[:, :1]) + per_example(radius, depth)
    # each column between ground and brim adds 1 to the rate; without a box the radius comes before any brim
    edges, order = (depth if unbounded else torch.cat([depth, depth + room], 1)).sort(1)
    rate = torch.where(order < depth.shape[1], 1, -1).cumsum(1)
    length = torch.nn.functional.pad((rate[:, :-1] * edges.diff(dim=1)).cumsum(1), (1, 0))
    last = ((length <= limit).sum(1, keepdim=True) - 1).clamp_min(0)
    height = edges.gather(1, last) + (limit - length.gather(1, last)) / rate.gather(1, last).clamp_min(1)
    water = torch.minimum((height - depth).clamp_min_(0), room)
    water *= (limit / water.sum(1, keepdim=True).clamp_min(torch.finfo(v.dtype).tiny)).clamp_max(1)  # rounding only
    return torch.where(per_example(room.sum(1) <= limit[:, 0], v), boxed, water.view_as(v).copysign(v))


def uniform_linf(noise: Noise, like: Tensor) -> Tensor:
    """Uniform in the cube [-1, 1]^D."""
    return laid_out(noise.uniform(like.shape[1:]), like).mul_(2).sub_(1)


def uniform_l1(noise: Noise, like: Tensor, free: Tensor | None) -> Tensor:
    """Uniform in the L1 unit ball of the free coordinates: e_i / (e_1 + ... + e_D + e_0), e exponential, signs random.

    `free` (B or 1, *X) bool tells the coordinates that may change (None = all).
    """
    size, sign = (laid_out(noise.uniform(like.shape[1:], draw), like) for draw in (0, 1))
    size = torch.log1p(-size).neg_()
    if free is not None:
        size = size * free
    spare = -torch.log1p(-noise.uniform((1,), draw=2)[:, 0].to(like))
    total = (size.flatten(1).sum(1) + spare).clamp_min(torch.finfo(like.dtype).tiny)
    return torch.where(sign < 0.5, -size, size) / per_example(total, like)


def uniform_l2(noise: Noise, like: Tensor, free: Tensor | None) -> Tensor:
    """Uniform in the Euclidean unit ball of the free coordinates: normal direction, length u^(1/D).

    `free` (B or 1, *X) bool tells the coordinates that may change (None = all); D is their number.
    """
    free = torch.ones_like(like, dtype=torch.bool) if free is None else free
    direction = laid_out(noise.normal(like.shape[1:]), like) * free
    dims = free.flatten(1).sum(1).clamp_min(1).expand(like.shape[0])
    length = noise.uniform((1,), draw=1)[:, 0].to(like) ** (1.0 / dims.to(like))
    return unit_l2(direction) * per_example(length, like)
