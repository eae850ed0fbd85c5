"""Recipes that change inputs for the sake of the unchanged ones: AdvProp, virtual adversarial training, plain noise."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparring.attacks.loop import Attack
from sparring.attacks.starts import Gaussian
from sparring.attacks.steps import Ascent
from sparring.core.model_state import CraftMode
from sparring.core.noise import Noise
from sparring.core.objectives import kl
from sparring.core.types import Inputs, Model, map_inputs, size
from sparring.threats.base import ThreatModel
from sparring.training.recipes import Crafting, Trades
from sparring.training.supervised import Supervised
from sparring.training.weights import called_with


@dataclass(frozen=True, kw_only=True)
class TwoStatistics(Crafting):
    """The mean of cross_entropy(model(x), y) and cross_entropy(model(x_adv), y), each by its own batch's statistics.

    BatchNorm's running statistics, those of evaluation, are of x alone.
    """

    def loss_on(self, model: Model, x: Inputs, x_adv: Inputs, y: Tensor) -> Tensor:
        apart = model
        if isinstance(model, nn.Module):
            apart = called_with(model, {name: buffer.clone() for name, buffer in model.named_buffers()})
        losses = [self._cross_entropy(self._logits(by(v), x, y), y) for by, v in ((model, x), (apart, x_adv))]
        return (losses[0] + losses[1]) / 2


@dataclass(frozen=True, kw_only=True)
class VirtualAdversarial(Trades):
    """Cross-entropy on rows with a label, plus beta * mean KL(p || softmax model(x_adv)) on all, p = softmax model(x).

    A label of -1 is none. p is held: no gradient goes through it.
    """

    unlabelled: ClassVar[bool] = True

    def _begin(self, x: Inputs, y: Tensor, threat: ThreatModel | None = None) -> None:
        super()._begin(x, y.clamp_min(0), threat)

    def _logits(self, out: Any, x: Inputs, y: Tensor) -> Tensor:
        return super()._logits(out, x, y.clamp_min(0))

    def loss_on(self, model: Model, x: Inputs, x_adv: Inputs, y: Tensor) -> Tensor:
        logits, attacked = self._logits(model(x), x, y), self._logits(model(x_adv), x, y)
        log_p, log_q = logits.detach().log_softmax(1), attacked.log_softmax(1)
        known = (y >= 0 if y.ndim == 1 else (y >= 0).all(1)).to(logits)
        labels = y.clamp_min(0)
        losses = F.cross_entropy(logits, labels, label_smoothing=self.label_smoothing, reduction="none")
        share = self._mean(known, labels).clamp_min(torch.finfo(losses.dtype).tiny)
        return self._mean(known * losses, labels) / share + self.beta * (log_p.exp() * (log_p - log_q)).sum(1).mean()


@dataclass(frozen=True, kw_only=True)
class Noisy(Supervised):
    """cross_entropy(model(x + sigma * N(0, 1)), y); what leaves the box stays outside, as `smooth` judges it."""

    sigma: float = 0.25

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.sigma < math.inf:
            raise ValueError(f"sigma, the noise's standard deviation in units of x, must be above 0; got {self.sigma}")

    def __call__(self, model: Model, x: Inputs, y: Tensor, *, noise: Noise | None = None) -> Tensor:
        self._begin(x, y)
        noise = Noise.from_torch(size(x)) if noise is None else noise

        def moved(t: Tensor) -> Tensor:
            return t + self.sigma * noise.normal(t.shape[1:]).to(t) if t.is_floating_point() else t

        return self._cross_entropy(self._logits(model(map_inputs(moved, x)), x, y), y)


def advprop(
    threat: ThreatModel, *, num_steps: int = 1, step: float = 1.0, label_smoothing: float = 0.0,
    craft_mode: CraftMode = "train",
) -> TwoStatistics:  # fmt: skip
    """Clean and attacked inputs side by side, for clean accuracy: take a small radius.

    Source: Xie 2020, "Adversarial examples improve image recognition", section 4 (PGD of 1 to 5 steps; one suits small
    networks). There attacked inputs have their own scale and shift in BatchNorm, too, and the losses are summed.
    """
    attack = Attack(threat=threat, rule=Ascent(step), num_steps=num_steps, keep="last")
    return TwoStatistics(attack=attack, label_smoothing=label_smoothing, craft_mode=craft_mode)


def vat(
    threat: ThreatModel, *, beta: float = 1.0, num_steps: int = 1, start_scale: float = 0.001,
    label_smoothing: float = 0.0, craft_mode: CraftMode = "eval",
) -> VirtualAdversarial:  # fmt: skip
    """Few labels and many inputs without: the prediction may not change within a small ball around any of them.

    Rows without a label have y = -1; `--extra` takes a file without labels for it. Source: Miyato 2018, eq. 6 to 11:
    one power iteration (K = 1, alpha = 1) is a step of the radius along the gradient of the KL at a tiny random start.
    Theirs is L2 and a unit vector times xi = 1e-6; a clean KL has no gradient at xi = 0. They craft in train mode.
    """
    start = Gaussian(start_scale)
    attack = Attack(threat=threat, rule=Ascent(1.0), num_steps=num_steps, objective=kl, start=start, keep="last")
    return VirtualAdversarial(attack=attack, beta=beta, label_smoothing=label_smoothing, craft_mode=craft_mode)


def gaussian(threat: ThreatModel | None = None, *, sigma: float = 0.25, label_smoothing: float = 0.0) -> Noisy:
    """Training under normal noise, for networks that are judged by `evaluate --smooth SIGMA`; the threat plays no part.

    Source: Cohen 2019, section 3.3 (the same sigma as in the vote; on CIFAR-10 0.25, 0.5 and 1).
    """
    return Noisy(sigma=sigma, label_smoothing=label_smoothing)
