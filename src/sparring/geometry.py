"""Pure maths of norm balls on batches (B, *X). Radii are a number or (B,)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from sparring.noise import Noise


def per_example(value: Any, like: Tensor) -> Any:
    """A number stays one; (B,) becomes (B, 1, ..., 1), ready to multiply `like` (B, *X)."""
    if not isinstance(value, Tensor) or value.ndim == 0:
        return value
    value = value if value.dtype == torch.bool else value.to(like)
    return value.view(-1, *[1] * (like.ndim - 1))


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


def uniform_linf(noise: Noise, like: Tensor) -> Tensor:
    """Uniform in the cube [-1, 1]^D."""
    return noise.uniform(like.shape[1:]).to(like).mul_(2).sub_(1)


def uniform_l2(noise: Noise, like: Tensor, free: Tensor | None) -> Tensor:
    """Uniform in the Euclidean unit ball of the free coordinates: normal direction, length u^(1/D).

    `free` (B or 1, *X) bool tells the coordinates that may change (None = all); D is their number.
    """
    direction = noise.normal(like.shape[1:]).to(like)
    if free is None:
        dims = torch.full((like.shape[0],), float(like[0].numel() if len(like) else 1))
    else:
        direction = direction * free
        dims = free.flatten(1).sum(1).clamp_min(1).expand(like.shape[0])
    length = noise.uniform((1,), draw=1)[:, 0].to(like) ** (1.0 / dims.to(like))
    return unit_l2(direction) * per_example(length, like)
