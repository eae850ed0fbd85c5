"""Published attacks as compositions, each with its source and the points where paper and code disagree.

All share their options: `wanted` makes the attack targeted (one class, or classes (B,)); `objective` and `keep` are
those of `Attack`; `restarts`, for those that start at random, keeps the worst of several per example. Steps are
fractions of the radius (`step`) or lengths in the threat's unit (`absolute_step`, required when it is infinite).
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from sparring.attacks.around import restarted
from sparring.attacks.loop import Attack, Keep, StepRule
from sparring.attacks.starts import Start, null, uniform
from sparring.attacks.steps import Ascent, FrankWolfe, RawAscent, SparseAscent
from sparring.core.objectives import Objective, aimed, cross_entropy
from sparring.core.types import Attacker
from sparring.threats.base import ThreatModel

Wanted = int | Tensor | None


def gradient_ascent(
    threat: ThreatModel, *, num_steps: int = 10, absolute_step: float = 0.1,
    objective: Objective = cross_entropy, wanted: Wanted = None, keep: Keep = "fooled_first",
) -> Attacker:  # fmt: skip
    """z <- project(z + absolute_step * grad): follows the raw gradient from the clean input.

    Source: the method of steepest ascent as introductions present it; Biggio 2013 evades classifiers by following
    gradients, Szegedy 2014 finds adversarial examples of deep networks (by L-BFGS). Confident models hold it up.
    """
    return _compose(threat, RawAscent(absolute_step), num_steps, null, objective, wanted, keep)


def fgsm(
    threat: ThreatModel, *,
    objective: Objective = cross_entropy, wanted: Wanted = None, keep: Keep = "fooled_first",
) -> Attacker:  # fmt: skip
    """One step of the length of the radius along the steepest direction, from the clean input.

    Source: Goodfellow 2015, eq. in section 4 (there for Linf, where the steepest direction is the sign).
    """
    return _compose(threat, Ascent(1.0), 1, null, objective, wanted, keep)


def bim(
    threat: ThreatModel, *, num_steps: int = 10, step: float = 0.1, absolute_step: float | None = None,
    objective: Objective = cross_entropy, wanted: Wanted = None, keep: Keep = "fooled_first",
) -> Attacker:  # fmt: skip
    """Many small FGSM steps from the clean input, projected after each.

    Source: Kurakin 2017, eq. 2. The paper takes steps of 1/255 and min(radius * 255 + 4, 1.25 * radius * 255) of them;
    we keep the two apart: the default covers the radius exactly once.
    """
    return _compose(threat, Ascent(step, absolute_step=absolute_step), num_steps, null, objective, wanted, keep)


def pgd(
    threat: ThreatModel, *, num_steps: int = 40, step: float = 0.125, absolute_step: float | None = None,
    objective: Objective = cross_entropy, wanted: Wanted = None, keep: Keep = "fooled_first", restarts: int = 1,
) -> Attacker:  # fmt: skip
    """BIM from a random start in the set.

    Source: Madry 2018, section 2.1; start as in the authors' MNIST code (uniform in the ball, then into the box).
    Their steps are radius / 30 (MNIST, 40 steps) and radius / 4 (CIFAR-10, 7 steps); our default is between.

    >>> from sparring import Linf
    >>> attack = pgd(Linf(8 / 255), num_steps=20, restarts=5, wanted=3)
    """
    rule = Ascent(step, absolute_step=absolute_step)
    return restarted(_compose(threat, rule, num_steps, uniform, objective, wanted, keep), restarts)


def mi_fgsm(
    threat: ThreatModel, *, num_steps: int = 10, step: float = 0.1, absolute_step: float | None = None,
    momentum: float = 1.0, objective: Objective = cross_entropy, wanted: Wanted = None, keep: Keep = "fooled_first",
) -> Attacker:  # fmt: skip
    """BIM along a running sum of normalised gradients.

    Source: Dong 2018, algorithm 1 (radius / num_steps per step, decay 1.0).
    """
    return _compose(threat, Ascent(step, momentum, absolute_step), num_steps, null, objective, wanted, keep)


def slide(
    threat: ThreatModel, *, num_steps: int = 40, step: float = 0.25, share: float = 0.01,
    absolute_step: float | None = None,
    objective: Objective = cross_entropy, wanted: Wanted = None, keep: Keep = "fooled_first", restarts: int = 1,
) -> Attacker:  # fmt: skip
    """PGD whose steps move the `share` of the coordinates with the largest gradient that can still move.

    For L1. `share` matters: near the radius / the numbers in one image of [0, 1] is a good choice; see `SparseAscent`.

    Source: Tramer and Boneh 2019, SLIDE; the start is `pgd`'s, uniform in the ball. Theirs is random on its surface
    (Laplace), their steps are 0.1 of the radius with 10 steps (MNIST), 0.26 with 100 (CIFAR-10), their share is 0.01.

    >>> from sparring import L1
    >>> slide(L1(12.0), num_steps=3, share=0.5)(torch.nn.Linear(4, 3), torch.rand(2, 4), torch.tensor([0, 2])).z.shape
    torch.Size([2, 4])
    """
    rule = SparseAscent(step, share, absolute_step)
    return restarted(_compose(threat, rule, num_steps, uniform, objective, wanted, keep), restarts)


def frank_wolfe(
    threat: ThreatModel, *, num_steps: int = 8, share: float = 1.0,
    objective: Objective = cross_entropy, wanted: Wanted = None, keep: Keep = "fooled_first", restarts: int = 1,
) -> Attacker:  # fmt: skip
    """Steps to the corner of the set that the gradient points to, from the clean input; restarts begin at random.

    Source: Frank and Wolfe 1956. For words one step is HotFlip (Ebrahimi 2018); see `steps.FrankWolfe`.
    """
    start = null if restarts == 1 else uniform
    return restarted(_compose(threat, FrankWolfe(share), num_steps, start, objective, wanted, keep), restarts)


CATALOGUE: dict[str, Callable[..., Attacker]] = {
    "gradient-ascent": gradient_ascent, "fgsm": fgsm, "bim": bim, "pgd": pgd, "mi-fgsm": mi_fgsm, "slide": slide,
    "frank-wolfe": frank_wolfe,
}  # fmt: skip


def _compose(
    threat: ThreatModel, rule: StepRule, num_steps: int, start: Start, objective: Objective, wanted: Wanted, keep: Keep
) -> Attack:
    goal = aimed(objective, wanted)
    return Attack(threat=threat, rule=rule, num_steps=num_steps, objective=goal, start=start, keep=keep)
