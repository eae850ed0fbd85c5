"""Checks that attack what the evaluation left standing: by other means, for longer, or with all of the box."""

from __future__ import annotations

import warnings
from typing import Any

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
from sparring.results.findings import Level
from sparring.threats.balls import Ball, Linf

QUERIES = 100
CORNERS = 8


def single_step(case: Case) -> Measured:
    """How many fall to one step, and to ten."""
    once = case.attack("single", lambda threat: fgsm(threat, objective=margin)).fell
    often = case.reference.fell
    one, ten = share_of(once), share_of(often)
    return {"one": one, "ten": ten, "ahead": one - ten, "only_one": int((once & ~often).sum())}


def single_step_level(measured: Any, case: Case) -> Level | None:
    ahead = measured["ahead"] > limits.SINGLE_STEP_AHEAD and measured["only_one"] >= limits.FEWEST_BROKEN
    return case.level("suspect") if ahead else None


def black_box(case: Case) -> Measured | None:
    """What falls to a search without gradients: corners and Square in norm balls, else random draws from the set."""
    rows = case.stood
    if not len(rows):
        return None
    x, threat, y = take(case.x, rows), take(case.threat, rows), case.y[rows]
    squares = isinstance(threat, Ball) and threat.norm in ("linf", "l2", "l1") and isinstance(x, torch.Tensor)
    fell = torch.zeros_like(y, dtype=torch.bool)
    for draw in range(CORNERS if squares else QUERIES):
        noise = Noise.make(case.seed, f"sanity/corner/{draw}", case.number[rows]).to(y.device)
        shown = threat.realize(x, Corner()(threat, x, noise) if squares else threat.sample(x, noise))
        fell |= case.wrong(shown, y) & (squares | threat.valid(x, shown))
    if squares and not bool(fell.all()):
        search = case.attack("square", lambda t: square(t, num_queries=QUERIES, rescale=True), rows[~fell])
        fell[~fell] = search.fell
    who = f"{CORNERS} random corners and Square with {QUERIES} queries" if squares else f"{QUERIES} random draws"
    more = "Add Square with 5,000 queries" if squares else "Add a search without gradients"
    return {**case.lost_to(fell), "who": who, "more": more}


def transfer(case: Case) -> Measured | None:
    """What falls to attacks made on a small network that has learned the model's answers."""
    if not len(case.stood) or not surrogate.can_learn(case):
        return None
    learned = surrogate.learn(case, case.stood)
    return case.lost_to(case.attack("transfer", surrogate.across, case.stood, model=learned).fell)


def softer_backward(case: Case) -> Measured | None:
    """What falls to a softened backward pass."""
    if not len(case.stood):
        return None
    soft = soft_backward.straight_through(case.model)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about gradients of tensors that are no leaves any more
            return case.lost_to(case.attack("straight-through", short_attack, case.stood, model=soft).fell)
    except Exception:  # the model ran before: it is the softening that its forward pass does not bear
        return None


def more_effort(case: Case) -> Measured | None:
    """What falls to further restarts and steps of an ordinary attack."""
    if not len(case.stood):
        return None
    fell = case.reference.fell[case.stood]
    if not bool(fell.all()):
        again = case.attack("effort", lambda t: apgd(t, num_steps=20, objective=margin), case.stood[~fell])
        fell[~fell] = again.fell
    return case.lost_to(fell)


def altogether(case: Case) -> Measured | None:
    """What fell to the checks together, which is what the number is too high by, or more."""
    return case.lost_to(case.lost) if len(case.stood) else None


def huge_radius(case: Case) -> Measured | None:
    """What stands when everything is allowed: every point of the box, or of the data's range."""
    threat, x = case.threat, case.x
    if (
        not isinstance(threat, Ball)
        or threat.mask is not None
        or not isinstance(x, torch.Tensor)
        or not len(case.stood)
    ):
        return None  # nowhere else could each input become any other
    low = torch.as_tensor(x.min() if threat.low is None else threat.low)
    high = torch.as_tensor(x.max() if threat.high is None else threat.high)
    wide = Linf(float((high - low).max()), threat.low, threat.high)
    return {"stands": 1 - share_of(case.attack("huge", short_attack, case.stood, threat=wide).fell)}


def huge_radius_level(measured: Any, case: Case) -> Level | None:
    if measured["stands"] <= limits.HUGE_STANDS:
        return None
    return case.level("invalid" if measured["stands"] > limits.HUGE_STANDS_MOSTLY else "suspect")
