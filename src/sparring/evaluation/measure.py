"""The per-example worst case over a list of attacks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparring.attacks.around import needs_grad
from sparring.core.machine import ONE_PROCESS, Machine
from sparring.core.registry import name_of
from sparring.core.types import Cost, Inputs, Model
from sparring.evaluation.all_batches import AllBatches, Progress, count_batches
from sparring.evaluation.fingerprint import describe, digest, digest_of_model, digest_of_package
from sparring.evaluation.kept import Kept, OtherSettings
from sparring.evaluation.one_batch import REJECTIONS, AttackRecord, BatchOutcome, BatchPlan, Certify, MakeAttack, Step
from sparring.evaluation.preflight import Preflight, preflight
from sparring.results.findings import Finding
from sparring.results.schema import Metric
from sparring.results.statistics import wilson
from sparring.threats.base import ThreatModel
from sparring.threats.inputs import pair_of

GALLERY_SIZE = 12
"""How many turned examples an evaluation keeps to be looked at."""
CURVE = (0.25, 0.5, 0.75, 1.0, 1.5, 2.0)
"""Radii of the security curve, as shares of the threat's radius."""
Metrics = Callable[[Mapping[str, Tensor]], dict[str, Metric]]
"""The table of examples -> what is measured on it, by name."""


@dataclass(repr=False)
class Evaluation:
    """Verdicts per example and what they add up to.

    model: the one that was attacked, after `preflight`. metrics: what was measured, by name, each with an interval.
    table: one entry per example: index, label, clean_prediction, clean_confidence, correct, certified, robust,
    broken_by (number of the attack, -1 for none), adversarial_prediction, adversarial_confidence, size, margin_left;
    and x/NAME for each named input of one number per example.
    margin_left: share of the clean margin (logit of the label minus the largest other) that is left at the worst
    permitted point an attack has shown: 1 untouched, 0 broken or wrong from the start.
    gallery: some turned examples: index, label, clean_prediction, clean_confidence, adversarial_prediction,
    adversarial_confidence, x and x_adv, which for named inputs are x/NAME and x_adv/NAME, one entry for each tensor;
    where batches differ in length, the shorter are filled with zeros at the end.
    certification: what certified, None where nothing was asked to. seconds: of work, all processes together.
    """

    model: Model
    threat: ThreatModel
    seed: int
    metrics: dict[str, Metric]
    certification: Any
    attacks: list[AttackRecord]
    curve: list[tuple[float, Metric]]
    curve_attacks: list[str]
    per_class: list[dict[str, Any]]
    table: dict[str, Tensor]
    gallery: dict[str, Tensor]
    findings: list[Finding]
    cost: Cost
    seconds: float

    def __repr__(self) -> str:
        """What was found, in a few lines."""
        return "\n".join(f"{name + ':':<18} {told}" for name, told in self.told().items())

    def _repr_html_(self) -> str:
        """The same as a table, for notebooks."""
        rows = (f"<tr><th>{escape(name)}</th><td>{escape(told)}</td></tr>" for name, told in self.told().items())
        return f"<table>{''.join(rows)}</table>"

    def told(self) -> dict[str, str]:
        """What was found, in words, by name."""
        found = {
            name.replace("_", " "): f"{metric.value:.1%} (95 % interval {metric.low:.1%} to {metric.high:.1%})"
            for name, metric in self.metrics.items()
        }
        names = list(dict.fromkeys(attack.name for attack in self.attacks))
        kinds = dict.fromkeys(name.partition(":")[0] for name in names)
        attacks = ", ".join(names) if len(names) < 4 else f"{len(names)} attacks ({', '.join(kinds)})"
        how = f"{self.threat.text()}, {attacks}; n = {self.robust.n}, seed {self.seed}"
        told = ", ".join(f"{finding.name} ({finding.level})" for finding in self.findings)
        return {"measured": how, **found, "findings": told or "none"}

    @property
    def clean(self) -> Metric:
        """The share that is right before any attack."""
        return self.metrics["clean_accuracy"]

    @property
    def robust(self) -> Metric:
        """The share that is right after all attacks."""
        return self.metrics["robust_accuracy"]

    @property
    def certified(self) -> Metric | None:
        """The share for which a certificate vouches; None where none was asked for."""
        return self.metrics.get("certified_accuracy")

    @property
    def attack_success(self) -> Metric | None:
        """The share of what was right that attacks turned; None where nothing was."""
        return self.metrics.get("attack_success")


def accuracy_metrics(table: Mapping[str, Tensor]) -> dict[str, Metric]:
    """Clean, robust and (where the table says so) certified accuracy, and attack success, with 95 % Wilson intervals.

    >>> table = {"correct": torch.tensor([True, True, False]), "robust": torch.tensor([True, False, False])}
    >>> accuracy_metrics(table)["attack_success"].count
    1
    """
    num, right, left = len(table["correct"]), int(table["correct"].sum()), int(table["robust"].sum())
    found = {"clean_accuracy": wilson(right, num), "robust_accuracy": wilson(left, num)}
    if "certified" in table:
        found["certified_accuracy"] = wilson(int(table["certified"].sum()), num)
    return found | ({"attack_success": wilson(right - left, right, higher_is_better=False)} if right else {})


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
    metrics: Metrics = accuracy_metrics,
    gallery_size: int = GALLERY_SIZE,
    numbers: Tensor | None = None,
    keep: Path | None = None,
    about: str = "",
    machine: Machine = ONE_PROCESS,
    observe: Callable[[Progress], object] | None = None,
) -> Evaluation:
    """Clean accuracy, and the share of examples that every attack leaves right.

    model: what `preflight` made of it goes, too, and is not looked at again; else a preflight looks at the first batch,
    and may wrap the model. batches: (x, y) pairs, also from a stream that can be read once. stages: functions from a
    threat model to an attack, run in order, each on what still stands; a `Stage` with `margin_at_most` only where
    `margin_left` is at most that. Every result is realized and shown to the model again in its full precision; it
    counts when it lies in the set and in the valid domain, is finite, and still fools. curve: larger radii are tried on
    what stands, smaller ones on what fell (what stands at a radius stands at any smaller one), with `curve_stages`
    (default: `stages`). certify: (model, x, y, threat, noise=) -> a lower bound of each margin; what is right with a
    bound above 0 is certified, and is not attacked at this radius or a smaller one. metrics: what to measure on the
    table of examples, which holds `certified` where that was asked for. numbers (N,): the examples' own, such as their
    rows in a data set (default: 0, 1, ...); they key what is drawn at random, and name the examples in the table.

    keep: a folder; every finished batch is kept there, and a later call with the same settings and batches goes on
    where this one ended. `about` says what the settings cannot: where a model that is no Module comes from, which code
    a hand-written attack runs. machine: which of several processes this one is; each computes the batches rank,
    rank + world, ..., all see all batches in the same order, and all return the whole. Model and batches stay on the
    device where they are.

    Verdicts depend on (seed, number of the example), not on batch size or processes. Raises PreflightError,
    ValueError (OtherSettings among them), TypeError, and RuntimeError when another process ends early.

    >>> from sparring import Linf, fgsm
    >>> model, data = torch.nn.Linear(4, 3), [(torch.rand(8, 4), torch.arange(8) % 3)]
    >>> measure(model, data, Linf(0.1), [fgsm]).robust.n
    8
    """
    plan = BatchPlan.make(threat, stages, curve, curve_stages or stages, certify, gallery_size, seed)
    kept = _kept(keep, machine, lambda: _settings_of(plan, model, about, numbers))
    walk = AllBatches(plan, machine, kept, observe, count_batches(batches), numbers)
    rest = iter(batches)
    first = next(rest, None)
    if first is None:
        raise ValueError("there is nothing to evaluate: not one batch was given")
    wanted = any(needs_grad(step.make(threat)) for step in (*plan.steps, *plan.curve_steps * bool(plan.factors)))
    pair = pair_of(first)
    checked = model if isinstance(model, Preflight) else preflight(model, *pair, threat, needs_grad=wanted)
    total = walk.run(checked.model, chain([first], rest))
    return _evaluation(plan, total, checked, metrics)


def _kept(keep: Path | None, machine: Machine, settings: Callable[[], dict[str, Any]]) -> Kept | None:
    """The folder of kept batches, once all processes agree. Raises OtherSettings, and ValueError where they do not."""
    if keep is None and machine.world == 1:
        return None
    kept = Kept(keep or Path(), settings())
    other = kept.other_settings() if keep and machine.rank == 0 else ""
    told = machine.gather((kept.settings, other))
    if differ := [rank for rank, (theirs, _) in enumerate(told) if theirs != kept.settings]:
        raise ValueError(
            f"process {differ[0]} evaluates something else than process {machine.rank}; all of them need the same "
            "model and weights, threat, attacks, seed and options, or the parts would not fit together"
        )
    if told[0][1]:
        raise OtherSettings(told[0][1])
    return kept if keep else None


def _settings_of(plan: BatchPlan, model: Model | Preflight, about: str, numbers: Tensor | None) -> dict[str, Any]:
    """Everything that decides about the outcome but the batches themselves, as plain data."""

    def attack(step: Step) -> list[Any]:
        made = [describe(value, exact=True) for value in (step.make, step.make(plan.threat))]
        return [step.record.name, step.record.margin_at_most, *made]

    return {
        "about": about, "numbers": None if numbers is None else digest(numbers),
        "model": digest_of_model(model.model if isinstance(model, Preflight) else model),
        "threat": describe(plan.threat, exact=True), "seed": plan.seed, "attacks": [*map(attack, plan.steps)],
        "curve_attacks": [*map(attack, plan.curve_steps)], "curve": list(plan.factors),
        "certify": describe(plan.certify, exact=True), "gallery_size": plan.gallery_size,
        "sparring": version("sparring"), "code": digest_of_package(), "torch": torch.__version__,
    }  # fmt: skip


def _evaluation(plan: BatchPlan, total: BatchOutcome, checked: Preflight, metrics: Metrics) -> Evaluation:
    """Adds everything up."""
    table, certify, threat = total.table, plan.certify, plan.threat
    contradicted = int((table["certified"] & ~table["robust"]).sum())
    table["certified"] = table["certified"] & table["robust"]
    measured = {name: column for name, column in table.items() if certify or name != "certified"}
    curve = [(0.0, table["correct"])]
    for factor, stands in total.stands_at.items():
        curve.append((float(torch.as_tensor(threat.at(factor).radius, dtype=torch.float64).mean()), stands))
    findings = [*checked.findings, *_rejected(total.attacks + total.curve_attacks)]
    if contradicted:
        sentence = (
            f"Attacks broke {contradicted} examples for which the certificate vouches. It is about another classifier "
            "than the one attacked (for smoothing: the vote over endless noise, against a mean over few), and these "
            "are not counted."
        )
        numbers, next_step = {"examples": contradicted}, "Smooth with more copies."
        findings.append(Finding("certificate contradicted", sentence, numbers, "suspect", next_step))
    settings = describe(certify)
    return Evaluation(
        model=checked.model, threat=threat, seed=plan.seed, metrics=metrics(measured),
        # a function has no settings but its name
        certification={"name": name_of(certify), "settings": settings if isinstance(settings, Mapping) else None}
        if certify else None,
        attacks=total.attacks,
        curve=[(r, wilson(int(stands.sum()), len(stands))) for r, stands in curve] if plan.factors else [],
        curve_attacks=[step.record.name for step in plan.curve_steps] if plan.factors else [],
        per_class=_per_class(table), table=table, gallery=total.gallery,
        findings=findings, cost=total.cost, seconds=total.seconds,
    )  # fmt: skip


def _rejected(records: Sequence[AttackRecord]) -> list[Finding]:
    """One finding for all attacks, at the radius and along the curve."""
    records = [record for record in records if any(record.rejected.values())]
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


def _per_class(table: Mapping[str, Tensor]) -> list[dict[str, Any]]:
    rows = []
    for k in table["label"].unique().tolist():
        own = table["label"] == k
        clean, robust = (table[name][own].float().mean().item() for name in ("correct", "robust"))
        rows.append({"label": k, "n": int(own.sum()), "clean": clean, "robust": robust})
    return rows
