"""FAB and FAB-T: steps onto the linearised decision boundary, towards the nearest adversarial example.

The geometry below is pure maths on batches (B, D): the smallest step onto a hyperplane within a box.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from sparring.attacks.starts import crafting
from sparring.core.geometry import per_example
from sparring.core.noise import Noise
from sparring.core.objectives import margin
from sparring.core.types import Attacker, AttackResult, Cost, Inputs, Model, labels_of, take
from sparring.threats.balls import Ball

_NORMS = {"linf": math.inf, "l2": 2, "l1": 1}


def fab(threat: Ball, *, num_steps: int = 100, restarts: int = 1) -> Attacker:
    """FAB: steps beyond the closest of all linearised boundaries, and keeps the smallest z that fools.

    A step takes K - 1 backwards, the slopes of the wrong classes' leads over the label, and goes to the closest of
    their planes by `step_beyond` (eta 1.05, alpha_max 0.1); after a z that fools it goes on at 0.9 z. The first run
    starts at the clean input, others at random within half the radius or half the best size, whichever is less. Between
    runs what is found within a finite radius is done. What is not `reached` is the best or last z, projected into the
    set. With an infinite radius all runs run on all, and `size` serves every radius at once. loss: the margin.

    Threats: Linf, L2, L1 (else TypeError). Source: Croce and Hein 2020, "Minimally distorted adversarial examples with
    a fast adaptive boundary attack". AutoAttack's code has no final search either; it judges only points it steps to,
    we also those where gradients are taken (at no cost); its restarts are on the surface of half the ball.

    >>> from sparring import Linf
    >>> fab(Linf(math.inf), num_steps=20)(lambda x: 5 * x, torch.tensor([[0.7, 0.5]]), torch.tensor([0])).size
    tensor([0.100...])
    """
    return FAB(threat, num_steps, None, restarts)


def fab_t(threat: Ball, *, num_steps: int = 100, targets: int = 9, restarts: int = 1) -> Attacker:
    """FAB towards min(targets, K - 1) wrong classes, the likeliest at the clean input first; one backward a step.

    Any wrong class counts; all else as in `fab`. Source: Croce and Hein 2020, "Reliable evaluation ...", FAB^T.
    """
    return FAB(threat, num_steps, targets, restarts)


@dataclass(frozen=True)
class FAB:
    """The attack of `fab` (targets=None) and of `fab_t`, which explain the numbers."""

    threat: Ball
    num_steps: int = 100
    targets: int | None = None
    restarts: int = 1
    alpha_max: float = 0.1
    eta: float = 1.05
    beta: float = 0.9
    needs_grad: ClassVar[bool] = True
    norms: ClassVar[tuple[str, ...]] = tuple(_NORMS)
    per_example: ClassVar[tuple[str, ...]] = ("threat",)

    def __post_init__(self) -> None:
        if not isinstance(self.threat, Ball) or self.threat.norm not in self.norms:
            raise TypeError(f"FAB knows Linf, L2 and L1 balls, not {type(self.threat).__name__}; try pgd there")
        if self.num_steps < 0 or self.restarts < 1 or (self.targets is not None and self.targets < 1):
            raise ValueError(f"num_steps must be at least 0, restarts and targets at least 1; got {self}")

    def __call__(self, model: Model, x: Inputs, target: Tensor, *, noise: Noise | None = None) -> AttackResult:
        with crafting(self.threat, model, x, target, noise) as (frozen, x, target, noise):
            assert isinstance(x, Tensor)  # a ball refuses others
            y, cost = labels_of(target), Cost(2 * len(x))
            null = self.threat.project(x, self.threat.null(x))
            every = _Search(frozen, self.threat, x, y, null.clone(), null, self.threat.size(x, null) + math.inf)
            order = every.look(null)[1].argsort(dim=1, descending=True, stable=True)
            rivals = order[order != y[:, None]].view(len(x), order.shape[1] - 1)  # the likeliest first
            groups = (rivals,) if self.targets is None else rivals[:, : self.targets].split(1, dim=1)
            radius = torch.as_tensor(self.threat.radius).to(every.size)
            for run in range(len(groups) * self.restarts):
                rows = ((every.size > 0) & ~((every.size <= radius) & radius.isfinite())).nonzero()[:, 0]
                if not len(rows):
                    break
                held = (v[rows] for v in (x, y, every.z, every.best, every.size))
                part = _Search(frozen, take(self.threat, rows), *held)
                part.z = part.start(noise.restart(run).take(rows)) if run % self.restarts else null[rows]
                self._run(part, groups[run // self.restarts][rows])
                every.z[rows], every.best[rows], every.size[rows] = part.z, part.best, part.size
                cost = cost.plus(Cost(2 * self.num_steps * len(rows), self.num_steps * len(rows) * groups[0].shape[1]))
            z = torch.where(per_example(every.size.isfinite(), x), every.best, every.z)
            z = torch.where(per_example(every.size <= radius, x), z, self.threat.project(x, z))
            loss = margin.score(every.look(z)[1], y)  # cut to the radius it may fool all the same, which the look sees
        reached = (every.size <= radius) & every.size.isfinite()
        return AttackResult(self.threat.realize(x, z), z, self.threat.size(x, z), loss, reached, cost)

    def _run(self, part: _Search, classes: Tensor) -> None:
        """Steps from part.z towards the boundaries to `classes` (B, m)."""
        x, norm = part.x, _NORMS[str(self.threat.norm)]
        room = part.threat.room(x) or (torch.full_like(x, -math.inf), torch.full_like(x, math.inf))
        low, high = (side.flatten(1) for side in room)
        for _ in range(self.num_steps):
            lead, slope = closest_plane(*part.planes(classes), norm)
            z = step_beyond(part.z.flatten(1), lead, slope, norm, low, high, self.eta, self.alpha_max).view_as(x)
            part.z = torch.where(per_example(part.look(z)[2], z), self.beta * z, z)


@dataclass
class _Search:
    """Some examples x, y; where each search is, z; the smallest `best` that fools; its `size`, infinite without one."""

    model: Model
    threat: Ball
    x: Tensor
    y: Tensor
    z: Tensor
    best: Tensor
    size: Tensor

    def look(self, z: Tensor, graph: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        """The very input that is judged, its logits (B, K), and where it fools (B,); what is better is kept."""
        point = self.threat.realize(self.x, z).requires_grad_(graph)
        with torch.set_grad_enabled(graph):
            logits = self.model(point)
        fools = margin.reached(logits, self.y) & margin.score(logits.detach(), self.y).isfinite()
        better = fools & ((size := self.threat.size(self.x, z)) < self.size)
        self.best, self.size = torch.where(per_example(better, z), z, self.best), torch.where(better, size, self.size)
        return point, logits, fools

    def planes(self, classes: Tensor) -> tuple[Tensor, Tensor]:
        """The leads of `classes` (B, m) over the label at z, and their slopes (B, m, D), 0 where x may not change."""
        point, logits, _ = self.look(self.z, graph=True)
        leads = logits.gather(1, classes) - logits.gather(1, self.y[:, None])
        sums, mask = leads.sum(0) if leads.requires_grad else (), 1 if self.threat.mask is None else self.threat.mask
        grads = [torch.autograd.grad(one, point, retain_graph=True, allow_unused=True)[0] for one in sums]
        if not grads or grads[0] is None:
            raise ValueError("no gradient reaches the input through autograd; use an attack that needs none")
        return leads.detach(), torch.stack([(grad * mask).flatten(1) for grad in grads], 1)

    def start(self, noise: Noise) -> Tensor:
        """At random within half the radius or the best size; half the last point's size where neither is finite."""
        radius = torch.as_tensor(self.threat.radius).to(self.size).minimum(self.size)
        radius = torch.where(radius.isfinite(), radius, self.threat.size(self.x, self.z))
        return replace(self.threat, radius=radius / 2).sample(self.x, noise)


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
