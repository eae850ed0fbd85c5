"""Training recipes: what a batch is turned into, and the loss on it.

`loss = recipe(model, x, y); loss.backward()` works in anybody's loop. Builders carry the papers' defaults.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, get_args

import torch
from torch import Tensor

from sparring.attacks.around import SmoothBackward, part_of
from sparring.attacks.loop import Attack
from sparring.attacks.starts import Gaussian
from sparring.attacks.steps import Ascent
from sparring.core.model_state import CraftMode, attack_mode
from sparring.core.noise import Noise
from sparring.core.objectives import kl
from sparring.core.types import Attacker, AttackResult, Inputs, Model, map_inputs, size, take
from sparring.threats.base import ThreatModel
from sparring.training.supervised import Supervised

TrainOn = Literal["realized", "applied"]
"""What the loss is computed on. "realized": the attacked inputs as they are judged and saved. "applied": what the model
was shown while crafting, which differs where `realize` rounds (mixtures of words instead of words)."""


class Recipe(Protocol):
    """The contract: a scalar loss with a graph to the weights, averaged over the batch.

    x (B, *X), y labels (B,). `noise` keys the random starts; without it they are drawn from PyTorch's global
    generator, as dropout is. The model's mode is the caller's business, except while crafting. A recipe may return
    `(loss, figures)`, too: scalars by name (tensors, so that nobody waits for the device), averaged over each epoch
    into its line of history as `train_NAME`. With a method `at(progress) -> Recipe` it changes over the run (a radius
    or weight that grows); progress goes from 0 to 1. With `replays` it gets each batch that often in a row; its
    `memory`, a dictionary of tensors and plain values, travels with checkpoints and rollbacks.
    """

    def __call__(
        self, model: Model, x: Inputs, y: Tensor, *, noise: Noise | None = None
    ) -> Tensor | tuple[Tensor, Mapping[str, Tensor]]:
        """The loss to call `backward` on."""


@dataclass(frozen=True, kw_only=True)
class Standard(Supervised):
    """Cross-entropy on clean inputs."""

    def __call__(self, model: Model, x: Inputs, y: Tensor, *, noise: Noise | None = None) -> Tensor:
        self._begin(x, y)
        return self._cross_entropy(self._logits(model(x), x, y), y)


@dataclass(frozen=True, kw_only=True)
class Crafting(Supervised):
    """What recipes that attack their batch share: `craft` makes inputs, `loss_on` trains on them.

    craft_mode: what BatchNorm and dropout do while crafting, see `attack_mode`.
    """

    attack: Attacker
    craft_mode: CraftMode = "eval"
    train_on: TrainOn = "realized"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.train_on not in get_args(TrainOn):
            raise ValueError(f"train_on={self.train_on!r}; expected one of {', '.join(get_args(TrainOn))}")
        if self.train_on == "applied" and part_of(self.attack, "threat") is None:
            raise ValueError('train_on="applied" needs an attack with a `threat`; this one is a plain function')

    def craft(self, model: Model, x: Inputs, y: Tensor, *, noise: Noise | None = None) -> Inputs:
        """The inputs to train on, without a graph."""
        self._begin(x, y, part_of(self.attack, "threat"))
        noise = Noise.from_torch(size(x)) if noise is None else noise
        with attack_mode(model, self.craft_mode) as frozen:
            result = self.attack(frozen, x, self._target(frozen, x, y), noise=noise)
        return self._crafted(x, result, part_of(self.attack, "threat"))

    def _target(self, model: Model, x: Inputs, y: Tensor) -> Tensor:
        """What the attack climbs away from."""
        return y

    def loss_on(self, model: Model, x: Inputs, x_adv: Inputs, y: Tensor) -> Tensor:
        """The loss, on the batch and what `craft` made of it: cross-entropy on the latter."""
        return self._cross_entropy(self._logits(model(x_adv), x, y), y)

    def __call__(self, model: Model, x: Inputs, y: Tensor, *, noise: Noise | None = None) -> Tensor:
        return self.loss_on(model, x, self.craft(model, x, y, noise=noise), y)

    def _crafted(self, x: Inputs, result: AttackResult, threat: ThreatModel | None) -> Inputs:
        """What is trained on of an attack's result."""
        return result.x_adv if self.train_on == "realized" or threat is None else threat.apply(x, result.z)


@dataclass(frozen=True, kw_only=True)
class Mixed(Crafting):
    """Cross-entropy on a batch of which the first `share` is attacked; share 1 is PGD-AT.

    One forward pass sees the mixture, so BatchNorm sees it too (Kurakin 2017, section 3).
    """

    share: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.share <= 1:
            raise ValueError(f"share must be in (0, 1]; got {self.share} (for none at all take the recipe standard)")

    def craft(self, model: Model, x: Inputs, y: Tensor, *, noise: Noise | None = None) -> Inputs:
        """The batch to train on, without a graph."""
        self._begin(x, y, part_of(self.attack, "threat"))
        num, device = max(1, round(self.share * size(x))), y.device
        noise = Noise.from_torch(size(x)) if noise is None else noise
        some, others = torch.arange(num, device=device), torch.arange(num, size(x), device=device)
        attack, x_part = take(self.attack, some), map_inputs(lambda t: t[:num], x)
        with attack_mode(model, self.craft_mode) as frozen:
            result = attack(frozen, x_part, y[:num], noise=noise.take(some))
        crafted = self._crafted(x_part, result, part_of(attack, "threat"))
        if num == size(x):
            return crafted
        rest, threat = map_inputs(lambda t: t[num:], x), part_of(take(self.attack, others), "threat")
        if threat is not None:  # named inputs may get other names when they are attacked
            null = threat.null(rest)
            rest = threat.realize(rest, null) if self.train_on == "realized" else threat.apply(rest, null)
        return map_inputs(lambda a, b: torch.cat([a, b]), crafted, rest)


@dataclass(frozen=True, kw_only=True)
class Disagreeing(Crafting):
    """What recipes share whose loss adds `beta` times how far clean and attacked predictions disagree."""

    beta: float = 6.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.beta < math.inf:
            raise ValueError(f"beta, the price of the disagreement, must be at least 0 and finite; got {self.beta}")


@dataclass(frozen=True, kw_only=True)
class Trades(Disagreeing):
    """cross_entropy(model(x), y) + beta * mean KL(softmax model(x) || softmax model(x_adv)), gradients through both.

    x_adv climbs the same KL, from a tiny normal start, since the KL is flat at x itself.
    """

    def _target(self, model: Model, x: Inputs, y: Tensor) -> Tensor:
        """The predictions on x; labels play no part."""
        with torch.no_grad():
            return model(x).softmax(1)

    def loss_on(self, model: Model, x: Inputs, x_adv: Inputs, y: Tensor) -> Tensor:
        logits, attacked = self._logits(model(x), x, y), self._logits(model(x_adv), x, y)
        log_p, log_q = logits.log_softmax(1), attacked.log_softmax(1)
        disagreement = self._mean((log_p.exp() * (log_p - log_q)).sum(1), y)
        return self._cross_entropy(logits, y) + self.beta * disagreement


def standard(
    threat: ThreatModel | None = None, *, label_smoothing: float = 0.0, class_weights: Sequence[float] | None = None
) -> Standard:
    """Ordinary training; the threat plays no part."""
    return Standard(label_smoothing=label_smoothing, class_weights=class_weights)


def pgd_at(
    threat: ThreatModel, *, num_steps: int = 10, step: float = 0.25,
    label_smoothing: float = 0.0, craft_mode: CraftMode = "eval", train_on: TrainOn = "realized",
    class_weights: Sequence[float] | None = None, slope: float | None = None,
) -> Mixed:  # fmt: skip
    """Training on PGD examples alone; with `slope` they climb the gradient of `SmoothBackward`.

    Networks learn to fool smoothed attacks, soft ones (slope 10) soon, steep ones (30) in long runs: docs/results.md.

    Source: Madry 2018; defaults of Rice 2020 (`train_cifar.py`: 10 steps of radius / 4, uniform start), except that
    they craft in train mode, and we follow Pang 2021 with eval mode (better by up to a point there).
    """
    attack = Attack(threat=threat, rule=Ascent(step), num_steps=num_steps, keep="last")
    return Mixed(
        attack=attack if slope is None else SmoothBackward(attack, slope), label_smoothing=label_smoothing,
        craft_mode=craft_mode, train_on=train_on, class_weights=class_weights,
    )  # fmt: skip


def mixed(
    threat: ThreatModel, *, share: float = 0.5, num_steps: int = 10, step: float = 0.25,
    label_smoothing: float = 0.0, craft_mode: CraftMode = "eval", train_on: TrainOn = "realized",
    class_weights: Sequence[float] | None = None,
) -> Mixed:  # fmt: skip
    """Half of each batch clean, half attacked. Source: Kurakin 2017 (there one step), Goodfellow 2015 (alpha 0.5)."""
    attack = Attack(threat=threat, rule=Ascent(step), num_steps=num_steps, keep="last")
    return Mixed(
        attack=attack, share=share, label_smoothing=label_smoothing, craft_mode=craft_mode, train_on=train_on,
        class_weights=class_weights,
    )  # fmt: skip


def trades(
    threat: ThreatModel, *, beta: float = 6.0, num_steps: int = 10, step: float = 0.25, start_scale: float = 0.001,
    label_smoothing: float = 0.0, craft_mode: CraftMode = "eval", train_on: TrainOn = "realized",
    class_weights: Sequence[float] | None = None,
) -> Trades:  # fmt: skip
    """Clean loss plus beta times the KL between clean and attacked predictions.

    Source: Zhang 2019, eq. 5; `train_trades_cifar10.py`: beta 6, 10 steps of .007 at radius .031 (we: radius / 4),
    start 0.001 * N(0, 1), eval mode while crafting. The code's `batchmean` KL is our mean of per-example sums.
    """
    start = Gaussian(start_scale)
    attack = Attack(threat=threat, rule=Ascent(step), num_steps=num_steps, objective=kl, start=start, keep="last")
    return Trades(
        attack=attack, beta=beta, label_smoothing=label_smoothing, craft_mode=craft_mode, train_on=train_on,
        class_weights=class_weights,
    )  # fmt: skip
