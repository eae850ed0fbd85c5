"""Looks at a model and one batch before any attack: refuses what would make the verdict wrong, in plain words.

Shapes: B examples, K classes. What can be handled is handled and told in a Finding.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sparring.core.model_state import ModelFailure, aligned, attack_mode, private_rng
from sparring.core.objectives import cross_entropy, margin
from sparring.core.types import Inputs, Model, device_of, map_inputs, plain, size, take
from sparring.results.findings import Finding
from sparring.threats.base import ThreatModel
from sparring.threats.inputs import (
    PreflightError,
    check_inputs,
    check_kind,
    check_labels,
    check_output,
    is_probability,
)  # fmt: skip


class Preflight(NamedTuple):
    """`model` is the one to attack: the model given, or a wrapper around it."""

    model: Model
    findings: tuple[Finding, ...]


@torch.inference_mode(False)
def preflight(model: Model, x: Inputs, y: Tensor, threat: ThreatModel, *, needs_grad: bool = True) -> Preflight:
    """The model to attack and what was found, from one batch (x, y); the model is left as it was.

    Raises PreflightError for: data that is not finite or outside the threat's box; outputs that are no finite
    logits (B, K); labels that are no classes 0..K-1; a model that fails, or has no gradient at its input, if an attack
    `needs_grad`. Handled, with a finding: train mode, probabilities instead of logits, one logit instead of two. Only
    told: random outputs, zero gradients, and none at all where no attack needs them.

    >>> from sparring.threats import Linf
    >>> softmax = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Softmax(dim=1)).eval()
    >>> [f.name for f in preflight(softmax, torch.rand(8, 4), torch.arange(8) % 3, Linf(0.1)).findings]
    ['probabilities']
    """
    check_kind(x)
    if size(x) == 0:
        raise PreflightError("the first batch is empty: there is nothing to attack")
    x, threat = map_inputs(aligned, plain(x)), take(threat, torch.arange(size(x)))
    check_inputs(x, threat)
    findings = _train_mode(model) + _all_allowed(threat)
    first, second = _two_looks(model, x, threat)
    if first.ndim == 1:
        findings += _one_logit(y, first)
        model = TwoLogits(model, is_probability(first))
        first, second = _two_looks(model, x, threat)
    check_labels(y, *first.shape)
    findings += _randomness(model, x, threat, first, second)
    if told := _probabilities(first):
        model = LogProbabilities(model)
        findings += told
    with private_rng(0, device_of(x)), attack_mode(model) as frozen, torch.enable_grad():
        findings += _gradients(frozen, x, y.to(device_of(x)), threat, needs_grad)
    return Preflight(model, tuple(findings))


def _two_looks(model: Model, x: Inputs, threat: ThreatModel) -> tuple[Tensor, Tensor]:
    """What the model returns for the clean inputs, twice; both (B,) from a model of one logit, else (B, K)."""
    with private_rng(0, device_of(x)), attack_mode(model) as frozen, torch.no_grad():
        return _run(frozen.raw, x, threat), _run(frozen.raw, x, threat)


def _run(model: Model, x: Inputs, threat: ThreatModel, z: Tensor | None = None) -> Tensor:
    """Finite logits (B, K) (or one number for each input, (B,)) at z (default: no change), or PreflightError."""
    seen = threat.apply(x, threat.null(x) if z is None else z)
    given = f"{tuple(seen.shape)} {seen.dtype}" if isinstance(seen, Tensor) else type(seen).__name__
    try:
        out = model(seen)
    except ModelFailure as error:
        raise PreflightError(str(error)) from error.__cause__
    except Exception as error:
        raise PreflightError(f"the model fails on inputs {given}: {type(error).__name__}: {error}") from error
    return check_output(out, size(x))


def _one_logit(y: Any, one: Tensor) -> list[Finding]:
    """What is told of a model of one number; labels that are whole numbers but not 0 and 1 are refused here."""
    classes = y.unique().tolist() if isinstance(y, Tensor) and y.shape == one.shape else []
    if not set(classes) <= {0, 1} and all(float(label).is_integer() for label in classes):
        raise PreflightError(
            f"the model returns one number for each input, which tells two classes apart, but the labels go from "
            f"{classes[0]:g} to {classes[-1]:g}; expected 0 and 1, where 1 is the class of a positive logit. A model "
            "of more classes must return logits (B, K)"
        )
    told = "The model returns one number for each input. It was taken for "
    if is_probability(one):
        return [Finding("one_logit", told + "the probability of class 1.")]
    told += "the logit s of class 1, and the logits are [0, s]."
    if bool(((one < 0) | (one > 1)).any()):
        return [Finding("one_logit", told)]
    told += " But all of the first batch lie in [0, 1], as probabilities would: then the predictions are wrong."
    return [Finding("one_logit", told, level="suspect", next_step="Return two logits, or leave out the sigmoid.")]


def _all_allowed(threat: ThreatModel) -> list[Finding]:
    if not getattr(threat, "allows_everything", False):
        return []
    sentence = (
        f"With the radius {threat.radius} every input may become any other, so that no model can be robust and the "
        "number says nothing about this one."
    )
    return [Finding("all_allowed", sentence, {}, "invalid", "Give the radius in the unit of the inputs: 8/255, not 8.")]


def _train_mode(model: Model) -> list[Finding]:
    count = sum(m.training for m in model.modules()) if isinstance(model, nn.Module) else 0
    if not count:
        return []
    sentence = f"The model came in training mode ({count} of its modules); it is judged in evaluation mode."
    return [Finding("train_mode", sentence, {"modules": count})]


def _randomness(model: Model, x: Inputs, threat: ThreatModel, first: Tensor, second: Tensor) -> list[Finding]:
    """Whether two looks differ by more than rounding, and whether the seed settles it."""
    rounding = 32 * torch.finfo(first.dtype).eps * max(1.0, first.abs().max().item())
    gap = (first - second).abs().max().item()
    if gap <= rounding:
        return []
    with private_rng(0, device_of(x)), attack_mode(model) as frozen, torch.no_grad():
        settled = (first - _run(frozen, x, threat)).abs().max().item() <= rounding
    changed = (first.argmax(1) != second.argmax(1)).float().mean().item()
    sentence = (
        f"The model is random even in evaluation mode: two looks at the same inputs differ by up to {gap:.2g}, and "
        f"{changed:.1%} of the predictions change. "
    ) + (
        "The verdict holds for the seed it was made with; average the attack over the randomness."
        if settled
        else "Not even a fixed seed makes it repeat, so neither will the verdict."
    )
    return [Finding("random_output", sentence, {"difference": gap, "changed": changed, "seeded": float(settled)})]


def _probabilities(out: Tensor) -> list[Finding]:
    """Told where rows are not negative and sum to 1; equal rows of a batch say nothing (a constant model)."""
    varied = len(out) == 1 or bool((out != out[0]).any())
    if not varied or bool((out < 0).any()) or bool(((out.sum(1) - 1).abs() >= 1e-3).any()):
        return []
    share = (out.amax(1) == 1).float().mean().item()
    sentence = (
        "The model returns probabilities, not logits; its attacks climb on their logarithm. A probability that is "
        f"rounded to 1 ({share:.1%} of this batch) has lost its gradient: return the logits for a verdict to trust."
    )
    return [Finding("probabilities", sentence, {"saturated": share})]


def _gradients(model: Model, x: Inputs, y: Tensor, threat: ThreatModel, needed: bool) -> list[Finding]:
    """Whether the logits depend on the input at all, and where cross-entropy has nothing to climb."""
    z = threat.null(x).requires_grad_()
    logits = _run(model, x, threat, z)
    scores = [objective.score(logits, y).sum() for objective in (margin, cross_entropy) if logits.requires_grad]
    try:
        grads = [torch.autograd.grad(score, z, retain_graph=True, allow_unused=True)[0] for score in scores]
    except RuntimeError as error:
        raise PreflightError(f"the model's gradient cannot be computed: {error}") from error
    found = [grad.flatten(1) for grad in grads if grad is not None]
    if len(found) < 2 and needed:
        raise PreflightError(
            "the logits have no gradient with respect to the input: somewhere in the model the graph is cut "
            "(no_grad, detach, numpy, a hard decision). Gradient attacks would find nothing and call it robust; "
            "run only searches without gradients, such as square"
        )
    if len(found) < 2:
        sentence = (
            "The logits have no gradient with respect to the input, so only searches without gradients were run. "
            "They break less than attacks that know the model: the number may be too high."
        )
        step = (
            "Attack what the model computes before it is cut; where it has no gradient at all, give the searches more "
            "queries."
        )
        return [Finding("no_gradient", sentence, {}, "suspect", step), *_labels_only(logits)]
    return _of_gradients(*found)


def _labels_only(logits: Tensor) -> list[Finding]:
    """Told of logits that take two values: the label's, and that of all other classes."""
    if len(logits) < 2 or logits.unique().numel() != 2 or not bool(((logits == logits.max()).sum(1) == 1).all()):
        return []
    sentence = (
        "The model returns nothing but labels, so an attack cannot see whether it comes nearer: searches are blind "
        "until they hit, and the number may be far too high."
    )
    return [Finding("labels_only", sentence, {}, "suspect", "Let it return probabilities.")]


def _of_gradients(by_margin: Tensor, by_loss: Tensor) -> list[Finding]:
    num = len(by_margin)
    broken = int((~(by_margin.isfinite() & by_loss.isfinite()).all(1)).sum())
    flat, lost = (by_margin == 0).all(1), (by_loss == 0).all(1)
    saturated = int((lost & ~flat).sum())
    findings = []
    if broken:
        sentence = f"The gradient at the input is NaN or infinite for {broken} of {num} examples; attacks fail there."
        findings.append(Finding("broken_gradient", sentence, {"examples": broken}))
    if bool(flat.all()):
        sentence = (
            f"The gradient at the input is exactly zero for all {num} examples: gradient attacks cannot move, and what "
            "they leave standing is not robust. Judge this model by attacks that need no gradient."
        )
        findings.append(Finding("zero_gradient", sentence, {"examples": num}))
    if saturated:
        sentence = (
            f"The gradient of the cross-entropy is exactly zero for {saturated} of {num} examples, because the model "
            "is too sure there; attacks that climb the margin still move."
        )
        findings.append(Finding("saturated_loss", sentence, {"examples": saturated}))
    return findings


class LogProbabilities(nn.Module):
    """A model that returns probabilities, with their logarithm as logits: its softmax is the probabilities again."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.model = model
        self.training = getattr(model, "training", False)

    def forward(self, x: Any) -> Tensor:
        p = self.model(x)
        return p.clamp_min(torch.finfo(p.dtype).tiny).log()


class TwoLogits(nn.Module):
    """A binary model that returns one number s for each input, (B,) or (B, 1), with two: [0, s].

    probability: s is the probability of class 1, and the two are [1 - s, s].
    """

    def __init__(self, model: Model, probability: bool = False) -> None:
        super().__init__()
        self.model, self.probability = model, probability
        self.training = getattr(model, "training", False)

    def forward(self, x: Any) -> Tensor:
        s = self.model(x).flatten()
        return torch.stack([1 - s if self.probability else torch.zeros_like(s), s], 1)
