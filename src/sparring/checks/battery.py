"""When not to believe a robustness number: a battery of probes on a sample of the examples that were evaluated."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from sparring.checks import by_attack as attack
from sparring.checks import by_gradient as gradient
from sparring.checks import by_model as model
from sparring.checks import by_record as record
from sparring.checks.case import Case, Probe
from sparring.core.model_state import attack_mode, private_rng
from sparring.core.noise import Noise
from sparring.core.types import Inputs, Model, device_of, plain, size, take
from sparring.evaluation.measure import Evaluation
from sparring.evaluation.preflight import preflight
from sparring.results.findings import Finding
from sparring.threats.base import ThreatModel

PROBES: tuple[Probe, ...] = (
    Probe("not_repeatable", "Is the sample predicted as the evaluation says?", model.repeatable),
    Probe("probability_output", "Are the outputs probabilities, rounded to 1?", model.probabilities),
    Probe("randomness", "Is the model random, and was that averaged over?", model.randomness),
    Probe("autograd_in_forward", "Does the forward pass compute gradients itself?", model.autograd_inside),
    Probe("batch_dependence", "Do predictions depend on the rest of the batch?", model.batch_dependence),
    Probe("reduced_precision", "Is it in half precision; would bf16 or TF32 predict otherwise?", model.precision),
    Probe("vanishing_gradients", "Is there a gradient on the loss that was climbed?", gradient.vanishing),
    Probe("misleading_gradients", "Does the margin rise where its gradient points?", gradient.misleading, True),
    Probe("single_step_wins", "Does one step break more than ten?", attack.single_step, True),
    Probe("undone_by_rounding", "Does rounding to 8 bits undo an attack?", gradient.undone_by_rounding, True),
    Probe("black_box_won", "Did an attack without gradients break much of what was left?", record.gradient_free),
    Probe("black_box_wins", "Does a search without gradients break what stood?", attack.black_box, True),
    Probe("transfer_wins", "Does an attack on a learned copy break what stood?", attack.transfer, True),
    Probe("straight_through_wins", "Does a softer backward pass break what stood?", attack.straight_through, True),
    Probe("effort_still_helps", "Do further steps and restarts break what stood?", attack.more_effort, True),
    Probe("number_too_high", "How much of what stood broke under all probes together?", attack.altogether),
    Probe("huge_radius_survived", "Does anything stand when everything is allowed?", attack.huge_radius),
    Probe("curve_shape", "Does robust accuracy fall with the radius, and go on falling?", record.curve),
)
"""The battery, in the order in which it runs."""

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
    device = device_of(x)
    x, y, part = plain(take(x, rows)), y[rows.to(y.device)].to(device), take(threat, rows)
    with _buffers_kept(model):
        checked = preflight(model, x, y, part)
        seen = {finding.name: finding for finding in (*evaluation.findings, *checked.findings)}
        with attack_mode(checked.model) as frozen:
            uncertain = open_rows(table)
            case = Case(
                model=frozen, whole=model, x=x, y=y, threat=part, number=rows.to(device), seed=seed, seen=seen,
                standing=uncertain[rows].to(device), at_stake=float(uncertain.double().mean()), evaluation=evaluation,
            )  # fmt: skip
            return _run(case)


def _run(case: Case) -> list[Finding]:
    """All probes in order; those that step by shares of the radius only where it is finite."""
    findings: list[Finding] = []
    bounded = bool(torch.as_tensor(case.threat.radius).isfinite().all())
    for probe in PROBES:
        if bounded or not probe.steps:
            with private_rng(case.seed, device_of(case.x)):
                findings += probe.run(case)
    return findings


def open_rows(table: Mapping[str, Tensor]) -> Tensor:
    """(N,) bool: what stands and is not certified, which something else might yet break."""
    return (table["robust"] & ~table["certified"]).cpu()


def sample(table: Mapping[str, Tensor], num: int, seed: int) -> Tensor:
    """(b,) the rows of an evaluation's table that are probed: at most `num`, sorted, all originally right.

    Three quarters stand (and are not certified) and a quarter fell, as far as there are so many. Drawn by seed and row.
    """
    standing, fell = open_rows(table), (table["correct"] & ~table["robust"]).cpu()
    order = Noise.make(seed, "sanity/sample", torch.arange(len(fell))).uniform((1,))[:, 0].argsort()
    standing, fallen = order[standing[order]], order[fell[order]]
    standing = standing[: max(math.ceil(STANDING_SHARE * num), num - len(fallen))]
    return torch.cat([standing, fallen[: num - len(standing)]]).sort().values


@contextmanager
def _buffers_kept(model: Any) -> Iterator[None]:
    """Puts back what a model that is odd enough changes in evaluation mode (BatchNorm statistics)."""
    saved = [(b, b.detach().clone()) for b in model.buffers()] if isinstance(model, nn.Module) else []
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, old in saved:
                buffer.copy_(old)
