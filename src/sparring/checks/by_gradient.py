"""Probes of the gradient: is there one, and does the loss rise where it points?"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sparring.checks import limits
from sparring.checks.case import Case, share_of
from sparring.core.geometry import per_example
from sparring.core.objectives import margin
from sparring.core.types import map_inputs
from sparring.results.findings import Finding, Level


def vanishing(case: Case) -> list[Finding]:
    """Whether the standing examples have a gradient on the losses that the attacks climbed."""
    rows = case.stood if len(case.stood) else case.every
    flat, flat_loss = _flat(case.slopes.by_margin)[rows], _flat(case.slopes.by_loss)[rows]
    # a cross-entropy of exactly 0 has lost the true class's part of its gradient; the others' part is still there
    lost = case.slopes.logits.log_softmax(1).gather(1, case.y[:, None])[rows, 0] == 0
    only_loss = all(_climbs_only_loss(record.settings) for record in case.evaluation.attacks)
    numbers = {"no_margin_gradient": share_of(flat), "no_loss_gradient": share_of(flat_loss), "lost": share_of(lost)}
    gone = share_of(flat_loss) if only_loss else share_of(flat)
    if max(numbers.values()) <= limits.NO_GRADIENT:
        return []
    level: Level = "note"
    if gone > limits.NO_GRADIENT and gone * case.at_stake >= limits.POINTS_LOST:
        level = "invalid" if gone > limits.MOSTLY_NO_GRADIENT and not _gradient_free(case) else "suspect"
    told = {
        "no gradient of the margin": numbers["no_margin_gradient"],
        "no gradient of the cross-entropy": numbers["no_loss_gradient"],
        "a cross-entropy that is rounded to 0": numbers["lost"],
    }
    seen = ", ".join(f"{share:.1%} have {what}" for what, share in told.items() if share)
    sentence = f"Of the sampled examples, {seen}. "
    if level == "note":
        sentence += (
            "The attacks climbed a loss that still moves, or hardly anything stands: the number does not hang on it."
        )
        return [Finding("vanishing_gradients", sentence, numbers, level)]
    sentence += "Where there is no gradient, an attack cannot move, and what it leaves standing is not robust."
    step = "Run Square, and look for rounding, hard decisions or saturation in the model."
    if only_loss:
        sentence += " Only the cross-entropy was climbed."
        step = "Climb the margin or DLR. " + step
    return [Finding("vanishing_gradients", sentence, numbers, level, step)]


def _climbs_only_loss(settings: Any) -> bool:
    """Whether an attack is known to climb the cross-entropy (or KL) and nothing else."""
    while isinstance(settings, dict) and settings.get("type") in ("Restarts", "Averaged"):
        settings = settings.get("attack")
    if not isinstance(settings, dict) or settings.get("type") != "Attack":
        return False
    objective = settings.get("objective")
    return isinstance(objective, dict) and objective.get("type") in ("CrossEntropy", "KL")


def _gradient_free(case: Case) -> bool:
    """Whether an attack that needs no gradient saw most of what stood."""
    return any(r.cost.forwards > 0 and r.cost.backwards == 0 and r.ran_on > r.skipped for r in case.evaluation.attacks)


def misleading(case: Case) -> list[Finding]:
    """Whether a short step along the gradient raises the margin as the gradient promises."""
    slopes, threat, x = case.slopes, case.threat, case.x
    start = threat.null(x)
    before = margin.score(slopes.logits, case.y)
    length = limits.SHORT_STEP * per_example(threat.radius, start)
    z = threat.project(x, start + length * threat.steepest(x, slopes.by_margin))
    promised = ((z - start) * slopes.by_margin).flatten(1).sum(1)
    rise = margin.score(case.logits(threat.apply(x, z)), case.y) - before
    rounding = limits.ROUNDING * torch.finfo(before.dtype).eps * slopes.logits.abs().amax(1)
    told = promised > 10 * rounding
    broken = share_of((rise < limits.RISE_KEPT * promised)[told])
    if int(told.sum()) < limits.FEWEST_BROKEN or broken <= limits.MISLED:
        return []
    sentence = (
        f"A step of {limits.SHORT_STEP:g} of the radius along the gradient raises the margin by less than "
        f"{limits.RISE_KEPT:.0%} of what the gradient promises on {broken:.1%} of the examples: the gradient points "
        "elsewhere than uphill (jumps, ripples, noise, a backward pass of its own), and attacks that follow it fail."
    )
    step = "Attack with a smooth stand-in for the odd layer (BPDA), with Square, and by transfer."
    return [Finding("misleading_gradients", sentence, {"misled": broken}, case.level("suspect"), step)]


def undone_by_rounding(case: Case) -> list[Finding]:
    """Whether adversarial images survive being saved with 8 bits per channel."""
    fell = case.reference.fell.nonzero()[:, 0]
    box = (getattr(case.threat, "low", None), getattr(case.threat, "high", None))
    image_like = isinstance(case.x, Tensor) and case.x.ndim == 4 and box == (0.0, 1.0)
    if not image_like or len(fell) < limits.FEWEST_BROKEN or "random_output" in case.seen:
        return []
    shown = map_inputs(lambda v: (v[fell] * 255).round() / 255, case.reference.x_adv)
    undone = share_of(case.logits(shown).argmax(1) == case.y[fell])
    if undone <= limits.UNDONE:
        return []
    sentence = (
        f"{undone:.1%} of the examples that a short attack broke stand again once rounded to 8 bits: for images in "
        "files the number may be too low, and an attack that hangs on the last digits is a weak one."
    )
    step = "State whether inputs come with 8 bits; if so, round inside the threat model."
    return [Finding("undone_by_rounding", sentence, {"undone": undone}, "note", step)]


def _flat(grad: Tensor) -> Tensor:
    """(B,) bool: zero everywhere, or not a number."""
    return (~(grad.abs() > 0)).flatten(1).all(1) | ~grad.isfinite().flatten(1).all(1)
