"""The per-example worst case over a list of attacks."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparring.core.machine import Machine
from sparring.core.types import Cost, Inputs, Model
from sparring.evaluation.all_batches import Progress, Walk, settings_of
from sparring.evaluation.bounds import Certify
from sparring.evaluation.fingerprint import describe, name_of
from sparring.evaluation.one_batch import Plan, make_plan
from sparring.evaluation.parts import Part, merge
from sparring.evaluation.preflight import Preflight
from sparring.evaluation.shards import joined
from sparring.evaluation.shelf import Shelf
from sparring.evaluation.verify import REJECTIONS, AttackRecord, MakeAttack
from sparring.results.findings import Finding
from sparring.results.schema import Metric
from sparring.results.statistics import wilson
from sparring.threats.base import ThreatModel

ALONE = Machine(torch.device("cpu"))
CURVE = (0.25, 0.5, 0.75, 1.0, 1.5, 2.0)
"""Radii of the security curve, as shares of the threat's radius."""


@dataclass
class Evaluation:
    """Verdicts per example and what they add up to. All shares carry a 95 % Wilson interval.

    table: one entry per example: index, label, clean_prediction, clean_confidence, correct, certified, robust,
    broken_by (number of the attack, -1 for none), adversarial_prediction, adversarial_confidence, size, margin_left.
    margin_left: share of the clean margin (logit of the label minus the largest other) that is left at the worst
    permitted point an attack has shown: 1 untouched, 0 broken or wrong from the start. certified: None when no
    certificate was asked for. gallery: some turned examples. model: the one
    that was attacked, after `preflight`. seconds: of work, all processes together.
    """

    model: Model
    threat: ThreatModel
    seed: int
    clean: Metric
    robust: Metric
    certified: Metric | None
    certification: Any
    attack_success: Metric | None
    attacks: list[AttackRecord]
    curve: list[tuple[float, Metric]]
    curve_attacks: list[str]
    per_class: list[dict[str, Any]]
    table: dict[str, Tensor]
    gallery: dict[str, Tensor]
    findings: list[Finding]
    cost: Cost
    seconds: float


def measure(
    model: Model | Preflight,
    batches: Iterable[tuple[Inputs, Tensor]],
    threat: ThreatModel,
    stages: Sequence[MakeAttack],
    *,
    seed: int = 0,
    curve: Sequence[float] = CURVE,
    curve_stages: Sequence[MakeAttack] | None = None,
    certify: Certify | None = None,
    gallery_size: int = 12,
    keep: Path | None = None,
    about: str = "",
    machine: Machine = ALONE,
    observe: Callable[[Progress], object] | None = None,
) -> Evaluation:
    """Clean accuracy, and the share of examples that every attack leaves right.

    model: what `preflight` made of it goes, too, and is not looked at again.
    batches: (x, y) pairs; stages: functions from a threat model to an attack, run in order, each on what still stands;
    a `Stage` with `margin_at_most` only where `margin_left` is at most that. Every result is realized and shown to the
    model again in its full precision; it counts when it lies in the set and in the valid domain, is finite, and still
    fools. A preflight looks at the first batch, and may wrap the model. The curve: larger radii are tried on what
    stands, smaller ones on what fell (what stands at a radius stands at any smaller one), with `curve_stages`
    (default: `stages`). certify: (model, x, y, threat) -> a lower bound of each margin; what is right with a bound
    above 0 is certified, and is not attacked at this radius or a smaller one.

    keep: a folder; every finished batch is kept there, and a later call with the same settings and batches goes on
    where this one ended. `about` says what the settings cannot: where a model that is no Module comes from, which code
    a hand-written attack runs. machine: which of several processes this one is, with `keep` on a file system that
    all of them share: this one computes the batches rank, rank + world, ..., waits for the others and returns the
    whole, as they do. Model and batches stay on the device where they are.

    Batches may come from a stream that can be read once. Verdicts depend on (seed, position of the example), not on
    batch size or shards. Raises PreflightError, ValueError (OtherSettings among them), TypeError, and RuntimeError
    when another process ends early.

    >>> from sparring import Linf, fgsm
    >>> model, data = torch.nn.Linear(4, 3), [(torch.rand(8, 4), torch.arange(8) % 3)]
    >>> measure(model, data, Linf(0.1), [fgsm]).robust.n
    8
    """
    plan = make_plan(threat, stages, curve, curve_stages or stages, certify, gallery_size)
    looked_at = model.model if isinstance(model, Preflight) else model
    shelf = Shelf(keep, settings_of(plan, looked_at, seed, about)) if keep else None
    started = time.monotonic()
    with joined((machine.rank, machine.world), shelf) as crew:
        walk = Walk(plan, seed, shelf, crew, observe)
        if shelf is None or crew.world == 1:
            total = merge((part for _, part in walk.over(model, batches) if part), gallery_size)
        else:
            keys = [key for key, _ in walk.over(model, batches)]
            crew.wait(time.monotonic() - started)
            total = merge((shelf.require(key) for key in keys), gallery_size)
            crew.wait(0.0)  # nobody may clear the folder while others read
    return _result(plan, seed, total, walk.model)


def _result(plan: Plan, seed: int, total: Part, model: Model) -> Evaluation:
    """Adds everything up."""
    table, threat = total.columns, plan.threat
    correct, robust, num = table["correct"], table["robust"], len(table["label"])
    contradicted = table["certified"] & ~robust
    table["certified"] = table["certified"] & robust
    right, left = int(correct.sum()), int(robust.sum())
    records = [record.counting(counts) for record, counts in zip(plan.records, total.attacks, strict=True)]
    on_curve = [record.counting(counts) for record, counts in zip(plan.curve_records, total.curve_attacks, strict=True)]
    radius = float(torch.as_tensor(threat.radius, dtype=torch.float64).mean())
    curve = [(0.0, wilson(right, num))]
    curve += [(factor * radius, wilson(int(stands.sum()), num)) for factor, stands in total.stands_at.items()]
    certify = plan.certify
    return Evaluation(
        model=model,
        threat=threat, seed=seed, clean=wilson(right, num), robust=wilson(left, num),
        certified=wilson(int(table["certified"].sum()), num) if certify else None,
        certification={"name": name_of(certify), "settings": _settings(certify)} if certify else None,
        attack_success=wilson(right - left, right) if right else None, attacks=records,
        curve=curve if plan.factors else [],
        curve_attacks=[record.name for record in plan.curve_records] if plan.factors else [],
        per_class=_per_class(table["label"], correct, robust), table=table, gallery=total.gallery,
        findings=total.findings
        + _rejected([r for r in (*records, *on_curve) if any(r.rejected.values())])
        + ([_contradicted(int(contradicted.sum()))] if contradicted.any() else []),
        cost=total.cost, seconds=total.seconds,
    )  # fmt: skip


def _settings(certify: Certify) -> Any:
    settings = describe(certify)
    return None if isinstance(settings, str) else settings  # a function has none but its name


def _rejected(records: list[AttackRecord]) -> list[Finding]:
    """One finding for all attacks, at the radius and along the curve."""
    if not records:
        return []
    counts = {name: n for name in REJECTIONS if (n := sum(record.rejected[name] for record in records))}
    names = ", ".join(dict.fromkeys(record.name for record in records))
    sentence = f"{names}: {sum(counts.values())} results did not hold when checked and were not counted."
    if "not_finite" not in counts:
        return [Finding("rejected results", sentence, counts)]
    sentence += " Some had outputs that are not finite: what such a model does there cannot be called right."
    return [
        Finding("rejected results", sentence, counts, "suspect", "Find out where the model overflows, and mend it.")
    ]


def _contradicted(count: int) -> Finding:
    sentence = (
        f"Attacks broke {count} examples for which the certificate vouches. It is about another classifier than the "
        "one attacked (for smoothing: the vote over endless noise, against a mean over few), and these are not counted."
    )
    return Finding("certificate contradicted", sentence, {"examples": count}, "suspect", "Smooth with more copies.")


def _per_class(label: Tensor, correct: Tensor, robust: Tensor) -> list[dict[str, Any]]:
    rows = []
    for k in label.unique().tolist():
        own = label == k
        shares = {"clean": correct[own].float().mean().item(), "robust": robust[own].float().mean().item()}
        rows.append({"label": k, "n": int(own.sum()), **shares})
    return rows
