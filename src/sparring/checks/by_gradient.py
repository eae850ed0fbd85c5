"""Checks of the gradient: is there one, and does the loss rise where it points?

What each of them asks stands in its row of `battery.CHECKS`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sparring.checks import limits
from sparring.checks.by_model import gradient_free
from sparring.checks.case import Case, Measured, share_of
from sparring.core.geometry import per_example
from sparring.core.objectives import margin
from sparring.core.types import Inputs, map_inputs

HARMLESS = "The attacks climbed a loss that still moves, or hardly anything stands: the number does not hang on it."
STUCK = "Where there is no gradient, an attack cannot move, and what it leaves standing is not robust."
SEARCH = "Run Square, and look for rounding, hard decisions or saturation in the model."


def vanishing(case: Case) -> Measured | None:
    rows = case.stood if len(case.stood) else case.every
    flat, flat_loss = _flat(case.slopes.by_margin)[rows], _flat(case.slopes.by_loss)[rows]
    # a cross-entropy of exactly 0 has lost the true class's part of its gradient; the others' part is still there
    lost = case.slopes.logits.log_softmax(1).gather(1, case.y[:, None])[rows, 0] == 0
    numbers = {"no_margin_gradient": share_of(flat), "no_loss_gradient": share_of(flat_loss), "lost": share_of(lost)}
    if max(numbers.values()) <= limits.NO_GRADIENT:
        return None
    words = ("no gradient of the margin", "no gradient of the cross-entropy", "a cross-entropy that is rounded to 0")
    seen = ", ".join(f"{n:.1%} have {what}" for what, n in zip(words, numbers.values(), strict=True) if n)
    alone = all(_climbs_only_loss(record.settings) for record in case.evaluation.attacks)
    gone = numbers["no_loss_gradient" if alone else "no_margin_gradient"]
    if gone <= limits.NO_GRADIENT or gone * case.at_stake < limits.POINTS_LOST:
        return {**numbers, "level": "note", "seen": seen, "meaning": HARMLESS, "step": ""}
    searched = any(gradient_free(r) and r.ran_on > r.skipped for r in case.evaluation.attacks)
    return {
        **numbers, "seen": seen, "meaning": STUCK + (" Only the cross-entropy was climbed." if alone else ""),
        "level": "invalid" if gone > limits.MOSTLY_NO_GRADIENT and not searched else "suspect",
        "step": ("Climb the margin or DLR. " if alone else "") + SEARCH,
    }  # fmt: skip


def _climbs_only_loss(settings: Any) -> bool:
    """Whether an attack is known to climb the cross-entropy (or KL) and nothing else."""
    match settings:
        case {"type": "Restarts" | "Averaged", "attack": inner}:
            return _climbs_only_loss(inner)
        case {"type": "Attack", "objective": {"type": "CrossEntropy" | "KL"}}:
            return True
    return False


def misleading(case: Case) -> Measured | None:
    slopes, threat, x = case.slopes, case.threat, case.x
    start = threat.null(x)
    before = margin.score(slopes.logits, case.y)
    length = limits.SHORT_STEP * per_example(threat.radius, start)
    z = threat.project(x, start + length * threat.steepest(x, slopes.by_margin))
    shown = threat.apply(x, z)
    if threat.discrete and _alike(shown, threat.realize(x, z)):
        return None  # the model is shown jumps alone: no short step can keep what a gradient promises
    promised = ((z - start) * slopes.by_margin).flatten(1).sum(1)
    rise = margin.score(case.logits(shown), case.y) - before
    rounding = limits.ROUNDING * torch.finfo(before.dtype).eps * slopes.logits.abs().amax(1)
    clear = promised > 10 * rounding
    if int(clear.sum()) < limits.FEWEST_BROKEN:
        return None
    misled = share_of((rise < limits.RISE_KEPT * promised)[clear])
    return {"level": case.level("suspect"), "misled": misled} if misled > limits.MISLED else None


def undone_by_rounding(case: Case) -> Measured | None:
    fell = case.reference.fell.nonzero()[:, 0]
    box = (getattr(case.threat, "low", None), getattr(case.threat, "high", None))
    image_like = isinstance(case.x, Tensor) and case.x.ndim == 4 and box == (0.0, 1.0)
    if not image_like or len(fell) < limits.FEWEST_BROKEN:
        return None
    shown = map_inputs(lambda v: (v[fell] * 255).round() / 255, case.reference.x_adv)
    undone = share_of(case.logits(shown).argmax(1) == case.y[fell])
    return {"level": "note", "undone": undone} if undone > limits.UNDONE else None


def _alike(one: Inputs, other: Inputs) -> bool:
    if isinstance(one, Tensor) or isinstance(other, Tensor):
        return isinstance(one, Tensor) and isinstance(other, Tensor) and torch.equal(one, other)
    return {*one} == {*other} and all(torch.equal(one[name], other[name]) for name in one)


def _flat(grad: Tensor) -> Tensor:
    """(B,) bool: zero everywhere, or not a number."""
    return (~(grad.abs() > 0)).flatten(1).all(1) | ~grad.isfinite().flatten(1).all(1)
