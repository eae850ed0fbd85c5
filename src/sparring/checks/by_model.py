"""Checks of the model as a function (does it answer the same twice, alone and in a batch, at any precision?), and of
what the evaluation recorded, which cost no pass.

What each of them asks stands in its row of `battery.CHECKS`.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from sparring.checks import limits
from sparring.checks.case import Case, Measured, share_of
from sparring.core.types import device_of, take

ONE_BY_ONE = 16  # examples shown one by one


def repeatable(case: Case) -> Measured | None:
    then = take(case.evaluation.table["clean_prediction"], case.rows).to(case.y.device)
    changed = share_of(case.clean.argmax(1) != then)
    return {"level": "invalid", "changed": changed} if changed > limits.CHANGED else None


def probabilities(case: Case) -> Measured | None:
    if "probabilities" not in case.seen:
        return None
    saturated = share_of(case.clean.softmax(1).amax(1) == 1)
    return {"level": case.level("suspect") if saturated > limits.SATURATED else "note", "saturated": saturated}


def randomness(case: Case) -> Measured | None:
    if "random_output" not in case.seen:
        return None
    told, averaged = case.seen["random_output"].numbers, any(_averages(r.settings) for r in case.evaluation.attacks)
    return {
        "level": "invalid" if not told["seeded"] else "note" if averaged else case.level("suspect"),
        "changed": told["changed"], "averaged": float(averaged), "seeded": float(told["seeded"]),
        "settled": "" if told["seeded"] else "A fixed seed does not make it repeat, so the number cannot be repeated. ",
        "average": "The attacks averaged over it." if averaged
        else "No attack averaged its gradients over the randomness.",
    }  # fmt: skip


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
    few, calls = take(case.shown, case.every[:ONE_BY_ONE]), _Calls()
    with calls, torch.autograd.graph.saved_tensors_hooks(lambda saved: saved, calls.unpack), torch.no_grad():
        try:
            case.model(few)
        except RuntimeError:  # torch.func refuses saved-tensor hooks, and nothing else does: the model ran before
            calls.count += 1
    return {"level": case.level("suspect"), "calls": calls.count} if calls.count else None


def batch_dependence(case: Case) -> Measured | None:
    if len(case.y) < 2:
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
    layers = case.whole.modules() if isinstance(case.whole, nn.Module) else ()
    modes = sum(isinstance(m, nn.modules.batchnorm._BatchNorm) and m.running_mean is None for m in layers)
    norms = f", and {modes} BatchNorm layers use the statistics of the batch in evaluation mode" if modes else ""
    level = "invalid" if changed > limits.CHANGED else "suspect"
    return {"level": level, "changed": changed, "difference": gap, "batch_norms": modes, "norms": norms}


def _half(case: Case) -> torch.dtype | None:
    """The 16-bit type of the model's weights, if that is what they have."""
    parameters = case.whole.parameters() if isinstance(case.whole, nn.Module) else ()
    return next((p.dtype for p in parameters if p.dtype in (torch.float16, torch.bfloat16)), None)


def half_precision(case: Case) -> Measured | None:
    half = _half(case)
    return {"level": case.level("suspect"), "dtype": str(half)} if half else None


def without_tf32(case: Case) -> Measured | None:
    if _half(case) or device_of(case.x).type != "cuda" or not torch.backends.cudnn.allow_tf32:
        return None
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        return _changes(case, "TF32 convolutions")


def in_bfloat16(case: Case) -> Measured | None:
    if _half(case) or not isinstance(case.x, Tensor) or case.x.dtype != torch.float32:
        return None
    with torch.autocast(device_of(case.x).type, torch.bfloat16):
        try:
            return _changes(case, "bf16")
        except Exception:  # the model ran before: it has an operation that bf16 has not, or leaves torch
            return None


def _changes(case: Case, what: str) -> Measured | None:
    """How many predictions are others in the precision that now holds."""
    changed = share_of(case.logits(case.shown).argmax(1) != case.clean.argmax(1))
    return {"level": "note", "changed": changed, "what": what} if changed > limits.COARSE_CHANGED else None


# What the evaluation recorded -------------------------------------------------------------------------------------


def gradient_free(record: Any) -> bool:
    """Whether an attack ran and took no gradient."""
    return bool(record.cost.forwards > 0 and record.cost.backwards == 0)


def one_answer(case: Case) -> Measured | None:
    table = case.evaluation.table
    if len(table["clean_prediction"].unique()) > 1 or len(table["label"].unique()) < 2:
        return None
    return {"level": "suspect", "num": len(table["label"]), "share": share_of(table["correct"])}


def won_without_gradients(case: Case) -> Measured | None:
    """What the most successful attack without gradients broke of what gradient attacks had left."""
    records = case.evaluation.attacks
    first = next((i for i, record in enumerate(records) if record.cost.backwards > 0), len(records))
    later = [record for record in records[first:] if gradient_free(record)]
    if not later:
        return None
    best = max(later, key=lambda r: r.broke / max(r.ran_on + r.skipped, 1))
    tried = best.ran_on + best.skipped
    share = best.broke / max(tried, 1)
    if share <= limits.GRADIENT_FREE_BROKE or best.broke < limits.FEWEST_BROKEN:
        return None
    return {"level": case.level("suspect"), "fell": best.broke, "tried": tried, "share": share, "who": best.name}


def stopped_early(case: Case) -> Measured | None:
    """Whether the last attack broke most of the little that it was given, so that its gate was too narrow."""
    last = next((record for record in reversed(case.evaluation.attacks) if record.ran_on), None)
    if last is None or not last.skipped or last.broke < limits.FEWEST_BROKEN:
        return None
    if last.broke <= limits.LAST_BROKE * last.ran_on:
        return None
    told = {"fell": last.broke, "tried": last.ran_on, "spared": last.skipped}
    return {"level": case.level("suspect"), **told, "who": last.name}


def no_search(case: Case) -> Measured | None:
    searched = any(gradient_free(record) for record in case.evaluation.attacks)
    return {"level": case.level("suspect")} if case.threat.discrete and not searched and case.at_stake > 0 else None


def short_reach(case: Case) -> Measured | None:
    """Whether no attack could have got as far as the radius: its steps together are shorter."""
    reaches = [_reach(record.settings) for record in case.evaluation.attacks]
    if any(reach is None or reach >= 1 for reach in reaches):
        return None
    return {"level": case.level("suspect"), "reach": max(reach for reach in reaches if reach is not None)}


def _reach(settings: Any) -> float | None:
    """How far the steps of an attack from the clean input go together, as a share of the radius; None for others."""
    while isinstance(settings, dict) and "attack" in settings:  # restarts and the like
        settings = settings["attack"]
    if not isinstance(settings, dict) or {"rule", "start", "num_steps"} - set(settings):
        return None
    rule = settings["rule"]
    ascends = isinstance(rule, dict) and rule.get("type") == "Ascent" and rule.get("absolute_step") is None
    clean = settings["start"] == {"type": "Null"}
    return settings["num_steps"] * rule["step_size"] if ascends and clean else None


def rise_of_curve(case: Case) -> Measured | None:
    values = [share.value for _, share in case.evaluation.curve]
    rise = max((after - before for before, after in itertools.pairwise(values)), default=0.0)
    return {"level": case.level("suspect"), "rise": rise} if rise > limits.CHANGED else None


def end_of_curve(case: Case) -> Measured | None:
    points = [(radius, share.value) for radius, share in case.evaluation.curve]
    radius = float(torch.as_tensor(case.evaluation.threat.radius, dtype=torch.float64).mean())
    here = next((value for r, value in points if math.isclose(r, radius, rel_tol=1e-6)), None)
    there = next((value for r, value in points if r >= limits.TWICE * radius), None)
    if here is None or there is None or rise_of_curve(case):
        return None
    start = points[0][1]
    fall, further = start - here, here - there
    if min(fall, here) < limits.FALL_WORTH or further >= limits.FALL_STOPS * fall:
        return None
    if case.at_stake - further < limits.FALL_WORTH:  # what a certificate vouches for need not fall
        return None
    level = case.level("suspect")
    return {"level": level, "start": start, "here": here, "there": there, "fall": fall, "further": further}
