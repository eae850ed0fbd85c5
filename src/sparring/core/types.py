"""The records every room shares. Shapes: B batch (always first), K classes, *X one input, *Z one perturbation."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

Inputs = Tensor | Mapping[str, Tensor]
"""What a data set holds for a batch: a tensor (B, *X), or named tensors that share their batch axis (text)."""

Model = Callable[[Any], Tensor]
"""ONE argument, what `threat.apply` returns -> logits (B, K). Normalisation lives inside."""


class Cost(NamedTuple):
    """Work in sample-passes: a batch of 32 seen once costs 32 forwards."""

    forwards: int = 0
    backwards: int = 0

    def plus(self, other: Cost) -> Cost:
        """The work of both together."""
        return Cost(self.forwards + other.forwards, self.backwards + other.backwards)


class AttackResult(NamedTuple):
    """What an attack found, one row per example, whether or not the model was fooled.

    `loss` and `reached` are None only when the attack keeps the last iterate without looking at it (training).
    """

    x_adv: Inputs  # (B, *X) what is judged and saved: threat.realize(x, z)
    z: Tensor  # (B, *Z)
    size: Tensor  # (B,) in the threat's unit
    loss: Tensor | None  # (B,) objective at x_adv
    reached: Tensor | None  # (B,) bool: the goal holds at x_adv
    cost: Cost


class Attacker(Protocol):
    """Anything that can be called like an attack. A hand-written function qualifies."""

    def __call__(self, model: Model, x: Inputs, target: Tensor, *, noise: Any = None) -> AttackResult:
        """Search around `x` (B, *X); `target` is labels (B,) or probabilities (B, K).

        `noise` is a `Noise`: `noise.uniform(shape, draw=0)` in [0, 1) and `noise.normal(shape, draw=0)`, (B, *shape).
        """


def size(x: Inputs) -> int:
    """Number of examples B. Raises ValueError when named inputs disagree about it."""
    if isinstance(x, Tensor):
        return x.shape[0]
    lengths = {name: value.shape[0] for name, value in x.items()}
    if len(set(lengths.values())) != 1:
        raise ValueError(f"inputs disagree about the batch size: {lengths}; every tensor needs the same first axis")
    return next(iter(lengths.values()))


def take(value: Any, index: Tensor) -> Any:
    """The rows `index` of a batch, and of everything that holds something for each example; the rest stays.

    A record (frozen dataclass) names in `per_example` the fields that may: tensors (one row stands for all), and
    further records. What has a `take` of its own is asked.
    """
    if isinstance(value, Tensor):
        return value[index.to(value.device)]
    if isinstance(value, Mapping):
        return {name: take(tensor, index) for name, tensor in value.items()}
    if hasattr(value, "take"):
        return value.take(index)
    changed = {}
    for name in getattr(value, "per_example", ()):
        held = getattr(value, name)
        shared = isinstance(held, Tensor) and (held.ndim == 0 or (len(held) == 1 and len(index) > 0))
        part = held if shared else take(held, index)
        if part is not held:
            changed[name] = part
    return dataclasses.replace(value, **changed) if changed else value


def map_inputs(function: Callable[..., Tensor], first: Inputs, *rest: Any) -> Inputs:
    """`function` on a tensor, or on each named tensor: map_inputs(torch.add, a, b)."""
    if isinstance(first, Tensor):
        return function(first, *rest)
    return {name: function(tensor, *(r[name] for r in rest)) for name, tensor in first.items()}


def plain(x: Inputs) -> Inputs:
    """`x` cut from any graph, and usable for gradients even where it was made in inference mode."""
    return map_inputs(lambda t: t.detach().clone() if t.is_inference() else t.detach(), x)


def logits_of(out: Any) -> Tensor:
    """The logits of a tensor, an output's `logits` (Hugging Face), those before Keras' softmax. TypeError without any.

    >>> logits_of({"loss": None, "logits": torch.zeros(2, 3)}).shape
    torch.Size([2, 3])
    """
    found = out.get("logits") if isinstance(out, Mapping) else getattr(out, "logits", out)
    if isinstance(found, Tensor):
        return getattr(found, "_keras_logits", found)
    parts = f" of {', '.join(map(str, out))}" if isinstance(out, Mapping) else ""
    key = f"[{next(iter(out))!r}]" if isinstance(out, Mapping) and out else "[0]"
    raise TypeError(
        f"the model returns a {type(out).__name__}{parts}; expected a tensor of logits (B, K), or an output that has "
        f"logits. Wrap it, such as lambda x: model(x){key}"
    )


def device_of(x: Inputs) -> torch.device:
    """The device a batch lives on."""
    return (x if isinstance(x, Tensor) else next(iter(x.values()))).device


def labels_of(target: Tensor) -> Tensor:
    """Labels (B,): the target itself, or the argmax of probabilities (B, K)."""
    return target.argmax(1) if target.ndim == 2 else target
