"""MART: training that looks harder at what the network gets wrong without any attack."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sparring.attacks.loop import Attack
from sparring.attacks.starts import Gaussian
from sparring.attacks.steps import Ascent
from sparring.core.model_state import CraftMode
from sparring.core.types import Inputs, Model, labels_of
from sparring.threats.base import ThreatModel
from sparring.training.recipes import Disagreeing, TrainOn


@dataclass(frozen=True, kw_only=True)
class Mart(Disagreeing):
    """cross_entropy(q, y) - log(1 - max_{k != y} q_k) + beta * mean (1 - p_y) KL(p || q), p clean and q attacked.

    p = softmax model(x), q = softmax model(x_adv); gradients through both, the weight 1 - p_y included.
    """

    beta: float = 5.0

    def loss_on(self, model: Model, x: Inputs, x_adv: Inputs, y: Tensor) -> Tensor:
        own = labels_of(y)[:, None]
        logits_adv, log_p = self._logits(model(x_adv), x, y), self._logits(model(x), x, y).log_softmax(1)
        log_q, p = logits_adv.log_softmax(1), log_p.exp()
        rival = log_q.exp().scatter(1, own, 0).amax(1)
        boosted = self._cross_entropy(logits_adv, y) - self._mean(torch.log(1.0001 - rival + 1e-12), y)
        divergence = (p * (log_p - log_q)).sum(1) * (1.0000001 - p.gather(1, own)[:, 0])
        return boosted + self.beta * self._mean(divergence, y)


def mart(
    threat: ThreatModel, *, beta: float = 5.0, num_steps: int = 10, step: float = 0.25, start_scale: float = 0.001,
    label_smoothing: float = 0.0, craft_mode: CraftMode = "eval", train_on: TrainOn = "realized",
) -> Mart:  # fmt: skip
    """A boosted loss on attacked inputs, and a disagreement that counts more where the clean input is hard.

    Source: Wang 2020, eq. 11; `mart.py` and `train_resnet.py`: beta 5, 10 steps of .007 at radius .031 (we: radius /
    4) on the cross-entropy, start 0.001 * N(0, 1), eval mode while crafting. The code adds 1e-12 to the probabilities
    inside its logarithms; ours are exact.
    """
    start = Gaussian(start_scale)
    attack = Attack(threat=threat, rule=Ascent(step), num_steps=num_steps, start=start, keep="last")
    return Mart(attack=attack, beta=beta, label_smoothing=label_smoothing, craft_mode=craft_mode, train_on=train_on)
