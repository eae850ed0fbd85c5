"""Gradients through a smoothed backward pass: a way for gradient attacks where ReLU units that are off hide it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from sparring.attacks.around import restarted
from sparring.attacks.auto_pgd import APGD
from sparring.attacks.loop import Attack
from sparring.attacks.starts import Corner
from sparring.core.model_state import attack_mode
from sparring.core.noise import Noise
from sparring.core.objectives import Objective, margin
from sparring.core.types import Attacker, AttackResult, Inputs, Model
from sparring.threats.base import ThreatModel

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

            return self.attack(smoothed, x, target, noise=noise)


def smooth(
    threat: ThreatModel, *, num_steps: int = 20, slope: float = 10.0, restarts: int = 5, objective: Objective = margin
) -> Attacker:
    """APGD through a smoothed backward pass, from random corners of the set.

    Ours; measured in docs/results.md. The slope is that of a sigmoid in place of ReLU's step.

    >>> from sparring import Linf
    >>> relu = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
    >>> smooth(Linf(0.1), num_steps=3, restarts=2)(relu, torch.rand(2, 4), torch.tensor([0, 2])).z.shape
    torch.Size([2, 4])
    """
    attack = Attack(threat=threat, rule=APGD(), num_steps=num_steps, objective=objective, start=Corner())
    smoothed = SmoothBackward(attack, slope)
    return restarted(smoothed, restarts)
