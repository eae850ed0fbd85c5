"""Probes that attack what the evaluation left standing: by other means, for longer, or with all of the box."""

from __future__ import annotations

import warnings

import torch

from sparring.attacks.auto_pgd import apgd
from sparring.attacks.catalogue import fgsm
from sparring.attacks.square import square
from sparring.attacks.starts import Corner
from sparring.checks import limits
from sparring.checks import soft_backward as probes_backward
from sparring.checks import surrogate as probes_surrogate
from sparring.checks.case import Case, share_of, short_attack
from sparring.core.noise import Noise
from sparring.core.objectives import margin
from sparring.core.types import take
from sparring.results.findings import Finding, Level
from sparring.threats.balls import Ball, Linf

QUERIES = 100
CORNERS = 8


def single_step(case: Case) -> list[Finding]:
    """Whether one step breaks more than ten."""
    once = case.attack("single", lambda threat: fgsm(threat, objective=margin)).fell
    often = case.reference.fell
    shares = {"one": share_of(once), "ten": share_of(often)}
    if shares["one"] - shares["ten"] <= limits.SINGLE_STEP_AHEAD or int((once & ~often).sum()) < limits.FEWEST_BROKEN:
        return []
    sentence = (
        f"One step breaks {shares['one']:.1%} of the sampled examples, ten steps break {shares['ten']:.1%}. Looking at "
        "the gradient again should help an attack; where it does not, the gradients mislead it."
    )
    step = "Look for masked gradients: a smooth stand-in for the odd layer (BPDA), Square, transfer."
    return [Finding("single_step_wins", sentence, shares, case.level("suspect"), step)]


def black_box(case: Case) -> list[Finding]:
    """Whether a search without gradients breaks what the attacks left standing."""
    rows = case.stood
    if not len(rows) or not isinstance(case.threat, Ball) or case.threat.norm not in ("linf", "l2", "l1"):
        return []
    x, threat, y = take(case.x, rows), take(case.threat, rows), case.y[rows]
    fell = torch.zeros_like(y, dtype=torch.bool)
    for draw in range(CORNERS):
        z = Corner()(threat, x, Noise.make(case.seed, f"sanity/corner/{draw}", case.number[rows]).to(y.device))
        fell |= case.wrong(threat.realize(x, z), y)
    if not bool(fell.all()):
        search = case.attack("square", lambda t: square(t, num_queries=QUERIES, rescale=True), rows[~fell])
        fell[~fell] = search.fell
    sentence = (
        f"{CORNERS} random corners and Square with {QUERIES} queries, which need no gradient, "
        "broke {fell} of {tried} examples that the attacks left standing: the number is some {points} points too high."
    )
    step = "Add Square with 5,000 queries, and look for masked gradients."
    return case.beaten("black_box_wins", fell, sentence, step)


def transfer(case: Case) -> list[Finding]:
    """Whether attacks made on a small network that has learned the model's answers break the model."""
    if not len(case.stood) or not probes_surrogate.can_learn(case):
        return []
    surrogate = probes_surrogate.learn(case, case.stood)
    fell = case.attack("transfer", probes_surrogate.across, case.stood, model=surrogate).fell
    sentence = (
        "Attacks on a small network that learned the model's answers around the sample broke {fell} of {tried} "
        "examples that the attacks on the model itself left standing: the number is some {points} points too high."
    )
    step = "Find what masks the gradients; attack a network of the same kind without the odd layer, and transfer."
    return case.beaten("transfer_wins", fell, sentence, step)


def straight_through(case: Case) -> list[Finding]:
    """Whether a softened backward pass finds what the model's own gradient does not."""
    if not len(case.stood):
        return []
    soft = probes_backward.straight_through(case.model)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about gradients of tensors that are no leaves any more
            fell = case.attack("straight-through", short_attack, case.stood, model=soft).fell
    except Exception:  # the model ran before: it is the softening that its forward pass does not bear
        return []
    sentence = (
        "With rounding, clamps and cuts passed straight through and ReLU softened, in the backward pass alone, ten "
        "steps broke {fell} of {tried} examples that the attacks left standing: the number is some {points} points "
        "too high."
    )
    step = "Attack with that backward pass (BPDA) at full length."
    return case.beaten("straight_through_wins", fell, sentence, step)


def more_effort(case: Case) -> list[Finding]:
    """Whether further restarts and steps of an ordinary attack still break something."""
    if not len(case.stood):
        return []
    fell = case.reference.fell[case.stood]
    if not bool(fell.all()):
        again = case.attack("effort", lambda t: apgd(t, num_steps=20, objective=margin), case.stood[~fell])
        fell[~fell] = again.fell
    sentence = (
        "Two further restarts on the margin (10 steps of PGD, 20 of APGD) broke {fell} of {tried} examples that the "
        "attacks left standing: they stopped too early, and the number is some {points} points too high."
    )
    return case.beaten("effort_still_helps", fell, sentence, "Give the attacks more steps and restarts.")


def altogether(case: Case) -> list[Finding]:
    """How much fell to the probes together, which is what the number is too high by, or more."""
    sentence = (
        "All probes together broke {fell} of {tried} examples that the attacks left standing: the number is some "
        "{points} points too high, or more."
    )
    step = "Believe no more than the number less these points; better, repeat the evaluation with what broke them."
    return case.beaten("number_too_high", case.lost, sentence, step) if len(case.stood) else []


def huge_radius(case: Case) -> list[Finding]:
    """Whether the attack gets everywhere when everything is allowed."""
    wide = _whole_box(case)
    if wide is None or not len(case.stood):
        return []
    stands = 1 - share_of(case.attack("huge", short_attack, case.stood, threat=wide).fell)
    if stands <= limits.HUGE_STANDS:
        return []
    level: Level = "invalid" if stands > limits.HUGE_STANDS_MOSTLY else "suspect"
    sentence = (
        "With all of the box allowed, where each input could become any other, a short attack leaves "
        f"{stands:.1%} of the standing examples: what fails there fails at the small radius too."
    )
    step = "Find out why the attack does not move (gradients that are flat or wrong) before believing the number."
    return [Finding("huge_radius_survived", sentence, {"stands": stands}, case.level(level), step)]


def _whole_box(case: Case) -> Linf | None:
    """Every point of the box, or of the data's range; None where masks or threats of other kinds forbid that."""
    threat, x = case.threat, case.x
    if not isinstance(threat, Ball) or threat.mask is not None or not isinstance(x, torch.Tensor):
        return None
    low = torch.as_tensor(x.min() if threat.low is None else threat.low)
    high = torch.as_tensor(x.max() if threat.high is None else threat.high)
    return Linf(float((high - low).max()), threat.low, threat.high)
