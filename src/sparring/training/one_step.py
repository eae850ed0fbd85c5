"""Training at about the price of two ordinary steps: one step of attack, or none beside the training step itself.

One step is cheap and may collapse: the network learns to stand that one step and nothing else (catastrophic
overfitting).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sparring.attacks.loop import Attack, Problem, Seen
from sparring.attacks.starts import Nearer, null
from sparring.attacks.steps import Ascent
from sparring.core.model_state import CraftMode
from sparring.core.noise import Noise
from sparring.core.types import Inputs, Model, size
from sparring.threats.base import ThreatModel
from sparring.training.recipes import Mixed, TrainOn
from sparring.training.supervised import Supervised


@dataclass(frozen=True, kw_only=True)
class Free(Supervised):
    """Cross-entropy at x + z, whose backward pass serves twice: it also moves z (B, *Z) one step of `attack`'s rule.

    Each batch comes `replays` times in a row; z goes on from one time to the next and from batch to batch, projected to
    the set around the new inputs. It starts at null, again where a batch has another shape or more rows.
    """

    attack: Attack
    replays: int = 8
    memory: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.replays < 1:
            raise ValueError(f"replays, how often each batch trains in a row, must be at least 1; got {self.replays}")

    def __call__(self, model: Model, x: Inputs, y: Tensor, *, noise: Noise | None = None) -> Tensor:
        threat, num = self.attack.threat, size(x)
        self._begin(x, y, threat)
        start, carried = threat.null(x), self.memory.get("z")
        if carried is None or carried.shape[1:] != start.shape[1:] or len(carried) < num:
            carried = start
        z = threat.project(x, carried[:num].to(start)).detach().requires_grad_()
        loss = self._cross_entropy(self._logits(model(threat.apply(x, z)), x, y), y)
        problem = Problem(threat, x, 1, Noise.make(0, "free", torch.arange(num)) if noise is None else noise)

        def move(grad: Tensor) -> None:
            seen = Seen(loss.detach().expand(num), torch.zeros(num, dtype=torch.bool, device=grad.device), grad)
            moved, _ = self.attack.rule.step(problem, z.detach(), seen, None, 0)
            self.memory["z"] = torch.cat([moved, carried[num:].to(moved)])

        z.register_hook(move)
        return loss


def fgsm_rs(
    threat: ThreatModel, *, step: float = 1.25, label_smoothing: float = 0.0, craft_mode: CraftMode = "eval",
    train_on: TrainOn = "realized",
) -> Mixed:  # fmt: skip
    """Training on one step from a random start, clipped to the ball.

    Source: Wong 2020, "Fast is better than free", algorithm 3; `CIFAR10/train_fgsm.py`: step 10/255 at radius 8/255,
    uniform start. They craft in train mode; we in eval mode, as the other recipes do.
    """
    attack = Attack(threat=threat, rule=Ascent(step), num_steps=1, keep="last")
    return Mixed(attack=attack, label_smoothing=label_smoothing, craft_mode=craft_mode, train_on=train_on)


def n_fgsm(
    threat: ThreatModel, *, step: float = 1.0, noise: float = 2.0, label_smoothing: float = 0.0,
    craft_mode: CraftMode = "eval", train_on: TrainOn = "realized",
) -> Mixed:  # fmt: skip
    """Training on one step from noise of twice the radius, clipped to valid inputs and not to the ball.

    `noise` and `step` are in radii. The recipe's own attack therefore has the larger ball that just holds their sum.
    Source: de Jorge 2022, "Make some noise", section 4; `train.py`: uniform noise in [-2 radius, 2 radius], step of the
    radius, no clipping to the ball. They craft in train mode; we in eval mode.
    """
    if not (noise > 0 and step > 0):
        raise ValueError(f"noise and step are in radii, above 0; got {noise} and {step} (no noise is fgsm-rs)")
    whole = noise + step
    attack = Attack(
        threat=threat.at(whole), rule=Ascent(step / whole), num_steps=1, start=Nearer(noise / whole), keep="last"
    )
    return Mixed(attack=attack, label_smoothing=label_smoothing, craft_mode=craft_mode, train_on=train_on)


def free(threat: ThreatModel, *, replays: int = 8, step: float = 1.0, label_smoothing: float = 0.0) -> Free:
    """Each batch several times in a row, the step of the weights being that of the attack, too.

    An epoch has `replays` times its steps, so take that much fewer epochs. Source: Shafahi 2019, algorithm 1; the code
    of Wong 2020 (`CIFAR10/train_free.py`: 8 replays, step of the radius). There a perturbation meets the next batch
    before it is clipped to it; here after.
    """
    attack = Attack(threat=threat, rule=Ascent(step), num_steps=1, start=null, keep="last")
    return Free(attack=attack, replays=replays, label_smoothing=label_smoothing)
