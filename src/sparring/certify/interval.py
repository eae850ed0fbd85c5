"""Certified margins by interval bounds: what no attack inside the norm ball can fall below.

A box of values is pushed through the layers (`rules`). Two refinements cost nothing: the last linear layer is bounded
on the difference of two logits, and in L2 and L1 the first linear layer is bounded on the ball itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from sparring.certify import rules
from sparring.core.geometry import per_example
from sparring.core.model_state import attack_mode
from sparring.core.types import take
from sparring.threats import L1, L2, Ball, Linf

ORDERS: dict[type, float] = {Linf: math.inf, L2: 2.0, L1: 1.0}


@dataclass(frozen=True)
class _Round:
    """{centre + scale * z + e : ||z||_order <= radius, |e| <= blur}: the ball, until a layer mixes its entries."""

    centre: Tensor  # (B, *X)
    scale: Tensor  # (B, *X) or (1, *X)
    blur: Tensor  # (B, *X)
    radius: Tensor  # (B,)
    order: float
    per_example: ClassVar[tuple[str, ...]] = ("centre", "scale", "blur", "radius")


@dataclass(frozen=True)
class _Region:
    """The values between low and high (B, *X), and in `ball` where there is one."""

    low: Tensor
    high: Tensor
    ball: _Round | None
    per_example: ClassVar[tuple[str, ...]] = ("low", "high", "ball")


def find_interval_bound(model: Any, threat: Any) -> tuple[Callable[..., Tensor] | None, str]:
    """`interval_margin` and "" where it can bound this model under this threat, else None and why it cannot."""
    if type(threat) not in ORDERS:
        return None, "interval bounds know Linf, L2 and L1 balls only"
    if not isinstance(model, nn.Module):
        return None, f"interval bounds go through the layers of a torch.nn.Module; this is a {type(model).__name__}"
    if any(p.dtype not in (torch.float32, torch.float64) for p in model.parameters()):
        return None, "interval bounds need weights of float32 or float64"
    unknown = rules.supported(model)
    return (None, f"interval bounds have no rule for {unknown}") if unknown else (interval_margin, "")


def interval_margin(model: nn.Module, x: Tensor, y: Tensor, threat: Any, *, noise: Any = None) -> Tensor:
    """(B,) a lower bound of min (logit_y - max_{k != y} logit_k) over the threat set of each example; > 0 is certified.

    x (B, *X) float32 or float64 inside the threat's box, y (B,) int64; threat: Linf, L2 or L1, with or without a box,
    mask and radius per example. The model is judged in eval mode, and stays as it was. The bound covers a radius larger
    by 2e-5 of itself plus 2e-6, twice what `threats.inside` forgives an attack, and the rounding of a model that
    computes in x's dtype (with TensorFloat-32 where torch's settings allow it; no autocast). Loose for networks that
    were not trained for it; -inf where nothing can be said. `noise` is left aside. Raises ValueError for a module
    without a rule, another threat, inputs outside the box.

    Source: Gowal 2018, interval bounds with the last layer elided; the dual norm at the first layer as in Xu 2020
    (auto_LiRPA); both intersected with the box, and rounded outward against Jia and Rinard 2021, by ourselves.

    >>> from sparring import Linf
    >>> model = nn.Linear(2, 2)
    >>> _ = model.load_state_dict({"weight": torch.eye(2), "bias": torch.zeros(2)})
    >>> interval_margin(model, torch.tensor([[0.9, 0.1]]), torch.tensor([0]), Linf(0.1))
    tensor([0.6000])
    """
    with attack_mode(model), torch.no_grad():
        gaps = interval_gaps(model, x, y, threat)
        return gaps.scatter(1, y[:, None], math.inf).amin(1)


def interval_gaps(model: nn.Module, x: Tensor, y: Tensor, threat: Any) -> Tensor:
    """(B, K) a lower bound of logit_y - logit_k for each class k over the threat set; 0 at k = y. For training.

    Differentiable in the weights (and x), unlike `interval_margin`, whose value is the smallest of the other classes.
    Every layer counts as in eval mode (running statistics, no dropout), whatever mode the model is in. The
    cross-entropy of the negated gaps is the loss of the worst logits that the bounds allow. Arguments and errors are
    those of `interval_margin`.

    Source: Gowal 2018, eq. 11 and 12 with the last layer elided; the bound itself is that of `interval_margin`.

    >>> from sparring import Linf
    >>> model, x, y = nn.Linear(4, 3), torch.full((2, 4), 0.5), torch.tensor([0, 2])
    >>> torch.nn.functional.cross_entropy(-interval_gaps(model, x, y, Linf(0.1)), y).backward()
    >>> model.weight.grad.shape
    torch.Size([3, 4])
    """
    _check(x, y, threat)
    return _gaps(model, _start(x, threat), y)


def gaps_from_box(model: nn.Module, low: Tensor, high: Tensor, y: Tensor) -> Tensor:
    """(B, K) as `interval_gaps`, where the inputs lie anywhere between two corners (B, *X): for sets that are no balls.

    >>> low, high = torch.zeros(1, 2), torch.full((1, 2), 0.5)
    >>> model = nn.Linear(2, 2)
    >>> _ = model.load_state_dict({"weight": torch.eye(2), "bias": torch.tensor([1.0, 0.0])})
    >>> [round(gap, 4) for gap in gaps_from_box(model, low, high, torch.tensor([0]))[0].tolist()]
    [0.0, 0.5]
    """
    return _gaps(model, _Region(low, high, None), y)


def _gaps(model: nn.Module, region: _Region, y: Tensor) -> Tensor:
    unknown = rules.supported(model)
    if unknown is not None:
        raise ValueError(rules.explain(unknown))
    layers = list(_layers(model))
    while layers and rules.rule_of(layers[-1]) is rules.unchanged:
        layers.pop()
    for layer in layers[:-1]:
        region = _through(layer, region)
    last: Any = layers[-1] if layers else nn.Identity()
    foldable = rules.rule_of(last) is rules.linear and last.weight.ndim == region.low.ndim == 2
    gaps = _folded(last, region, y) if foldable else _plain(_through(last, region), y)
    return torch.where(gaps.isnan(), -math.inf, gaps).scatter(1, y[:, None], 0)


def _check(x: Any, y: Tensor, threat: Any) -> None:
    if not isinstance(threat, Ball) or type(threat) not in ORDERS:
        known = ", ".join(kind.__name__ for kind in ORDERS)
        raise ValueError(f"interval bounds know the norm balls {known}; got a {type(threat).__name__}")
    if not isinstance(x, Tensor) or x.dtype not in (torch.float32, torch.float64):
        got = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise ValueError(f"interval bounds need inputs in float32 or float64; got {got}")
    if y.shape != x.shape[:1] or y.dtype != torch.int64:
        raise ValueError(f"labels are {y.dtype} {tuple(y.shape)}; expected int64 {tuple(x.shape[:1])}, one per example")
    if not bool(threat.valid(x, x).all()):
        raise ValueError(
            "some inputs are not finite or lie outside the threat's box, where there is no set to bound: scale the "
            "data, or give the threat the box of your data"
        )


def _layers(module: nn.Module) -> Iterator[nn.Module]:
    """The layers in order, out of sequences in sequences."""
    if rules.rule_of(module) is rules.sequence:
        for part in module:  # type: ignore[attr-defined]
            yield from _layers(part)
    else:
        yield module


def _start(x: Tensor, threat: Ball) -> _Region:
    """The set around x, by the slack that a verdict forgives and the rounding of x + z wider."""
    radius = torch.as_tensor(threat.radius, dtype=x.dtype, device=x.device).expand(len(x))
    radius = radius * (1 + 2e-5) + 2e-6
    free = threat._masked(torch.ones_like(x))
    reach = torch.where(free > 0, per_example(radius, x), 0)
    low, high = threat.realize(x, -reach), threat.realize(x, reach)
    blur = rules.rounding(0, x.dtype) * rules.largest(low, high)
    order = ORDERS[type(threat)]
    shared = threat.mask is None or len(threat.mask) == 1
    ball = None if order == math.inf else _Round(x, free[:1] if shared else free, blur, radius, order)
    return _Region(low - blur, high + blur, ball)


def _through(layer: Any, region: _Region) -> _Region:
    """The region of the layer's outputs."""
    rule, ball = rules.rule_of(layer), region.ball
    # padding that repeats pixels adds weights up, which the norms of the rows do not see
    if ball is not None and rule is rules.linear and getattr(layer, "padding_mode", "zeros") == "zeros":
        return _Region(*_sums(layer, layer.weight, layer.bias, region, *rules.absolute(layer)), None)
    low, high = rules.propagate(layer, region.low, region.high)
    if ball is not None and isinstance(rule, rules.Channelwise):
        mean, factor, shift = rule.of(layer, region.low)
        size = (rules.largest(region.low, region.high) + mean.abs()) * factor.abs() + shift.abs()
        blur = ball.blur * factor.abs() + rules.rounding(8, size.dtype) * size
        centre, scale = (ball.centre - mean) * factor + shift, ball.scale * factor.abs()
    elif ball is not None and rule in (rules.unchanged, rules.reshaped):
        (centre, blur), (scale, _) = rule(layer, ball.centre, ball.blur), rule(layer, ball.scale, ball.scale)
    else:
        return _Region(low, high, None)
    return _Region(low, high, replace(ball, centre=centre, scale=scale, blur=blur))


def _sums(
    layer: Any, weight: Tensor, bias: Tensor | None, region: _Region, size: Tensor, offset: Tensor | None
) -> rules.Corners:
    """`rules.sums` over the box, and where the region knows its ball also over that; both hold."""
    low, high = rules.sums(layer, weight, bias, region.low, region.high, size, offset)
    if region.ball is None:
        return low, high
    op, ball, share = rules.operation(layer), region.ball, rules.product_rounding(weight)
    error = share * op(rules.largest(region.low, region.high), size, offset) + op(ball.blur, weight.abs(), None)
    middle = op(ball.centre, weight, bias)
    reach = per_example(ball.radius, middle) * _dual(op, weight, ball.scale, ball.order) * (1 + share)
    reach = (reach + error).nan_to_num(math.inf, math.inf)  # an infinite radius times a row of zeros
    return torch.maximum(low, middle - reach), torch.minimum(high, middle + reach)


def _dual(op: Callable[..., Tensor], weight: Tensor, scale: Tensor, order: float) -> Tensor:
    """max <row, scale * z> over ||z||_order <= 1, for each output: the dual norm of the rows of the scaled map."""
    if order == 2:
        square = op(scale**2, weight**2, None)
        return square.clamp_min(torch.finfo(square.dtype).tiny).sqrt()  # a root of 0 has no gradient
    if weight.ndim == 2:
        return torch.stack([(weight.abs() * row.unsqueeze(-2)).amax(-1) for row in scale])
    dual = torch.zeros_like(op(scale, weight, None))
    for position in torch.eye(weight[0].numel(), dtype=torch.bool, device=weight.device):  # L1: the largest entry
        only = torch.where(position.view_as(weight[0]), weight.abs(), 0)
        dual = torch.maximum(dual, op(scale, only, None))
    return dual


def _folded(last: nn.Linear, region: _Region, y: Tensor) -> Tensor:
    """(B, K) the last layer bounded on logit_y - logit_k itself, so that what both share cancels."""
    weight, bias = last.weight, last.bias
    size, offset = rules.absolute(last)
    gaps = region.low.new_empty(len(y), len(weight))
    for label in _labels(y, len(weight)):
        rows = (y == label).nonzero()[:, 0]
        gaps[rows], _ = _sums(
            last, weight[label] - weight, None if bias is None else bias[label] - bias, take(region, rows),
            size + size[label], None if offset is None else offset + offset[label],
        )  # fmt: skip
    return gaps


def _plain(region: _Region, y: Tensor) -> Tensor:
    """(B, K) the lowest own logit minus the highest of each class."""
    if region.low.ndim != 2:
        raise ValueError(f"the model returns shape {tuple(region.low.shape)}; a margin needs logits (B, K)")
    _labels(y, region.low.shape[1])
    return region.low.gather(1, y[:, None]) - region.high


def _labels(y: Tensor, num_classes: int) -> list[int]:
    labels: list[int] = y.unique().tolist()
    if num_classes < 2 or (labels and not 0 <= labels[0] <= labels[-1] < num_classes):
        raise ValueError(f"labels {labels} do not fit {num_classes} classes: expected 0 to K - 1, and K >= 2")
    return labels
