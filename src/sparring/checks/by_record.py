"""Probes that only read what the evaluation recorded: they cost no pass."""

from __future__ import annotations

import itertools
import math

import torch

from sparring.checks import limits
from sparring.checks.case import Case
from sparring.results.findings import Finding


def curve(case: Case) -> list[Finding]:
    """Whether robust accuracy falls with the radius, and goes on falling."""
    points = [(radius, share.value) for radius, share in case.evaluation.curve]
    rise = max((after - before for (_, before), (_, after) in itertools.pairwise(points)), default=0.0)
    if rise > limits.CHANGED:
        sentence = (
            f"Robust accuracy rises by {rise:.1%} somewhere as the radius grows, which cannot be: the attack at the "
            "larger radius failed."
        )
        step = "Give the attacks on the curve more steps and restarts."
        return [Finding("curve_shape", sentence, {"rise": rise}, case.level("suspect"), step)]
    radius = float(torch.as_tensor(case.evaluation.threat.radius, dtype=torch.float64).mean())
    here = next((value for r, value in points if math.isclose(r, radius, rel_tol=1e-6)), None)
    there = next((value for r, value in points if r >= limits.TWICE * radius), None)
    if here is None or there is None:
        return []
    fall, further = points[0][1] - here, here - there
    if fall < limits.FALL_WORTH or here < limits.FALL_WORTH or further >= limits.FALL_STOPS * fall:
        return []
    sentence = (
        f"Robust accuracy falls from {points[0][1]:.1%} to {here:.1%} at the radius, and at twice the radius it is "
        f"still {there:.1%}: an attack that is allowed more and finds hardly more has got stuck."
    )
    step = "Run the full attacks at the larger radii, and Square."
    return [Finding("curve_shape", sentence, {"fall": fall, "further": further}, case.level("suspect"), step)]


def gradient_free(case: Case) -> list[Finding]:
    """Whether, in the evaluation, an attack without gradients broke much of what gradient attacks had left."""
    before = False
    for record in case.evaluation.attacks:
        free = record.cost.forwards > 0 and record.cost.backwards == 0
        share = record.broke / max(record.ran_on + record.skipped, 1)
        if before and free and record.broke >= limits.FEWEST_BROKEN and share > limits.GRADIENT_FREE_BROKE:
            sentence = (
                f"{record.name}, which needs no gradient, broke {record.broke} of the {record.ran_on + record.skipped} "
                "examples that gradient attacks had left: gradients miss the way, and others may find still more."
            )
            numbers = {"fell": record.broke, "tried": record.ran_on + record.skipped}
            step = "Find what masks the gradients; give Square more queries and restarts."
            return [Finding("black_box_won", sentence, numbers, case.level("suspect"), step)]
        before |= record.cost.backwards > 0
    return []
