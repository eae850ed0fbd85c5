"""FAB and FAB-T: steps onto the linearised decision boundary, towards the nearest adversarial example."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from sparring.attacks.hyperplane import closest_plane, step_beyond
from sparring.core.geometry import per_example
from sparring.core.model_state import attack_mode, private_rng
from sparring.core.noise import Noise
from sparring.core.objectives import margin
from sparring.core.types import Attacker, AttackResult, Cost, Inputs, Model, labels_of, take
from sparring.threats.balls import L1, L2, Ball, Linf

_NORMS: dict[type[Ball], float] = {Linf: math.inf, L2: 2, L1: 1}


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
    per_example: ClassVar[tuple[str, ...]] = ("threat",)

    def __post_init__(self) -> None:
        if not isinstance(self.threat, tuple(_NORMS)):
            raise TypeError(f"FAB knows Linf, L2 and L1 balls, not {type(self.threat).__name__}; try pgd there")
        if self.num_steps < 0 or self.restarts < 1 or (self.targets is not None and self.targets < 1):
            raise ValueError(f"num_steps must be at least 0, restarts and targets at least 1; got {self}")

    def __call__(self, model: Model, x: Inputs, target: Tensor, *, noise: Noise | None = None) -> AttackResult:
        if not isinstance(x, Tensor):
            raise TypeError(f"FAB moves points of a vector space: x must be a tensor (B, *X); got {type(x).__name__}")
        noise, cost = (noise or Noise.make(0, "attack", torch.arange(len(x)))).to(x.device), Cost(2 * len(x))
        with attack_mode(model) as frozen, private_rng(noise.seed, x.device), torch.inference_mode(False):
            x, y = x.detach().clone(), labels_of(target.detach().clone())
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
        norm = next(norm for kind, norm in _NORMS.items() if isinstance(self.threat, kind))
        x, box = part.x, Linf(math.inf, self.threat.low, self.threat.high)  # no ball, for the room in the box
        low, high = (box.project(x, torch.full_like(x, end)).flatten(1) for end in (-math.inf, math.inf))
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
        if logits.ndim != 2 or logits.shape[1] < 2 or self.y.shape != logits.shape[:1]:
            raise ValueError(f"FAB needs logits (B, K >= 2) and labels (B,); got {logits.shape} and {self.y.shape}")
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
