"""Adversarial weight perturbation: every step is taken where the weights, too, have been moved against it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from sparring.core.noise import Noise
from sparring.core.types import Inputs, size
from sparring.training.guard import field_of


@dataclass(frozen=True, kw_only=True)
class WeightPerturbed:
    """The loss of `recipe` at weights w + v instead of w: v_i = gamma * ||w_i|| * g_i / ||g_i||, g the loss's gradient.

    i runs over the tensors of weights with two axes and more (no biases, no BatchNorm). The inputs are crafted at w;
    the gradient reaches w as if it stood at w + v, and the step is taken from w. The pass for v leaves BatchNorm's
    running statistics as they are. `start`: the progress at which v sets in.
    """

    recipe: Any
    gamma: float = 0.01
    start: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.gamma < 1:
            raise ValueError(f"gamma, the length of v by that of the weights, must be in [0, 1); got {self.gamma}")
        if field_of(self.recipe, "craft", None) is None or field_of(self.recipe, "loss_on", None) is None:
            raise ValueError(
                f"weights are perturbed between crafting inputs and training on them, and {type(self.recipe).__name__} "
                "has no such two parts: take pgd-at, mixed, trades, mart, fgsm-rs or n-fgsm"
            )

    def at(self, progress: float) -> Any:
        """The recipe at this moment; without v before `start`."""
        recipe = self.recipe.at(progress) if hasattr(self.recipe, "at") else self.recipe
        return recipe if progress < self.start else replace(self, recipe=recipe)

    def __call__(self, model: nn.Module, x: Inputs, y: Tensor, *, noise: Noise | None = None) -> Tensor:
        noise = Noise.from_torch(size(x)) if noise is None else noise
        craft, loss_on = field_of(self.recipe, "craft", None), field_of(self.recipe, "loss_on", None)
        x_adv = craft(model, x, y, noise=noise)
        buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
        moved: dict[str, Tensor] = {name: w for name, w in model.named_parameters() if w.ndim > 1 and w.requires_grad}
        loss = loss_on(called_with(model, buffers), x, x_adv, y)
        grads = torch.autograd.grad(loss, list(moved.values()), allow_unused=True)
        for (name, w), grad in zip(moved.items(), grads, strict=True):
            if grad is None:
                continue
            length = self.gamma * w.detach().norm() / grad.norm().clamp_min(torch.finfo(grad.dtype).tiny)
            moved[name] = w + length * grad
        return loss_on(called_with(model, moved), x, x_adv, y)


def called_with(model: nn.Module, tensors: dict[str, Tensor]) -> Callable[[Any], Any]:
    """The model as a function, with these tensors for its own of those names; its own are neither used nor changed."""
    return lambda x: functional_call(model, tensors, (x,))


def awp(recipe: Any, *, gamma: float = 0.01, start: float = 0.0) -> WeightPerturbed:
    """Any recipe that crafts, at weights moved against it.

    Source: Wu 2020, eq. 8 to 11; `AT_AWP` and `trades_AWP`: gamma 0.01 for PGD-AT, 0.005 for TRADES, one step. There
    weight decay and momentum act at w + v; here at w.
    """
    return WeightPerturbed(recipe=recipe, gamma=gamma, start=start)
