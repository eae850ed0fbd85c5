"""Training against several threats at once: the worst of them for each example, or the mean over them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from sparring.attacks.around import merged
from sparring.attacks.loop import Attack
from sparring.attacks.steps import Ascent
from sparring.core.model_state import CraftMode
from sparring.core.noise import Noise
from sparring.core.registry import parse_list
from sparring.core.types import AttackResult, Inputs, Model, map_inputs, size, take
from sparring.threats.base import ThreatModel
from sparring.threats.named import make_threat
from sparring.training.recipes import Crafting


@dataclass(frozen=True)
class WorstOf:
    """The result with the highest loss among several attacks, example by example.

    Each attack must look at what it returns (no keep="last"), and all must change the input alike, so that a z (B, *Z)
    of one can stand beside that of another. `size` is in the unit of the threat that won. `threat` is the first's.
    """

    attacks: tuple[Attack, ...]
    per_example: ClassVar[tuple[str, ...]] = ("attacks",)

    @property
    def threat(self) -> ThreatModel:
        return self.attacks[0].threat

    def take(self, index: Tensor) -> WorstOf:
        """The same for some of the examples."""
        return WorstOf(tuple(take(attack, index) for attack in self.attacks))

    def scaled(self, factor: float) -> WorstOf:
        """With every radius times `factor`."""
        return WorstOf(tuple(replace(attack, threat=attack.threat.at(factor)) for attack in self.attacks))

    def __call__(self, model: Model, x: Inputs, target: Tensor, *, noise: Noise | None = None) -> AttackResult:
        worst, rows = self.attacks[0](model, x, target, noise=noise), torch.arange(size(x), device=target.device)
        for attack in self.attacks[1:]:
            found = attack(model, x, target, noise=noise)
            assert worst.loss is not None and found.loss is not None
            worst = merged(worst, found, rows, found.loss > worst.loss)
        return worst


@dataclass(frozen=True, kw_only=True)
class MeanOfThreats(Crafting):
    """The mean over several attacks of the cross-entropy on what each finds; `attack` is a `WorstOf` of them."""

    def craft(self, model: Model, x: Inputs, y: Tensor, *, noise: Noise | None = None) -> Inputs:
        """The attacked batches one below the other: (num * B, *X)."""
        assert isinstance(self.attack, WorstOf)
        noise = Noise.from_torch(size(x)) if noise is None else noise
        found = [Crafting.craft(replace(self, attack=one), model, x, y, noise=noise) for one in self.attack.attacks]
        return map_inputs(lambda *parts: torch.cat(parts), *found)

    def loss_on(self, model: Model, x: Inputs, x_adv: Inputs, y: Tensor) -> Tensor:
        times = size(x_adv) // size(x)
        labels = y.repeat(times, *[1] * (y.ndim - 1))
        return self._cross_entropy(self._logits(model(x_adv), x_adv, labels), labels)


def multi_norm(
    threat: ThreatModel, others: str, *, how: Literal["worst", "mean"] = "worst", num_steps: int = 10,
    step: float = 0.25, label_smoothing: float = 0.0, craft_mode: CraftMode = "eval",
) -> Crafting:  # fmt: skip
    """Training against the run's threat and others, such as multi-norm:"l2:1.5,l1:12".

    worst: each example by the threat that raises its loss most. mean: the mean loss over the threats.
    Source: Tramer and Boneh 2019, section 3 (max and avg strategies). Their steps differ by norm (and are sparse for
    L1); ours are `step` of each radius along the steepest direction.
    """
    threats = [threat, *(make_threat(spec.text) for spec in parse_list(others))]
    if len({type(one) for one in threats}) == 1 and len({one.radius for one in threats}) == 1:
        raise ValueError(f"multi-norm: {others!r} adds nothing to {threat.text()}")
    made = [Attack(threat=one, rule=Ascent(step), num_steps=num_steps, keep="highest_loss") for one in threats]
    attack = WorstOf(tuple(made))
    options: dict[str, Any] = {"label_smoothing": label_smoothing, "craft_mode": craft_mode}
    return MeanOfThreats(attack=attack, **options) if how == "mean" else Crafting(attack=attack, **options)
