"""Auto-PGD as AutoAttack runs it; `protocols` puts it together with FAB and Square.

Source: Croce and Hein 2020, "Reliable evaluation of adversarial robustness with an ensemble of diverse parameter-free
attacks"; for L1 Croce and Hein 2021, "Mind the box". Budgets are those of the authors' `autoattack.py`.
"""

from __future__ import annotations

from torch import Tensor

from sparring.attacks.adaptive_l1 import ShrinkingRadius, SparseAPGD
from sparring.attacks.around import EachTarget, restarted
from sparring.attacks.auto_pgd import APGD
from sparring.attacks.eot import Averaged
from sparring.attacks.loop import Attack, StepRule
from sparring.attacks.starts import Gaussian, OnTheEdge, Start
from sparring.core.objectives import Objective, aimed, cross_entropy
from sparring.core.types import Attacker
from sparring.threats.base import ThreatModel


def apgd(
    threat: ThreatModel, *, num_steps: int = 100, rho: float = 0.75, eot: int = 1, restarts: int = 1,
    objective: Objective = cross_entropy, wanted: int | Tensor | None = None,
) -> Attacker:  # fmt: skip
    """PGD that finds its own step length, from a random start on the edge of the set.

    `eot` averages every gradient over that many looks, for stochastic models. On L1 balls: sparse steps, at 3, 2 and 1
    times the radius, where `rho` has no say. `wanted` (one class, or (B,)) makes it targeted; that is not `apgd_t`.

    Source: Croce and Hein 2020, algorithm 1; for L1 Croce and Hein 2021.

    >>> from sparring import L1
    >>> attack = apgd(L1(12.0), num_steps=50, restarts=5)
    """
    attack = _single(threat, num_steps, rho, aimed(objective, wanted))
    return restarted(attack if eot == 1 else Averaged(attack, eot), restarts)


def apgd_t(threat: ThreatModel, *, num_steps: int = 100, rho: float = 0.75, targets: int = 9) -> Attacker:
    """APGD on the targeted DLR loss towards each of the likeliest wrong classes, on what still stands.

    Source: Croce and Hein 2020, section 5.

    >>> from sparring import Linf
    >>> result = apgd_t(Linf(0.1), num_steps=4)(torch.nn.Linear(4, 3), torch.rand(2, 4), torch.tensor([0, 2]))
    """
    return EachTarget(_single(threat, num_steps, rho, cross_entropy), targets)


def _single(threat: ThreatModel, num_steps: int, rho: float, objective: Objective) -> Attacker:
    """One run; on L1 balls the sparse form."""
    sparse = threat.norm == "l1"
    rule: StepRule = SparseAPGD() if sparse else APGD(rho)
    start: Start = Gaussian(1.0) if sparse else OnTheEdge()
    attack = Attack(threat=threat, rule=rule, num_steps=num_steps, objective=objective, start=start)
    return ShrinkingRadius(attack) if sparse else attack
