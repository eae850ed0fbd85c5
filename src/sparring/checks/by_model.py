"""Checks of the model as a function (does it answer the same twice, alone and in a batch, at any precision?), and of
what the evaluation recorded, which cost no pass."""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from sparring.checks import limits
from sparring.checks.case import Case, Measured, share_of
from sparring.core.model_state import private_rng
from sparring.core.types import device_of, take
from sparring.results.findings import Level

ONE_BY_ONE = 16  # examples shown one by one


def repeatable(case: Case) -> Measured | None:
    """How many of the sample are not predicted as the evaluation says."""
    then = take(case.evaluation.table["clean_prediction"], case.number.cpu()).to(case.y.device)
    return None if "random_output" in case.seen else {"changed": share_of(case.clean.argmax(1) != then)}


def probabilities(case: Case) -> Measured | None:
    """How many of the probabilities that the model returns are rounded to 1."""
    return {"saturated": share_of(case.clean.softmax(1).amax(1) == 1)} if "probabilities" in case.seen else None


def probabilities_level(measured: Any, case: Case) -> Level:
    return case.level("suspect") if measured["saturated"] > limits.SATURATED else "note"


def randomness(case: Case) -> Measured | None:
    """Whether the model is random, whether a seed settles it, and whether the attacks averaged over it."""
    found = case.seen.get("random_output")
    if found is None:
        return None
    averaged = any(_averages(record.settings) for record in case.evaluation.attacks)
    return {
        "changed": found.numbers["changed"], "averaged": float(averaged), "seeded": float(found.numbers["seeded"]),
        "settled": "" if found.numbers["seeded"]
        else "A fixed seed does not make it repeat, so the number cannot be repeated. ",
        "average": "The attacks averaged over it." if averaged
        else "No attack averaged its gradients over the randomness.",
    }  # fmt: skip


def randomness_level(measured: Any, case: Case) -> Level:
    if not measured["seeded"]:
        return "invalid"
    return "note" if measured["averaged"] else case.level("suspect")


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


def autograd_inside(case: Case) -> Measured | None:
    """How often the forward pass computes gradients itself (optimisation at inference)."""
    few, calls = take(case.shown, case.every[:ONE_BY_ONE]), _Calls()
    with calls, torch.autograd.graph.saved_tensors_hooks(lambda saved: saved, calls.unpack), torch.no_grad():
        try:
            case.model(few)
        except RuntimeError:  # torch.func refuses saved-tensor hooks, and nothing else does: the model ran before
            calls.count += 1
    return {"calls": calls.count}


def batch_dependence(case: Case) -> Measured | None:
    """How far an example's logits and prediction depend on the others in its batch."""
    if "random_output" in case.seen or len(case.y) < 2:
        return None
    gap = changed = 0.0
    for rows in (case.every[:ONE_BY_ONE].split(1), case.every.flip(0).split(-(-len(case.y) // 3))):
        try:
            other = torch.cat([case.logits(take(case.shown, part)) for part in rows])
        except ValueError:  # BatchNorm without running statistics refuses a batch of one
            continue
        here = case.clean[torch.cat(rows)]
        gap = max(gap, (here - other).abs().max().item())
        changed = max(changed, share_of(here.argmax(1) != other.argmax(1)))
    if changed == 0 and gap <= limits.COMPANY * max(1.0, case.clean.abs().max().item()):
        return None
    modes = _batch_statistics(case.whole)
    norms = f", and {modes} BatchNorm layers use the statistics of the batch in evaluation mode" if modes else ""
    return {"changed": changed, "difference": gap, "batch_norms": modes, "norms": norms}


def batch_dependence_level(measured: Any, case: Case) -> Level:
    return "invalid" if measured["changed"] > limits.CHANGED else "suspect"


def _batch_statistics(whole: Any) -> int:
    """BatchNorm layers that have no running statistics to use."""
    layers = whole.modules() if isinstance(whole, nn.Module) else ()
    return sum(isinstance(m, nn.modules.batchnorm._BatchNorm) and m.running_mean is None for m in layers)


def _half(case: Case) -> torch.dtype | None:
    """The 16-bit type of the model's weights, if that is what they have."""
    parameters = case.whole.parameters() if isinstance(case.whole, nn.Module) else ()
    return next((p.dtype for p in parameters if p.dtype in (torch.float16, torch.bfloat16)), None)


def half_precision(case: Case) -> Measured | None:
    """Whether the model computes in half precision."""
    half = _half(case)
    return {"dtype": str(half)} if half else None


def without_tf32(case: Case) -> Measured | None:
    """How many predictions TF32 has changed."""
    if _half(case) or device_of(case.x).type != "cuda" or not torch.backends.cudnn.allow_tf32:
        return None
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        return _changes(case, case.logits(case.shown), "TF32 convolutions")


def in_bfloat16(case: Case) -> Measured | None:
    """How many predictions bf16 would change."""
    if _half(case) or not isinstance(case.x, Tensor) or case.x.dtype != torch.float32:
        return None
    device = device_of(case.x)
    with torch.autocast(device.type, torch.bfloat16), private_rng(case.seed, device):
        try:
            return _changes(case, case.logits(case.shown), "bf16")
        except Exception:  # the model ran before: it has an operation that bf16 has not, or leaves torch
            return None


def _changes(case: Case, other: Tensor, what: str) -> Measured | None:
    changed = share_of(other.argmax(1) != case.clean.argmax(1))
    return None if "random_output" in case.seen else {"changed": changed, "what": what}


def coarse_level(measured: Any, case: Case) -> Level | None:
    return "note" if measured["changed"] > limits.COARSE_CHANGED else None


# What the evaluation recorded -------------------------------------------------------------------------------------


def gradient_free(record: Any) -> bool:
    """Whether an attack ran and took no gradient."""
    return bool(record.cost.forwards > 0 and record.cost.backwards == 0)


def won_without_gradients(case: Case) -> Measured | None:
    """What the most successful attack without gradients broke of what gradient attacks had left."""
    records = case.evaluation.attacks
    first = next((i for i, record in enumerate(records) if record.cost.backwards > 0), len(records))
    later = [record for record in records[first:] if gradient_free(record)]
    if not later:
        return None
    best = max(later, key=lambda r: r.broke / max(r.ran_on + r.skipped, 1))
    tried = best.ran_on + best.skipped
    return {"fell": best.broke, "tried": tried, "share": best.broke / max(tried, 1), "who": best.name}


def won_level(measured: Any, case: Case) -> Level | None:
    much = measured["share"] > limits.GRADIENT_FREE_BROKE and measured["fell"] >= limits.FEWEST_BROKEN
    return case.level("suspect") if much else None


def no_search(case: Case) -> Measured | None:
    """Whether inputs that move in jumps were attacked along gradients alone."""
    searched = any(gradient_free(record) for record in case.evaluation.attacks)
    return {} if case.threat.discrete and not searched and case.at_stake > 0 else None


def rise_of_curve(case: Case) -> Measured:
    """How much robust accuracy rises somewhere as the radius grows."""
    values = [share.value for _, share in case.evaluation.curve]
    return {"rise": max((after - before for before, after in itertools.pairwise(values)), default=0.0)}


def end_of_curve(case: Case) -> Measured | None:
    """How far robust accuracy falls to the radius, and from there to twice the radius; None where it rises."""
    points = [(radius, share.value) for radius, share in case.evaluation.curve]
    radius = float(torch.as_tensor(case.evaluation.threat.radius, dtype=torch.float64).mean())
    here = next((value for r, value in points if math.isclose(r, radius, rel_tol=1e-6)), None)
    there = next((value for r, value in points if r >= limits.TWICE * radius), None)
    if here is None or there is None or rise_of_curve(case)["rise"] > limits.CHANGED:  # type: ignore[operator]
        return None
    start = points[0][1]
    return {"start": start, "here": here, "there": there, "fall": start - here, "further": here - there}


def end_level(measured: Any, case: Case) -> Level | None:
    fall, here, further = measured["fall"], measured["here"], measured["further"]
    some = fall >= limits.FALL_WORTH and here >= limits.FALL_WORTH
    return case.level("suspect") if some and further < limits.FALL_STOPS * fall else None
