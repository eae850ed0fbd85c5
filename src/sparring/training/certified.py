"""Certified training: the loss of the worst logits that interval bounds allow, so that a bound can be proven later."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from sparring.attacks.loop import Attack
from sparring.attacks.steps import Ascent
from sparring.certify.interval import interval_gaps
from sparring.core.model_state import attack_mode
from sparring.core.noise import Noise
from sparring.core.types import Inputs, size
from sparring.threats.base import ThreatModel
from sparring.training.supervised import Supervised


@dataclass(frozen=True, kw_only=True)
class CertifiedTraining(Supervised):
    """(1 - k) * cross_entropy(model(x), y) + k * cross_entropy(-gaps, y), k = weight * reach.

    gaps (B, K): lower bounds of logit_y - logit_k over `reach * radius`; `reach` grows from 0 to 1 between the moments
    of `ramp`. With `box` below 1 they are of that share of the radius around what `attack` finds in the rest of it.
    """

    threat: ThreatModel
    weight: float = 0.5
    ramp: tuple[float, float] = (0.05, 0.5)
    box: float = 1.0
    attack: Attack | None = None
    reach: float = 1.0
    certifies: ClassVar[bool] = True  # the best epoch is the one with the highest certified accuracy

    def at(self, progress: float) -> Self:
        """With the radius as large as it is at this moment of the run."""
        start, end = self.ramp
        return replace(self, reach=min(1.0, max(0.0, (progress - start) / max(end - start, 1e-9))))

    def __call__(
        self, model: Any, x: Inputs, y: Tensor, *, noise: Noise | None = None
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        self._begin(x, y, self.threat)
        clean = self._cross_entropy(self._logits(model(x), x, y), y)
        if self.reach == 0:
            return clean, {}
        gaps, k = self._gaps(model, x, y, noise), self.weight * self.reach
        sure = (gaps.scatter(1, y[:, None], torch.inf).amin(1) > 0).float().mean().detach()
        return (1 - k) * clean + k * self._cross_entropy(-gaps, y), {"certified_in_box": sure}

    def _gaps(self, model: Any, x: Any, y: Tensor, noise: Noise | None) -> Tensor:
        if self.attack is not None:
            attack = replace(self.attack, threat=self.threat.at(self.reach * (1 - self.box)))
            with attack_mode(model, "eval") as frozen:
                x = attack(frozen, x, y, noise=Noise.from_torch(size(x)) if noise is None else noise).x_adv
        return interval_gaps(model, x, y, self.threat.at(self.reach * self.box))


def ibp(
    threat: ThreatModel, *, weight: float = 0.5, ramp: tuple[float, float] = (0.05, 0.5), box: float = 1.0,
    num_steps: int = 8, step: float = 0.25,
) -> CertifiedTraining:  # fmt: skip
    """Clean loss and the loss of interval bounds: networks whose robustness `--certify interval` proves.

    box: 1 bounds the whole radius; below 1 an attack of `num_steps` steps goes the rest of the way.

    Source: Gowal 2018, eq. 13 and section 4 (radius and share of the bound grow, the latter to a half; there over steps
    2 to 10 thousand of 60); with `box` Mueller 2023 (SABR: 0.4 and 8 steps for MNIST 0.1, 0.6 for 0.3). Bounds are
    those of eval mode, so plain layers without BatchNorm do best.
    """
    for name, share, of in (("weight", weight, "the bound in the loss"), ("box", box, "the radius that is bounded")):
        if not 0 < share <= 1:
            raise ValueError(f"{name}={share}; expected the share of {of}, above 0, at most 1")
    attack = Attack(threat=threat, rule=Ascent(step), num_steps=num_steps, keep="last") if box < 1 else None
    return CertifiedTraining(threat=threat, weight=weight, ramp=ramp, box=box, attack=attack)
