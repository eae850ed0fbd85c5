"""Probes of the model as a function: does it answer the same twice, alone and in a batch, at any precision?"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from sparring.checks import limits
from sparring.checks.case import Case, share_of
from sparring.core.model_state import private_rng
from sparring.core.types import device_of, take
from sparring.results.findings import Finding, Level

ALONE = 16  # examples shown one by one


def repeatable(case: Case) -> list[Finding]:
    """Whether the sample is predicted as the evaluation says."""
    then = take(case.evaluation.table["clean_prediction"], case.number.cpu()).to(case.y.device)
    changed = share_of(case.clean.argmax(1) != then)
    if changed <= limits.CHANGED or "random_output" in case.seen:
        return []
    sentence = (
        f"{changed:.1%} of the sampled predictions are not those of the evaluation: the model or the data has changed "
        "since, or a seed does not settle its randomness. The number cannot be repeated."
    )
    step = "Evaluate again with the model and the examples at hand, in the same order."
    return [Finding("not_repeatable", sentence, {"changed": changed}, "invalid", step)]


def probabilities(case: Case) -> list[Finding]:
    """Whether the model returns probabilities, and how many of them are rounded to 1."""
    if "probabilities" not in case.seen:
        return []
    saturated = share_of(case.clean.softmax(1).amax(1) == 1)
    bad = saturated > limits.SATURATED
    sentence = (
        f"The model returns probabilities, and {saturated:.1%} of the sampled ones are rounded to 1. Attacks climb "
        "their logarithm, whose gradient is gone where that happens."
    )
    level: Level = case.level("suspect") if bad else "note"
    return [
        Finding("probability_output", sentence, {"saturated": saturated}, level, "Return logits: leave out softmax.")
    ]


def randomness(case: Case) -> list[Finding]:
    """Whether the model is random, whether a seed settles it, and whether the attacks averaged over it."""
    found = case.seen.get("random_output")
    if found is None:
        return []
    averaged = any(_averages(record.settings) for record in case.evaluation.attacks)
    settled, changed = bool(found.numbers["seeded"]), found.numbers["changed"]
    level: Level = "note" if settled and averaged else case.level("suspect") if settled else "invalid"
    sentence = (
        f"The model is random: between two looks {changed:.1%} of the predictions change. "
        + ("" if settled else "A fixed seed does not make it repeat, so the number cannot be repeated. ")
        + ("The attacks averaged over it." if averaged else "No attack averaged its gradients over the randomness.")
    )
    step = "Average the gradients over many looks: --attacks autoattack-rand, or apgd:eot=20; or evaluate its mean."
    return [Finding("randomness", sentence, {"changed": changed, "averaged": float(averaged)}, level, step)]


def _averages(settings: Any) -> bool:
    """Whether an attack's settings hold an average over several looks, however deep."""
    if isinstance(settings, dict):
        return settings.get("type") == "Averaged" or any(_averages(part) for part in settings.values())
    return isinstance(settings, list) and any(_averages(part) for part in settings)


class _Calls(TorchFunctionMode):
    """Counts calls for gradients; nothing is patched, and nothing stays behind."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += getattr(func, "__name__", "") in ("grad", "backward")
        return func(*args, **(kwargs or {}))

    def unpack(self, saved: Tensor) -> Tensor:
        """A saved tensor that is asked for: the engine runs backwards."""
        self.count += 1
        return saved


def autograd_inside(case: Case) -> list[Finding]:
    """Whether the forward pass computes gradients itself (optimisation at inference)."""
    few, calls = take(case.shown, case.every[:ALONE]), _Calls()
    with calls, torch.autograd.graph.saved_tensors_hooks(lambda saved: saved, calls.unpack), torch.no_grad():
        try:
            case.model(few)
        except RuntimeError:  # torch.func refuses saved-tensor hooks, and nothing else does: the model ran before
            calls.count += 1
    if not calls.count:
        return []
    sentence = (
        "The model computes gradients inside its own forward pass (optimisation at inference). The gradient through it "
        "is often cut or wrong, and attacks that follow it stop short."
    )
    step = "Attack it through the unrolled optimisation, by transfer from the bare network, and without gradients."
    return [Finding("autograd_in_forward", sentence, {"calls": calls.count}, case.level("suspect"), step)]


def batch_dependence(case: Case) -> list[Finding]:
    """Whether an example's prediction depends on the others in its batch."""
    if "random_output" in case.seen or len(case.y) < 2:
        return []
    gap = changed = 0.0
    for rows in (case.every[:ALONE].split(1), case.every.flip(0).split(-(-len(case.y) // 3))):
        try:
            other = torch.cat([case.logits(take(case.shown, part)) for part in rows])
        except ValueError:  # BatchNorm without running statistics refuses a batch of one
            continue
        here = case.clean[torch.cat(rows)]
        gap = max(gap, (here - other).abs().max().item())
        changed = max(changed, share_of(here.argmax(1) != other.argmax(1)))
    if changed == 0 and gap <= limits.COMPANY * max(1.0, case.clean.abs().max().item()):
        return []
    modes = _batch_statistics(case.whole)
    sentence = (
        f"Predictions depend on the rest of the batch: {changed:.1%} change between batches of different company"
        + (f", and {modes} BatchNorm layers use the statistics of the batch in evaluation mode" if modes else "")
        + ". An attack then moves the other examples too, and the number hangs on the batch size."
    )
    level: Level = "invalid" if changed > limits.CHANGED else "suspect"
    step = "Evaluate with running statistics (model.eval(), track_running_stats=True), or one example at a time."
    numbers = {"changed": changed, "difference": gap, "batch_norms": modes}
    return [Finding("batch_dependence", sentence, numbers, level, step)]


def _batch_statistics(whole: Any) -> int:
    """BatchNorm layers that have no running statistics to use."""
    layers = whole.modules() if isinstance(whole, nn.Module) else ()
    return sum(isinstance(m, nn.modules.batchnorm._BatchNorm) and m.running_mean is None for m in layers)


def precision(case: Case) -> list[Finding]:
    """Whether the model computes in half precision, and whether bf16 or TF32 would change its predictions."""
    raw = torch.float32
    if isinstance(case.whole, nn.Module):
        raw = next((p.dtype for p in case.whole.parameters() if p.dtype in (torch.float16, torch.bfloat16)), raw)
    device = device_of(case.x)
    findings = []
    if raw != torch.float32:
        sentence = (
            f"The model's weights are {raw}: logits tie and gradients vanish in so few digits, and a verdict of "
            "float32 may be lower."
        )
        findings.append(Finding("reduced_precision", sentence, {}, case.level("suspect"), "Judge model.float()."))
    elif device.type == "cuda" and torch.backends.cudnn.allow_tf32:
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            findings += _changes(case, case.logits(case.shown), "TF32 convolutions")
    if raw == torch.float32 and isinstance(case.x, Tensor) and case.x.dtype == torch.float32:
        with torch.autocast(device.type, torch.bfloat16), private_rng(case.seed, device):
            try:
                coarse = case.logits(case.shown)
            except RuntimeError:  # an operation that bf16 does not have
                return findings
        findings += _changes(case, coarse, "bf16")
    return findings


def _changes(case: Case, other: Tensor, what: str) -> list[Finding]:
    changed = share_of(other.argmax(1) != case.clean.argmax(1))
    if changed <= limits.COARSE_CHANGED or "random_output" in case.seen:
        return []
    sentence = (
        f"{changed:.1%} of the sampled clean predictions change between {what} and float32. The verdict is one of "
        "float32; deployed otherwise, it is another model."
    )
    step = "Evaluate in the precision of deployment as well."
    return [Finding("reduced_precision", sentence, {"changed": changed}, "note", step)]
