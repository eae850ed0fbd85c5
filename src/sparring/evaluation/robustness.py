"""The per-example worst case over a list of attacks."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparring.evaluation.findings import Finding
from sparring.evaluation.preflight import check_data, check_labels, preflight
from sparring.evaluation.statistics import Share, wilson
from sparring.evaluation.verify import AttackRecord, Batch, MakeAttack, attempt, new_record, predict
from sparring.threats.base import ThreatModel
from sparring.types import Cost, Inputs, Model, device_of, size, take

CURVE = (0.25, 0.5, 0.75, 1.0, 1.5, 2.0)
"""Radii of the security curve, as shares of the threat's radius."""


@dataclass
class Evaluation:
    """Verdicts per example and what they add up to. All shares carry a 95 % Wilson interval.

    table: one entry per example: index, label, clean_prediction, clean_confidence, correct, robust, broken_by (number
    of the attack, -1 for none), adversarial_prediction, adversarial_confidence, size. gallery: some turned examples.
    """

    threat: ThreatModel
    seed: int
    clean: Share
    robust: Share
    attack_success: Share | None
    attacks: list[AttackRecord]
    curve: list[tuple[float, Share]]
    curve_attacks: list[str]
    per_class: list[dict[str, Any]]
    table: dict[str, Tensor]
    gallery: dict[str, Tensor]
    findings: list[Finding]
    cost: Cost
    seconds: float


def evaluate(
    model: Model,
    batches: Iterable[tuple[Inputs, Tensor]],
    threat: ThreatModel,
    attacks: Sequence[MakeAttack],
    *,
    seed: int = 0,
    curve: Sequence[float] = CURVE,
    curve_attacks: Sequence[MakeAttack] | None = None,
    gallery_size: int = 12,
    observe: Callable[[int], None] | None = None,
) -> Evaluation:
    """Clean accuracy, and the share of examples that every attack leaves right.

    batches: (x, y) pairs; attacks: functions from a threat model to an attack, run in order, each on what still stands.
    Every result is realized and shown to the model again in its full precision; it counts when it lies in the set and
    in the valid domain, is finite, and still fools. A preflight looks at the first batch, and may wrap the model.
    The curve: larger radii are tried on what stands, smaller ones on what fell (what stands at a radius stands at any
    smaller one), with `curve_attacks` (default: `attacks`). `observe` is told the number of examples done.
    Verdicts depend on (seed, position of the example), not on the batch size. Raises PreflightError, ValueError.

    >>> from sparring import Linf, fgsm
    >>> model, data = torch.nn.Linear(4, 3), [(torch.rand(8, 4), torch.arange(8) % 3)]
    >>> evaluate(model, data, Linf(0.1), [fgsm]).robust.n
    8
    """
    started, totals, done = time.monotonic(), _Totals(threat, attacks, curve, curve_attacks or attacks, gallery_size), 0
    for x, y in batches:
        if done and not size(x):
            continue
        if done == 0:
            checked = preflight(model, x, y, threat)
            model, totals.findings = checked.model, list(checked.findings)
        index = torch.arange(done, done + size(x), device=device_of(x))
        check_data(x, take(threat, index))
        totals.add(Batch(model, x, y.to(device_of(x)), index, threat, seed))
        done += size(x)
        if observe:
            observe(done)
    if not done:
        raise ValueError("there is nothing to evaluate: not one batch was given")
    return totals.result(seed, time.monotonic() - started)


class _Totals:
    """The running totals of one evaluation."""

    def __init__(
        self, threat: ThreatModel, attacks: Sequence[MakeAttack], curve: Sequence[float],
        curve_attacks: Sequence[MakeAttack], gallery_size: int,
    ) -> None:  # fmt: skip
        if not attacks:
            raise ValueError("no attack was given: without one, robust accuracy means nothing")
        self.threat, self.gallery_size = threat, gallery_size
        self.records = [new_record(number, make, threat) for number, make in enumerate(attacks)]
        self.curve_records = [new_record(100 + n, make, threat) for n, make in enumerate(curve_attacks)]
        bounded = bool(torch.as_tensor(threat.radius).isfinite().all())
        self.factors = sorted({*curve} - {1.0}) if bounded else []
        self.columns: dict[str, list[Tensor]] = {}
        self.stands_at: dict[float, list[Tensor]] = {}
        self.gallery: dict[str, list[Tensor]] = {}
        self.findings: list[Finding] = []
        self.cost = Cost()

    def add(self, batch: Batch) -> None:
        """Everything about one batch."""
        logits, cost = predict(batch.model, batch.x, batch.seed + int(batch.number[0]))
        check_labels(batch.y, logits)
        self.cost = self.cost.plus(cost)
        prediction, confidence = _top(logits)
        table = {
            "index": batch.number, "label": batch.y, "clean_prediction": prediction, "clean_confidence": confidence,
            "robust": (prediction == batch.y) & logits.isfinite().all(1), "broken_by": torch.full_like(batch.y, -1),
            "adversarial_prediction": prediction.clone(), "adversarial_confidence": confidence.clone(),
            "size": torch.zeros_like(confidence),
        }  # fmt: skip
        table["correct"] = table["robust"].clone()
        for record in self.records:
            standing = table["robust"].nonzero()[:, 0]
            if len(standing):
                self._attack(batch, record, standing, table)
            record.standing_after += int(table["robust"].sum())
        self._curve(batch, table["correct"], table["robust"])
        for name, column in table.items():
            self.columns.setdefault(name, []).append(column.cpu())

    def _attack(self, batch: Batch, record: AttackRecord, standing: Tensor, table: dict[str, Tensor]) -> None:
        """One attack on what stands; `table` is updated."""
        trial = attempt(batch, record, standing)
        self.cost = self.cost.plus(trial.cost)
        prediction, confidence = _top(trial.logits[trial.broke])
        hit = standing[trial.broke]
        table["robust"][hit] = False
        table["broken_by"][hit] = record.number
        table["adversarial_prediction"][hit] = prediction
        table["adversarial_confidence"][hit] = confidence
        table["size"][hit] = trial.size[trial.broke].to(confidence)
        if isinstance(batch.x, Tensor) and isinstance(trial.x_adv, Tensor):
            self._remember({"x": batch.x[hit], "x_adv": trial.x_adv[trial.broke]}, hit, table)

    def _curve(self, batch: Batch, correct: Tensor, robust: Tensor) -> None:
        """Which examples stand at each radius: downwards from what fell, upwards from what stands."""
        self.stands_at.setdefault(1.0, []).append(robust.clone().cpu())
        below = [factor for factor in reversed(self.factors) if factor < 1]
        for factors in (below, [factor for factor in self.factors if factor > 1]):
            stands = robust.clone()
            for factor in factors:
                rows = (correct & ~stands if factor < 1 else stands).nonzero()[:, 0]
                for record in self.curve_records:
                    if len(rows):
                        trial = attempt(batch, record, rows, factor)
                        self.cost = self.cost.plus(trial.cost)
                        stands[rows] = ~trial.broke
                        rows = rows[~trial.broke]
                self.stands_at.setdefault(factor, []).append(stands.clone().cpu())

    def _remember(self, pictures: dict[str, Tensor], hit: Tensor, table: dict[str, Tensor]) -> None:
        """Keeps turned examples for the gallery until it is full."""
        room = self.gallery_size - sum(len(part) for part in self.gallery.get("x", []))
        if room <= 0 or not len(hit):
            return
        names = ("label", "clean_prediction", "clean_confidence", "adversarial_prediction", "adversarial_confidence")
        for name, column in (pictures | {name: table[name][hit] for name in ("index", *names)}).items():
            self.gallery.setdefault(name, []).append(column[:room].cpu())

    def result(self, seed: int, seconds: float) -> Evaluation:
        """Adds everything up."""
        table = {name: torch.cat(parts) for name, parts in self.columns.items()}
        correct, robust, num = table["correct"], table["robust"], len(table["label"])
        right, left = int(correct.sum()), int(robust.sum())
        self.findings += [_rejected(r) for r in (*self.records, *self.curve_records) if any(r.rejected.values())]
        radius = float(torch.as_tensor(self.threat.radius, dtype=torch.float64).mean())
        curve = [(0.0, wilson(right, num))]
        curve += [(f * radius, wilson(int(torch.cat(s).sum()), num)) for f, s in sorted(self.stands_at.items())]
        return Evaluation(
            threat=self.threat, seed=seed, clean=wilson(right, num), robust=wilson(left, num),
            attack_success=wilson(right - left, right) if right else None, attacks=self.records,
            curve=curve if self.factors else [],
            curve_attacks=[record.name for record in self.curve_records] if self.factors else [],
            per_class=_per_class(table["label"], correct, robust), table=table,
            gallery={name: torch.cat(parts) for name, parts in self.gallery.items()},
            findings=self.findings, cost=self.cost, seconds=seconds,
        )  # fmt: skip


def _rejected(record: AttackRecord) -> Finding:
    counts = {name: n for name, n in record.rejected.items() if n}
    sentence = f"{record.name}: {sum(counts.values())} results did not hold when checked and were not counted."
    return Finding("rejected results", sentence, counts)


def _top(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Prediction and its probability, each (B,)."""
    confidence, prediction = logits.softmax(1).max(1)
    return prediction, confidence


def _per_class(label: Tensor, correct: Tensor, robust: Tensor) -> list[dict[str, Any]]:
    rows = []
    for k in label.unique().tolist():
        own = label == k
        shares = {"clean": correct[own].float().mean().item(), "robust": robust[own].float().mean().item()}
        rows.append({"label": k, "n": int(own.sum()), **shares})
    return rows
