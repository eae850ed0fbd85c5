"""Attacks made of attacks: restarts, targets, averages over looks, a smoothed backward pass."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from sparring.attacks.starts import crafting, gradient
from sparring.core.geometry import per_example
from sparring.core.model_state import Frozen, attack_mode
from sparring.core.noise import Noise
from sparring.core.objectives import Objective, TargetedDLR
from sparring.core.types import Attacker, AttackResult, Cost, Inputs, Model, labels_of, map_inputs, size, take
from sparring.threats.inputs import check_kind


@dataclass(frozen=True)
class Restarts:
    """`attack` up to `num` times from other random starts; per example the worst result is kept.

    Worst: one that reaches the goal, else the highest loss. An example that has fallen is not attacked again, which
    costs one wait for the device per restart.

    >>> from sparring import Linf, pgd
    >>> Restarts(pgd(Linf(0.1), num_steps=2), 3)(torch.nn.Linear(4, 3), torch.rand(2, 4), torch.tensor([0, 2])).z.shape
    torch.Size([2, 4])
    """

    attack: Attacker
    num: int
    per_example: ClassVar[tuple[str, ...]] = ("attack",)

    def __post_init__(self) -> None:
        if self.num < 1:
            raise ValueError(f"restarts must be at least 1; got {self.num}")

    def __call__(self, model: Model, x: Inputs, target: Tensor, *, noise: Noise | None = None) -> AttackResult:
        def again(number: int, rows: Tensor) -> Attacker:
            return self.attack if number == 0 else take(self.attack, rows)

        check_kind(x)
        noise = noise or Noise.make(0, "attack", torch.arange(size(x)))
        return _worst("restarts", self.num, again, model, x, target, noise)


@dataclass(frozen=True)
class EachTarget:
    """`attack` towards `num` wrong classes, one after the other: the likeliest, or the nearest.

    `goal` makes the objective from the wanted classes (B,). The attack goes on only on what still stands; per example
    the worst result is kept. With K classes there are at most K - 1 targets. Likeliest: by the logits at the clean
    input. With `nearest`, the likeliest nine (or `num`) are ranked by how far the linearised model has to be moved to
    them, (f_y - f_k) / |grad(f_y - f_k)| in the dual norm of the threat, for a backward pass each: a class with a
    small logit may have a steep slope.

    Source: Croce and Hein 2020, section 5: the nine classes with the largest logits. The linearised distance is
    DeepFool's (Moosavi-Dezfooli 2016, eq. 8) and FAB's (Croce and Hein 2020, "Minimally distorted", eq. 4).

    >>> from sparring import Linf, pgd
    >>> attack = EachTarget(pgd(Linf(0.1), num_steps=2), 2)
    >>> attack(torch.nn.Linear(4, 3), torch.rand(2, 4), torch.tensor([0, 2])).z.shape
    torch.Size([2, 4])
    """

    attack: Any
    num: int = 9
    goal: Callable[[Tensor], Objective] = TargetedDLR
    nearest: bool = False
    per_example: ClassVar[tuple[str, ...]] = ("attack",)

    def __post_init__(self) -> None:
        if self.num < 1:
            raise ValueError(f"targets must be at least 1; got {self.num}")
        if part_of(self.attack, "objective") is None:
            raise TypeError(f"targets are sought through the objective, and a {type(self.attack).__name__} has none")

    def __call__(self, model: Model, x: Inputs, target: Tensor, *, noise: Noise | None = None) -> AttackResult:
        with crafting(part_of(self.attack, "threat"), model, x, target, noise) as (frozen, x, target, noise):
            order, looks = self._order(frozen, x, target)

            def towards(number: int, rows: Tensor) -> Attacker:
                return seeking(take(self.attack, rows), self.goal(order[rows, number]))

            worst = _worst("targets", min(self.num, order.shape[1] - 1), towards, frozen, x, target, noise)
        return worst._replace(cost=worst.cost.plus(looks))

    def _order(self, model: Model, x: Inputs, target: Tensor) -> tuple[Tensor, Cost]:
        """The classes (B, K), the likeliest or nearest wrong one first, the label last; and what it cost to see."""
        threat, own = part_of(self.attack, "threat"), labels_of(target)[:, None]
        z = threat.null(x).requires_grad_(self.nearest)
        with torch.set_grad_enabled(self.nearest):
            logits = model(threat.apply(x, z))
        order = logits.detach().scatter(1, own, -math.inf).argsort(dim=1, descending=True, stable=True)
        if not self.nearest:
            return order, Cost(forwards=size(x))
        num = min(max(self.num, 9), order.shape[1] - 1)
        distances = []
        for wrong in order[:, :num].split(1, 1):
            lead = (logits.gather(1, own) - logits.gather(1, wrong))[:, 0]
            grad = gradient(lead, z, keep_graph=True)
            slope = (grad * threat.steepest(x, grad)).flatten(1).sum(1)
            distances.append((lead.detach() / slope).nan_to_num(nan=math.inf))
        nearest = order[:, :num].gather(1, torch.stack(distances, 1).argsort(dim=1, stable=True))
        return torch.cat([nearest, order[:, num:]], 1), Cost(size(x), num * size(x))


@dataclass(frozen=True)
class MeanOver(Objective):
    """The mean of `base` over several looks, whose logits stand side by side: (B, num * K).

    Reached when the mean of the probabilities reaches the goal.
    """

    base: Objective
    num: int
    per_example: ClassVar[tuple[str, ...]] = ("base",)

    def score(self, logits: Tensor, target: Tensor) -> Tensor:
        return torch.stack([self.base.score(one, target) for one in logits.chunk(self.num, 1)]).mean(0)

    def reached(self, logits: Tensor, target: Tensor) -> Tensor:
        return self.base.reached(torch.stack([one.softmax(1) for one in logits.chunk(self.num, 1)]).mean(0), target)


@dataclass(frozen=True)
class Averaged:
    """`attack` on the mean loss over `num` looks at a stochastic model: every gradient is the mean of `num`.

    Raises TypeError for attacks whose objective it cannot reach; around `EachTarget`, which picks its own, that is so,
    too: write EachTarget(Averaged(attack, num)).

    Source: Athalye 2018, "Synthesizing robust adversarial examples"; AutoAttack's `rand` uses 20 looks.

    >>> from sparring import Linf, pgd
    >>> linear, attack = torch.nn.Linear(4, 3), Averaged(pgd(Linf(0.1), num_steps=3), 5)
    >>> attack(lambda v: linear(v + torch.rand_like(v)), torch.rand(2, 4), torch.tensor([0, 2])).cost
    Cost(forwards=40, backwards=30)
    """

    attack: Any
    num: int
    per_example: ClassVar[tuple[str, ...]] = ("attack",)

    def __post_init__(self) -> None:
        if self.num < 1:
            raise ValueError(f"the number of looks must be at least 1; got {self.num}")
        if part_of(self.attack, "objective") is None:
            raise TypeError(f"looks are averaged in the objective, and a {type(self.attack).__name__} has none")
        if part_of(self.attack, "goal") is not None:
            raise TypeError(
                "EachTarget would replace the mean over looks by its own goal; average the attack inside it"
            )

    def __call__(self, model: Model, x: Inputs, target: Tensor, *, noise: Noise | None = None) -> AttackResult:
        attack = seeking(self.attack, MeanOver(part_of(self.attack, "objective"), self.num))
        with attack_mode(model) as frozen:

            def looks(v: Any) -> Tensor:
                return torch.cat([frozen(v) for _ in range(self.num)], 1)

            result = attack(Frozen(looks) if isinstance(model, Frozen) else looks, x, target, noise=noise)
        return result._replace(cost=Cost(self.num * result.cost.forwards, self.num * result.cost.backwards))


_IN_PLACE: tuple[Callable[..., Any], ...] = (torch.relu_, Tensor.relu_)
_RELU: tuple[Callable[..., Any], ...] = (torch.relu, F.relu, Tensor.relu, *_IN_PLACE)


class _SmoothedReLU(torch.autograd.Function):
    """max(v, 0), whose derivative is said to be sigmoid(slope * v)."""

    @staticmethod
    def forward(ctx: Any, v: Tensor, slope: float) -> Tensor:
        ctx.save_for_backward(v)
        ctx.slope = slope
        return v.clamp_min(0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (v,) = ctx.saved_tensors
        return grads[0] * torch.sigmoid(ctx.slope * v), None


class _SmoothBackward(TorchFunctionMode):
    """While active, every ReLU passes gradients as a smooth function would; outputs stay as they are."""

    def __init__(self, slope: float) -> None:
        super().__init__()
        self.slope = slope

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = kwargs or {}
        v = args[0] if args else given.get("input")
        if function not in _RELU or v is None or not v.requires_grad:
            return function(*args, **given)
        if function in _IN_PLACE or given.get("inplace", args[1:] == (True,)):
            return v.copy_(_SmoothedReLU.apply(v.clone(), self.slope))  # others hold v, and must find it changed
        return _SmoothedReLU.apply(v, self.slope)


@dataclass(frozen=True)
class SmoothBackward:
    """`attack` on a model whose ReLUs have the derivative sigmoid(slope * v) in the backward pass; forward unchanged.

    On networks that were trained against large Linf changes, most ReLU units are off around the input and carry no
    gradient; what hides there is found by random search alone, or by this. Works for ReLUs called as torch functions
    or modules (not inside scripted models, where it changes nothing). Slopes of 5 to 10 do.

    >>> from sparring import Linf, pgd
    >>> off = lambda v: torch.stack([v[:, 0], torch.relu(v[:, 0] + v[:, 1] - 1)], 1)
    >>> x, y = torch.tensor([[0.2, 0.5]]), torch.tensor([0])
    >>> [bool(attack(off, x, y).z[0, 1] > 0.29) for attack in (pgd(Linf(0.3)), SmoothBackward(pgd(Linf(0.3))))]
    [False, True]
    """

    attack: Any
    slope: float = 10.0
    per_example: ClassVar[tuple[str, ...]] = ("attack",)

    def __post_init__(self) -> None:
        if not 0 < self.slope < math.inf:
            raise ValueError(f"slope must be above 0 and finite, it is that of the sigmoid; got {self.slope}")

    def __call__(self, model: Model, x: Inputs, target: Tensor, *, noise: Noise | None = None) -> AttackResult:
        with attack_mode(model) as frozen:

            def smoothed(v: Any) -> Tensor:
                with _SmoothBackward(self.slope):
                    return frozen(v)

            return self.attack(Frozen(smoothed) if isinstance(model, Frozen) else smoothed, x, target, noise=noise)


def restarted(attack: Attacker, num: int) -> Attacker:
    """`attack`, or the worst of `num` runs of it."""
    return attack if num == 1 else Restarts(attack, num)


def needs_grad(attack: Any) -> bool:
    """Whether an attack asks for gradients, however deep it lies; what does not say so is taken to."""
    return part_of(attack, "needs_grad") is not False


def seeking(attack: Any, objective: Objective) -> Any:
    """The same attack with another objective, however deep it lies in attacks made of attacks."""
    if hasattr(attack, "objective"):
        return replace(attack, objective=objective)
    return replace(attack, attack=seeking(attack.attack, objective))


def part_of(attack: Any, name: str) -> Any:
    """The `objective` (or another field) of an attack, however deep; None where it has none."""
    while not hasattr(attack, name) and hasattr(attack, "attack"):
        attack = attack.attack
    return getattr(attack, name, None)


def _worst(
    name: str, num: int, attack: Callable[[int, Tensor], Attacker],
    model: Model, x: Inputs, target: Tensor, noise: Noise,
) -> AttackResult:  # fmt: skip
    """Per example the worst of `num` runs of `attack(number, rows)`, each on the rows that stood before."""
    rows = torch.arange(size(x), device=target.device)
    worst = attack(0, rows)(model, x, target, noise=noise)
    if worst.loss is None or worst.reached is None:
        raise ValueError(f'{name} keep the worst result and so need its loss; build the attack without keep="last"')
    for number in range(1, num):
        rows = (~worst.reached).nonzero()[:, 0]
        if not len(rows):
            break
        result = attack(number, rows)(model, take(x, rows), target[rows], noise=noise.restart(number).take(rows))
        worst = _merge(worst, result, rows)
    return worst


def _merge(worst: AttackResult, again: AttackResult, rows: Tensor) -> AttackResult:
    """`worst` with those of `rows` replaced where `again` did better."""
    assert worst.loss is not None and again.loss is not None and again.reached is not None
    return merged(worst, again, rows, again.reached | (again.loss > worst.loss[rows]) | worst.loss[rows].isnan())


def merged(one: AttackResult, other: AttackResult, rows: Tensor, better: Tensor) -> AttackResult:
    """`one` with those of `rows` (b,) replaced by `other` (of these rows) where it is `better` (b,); both cost."""

    def put(old: Tensor, new: Tensor) -> Tensor:
        return old.index_copy(0, rows, torch.where(per_example(better, new), new, old[rows]))

    fields = {name: put(getattr(one, name), getattr(other, name)) for name in ("z", "size", "loss", "reached")}
    return AttackResult(map_inputs(put, one.x_adv, other.x_adv), cost=one.cost.plus(other.cost), **fields)
