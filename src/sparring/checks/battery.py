"""When not to believe a robustness number: a battery of checks on a sample of the examples that were evaluated."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from sparring.checks import by_attack as attack
from sparring.checks import by_gradient as gradient
from sparring.checks import by_model as model
from sparring.checks import limits
from sparring.checks.case import Case, Check
from sparring.core.model_state import attack_mode
from sparring.core.noise import Noise
from sparring.core.types import Inputs, Model, device_of, plain, size, take
from sparring.evaluation.measure import Evaluation
from sparring.evaluation.preflight import LogProbabilities, Preflight, TwoLogits, preflight
from sparring.results.findings import Finding
from sparring.threats.base import ThreatModel

LEFT = "{fell} of {tried} examples that the attacks left standing: the number is some {worth} too high."
OTHERWISE = (
    "{changed:.1%} of the sampled clean predictions change between {what} and float32. The verdict is one of float32; "
    "deployed otherwise, it is another model."
)
STEPS = ("radius", "gradient")
OTHERWISE_STEP = "Evaluate in the precision of deployment as well."

CHECKS: tuple[Check, ...] = (
    Check(
        "not_repeatable", "Is the sample predicted as the evaluation says?", model.repeatable,
        "{changed:.1%} of the sampled predictions are not those of the evaluation: the model or the data has changed "
        "since, or a seed does not settle its randomness. The number cannot be repeated.",
        "Evaluate again with the model and the examples at hand, in the same order.", ("repeats",),
    ),
    Check(
        "one_answer", "Are there several answers?", model.one_answer,
        "All {num} examples get one answer, which no attack could turn: what is right and stands is the share of that "
        "class ({share:.1%}), and says nothing of robustness.",
        "Rank models by clean and robust figures of every class together, such as balanced accuracy or false alarms.",
    ),
    Check(
        "probability_output", "Are the outputs probabilities, rounded to 1?", model.probabilities,
        "The model returns probabilities, and {saturated:.1%} of the sampled ones are rounded to 1. Attacks climb "
        "their logarithm, whose gradient is gone where that happens.",
        "Return logits: leave out softmax.",
    ),
    Check(
        "randomness", "Is the model random, and was that averaged over?", model.randomness,
        "The model is random: between two looks {changed:.1%} of the predictions change. {settled}{average}",
        "Average the gradients over many looks: --attacks autoattack-rand, or apgd:eot=20; or evaluate its mean.",
    ),
    Check(
        "autograd_in_forward", "Does the forward pass compute gradients itself?", model.autograd_inside,
        "The model computes gradients inside its own forward pass (optimisation at inference). The gradient through it "
        "is often cut or wrong, and attacks that follow it stop short.",
        "Attack it through the unrolled optimisation, by transfer from the bare network, and without gradients.",
    ),
    Check(
        "batch_dependence", "Do predictions depend on the rest of the batch?", model.batch_dependence,
        "Predictions depend on the rest of the batch: {changed:.1%} change between batches of different company{norms}"
        ". An attack then moves the other examples too, and the number hangs on the batch size.",
        "Evaluate with running statistics (model.eval(), track_running_stats=True), or one example at a time.",
        ("repeats",),
    ),
    Check(
        "reduced_precision", "Is it in half precision?", model.half_precision,
        "The model's weights are {dtype}: logits tie and gradients vanish in so few digits, and a verdict of float32 "
        "may be lower.",
        "Judge model.float().",
    ),
    Check(
        "reduced_precision", "Did TF32 predict otherwise?", model.without_tf32,
        OTHERWISE, OTHERWISE_STEP, ("repeats",),
    ),
    Check(
        "reduced_precision", "Would bf16 predict otherwise?", model.in_bfloat16,
        OTHERWISE, OTHERWISE_STEP, ("repeats",),
    ),
    Check(
        "vanishing_gradients", "Is there a gradient on the loss that was climbed?", gradient.vanishing,
        "Of the sampled examples, {seen}. {meaning}", "{step}", ("gradient",),
    ),
    Check(
        "misleading_gradients", "Does the margin rise where its gradient points?", gradient.misleading,
        f"A step of {limits.SHORT_STEP:g} of the radius along the gradient raises the margin by less than "
        f"{limits.RISE_KEPT:.0%} of what the gradient promises on {{misled:.1%}} of the examples: the gradient points "
        "elsewhere than uphill (jumps, ripples, noise, a backward pass of its own), and attacks that follow it fail.",
        "Attack with a smooth stand-in for the odd layer (BPDA), with Square, and by transfer.", STEPS,
    ),
    Check(
        "single_step_wins", "Does one step break more than ten?", attack.single_step,
        "One step breaks {one:.1%} of the sampled examples, ten steps break {ten:.1%}. Looking at the gradient again "
        "should help an attack; where it does not, the gradients mislead it.",
        "Look for masked gradients: a smooth stand-in for the odd layer (BPDA), Square, transfer.", STEPS,
    ),
    Check(
        "undone_by_rounding", "Does rounding to 8 bits undo an attack?", gradient.undone_by_rounding,
        "{undone:.1%} of the examples that a short attack broke stand again once rounded to 8 bits: for images in "
        "files the number may be too low, and an attack that hangs on the last digits is a weak one.",
        "State whether inputs come with 8 bits; if so, round inside the threat model.", ("repeats", *STEPS),
    ),
    Check(
        "short_reach", "Could an attack get as far as the radius?", model.short_reach,
        "The steps of every attack together are at most {reach:.2g} of the radius, from the clean input: none could go "
        "as far as it was allowed to.",
        "Give longer or more steps: num_steps times step is to be above 1.", ("radius",),
    ),
    Check(
        "no_search", "Was what moves in jumps attacked without gradients, too?", model.no_search,
        "The inputs of this threat model move in jumps, and no attack without gradients was run: a gradient points "
        "between the permitted inputs, and what it misses need not be robust.",
        "Add a search without gradients that goes from one permitted input to the next.",
    ),
    Check(
        "black_box_won", "Did an attack without gradients break much of what was left?", model.won_without_gradients,
        "{who}, which needs no gradient, broke {fell} of the {tried} examples that gradient attacks had left: "
        "gradients miss the way, and others may find still more.",
        "Find what masks the gradients; give Square more queries and restarts.",
    ),
    Check(
        "stopped_early", "Did the last attack break little of what it was given?", model.stopped_early,
        "{who}, the last attack, broke {fell} of the {tried} examples that it was given, those that have the least "
        "margin left. {spared} more stand that it was not given, and nobody knows what it would break of them.",
        "Evaluate with --attacks autoattack, which tries all that stand.",
    ),
    Check(
        "black_box_wins", "Does a search without gradients break what stood?", attack.black_box,
        "{who}, which need no gradient, broke " + LEFT,
        "{more}, and look for masked gradients.", ("radius", "standing"),
    ),
    Check(
        "transfer_wins", "Does an attack on a learned copy break what stood?", attack.transfer,
        "Attacks on a small network that learned the model's answers around the sample broke {fell} of {tried} "
        "examples that the attacks on the model itself left standing: the number is some {worth} too high.",
        "Find what masks the gradients; attack a network of the same kind without the odd layer, and transfer.",
        ("radius", "standing"),
    ),
    Check(
        "straight_through_wins", "Does a softer backward pass break what stood?", attack.softer_backward,
        "With rounding, clamps and cuts passed straight through and ReLU softened, in the backward pass alone, ten "
        "steps broke " + LEFT,
        "Attack with that backward pass (BPDA) at full length.", ("standing", *STEPS),
    ),
    Check(
        "effort_still_helps", "Do further steps and restarts break what stood?", attack.more_effort,
        "Two further restarts on the margin (10 steps of PGD, 20 of APGD) broke {fell} of {tried} examples that the "
        "attacks left standing: they stopped too early, and the number is some {worth} too high.",
        "Give the attacks more steps and restarts.", ("standing", *STEPS),
    ),
    Check(
        "number_too_high", "How much of what stood broke under all checks together?", attack.altogether,
        "All checks together broke {fell} of {tried} examples that the attacks left standing: the number is some "
        "{worth} too high, or more.",
        "Believe no more than the number less these points; better, repeat the evaluation with what broke them.",
        ("standing",),
    ),
    Check(
        "huge_radius_survived", "Does anything stand when everything is allowed?", attack.huge_radius,
        "With all of the box allowed, where each input could become any other, a short attack leaves {stands:.1%} of "
        "the standing examples: what fails there fails at the small radius too.",
        "Find out why the attack does not move (gradients that are flat or wrong) before believing the number.",
        ("gradient", "standing"),
    ),
    Check(
        "curve_shape", "Does robust accuracy never rise with the radius?", model.rise_of_curve,
        "Robust accuracy rises by {rise:.1%} somewhere as the radius grows, which cannot be: the attack at the larger "
        "radius failed.",
        "Give the attacks on the curve more steps and restarts.",
    ),
    Check(
        "curve_shape", "Does it go on falling at twice the radius?", model.end_of_curve,
        "Robust accuracy falls from {start:.1%} to {here:.1%} at the radius, and at twice the radius it is still "
        "{there:.1%}: an attack that is allowed more and finds hardly more has got stuck.",
        "Run the full attacks at the larger radii, and Square.",
    ),
)  # fmt: skip
"""The battery, in the order in which it runs. The limits, and what they were set by, are in `limits`."""

STANDING_SHARE = 0.75


@torch.inference_mode(False)
def examine(
    model: Model, x: Inputs, y: Tensor, threat: ThreatModel, evaluation: Evaluation, *, seed: int = 0, num: int = 128
) -> list[Finding]:
    """What speaks against an evaluation's robust accuracy, from `num` of its examples; `verdict` makes one word of it.

    x (N, *X), y (N,): the examples that were evaluated, in order; `threat` and `evaluation` as they were. The sample is
    drawn by `seed` from the examples that the model got right, three quarters from those that still stand (and are not
    certified) where there are enough. "invalid": the number means nothing. "suspect": it may be too high; a number so
    low that it hardly can be gets notes. The model, the tensors and the global generators are left as they were.

    Cost: at most about 310 passes (forwards + 2 x backwards) per sampled example, 240 in the usual mixture; a random
    model, which is looked at several times, gets some 80 more. Raises ValueError when x, y and the evaluation do not
    belong together, and PreflightError as `preflight` does.

    >>> from sparring import Linf, pgd
    >>> from sparring.results.findings import verdict
    >>> from sparring.evaluation.measure import measure
    >>> def rounds(v):
    ...     return torch.stack([(4 * v).round().sum(1), 8 + 0 * v[:, 0]], 1)
    >>> x = torch.rand(64, 4, generator=torch.Generator().manual_seed(0))
    >>> y, threat = rounds(x).argmax(1), Linf(0.2)
    >>> verdict(examine(rounds, x, y, threat, measure(rounds, [(x, y)], threat, [pgd])))
    'INVALID'
    """
    table = evaluation.table
    if size(x) != len(y) or len(y) != len(table["label"]) or not torch.equal(y.cpu(), table["label"]):
        raise ValueError(
            f"got {size(x)} inputs and {len(y)} labels for an evaluation of {len(table['label'])} examples; expected "
            "the very examples that were evaluated, in the same order, or their verdicts would be mixed up"
        )
    rows = sample(table, num, seed)
    if not len(rows):
        sentence = "No example is right without a certificate, so there is nothing that an attack could have missed."
        return [Finding("nothing_to_probe", sentence)]
    device, uncertain, number = device_of(x), open_rows(table), table["index"][rows]
    x, y, part = plain(take(x, rows)), take(y, rows).to(device), take(threat, number)
    seen = {finding.name: finding for finding in evaluation.findings}
    with attack_mode(model, "keep"):  # puts back what an odd model writes into its buffers at every look
        looked_at: Any = evaluation.model
        while looked_at is not model and isinstance(looked_at, LogProbabilities | TwoLogits):
            looked_at = looked_at.model
        if looked_at is model:
            checked = Preflight(evaluation.model, ())
        else:
            checked = preflight(model, x, y, part, needs_grad="no_gradient" not in seen)
        seen |= {finding.name: finding for finding in checked.findings}
        with attack_mode(checked.model) as frozen:
            case = Case(
                model=frozen, whole=model, x=x, y=y, threat=part, rows=rows, number=number.to(device),
                seed=seed, seen=seen,
                stood=uncertain[rows].nonzero()[:, 0].to(device), at_stake=float(uncertain.double().mean()),
                evaluation=evaluation,
            )  # fmt: skip
            return [finding for check in CHECKS if (finding := check.run(case))]


def open_rows(table: Mapping[str, Tensor]) -> Tensor:
    """(N,) bool: what stands and is not certified, which something else might yet break."""
    return (table["robust"] & ~table["certified"]).cpu()


def sample(table: Mapping[str, Tensor], num: int, seed: int) -> Tensor:
    """(b,) the rows of an evaluation's table that are checked: at most `num`, sorted, all originally right.

    Three quarters stand (and are not certified) and a quarter fell, as far as there are so many. Drawn by seed and row.
    """
    standing, fell = open_rows(table), (table["correct"] & ~table["robust"]).cpu()
    order = Noise.make(seed, "sanity/sample", torch.arange(len(fell))).uniform((1,))[:, 0].argsort()
    standing, fallen = order[standing[order]], order[fell[order]]
    standing = standing[: max(math.ceil(STANDING_SHARE * num), num - len(fallen))]
    return torch.cat([standing, fallen[: num - len(standing)]]).sort().values
