"""Published attacks as compositions, each with its source and the points where paper and code disagree.

All share their options: `wanted` makes the attack targeted (one class, or classes (B,)); `restarts` keeps the worst of
several random starts per example; `objective` and `keep` are those of `Attack`. Steps are fractions of the radius
(`step`) or lengths in the threat's unit (`absolute_step`, required when the radius is infinite).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sparring.attacks.around import Restarts
from sparring.attacks.loop import Attack, Keep, StepRule
from sparring.attacks.starts import Start, null, uniform
from sparring.attacks.steps import Ascent, RawAscent
from sparring.core.objectives import Objective, cross_entropy, targeted
from sparring.core.types import Attacker
from sparring.threats.base import ThreatModel


def gradient_ascent(
    threat: ThreatModel, *, num_steps: int = 10, absolute_step: float = 0.1, **options: Any
) -> Attacker:
    """z <- project(z + absolute_step * grad): follows the raw gradient from the clean input.

    Source: the method of steepest ascent as introductions present it; Biggio 2013 evades classifiers by following
    gradients, Szegedy 2014 finds adversarial examples of deep networks (by L-BFGS). Confident models hold it up.
    """
    return _compose(threat, RawAscent(absolute_step), num_steps, null, **options)


def fgsm(threat: ThreatModel, **options: Any) -> Attacker:
    """One step of the length of the radius along the steepest direction, from the clean input.

    Source: Goodfellow 2015, eq. in section 4 (there for Linf, where the steepest direction is the sign).
    """
    return _compose(threat, Ascent(1.0), 1, null, **options)


def bim(
    threat: ThreatModel, *, num_steps: int = 10, step: float = 0.1, absolute_step: float | None = None, **options: Any
) -> Attacker:
    """Many small FGSM steps from the clean input, projected after each.

    Source: Kurakin 2017, eq. 2. The paper takes steps of 1/255 and min(radius * 255 + 4, 1.25 * radius * 255) of them;
    we keep the two apart: the default covers the radius exactly once.
    """
    return _compose(threat, Ascent(step, absolute_step=absolute_step), num_steps, null, **options)


def pgd(
    threat: ThreatModel, *, num_steps: int = 40, step: float = 0.125, absolute_step: float | None = None, **options: Any
) -> Attacker:
    """BIM from a random start in the set.

    Source: Madry 2018, section 2.1; start as in the authors' MNIST code (uniform in the ball, then into the box).
    Their steps are radius / 30 (MNIST, 40 steps) and radius / 4 (CIFAR-10, 7 steps); our default is between.

    >>> from sparring import Linf
    >>> attack = pgd(Linf(8 / 255), num_steps=20, restarts=5, wanted=3)
    """
    return _compose(threat, Ascent(step, absolute_step=absolute_step), num_steps, uniform, **options)


def mi_fgsm(
    threat: ThreatModel, *, num_steps: int = 10, step: float = 0.1, absolute_step: float | None = None,
    momentum: float = 1.0, **options: Any,
) -> Attacker:  # fmt: skip
    """BIM along a running sum of normalised gradients.

    Source: Dong 2018, algorithm 1 (radius / num_steps per step, decay 1.0).
    """
    return _compose(threat, Ascent(step, momentum, absolute_step), num_steps, null, **options)


CATALOGUE: dict[str, Callable[..., Attacker]] = {
    "gradient-ascent": gradient_ascent,
    "fgsm": fgsm,
    "bim": bim,
    "pgd": pgd,
    "mi-fgsm": mi_fgsm,
}


def _compose(
    threat: ThreatModel,
    rule: StepRule,
    num_steps: int,
    start: Start,
    *,
    objective: Objective = cross_entropy,
    wanted: Any = None,
    restarts: int = 1,
    keep: Keep = "fooled_first",
) -> Attacker:
    if restarts > 1 and start is null:
        raise ValueError(f"restarts={restarts}, but this attack starts at the clean input: every run would be the same")
    goal = objective if wanted is None else targeted(objective, wanted)
    attack = Attack(threat=threat, rule=rule, num_steps=num_steps, objective=goal, start=start, keep=keep)
    return attack if restarts == 1 else Restarts(attack, restarts)
