"""Guards look at a run every few dozen steps, and may take it back to where it was sound, or end it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from sparring.training.state import TrainingState


@dataclass(frozen=True, kw_only=True)
class Rollback:
    """Weights, moments of the optimizer and the average go back to the last look without a verdict; the run goes on.

    From here on the learning rate is times `rate_factor`, and the recipe's fields `options` (plain values, so that a
    checkpoint holds them) have new values. `reason` is for the record. The data goes on where it is.
    """

    rate_factor: float = 1.0
    options: Mapping[str, Any] = field(default_factory=dict)
    reason: str = ""

    def __post_init__(self) -> None:
        if not 0 < self.rate_factor < math.inf:
            raise ValueError(f"rate_factor must be positive and finite; got {self.rate_factor}")


@dataclass(frozen=True)
class Stop:
    """The run ends with the weights of the last look without a verdict; `sentence` says why."""

    sentence: str


@dataclass(frozen=True)
class Wait:
    """The run goes on, but this moment is no place to go back to: it is too early to tell, or something looks wrong."""


class Guard(Protocol):
    """Called every `every` steps (an attribute; 50 without one) and at the end of each epoch.

    It reads the state (`trouble`, `figures`, `rollbacks`, the `current` recipe, the model) and changes nothing but
    `state.notes`, its own memory of plain values, which checkpoints hold. None: all is well, and this is the place to
    go back to. When it finds nothing although a loss or gradient was not finite, the run ends.
    """

    def __call__(self, state: TrainingState) -> Rollback | Stop | Wait | None:
        """The verdict."""


@dataclass(frozen=True, kw_only=True)
class NonFinite:
    """Ends a run whose loss or gradient is not finite, after `num_rollbacks` new tries at a smaller learning rate."""

    every: int = 50
    num_rollbacks: int = 0
    rate_factor: float = 0.5

    def __call__(self, state: TrainingState) -> Rollback | Stop | None:
        if not state.trouble:
            return None
        if len(state.rollbacks) < self.num_rollbacks:
            return Rollback(rate_factor=self.rate_factor, reason=state.trouble)
        advice = "Try a smaller learning rate, a radius that grows from a smaller one, or float32 instead of less."
        return Stop(f"{state.trouble} The last good weights are kept. {advice}")


def first_trouble(before: Tensor | None, model: nn.Module, loss: Tensor, step: int) -> Tensor:
    """[step, loss, norm of the gradient] of the first step where one was not finite, else -1s; on the loss's device."""
    loss, grads = wide(loss), [p.grad for p in model.parameters() if p.grad is not None]
    norm = wide(torch.nn.utils.get_total_norm(grads)).to(loss.device) if grads else torch.zeros_like(loss)
    now = torch.stack([torch.full_like(loss, step), loss, norm])
    now = torch.where(now.isfinite().all(), -1.0, now)
    return now if before is None else torch.where(before[0] < 0, now, before.to(now.device))


def field_of(recipe: Any, name: str, default: Any) -> Any:
    """A field of a recipe, however deep in recipes that hold another; the default where there is none."""
    while not hasattr(recipe, name) and hasattr(recipe, "recipe"):
        recipe = recipe.recipe
    return getattr(recipe, name, default)


def with_recipe_options(recipe: Any, options: Mapping[str, Any]) -> Any:
    """The recipe with other values of its fields, also inside a recipe that holds another."""
    if not options:
        return recipe
    known = [f.name for f in fields(recipe)] if is_dataclass(recipe) else []
    own = {name: value for name, value in options.items() if name in known}
    rest = {name: value for name, value in options.items() if name not in known}
    if rest and hasattr(recipe, "recipe"):
        own["recipe"] = with_recipe_options(recipe.recipe, rest)
    elif rest:
        raise ValueError(f"the guard wants to change {', '.join(rest)}; this recipe has {', '.join(known) or 'none'}")
    return replace(recipe, **own)


def wide(value: Tensor | float) -> Tensor:
    """A scalar without its graph, in the widest float type that its device has."""
    value = torch.as_tensor(value).detach()
    return value.to(torch.float32 if value.device.type == "mps" else torch.float64)
