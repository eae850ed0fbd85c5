"""How an attack begins: what it is handed, checked and safe to use, and where it starts: z of (threat, x, noise)."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from sparring.core.geometry import laid_out, per_example
from sparring.core.model_state import Frozen, aligned, attack_mode, class_logits, private_rng
from sparring.core.noise import Noise
from sparring.core.types import Inputs, Model, device_of, map_inputs, plain, size
from sparring.threats.base import ThreatModel
from sparring.threats.inputs import check_inputs, check_kind, check_labels, check_one_logit

Start = Callable[[ThreatModel, Inputs, Noise], Tensor]
_WHOLE = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.bool)
_DIRECT_CALLS = itertools.count()
_X = TypeVar("_X", bound=Inputs)


@contextmanager
def crafting(
    threat: Any, model: Model, x: _X, target: Tensor, noise: Noise | None
) -> Iterator[tuple[Model, _X, Tensor, Noise]]:
    """What every attack begins with: the model frozen (see `attack_mode`), x and target to keep, noise on their device.

    Without noise that of seed 0 and the position in the batch is taken. Raises ValueError for what can be no batch, no
    target or no logits of a classifier. A direct call, of what is not `Frozen`, also has its values looked at (the
    threat's `complaints`, labels beyond the classes): always on the CPU, on a GPU, which would wait, now and then.
    """
    check_kind(x)
    direct = not isinstance(model, Frozen) and (device_of(x).type == "cpu" or next(_DIRECT_CALLS) % 100 == 0)
    if direct and threat is not None:
        check_inputs(x, threat)
    num, device, labels = size(x), device_of(x), not (isinstance(target, Tensor) and target.is_floating_point())
    if labels:
        target = target.long() if isinstance(target, Tensor) and target.dtype in _WHOLE else target
        check_labels(target, num, values=direct)
    elif target.ndim != 2 or len(target) != num:
        raise ValueError(
            f"target has shape {tuple(target.shape)} and type {target.dtype} for {num} examples; "
            "expected integer labels (B,) or probabilities (B, K)"
        )

    seen: list[int] = []

    def first_look(logits: Tensor) -> None:
        by_class = class_logits(logits)
        check_logits(by_class, num)
        num_classes = by_class.shape[1]
        seen.append(num_classes)
        if labels and direct:
            check_one_logit(logits)
            check_labels(target, num, num_classes)
        if not labels and num_classes % target.shape[1]:  # where looks are averaged, several stand side by side
            raise ValueError(
                f"target has {target.shape[1]} probabilities for each example and the model {num_classes} classes; "
                "expected one for each class"
            )

    noise = (noise or Noise.make(0, "attack", torch.arange(num))).to(device)
    with attack_mode(model) as frozen, private_rng(noise.seed, device), torch.inference_mode(False):
        kept: Any = map_inputs(aligned, plain(x))
        try:
            yield Frozen(frozen.model, first_look), kept, target.detach().clone(), noise
        except IndexError:  # labels beyond the classes, which nobody waited to see
            if labels and seen:
                check_labels(target, num, seen[0])
            raise


def check_logits(logits: Tensor, num: int) -> None:
    """Raises ValueError for what are no logits (B, K) of `num` examples and at least two classes."""
    if logits.ndim != 2 or len(logits) != num or logits.shape[1] < 2 or not logits.is_floating_point():
        needs = "an attack needs logits (B, K), K at least 2"
        kind = "" if logits.is_floating_point() else f" of {logits.dtype}"
        raise ValueError(f"the model returned shape {tuple(logits.shape)}{kind} for {num} examples; {needs}")


@dataclass(frozen=True)
class Null:
    """Start at the clean input."""

    def __call__(self, threat: ThreatModel, x: Inputs, noise: Noise) -> Tensor:
        return threat.null(x)


@dataclass(frozen=True)
class Uniform:
    """Start at a random point of the set."""

    def __call__(self, threat: ThreatModel, x: Inputs, noise: Noise) -> Tensor:
        return threat.sample(x, noise)


@dataclass(frozen=True)
class Nearer:
    """Start at a random point of the same set with its radius times `share`."""

    share: float

    def __call__(self, threat: ThreatModel, x: Inputs, noise: Noise) -> Tensor:
        return threat.at(self.share).sample(x, noise)


@dataclass(frozen=True)
class Gaussian:
    """Start close to the clean input: normal noise of standard deviation `scale`, in the units of z."""

    scale: float

    def __call__(self, threat: ThreatModel, x: Inputs, noise: Noise) -> Tensor:
        null = threat.null(x)
        return threat.project(x, null + self.scale * laid_out(noise.normal(null.shape[1:]), null))


@dataclass(frozen=True, eq=False)
class Given:
    """Start at a known z (B, *Z)."""

    z: Tensor
    per_example: ClassVar[tuple[str, ...]] = ("z",)

    def __call__(self, threat: ThreatModel, x: Inputs, noise: Noise) -> Tensor:
        return threat.project(x, self.z)


@dataclass(frozen=True)
class OnTheEdge:
    """Start in a random direction, as far out as the radius allows, and from there into the box."""

    def __call__(self, threat: ThreatModel, x: Inputs, noise: Noise) -> Tensor:
        if threat.norm == "l2":
            return Corner()(threat, x, noise)
        null = threat.null(x)
        cube = laid_out(noise.uniform(null.shape[1:]), null) * 2 - 1
        direction = cube / per_example(threat.size(x, cube).clamp_min(1e-12), cube)
        return threat.project(x, null + per_example(threat.radius, null) * direction)


@dataclass(frozen=True)
class Corner:
    """Start where a random linear function is largest in the set: for Linf a random corner of the cube."""

    def __call__(self, threat: ThreatModel, x: Inputs, noise: Noise) -> Tensor:
        null = threat.null(x)
        return threat.corner(x, laid_out(noise.normal(null.shape[1:]), null))


null, uniform = Null(), Uniform()


def gradient(loss: Tensor, z: Tensor, keep_graph: bool = False) -> Tensor:
    """The gradient of each example's loss (B,) in its own z. Raises ValueError where none reaches z."""
    reachable = loss.requires_grad
    grad = torch.autograd.grad(loss.sum(), z, retain_graph=keep_graph, allow_unused=True)[0] if reachable else None
    if grad is None:
        raise ValueError(
            "no gradient reaches the input: the model's output does not depend on it through autograd "
            "(detach(), no_grad(), numpy or rounding inside the model?); use an attack without gradients"
        )
    return grad
