"""Checks that attack what the evaluation left standing: by other means, for longer, or with all of the box.

What each of them asks stands in its row of `battery.CHECKS`.
"""

from __future__ import annotations

import warnings
from functools import partial

import torch

from sparring.attacks.auto_pgd import apgd
from sparring.attacks.catalogue import fgsm
from sparring.attacks.square import square
from sparring.attacks.starts import Corner
from sparring.checks import limits, soft_backward, surrogate
from sparring.checks.case import Case, Measured, share_of, short_attack
from sparring.core.noise import Noise
from sparring.core.objectives import margin
from sparring.core.types import take
from sparring.threats.balls import Ball, Linf

QUERIES = 100
CORNERS = 8


def single_step(case: Case) -> Measured | None:
    once, often = case.attack("single", partial(fgsm, objective=margin)).fell, case.reference.fell
    one, ten, only_one = share_of(once), share_of(often), int((once & ~often).sum())
    if one - ten <= limits.SINGLE_STEP_AHEAD or only_one < limits.FEWEST_BROKEN:
        return None
    return {"level": case.level("suspect"), "one": one, "ten": ten, "ahead": one - ten, "only_one": only_one}


def black_box(case: Case) -> Measured | None:
    """What falls to a search without gradients: corners and Square in norm balls, else random draws from the set."""
    rows = case.stood
    x, threat, y = take(case.x, rows), take(case.threat, rows), case.y[rows]
    squares = isinstance(threat, Ball) and threat.norm in ("linf", "l2", "l1") and isinstance(x, torch.Tensor)
    fell = torch.zeros_like(y, dtype=torch.bool)
    for draw in range(CORNERS if squares else QUERIES):
        noise = Noise.make(case.seed, f"sanity/corner/{draw}", case.number[rows]).to(y.device)
        shown = threat.realize(x, Corner()(threat, x, noise) if squares else threat.sample(x, noise))
        fell |= case.wrong(shown, y) & (squares | threat.valid(x, shown))
    if squares and not bool(fell.all()):
        search = partial(square, num_queries=QUERIES, rescale=True)
        fell[~fell] = case.attack("square", search, rows[~fell]).fell
    who = f"{CORNERS} random corners and Square with {QUERIES} queries" if squares else f"{QUERIES} random draws"
    more = "Add Square with 5,000 queries" if squares else "Add a search without gradients"
    return case.lost_to(fell, who=who, more=more)


def transfer(case: Case) -> Measured | None:
    x = case.x
    if not isinstance(x, torch.Tensor) or case.threat.discrete or x[0].numel() > surrogate.LARGEST:
        return None
    learned = surrogate.learn(case, case.stood)
    return case.lost_to(case.attack("transfer", surrogate.across, case.stood, model=learned).fell)


def softer_backward(case: Case) -> Measured | None:
    soft = soft_backward.straight_through(case.model)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about gradients of tensors that are no leaves any more
            return case.lost_to(case.attack("straight-through", short_attack, case.stood, model=soft).fell)
    except Exception:  # the model ran before: it is the softening that its forward pass does not bear
        return None


def more_effort(case: Case) -> Measured | None:
    fell = case.reference.fell[case.stood]
    if not bool(fell.all()):
        again = partial(apgd, num_steps=20, objective=margin)
        fell[~fell] = case.attack("effort", again, case.stood[~fell]).fell
    return case.lost_to(fell)


def altogether(case: Case) -> Measured | None:
    return case.lost_to(case.lost)


def huge_radius(case: Case) -> Measured | None:
    threat, x = case.threat, case.x
    if not isinstance(threat, Ball) or threat.mask is not None or not isinstance(x, torch.Tensor):
        return None  # nowhere else could each input become any other
    low = torch.as_tensor(x.min() if threat.low is None else threat.low)
    high = torch.as_tensor(x.max() if threat.high is None else threat.high)
    wide = Linf(float((high - low).max()), threat.low, threat.high)
    stands = 1 - share_of(case.attack("huge", short_attack, case.stood, threat=wide).fell)
    if stands <= limits.HUGE_STANDS:
        return None
    return {"level": case.level("invalid" if stands > limits.HUGE_STANDS_MOSTLY else "suspect"), "stands": stands}
