"""The smallest step onto a hyperplane within a box, measured in Linf, L2 or L1. Pure maths on batches (B, D)."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def onto_plane(
    w: Tensor, gap: Tensor, norm: float, low: float | Tensor = -math.inf, high: float | Tensor = math.inf
) -> Tensor:
    """The d (B, D) of smallest p-norm with <w, d> = gap and low <= d <= high.

    w: (B, D); gap: (B,); norm: p, one of 1, 2 and math.inf; low <= 0 <= high: numbers or tensors that broadcast to
    (B, D). From a point x onto {v: <w, v> = b} within the box [l, h], gap is b - <w, x>, low is l - x, high is h - x.
    Where no such d exists: the one whose <w, d> comes closest to gap, every entry at the end that helps. Entries with
    w = 0 stay 0. The scale of w does not matter. Raises ValueError for another norm.

    With the sign taken out, d_i = t_i >= 0 and what one entry can give at most is |w_i| room_i. In L1 the entries with
    the largest |w_i| give all they can, one after the other; in Linf t_i = min(tau, room_i), in L2
    t_i = min(tau |w_i|, room_i), where <|w|, t> is piecewise linear and rising in tau. One sort and two cumulative sums
    each; exact up to rounding.
    Source: Croce and Hein 2020, "Minimally distorted adversarial examples with a fast adaptive boundary attack",
    whose code bisects the sorted ends, and takes |w_i| < 1e-8 for 0 in L2 and L1.

    >>> onto_plane(torch.tensor([[3.0, 4.0]]), torch.tensor([5.0]), 2)
    tensor([[0.6000, 0.8000]])
    >>> step = onto_plane(torch.tensor([[1.0, 1.0]]), torch.tensor([3.0]), math.inf, high=torch.tensor([[9.0, 1.0]]))
    >>> [round(number, 3) for number in step[0].tolist()]
    [2.0, 1.0]
    """
    if norm not in (1, 2, math.inf):
        raise ValueError(f"norm={norm}; the smallest step onto a hyperplane is known here for 1, 2 and math.inf")
    largest = w.abs().amax(1, keepdim=True).clamp_min(torch.finfo(w.dtype).tiny)
    slope, gap = w / largest, gap[:, None] / largest  # gradients can be so small that their squares underflow
    sign, slope, gap = slope.sign() * gap.sign(), slope.abs(), gap.abs()
    room = torch.where(sign > 0, torch.as_tensor(high).to(w), -torch.as_tensor(low).to(w))
    if norm == 1:
        steps = _greedy(slope, room.masked_fill(sign == 0, 0), gap)
    else:
        each = slope if norm == 2 else torch.ones_like(slope)  # t_i = min(tau * each_i, room_i)
        weight = slope * each
        room = room.masked_fill((sign == 0) | (weight == 0), 0)
        tau = _level(weight, (room / each).masked_fill(room == 0, 0), gap)
        steps = torch.minimum(tau * each, room)
    return sign * steps


def closest_plane(leads: Tensor, slopes: Tensor, norm: float) -> tuple[Tensor, Tensor]:
    """Of the planes {d: lead + <slope, d> = 0} the one that is closest to 0 in the p-norm: lead (B,), slope (B, D).

    leads: (B, m); slopes: (B, m, D); norm: p. The distance is |lead| over the dual norm of the slope.

    >>> closest_plane(torch.tensor([[4.0, -3.0]]), torch.tensor([[[2.0, 2.0], [0.0, 1.0]]]), math.inf)
    (tensor([4.]), tensor([[2., 2.]]))
    """
    dual = torch.linalg.vector_norm(slopes, ord={1: math.inf, 2: 2, math.inf: 1}[norm], dim=2)
    closest = (leads.abs() / dual).nan_to_num(nan=math.inf).argmin(1, keepdim=True)
    return leads.gather(1, closest)[:, 0], slopes.take_along_dim(closest[:, :, None], 1)[:, 0]


def step_beyond(
    z: Tensor, lead: Tensor, slope: Tensor, norm: float, low: Tensor, high: Tensor, eta: float, alpha_max: float
) -> Tensor:
    """(1 - alpha) (z + eta d(z)) + alpha eta d(0), cut to low <= z <= high: beyond the plane, and drawn towards 0.

    The plane is {v: lead + <slope, v - z> = 0}, d(v) the smallest step onto it from v in the box, and alpha =
    min(|d(z)| / (|d(z)| + |d(0)|), alpha_max). z, slope, low, high: (B, D); lead: (B,); eta >= 1 is the overshoot.
    A z whose lead or slope is not finite stays where it is. Source: as `onto_plane`.
    """
    near = onto_plane(slope, -lead, norm, low - z, high - z)
    far = onto_plane(slope, (slope * z).sum(1) - lead, norm, low, high)
    a, b = (torch.linalg.vector_norm(d, ord=norm, dim=1, keepdim=True) for d in (near, far))
    alpha = (a / (a + b).clamp_min(torch.finfo(z.dtype).tiny)).clamp_max(alpha_max)
    moved = ((1 - alpha) * (z + eta * near) + alpha * eta * far).clamp(low, high)
    return torch.where(moved.isfinite().all(1, keepdim=True), moved, z)


def _greedy(slope: Tensor, room: Tensor, gap: Tensor) -> Tensor:
    """0 <= t_i <= room_i with <slope, t> = gap (B, 1) and the smallest sum: the steepest entries first."""
    slope, order = slope.sort(dim=1, descending=True, stable=True)
    room = room.gather(1, order)
    left = (gap - _before((slope * room).cumsum(1))).clamp_min(0)
    steps = torch.minimum(left / slope.clamp_min(torch.finfo(slope.dtype).tiny), room)
    return torch.empty_like(steps).scatter_(1, order, steps)


def _level(weight: Tensor, ends: Tensor, gap: Tensor) -> Tensor:
    """The tau (B, 1) with sum_i weight_i min(tau, ends_i) = gap (B, 1); the largest number where no tau is enough."""
    ends, order = ends.sort(dim=1, stable=True)
    weight = weight.gather(1, order)
    passed = _before((weight * ends).cumsum(1))  # what the entries at their end give
    rising = weight.flip(1).cumsum(1).flip(1)  # the weight of the others; summed from behind, so that nothing cancels
    reached = passed + rising * ends  # the sum at tau = ends_k
    k = (reached < gap).sum(1, keepdim=True)
    last = k.clamp_max(ends.shape[1] - 1)
    tau = (gap - passed.gather(1, last)) / rising.gather(1, last).clamp_min(torch.finfo(ends.dtype).tiny)
    tau = tau.clamp(_before(ends).gather(1, last), ends.gather(1, last))
    return torch.where(k == last, tau, torch.finfo(ends.dtype).max)


def _before(sums: Tensor) -> Tensor:
    """Each column the one before it, the first 0."""
    return F.pad(sums[:, :-1], (1, 0))
