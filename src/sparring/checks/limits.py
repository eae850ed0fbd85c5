"""The thresholds of the battery, all in one place.

They were set on one half of a bench of broken defences and honest models, and judged on the other half, which has other
defences and networks (benchmarks/defences.py). "Honest" and "broken" below are the two sides of the first half. Shares
are of the sampled examples unless a line says otherwise.
"""

from __future__ import annotations

# Something else breaks what the attacks left standing (black box, transfer, straight-through, more effort).
FEWEST_BROKEN = 3
"""One or two examples may be luck."""
POINTS_LOST = 0.03
"""Robust accuracy that is so much too high is suspect. To all probes together, models that are not random and
whose number was right to 0.03 lost at most 0.023, those whose number was 0.05 too high and more lost at least 0.042."""
MOST_OF_IT_LOST = 1 / 3
"""When so many of the standing examples fall to a short attack of another kind, the number means nothing."""

# Gradients.
NO_GRADIENT = 0.05
"""Examples whose gradient is 0 on the loss that was climbed: none on honest models, 0.14 to 1 on broken ones."""
MOSTLY_NO_GRADIENT = 0.5
"""With no gradient at most examples, gradient attacks were a random draw."""
SHORT_STEP = 0.02
"""A step along the gradient, as a share of the radius: short enough for a network that is curved."""
RISE_KEPT = 0.2
"""The share of the rise promised by the gradient that such a step must keep."""
MISLED = 0.05
"""Examples whose gradient breaks its promise: none on honest models, 0.12 to 0.41 where it is there but wrong."""

# Strength.
SINGLE_STEP_AHEAD = 0.03
"""Examples that one step breaks beyond those that ten steps break: honest models lie at -0.01 and below."""
HUGE_STANDS = 0.05
"""Standing examples that a radius as large as the box leaves standing. Each could be exchanged for an image of another
class, so the truth is 0; ten steps reach it on honest models."""
HUGE_STANDS_MOSTLY = 1 / 3
"""An attack that fails so often when everything is allowed tells nothing about a small radius."""
GRADIENT_FREE_BROKE = 0.1
"""Of what gradient attacks left standing, broken by one that needs no gradient. Adversarially trained MNIST networks at
Linf 0.3 lose about 0.03 so, which is honest."""
LAST_BROKE = 0.5
"""Of the examples with the least margin, the only ones that a plan gives to its last attacks: seven adversarially
trained networks (MNIST, digits) lost none of 6 to 13 to the last, one whose number was 5 points too high 7 of 7."""
FALL_WORTH = 0.05
"""Clean minus robust accuracy from which there is a fall to speak of."""
FALL_STOPS = 0.25
"""What twice the radius must add to that fall, as a share of it: honest models add 0.9 of it and more, clamped logits
0.08."""
TWICE = 1.9
"""The point of the curve that is compared lies at least this many radii out."""

# The model as a function.
LOOKS = 5
"""Looks at a random model, whose mean decides whether it was broken: one look may fool itself."""
ROUNDING = 64
"""Differences below this many float steps of the largest logit are rounding."""
COMPANY = 1e-3
"""Differences of logits between batch sizes, as a share of the largest logit: kernels round differently."""
CHANGED = 0.01
"""Predictions that change between looks that should agree."""
COARSE_CHANGED = 0.02
"""Predictions that change in bf16: honest models change at most 0.008."""
SATURATED = 0.05
"""Examples with a probability rounded to 1, whose gradient is gone."""
UNDONE = 0.1
"""Fallen examples that stand again once rounded to 8 bits: none on honest models."""
