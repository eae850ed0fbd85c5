"""What a layer makes of a box of inputs: one rule for each type of module, in a table that anyone may extend.

A rule takes the module and two corners low <= high (B, *X), and returns corners between which the module's output
lies in eval mode for every input between the two. Rounding counts: each rule steps outward by at least what the model
and the rule itself can lose in the dtype of `low`, so a bound holds for the floats that the model computes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparring.core.layers import Block, GlobalMean, Normalize

Corners = tuple[Tensor, Tensor]
Rule = Callable[[Any, Tensor, Tensor], Corners]


def outward(low: Tensor, high: Tensor, size: Tensor, terms: int = 1) -> Corners:
    """The box, wider by what rounding may do to sums of `terms` numbers whose absolute values sum to `size`."""
    slack = rounding(terms, low.dtype) * size
    return low - slack, high + slack


def rounding(terms: int, dtype: torch.dtype) -> float:
    """The share of the absolute terms of a sum that rounding may move it by, here and in the model together.

    (terms + 8) * eps: the classical bound terms * eps / 2 holds for any order of summation, and is needed twice
    (Higham 2002, section 3.1).
    """
    return (terms + 8) * torch.finfo(dtype).eps


COARSE = {"highest": 0.0, "high": 2.0**-8, "medium": 2.0**-6}
"""The same for two products, whose factors a device may cut to TensorFloat-32 or bfloat16: torch's setting -> share."""


def product_rounding(weight: Tensor) -> float:
    """`rounding` of the sums of a linear layer, under torch's present settings of precision."""
    share = 0.0
    if weight.dtype == torch.float32:
        share = COARSE[torch.get_float32_matmul_precision()]
        share = max(share, COARSE["high"] if weight.is_cuda and torch.backends.cudnn.allow_tf32 else 0.0)
    return share + rounding(weight[0].numel(), weight.dtype)


def largest(low: Tensor, high: Tensor) -> Tensor:
    """The largest absolute value of each entry in the box."""
    return torch.maximum(low.abs(), high.abs())


def operation(module: Any) -> Callable[[Tensor, Tensor, Tensor | None], Tensor]:
    """What a linear layer does to (input, weight, bias), in its own strides and padding."""
    return F.linear if module.weight.ndim == 2 else module._conv_forward


def absolute(module: Any) -> tuple[Tensor, Tensor | None]:
    """|weight| and |bias|."""
    return module.weight.abs(), None if module.bias is None else module.bias.abs()


def linear(module: Any, low: Tensor, high: Tensor) -> Corners:
    return sums(module, module.weight, module.bias, low, high)


def sums(
    layer: Any, weight: Tensor, bias: Tensor | None, low: Tensor, high: Tensor,
    size: Tensor | None = None, offset: Tensor | None = None,
) -> Corners:  # fmt: skip
    """Corners of the linear map (weight, bias), done as `layer` does: W m + b -+ |W| r with middle m, half width r.

    Rounding is measured by (size, offset), at least (|weight|, |bias|), or by these: then |W| r and |W| times the
    rounding's share of the inputs are one product.
    """
    op, share = operation(layer), product_rounding(weight)
    middle, spread, largest_in = op((low + high) / 2, weight, bias), (high - low) / 2, share * largest(low, high)
    if size is None:
        spread = op(spread + largest_in, weight.abs(), None if bias is None else share * bias.abs())
    else:
        spread = op(spread, weight.abs(), None) + op(largest_in, size, None if offset is None else share * offset)
    return middle - spread, middle + spread


@dataclass(frozen=True)
class Channelwise:
    """The rule of a layer (x - mean) * factor + shift that acts on each channel (axis 1) by itself.

    `constants(module)` gives mean, factor and shift: numbers, or tensors of one entry or one for each channel.
    """

    constants: Callable[[Any], tuple[Any, Any, Any]]

    def of(self, module: Any, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(mean, factor, shift) in the dtype of `like` (B, *X), to broadcast against it."""
        shape = (-1, *[1] * (like.ndim - 2))
        numbers = (torch.as_tensor(v, dtype=like.dtype, device=like.device) for v in self.constants(module))
        mean, factor, shift = (v.view(shape) for v in numbers)
        return mean, factor, shift

    def __call__(self, module: Any, low: Tensor, high: Tensor) -> Corners:
        mean, factor, shift = self.of(module, low)
        ends = [(end - mean) * factor + shift for end in (low, high)]
        size = (largest(low, high) + mean.abs()) * factor.abs() + shift.abs()
        return outward(torch.minimum(*ends), torch.maximum(*ends), size, terms=8)


@dataclass(frozen=True)
class Composed:
    """The rule of a module that is made of others, all of which must have rules of their own."""

    rule: Rule

    def __call__(self, module: Any, low: Tensor, high: Tensor) -> Corners:
        return self.rule(module, low, high)


def unchanged(module: Any, low: Tensor, high: Tensor) -> Corners:
    return low, high


def reshaped(module: Any, low: Tensor, high: Tensor) -> Corners:
    return module(low), module(high)


def relu(module: Any, low: Tensor, high: Tensor) -> Corners:
    return torch.relu(low), torch.relu(high)


def leaky_relu(module: Any, low: Tensor, high: Tensor) -> Corners:
    """Straight on both sides of 0, whatever the slope's sign."""
    ends = [F.leaky_relu(v, module.negative_slope) for v in (low, torch.zeros_like(low).clamp(low, high), high)]
    low, high = torch.stack(ends).aminmax(dim=0)
    return outward(low, high, largest(low, high))


def rising(module: Any, low: Tensor, high: Tensor) -> Corners:
    """A function that never falls, computed to a few units in the last place."""
    low, high = module(low), module(high)
    return outward(low, high, largest(low, high))


def maximum(module: Any, low: Tensor, high: Tensor) -> Corners:
    return module(low), module(high)


def average(module: Any, low: Tensor, high: Tensor) -> Corners:
    """Means over windows, which hold at most one channel."""
    return outward(module(low), module(high), module(largest(low, high)), terms=low.shape[2:].numel())


def _in_turn(module: Any, low: Tensor, high: Tensor) -> Corners:
    for part in module:
        low, high = propagate(part, low, high)
    return low, high


def _residual(module: Any, low: Tensor, high: Tensor) -> Corners:
    main, side = propagate(module.main, low, high), propagate(module.shortcut, low, high)
    low, high = outward(main[0] + side[0], main[1] + side[1], largest(*main) + largest(*side))
    return torch.relu(low), torch.relu(high)


def _batch_norm(module: Any) -> tuple[Any, Any, Any]:
    factor = 1 if module.weight is None else module.weight
    deviation = (module.running_var + module.eps).sqrt()
    return module.running_mean, factor / deviation, 0.0 if module.bias is None else module.bias


sequence, batch_norm = Composed(_in_turn), Channelwise(_batch_norm)
RULES: dict[type[nn.Module], Rule] = {
    nn.Linear: linear, nn.Conv1d: linear, nn.Conv2d: linear,
    nn.BatchNorm1d: batch_norm, nn.BatchNorm2d: batch_norm, Normalize: Channelwise(lambda m: (m.mean, 1 / m.std, 0.0)),
    nn.Identity: unchanged, nn.Dropout: unchanged, nn.Dropout2d: unchanged,
    nn.Flatten: reshaped, nn.Unflatten: reshaped,
    nn.ReLU: relu, nn.LeakyReLU: leaky_relu, nn.Sigmoid: rising, nn.Tanh: rising,
    nn.MaxPool2d: maximum, nn.AvgPool2d: average, nn.AdaptiveAvgPool2d: average, GlobalMean: average,
    nn.Sequential: sequence, Block: Composed(_residual),
}  # fmt: skip
"""One rule for each type of module; add your own layer's here: a function, `Channelwise` or `Composed`."""


def rule_of(module: nn.Module) -> Rule | None:
    """The rule for a module, or None. A subclass inherits one only while it computes what its parent computes."""
    hooked = bool(module._forward_hooks) or bool(module._forward_pre_hooks) or "forward" in vars(module)
    without_statistics = isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d) and module.running_mean is None
    if hooked or without_statistics:
        return None
    own = type(module)
    parent = next((kind for kind in own.__mro__ if kind in RULES), None)
    if parent is None or any(getattr(own, n, None) is not getattr(parent, n, None) for n in ("forward", *_INNER)):
        return None
    return RULES[parent]


_INNER = ("_conv_forward", "__call__", "_call_impl", "__iter__")


def propagate(module: nn.Module, low: Tensor, high: Tensor) -> Corners:
    """Corners (B, *Y) of a box that holds the module's output for every input in the box [low, high] (B, *X).

    Raises ValueError for a module without a rule. Source: Gowal 2018, "On the effectiveness of interval bound
    propagation", section 3.1; the outward rounding is ours.

    >>> low, high = propagate(nn.ReLU(), torch.tensor([[-2.0, 1.0]]), torch.tensor([[-1.0, 3.0]]))
    >>> low, high
    (tensor([[0., 1.]]), tensor([[0., 3.]]))
    """
    rule = rule_of(module)
    if rule is None:
        raise ValueError(explain(supported(module) or type(module).__name__))
    return rule(module, low, high)


def supported(model: Any) -> str | None:
    """The name and type of the first module that no rule covers, such as "3 (GELU)"; None when all are covered.

    >>> supported(nn.Sequential(nn.Linear(4, 4), nn.GELU())), supported(nn.Linear(4, 4))
    ('1 (GELU)', None)
    """
    if not isinstance(model, nn.Module):
        return f"the model ({type(model).__name__}, no nn.Module)"
    return next(_unknown("", model), None)


def _unknown(name: str, module: nn.Module) -> Iterator[str]:
    rule = rule_of(module)
    if rule is None:
        yield f"{name or 'the model'} ({type(module).__name__})"
    elif isinstance(rule, Composed):
        for child, part in module.named_children():
            yield from _unknown(f"{name}.{child}" if name else child, part)


def explain(unknown: str) -> str:
    """What to do about a module without a rule."""
    return (
        f"interval bounds have no rule for {unknown}, so nothing is certified. A rule covers a module of a known type "
        "that has no forward hooks, and BatchNorm only with running statistics. For a layer of your own: "
        "sparring.certify.RULES[MyLayer] = my_rule, with my_rule(module, low, high) -> (low, high)"
    )
