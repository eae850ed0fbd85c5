"""Auto-PGD as AutoAttack runs it; `protocols` puts it together with FAB and Square.

Source: Croce and Hein 2020, "Reliable evaluation of adversarial robustness with an ensemble of diverse parameter-free
attacks"; for L1 Croce and Hein 2021, "Mind the box". Budgets are those of the authors' `autoattack.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from sparring.attacks.adaptive_l1 import ShrinkingRadius, SparseAPGD
from sparring.attacks.around import EachTarget, Restarts
from sparring.attacks.auto_pgd import APGD
from sparring.attacks.eot import Averaged
from sparring.attacks.loop import Attack, Gaussian, Start, StepRule
from sparring.core.geometry import per_example
from sparring.core.noise import Noise
from sparring.core.objectives import Objective, cross_entropy, targeted
from sparring.core.types import Attacker, Inputs
from sparring.threats.balls import L2
from sparring.threats.base import ThreatModel
from sparring.threats.l1 import L1


@dataclass(frozen=True)
class OnTheEdge:
    """Start in a random direction, as far out as the radius allows, and from there into the box."""

    def __call__(self, threat: ThreatModel, x: Inputs, noise: Noise) -> Tensor:
        null = threat.null(x)
        if isinstance(threat, L2) and isinstance(x, Tensor):
            direction = threat.steepest(x, noise.normal(null.shape[1:]).to(null))
        else:
            cube = noise.uniform(null.shape[1:]).to(null) * 2 - 1
            direction = cube / per_example(threat.size(x, cube).clamp_min(1e-12), cube)
        return threat.project(x, null + per_example(threat.radius, null) * direction)


def apgd(
    threat: ThreatModel, *, num_steps: int = 100, rho: float = 0.75, eot: int = 1, restarts: int = 1,
    objective: Objective = cross_entropy, wanted: Any = None,
) -> Attacker:  # fmt: skip
    """PGD that finds its own step length, from a random start on the edge of the set.

    `eot` averages every gradient over that many looks, for stochastic models. On L1 balls: sparse steps, at 3, 2 and 1
    times the radius, where `rho` has no say. `wanted` (one class, or (B,)) makes it targeted; that is not `apgd_t`.

    Source: Croce and Hein 2020, algorithm 1; for L1 Croce and Hein 2021.

    >>> from sparring import L1
    >>> attack = apgd(L1(12.0), num_steps=50, restarts=5)
    """
    goal = objective if wanted is None else targeted(objective, wanted)
    attack: Any = _single(threat, num_steps, rho, goal)
    attack = attack if eot == 1 else Averaged(attack, eot)
    return attack if restarts == 1 else Restarts(attack, restarts)


def apgd_t(threat: ThreatModel, *, num_steps: int = 100, rho: float = 0.75, targets: int = 9) -> Attacker:
    """APGD on the targeted DLR loss towards each of the likeliest wrong classes, on what still stands.

    Source: Croce and Hein 2020, section 5.

    >>> from sparring import Linf
    >>> result = apgd_t(Linf(0.1), num_steps=4)(torch.nn.Linear(4, 3), torch.rand(2, 4), torch.tensor([0, 2]))
    """
    return EachTarget(_single(threat, num_steps, rho, cross_entropy), targets)


def _single(threat: ThreatModel, num_steps: int, rho: float, objective: Objective) -> Attacker:
    """One run; on L1 balls the sparse form."""
    sparse = isinstance(threat, L1)
    rule: StepRule = SparseAPGD() if sparse else APGD(rho)
    start: Start = Gaussian(1.0) if sparse else OnTheEdge()
    attack = Attack(threat=threat, rule=rule, num_steps=num_steps, objective=objective, start=start)
    return ShrinkingRadius(attack) if sparse else attack
