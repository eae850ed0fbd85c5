"""Training recipes: what a batch is turned into, and the loss on it.

`loss = recipe(model, x, y); loss.backward()` works in anybody's loop. Builders carry the papers' defaults.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from sparring.attacks.loop import Attack
from sparring.attacks.starts import Gaussian, uniform
from sparring.attacks.steps import Ascent
from sparring.core.model_state import CraftMode, attack_mode
from sparring.core.noise import Noise
from sparring.core.objectives import kl
from sparring.core.types import Attacker, Inputs, Model, map_inputs, size, take
from sparring.threats.base import ThreatModel


class Recipe(Protocol):
    """The contract: a scalar loss with a graph to the weights, averaged over the batch.

    x (B, *X), y labels (B,). `noise` keys the random starts; without it they are drawn from PyTorch's global
    generator, as dropout is. The model's mode is the caller's business, except while crafting.
    """

    def __call__(self, model: Model, x: Inputs, y: Tensor, *, noise: Noise | None = None) -> Tensor:
        """The loss to call `backward` on."""
        ...


@dataclass(frozen=True, kw_only=True)
class Standard:
    """Cross-entropy on clean inputs."""

    label_smoothing: float = 0.0

    def __call__(self, model: Model, x: Inputs, y: Tensor, *, noise: Noise | None = None) -> Tensor:
        return F.cross_entropy(model(x), y, label_smoothing=self.label_smoothing)


@dataclass(frozen=True, kw_only=True)
class Mixed:
    """Cross-entropy on a batch of which the first `share` is attacked; share 1 is PGD-AT.

    craft_mode: what BatchNorm and dropout do while crafting, see `attack_mode`. One forward pass sees the mixture, so
    BatchNorm sees it too (Kurakin 2017, section 3).
    """

    attack: Attacker
    share: float = 1.0
    label_smoothing: float = 0.0
    craft_mode: CraftMode = "eval"

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise ValueError(f"share must be in (0, 1]; got {self.share} (for none at all take the recipe standard)")

    def craft(self, model: Model, x: Inputs, y: Tensor, *, noise: Noise | None = None) -> Inputs:
        """The batch to train on, without a graph."""
        num = max(1, round(self.share * size(x)))
        x_part, rest = map_inputs(lambda t: t[:num], x), map_inputs(lambda t: t[num:], x)
        noise = Noise.from_torch(size(x)) if noise is None else noise
        with attack_mode(model, self.craft_mode) as frozen:
            some = torch.arange(num, device=y.device)
            x_adv = take(self.attack, some)(frozen, x_part, y[:num], noise=noise.take(some)).x_adv
        return x_adv if num == size(x) else map_inputs(lambda a, b: torch.cat([a, b]), x_adv, rest)

    def __call__(self, model: Model, x: Inputs, y: Tensor, *, noise: Noise | None = None) -> Tensor:
        crafted = self.craft(model, x, y, noise=noise)
        return F.cross_entropy(model(crafted), y, label_smoothing=self.label_smoothing)


@dataclass(frozen=True, kw_only=True)
class Trades:
    """cross_entropy(model(x), y) + beta * mean KL(softmax model(x) || softmax model(x_adv)), gradients through both.

    x_adv climbs the same KL, from a tiny normal start, since the KL is flat at x itself.
    """

    attack: Attacker
    beta: float = 6.0
    label_smoothing: float = 0.0
    craft_mode: CraftMode = "eval"

    def craft(self, model: Model, x: Inputs, y: Tensor, *, noise: Noise | None = None) -> Inputs:
        """Inputs whose predictions are far from those on x; labels play no part."""
        noise = Noise.from_torch(size(x)) if noise is None else noise
        with attack_mode(model, self.craft_mode) as frozen:
            with torch.no_grad():
                clean = frozen(x).softmax(1)
            return self.attack(frozen, x, clean, noise=noise).x_adv

    def loss(self, model: Model, x: Inputs, x_adv: Inputs, y: Tensor) -> Tensor:
        """The clean loss and the price of the disagreement."""
        logits, log_q = model(x), model(x_adv).log_softmax(1)
        log_p = logits.log_softmax(1)
        disagreement = (log_p.exp() * (log_p - log_q)).sum(1).mean()
        return F.cross_entropy(logits, y, label_smoothing=self.label_smoothing) + self.beta * disagreement

    def __call__(self, model: Model, x: Inputs, y: Tensor, *, noise: Noise | None = None) -> Tensor:
        return self.loss(model, x, self.craft(model, x, y, noise=noise), y)


def standard(threat: ThreatModel | None = None, **options: Any) -> Standard:
    """Ordinary training; the threat plays no part."""
    return Standard(**options)


def pgd_at(threat: ThreatModel, *, num_steps: int = 10, step: float = 0.25, **options: Any) -> Mixed:
    """Training on PGD examples alone.

    Source: Madry 2018; defaults of Rice 2020 (`train_cifar.py`: 10 steps of radius / 4, uniform start), except that
    they craft in train mode, and we follow Pang 2021 with eval mode (better by up to a point there).
    """
    return Mixed(attack=_last(threat, num_steps, step), **options)


def mixed(threat: ThreatModel, *, share: float = 0.5, num_steps: int = 10, step: float = 0.25, **options: Any) -> Mixed:
    """Half of each batch clean, half attacked. Source: Kurakin 2017 (there one step), Goodfellow 2015 (alpha 0.5)."""
    return Mixed(attack=_last(threat, num_steps, step), share=share, **options)


def trades(
    threat: ThreatModel,
    *,
    beta: float = 6.0,
    num_steps: int = 10,
    step: float = 0.25,
    start_scale: float = 0.001,
    **options: Any,
) -> Trades:
    """Clean loss plus beta times the KL between clean and attacked predictions.

    Source: Zhang 2019, eq. 5; `train_trades_cifar10.py`: beta 6, 10 steps of .007 at radius .031 (we: radius / 4),
    start 0.001 * N(0, 1), eval mode while crafting. The code's `batchmean` KL is our mean of per-example sums.
    """
    attack = _last(threat, num_steps, step)
    return Trades(attack=replace(attack, objective=kl, start=Gaussian(start_scale)), beta=beta, **options)


RECIPES: dict[str, Callable[..., Recipe]] = {"standard": standard, "mixed": mixed, "pgd-at": pgd_at, "trades": trades}


def _last(threat: ThreatModel, num_steps: int, step: float) -> Attack:
    """The inner attack of training: no look at the last iterate, so no extra forward pass."""
    return Attack(threat=threat, rule=Ascent(step), num_steps=num_steps, start=uniform, keep="last")
