"""The same model with another backward pass: the forward is unchanged, its flat and hard functions get a slope."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from sparring.core.types import Model

SLOPE = 10.0
"""Of the sigmoid that stands for the derivative of a hard decision; inputs and features are of order 1."""


def _mild_softmax(x: Tensor, dim: int = -1, **_: Any) -> Tensor:
    """Softmax of logits that were shrunk to at most 5."""
    return (x / (x.detach().abs().amax(dim, keepdim=True) / 5).clamp_min(1)).softmax(dim)


_IDENTITY = ("round", "floor", "ceil", "trunc", "sign", "sgn", "clamp", "clip", "hardtanh", "relu6", "detach", "fix")
_STAND_INS: dict[str, Callable[..., Tensor]] = {
    **dict.fromkeys(_IDENTITY, lambda x, *_, **__: x),
    "relu": lambda x, *_, **__: F.softplus(x, SLOPE),
    "sigmoid": lambda x, *_, **__: F.softsign(x) / 2,  # a derivative 1 / (1 + |x|)^2 never rounds to 0
    "tanh": lambda x, *_, **__: F.softsign(x),
    "softmax": _mild_softmax,
}
_COMPARISONS = {"gt": 1.0, "ge": 1.0, "lt": -1.0, "le": -1.0}


class StraightThrough(TorchFunctionMode):
    """While active, hard functions compute what they do and pass a gradient as a soft one would.

    Rounding, sign, clamp and detach pass it through; ReLU as softplus, sigmoid and tanh with long tails, softmax at a
    milder temperature; comparisons become 0 or 1 with the slope of a sigmoid; no_grad is ignored.

    Source: Athalye 2018, "Obfuscated gradients", section 4.2 (BPDA), there made by hand for each defence.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, getattr(func, "__name__", "").strip("_")
        if name == "set_grad_enabled":
            return None if args == (False,) else func(*args, **kwargs)
        if name == "where" and isinstance(args[0], Tensor) and args[0].is_floating_point():
            return args[0] * args[1] + (1 - args[0]) * args[2]
        first = args[0] if args else None
        if not isinstance(first, Tensor) or not first.is_floating_point() or not first.requires_grad:
            return func(*args, **kwargs)
        if name in _COMPARISONS:
            soft = torch.sigmoid(SLOPE * _COMPARISONS[name] * (first - args[1]))
            return _with_slope_of(func(*args, **kwargs).to(first.dtype), soft)
        if name in _STAND_INS:
            soft = _STAND_INS[name](first.clone(), *args[1:], **kwargs)
            return _with_slope_of(func(first.detach().clone(), *args[1:], **kwargs), soft)
        return func(*args, **kwargs)


def _with_slope_of(out: Tensor, soft: Tensor) -> Tensor:
    """The value of `out`, with the gradient of `soft`."""
    return out + (soft - soft.detach())


def straight_through(model: Model) -> Model:
    """The model as a function with the backward pass of `StraightThrough`; without a graph it is the model itself.

    >>> x = torch.full((1, 3), 0.2, requires_grad=True)
    >>> torch.autograd.grad(straight_through(torch.round)(x).sum(), x)[0]
    tensor([[1., 1., 1.]])
    """

    def soft(x: Any) -> Tensor:
        if not torch.is_grad_enabled():
            return model(x)
        with StraightThrough():
            return model(x)

    return soft
