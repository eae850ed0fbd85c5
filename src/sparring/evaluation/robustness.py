"""The per-example worst case over a list of attacks, every result checked before it counts."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sparring.attacks.attack import Attack
from sparring.evaluation.preflight import Finding, preflight
from sparring.evaluation.statistics import Share, wilson
from sparring.model_state import attack_mode, private_rng
from sparring.noise import Noise
from sparring.threats.base import ThreatModel, at_factor, inside
from sparring.types import Attacker, AttackResult, Cost, Inputs, Model, describe, device_of, size, take

MakeAttack = Callable[[ThreatModel], Attacker]
CURVE = (0.25, 0.5, 0.75, 1.0, 1.5, 2.0)
"""Radii of the security curve, as shares of the threat's radius."""

REJECTIONS = ("not_finite", "outside_set", "outside_domain", "not_reproduced")


@dataclass
class AttackRecord:
    """What one attack did. `rejected` counts the results that did not hold when checked."""

    name: str
    settings: Any
    ran_on: int = 0
    broke: int = 0
    standing_after: int = 0
    cost: Cost = field(default_factory=Cost)
    rejected: dict[str, int] = field(default_factory=lambda: dict.fromkeys(REJECTIONS, 0))


@dataclass
class Evaluation:
    """Verdicts per example and what they add up to. All shares carry a 95 % Wilson interval.

    table: one entry per example: label, clean_prediction, clean_confidence, robust, broken_by (number of the attack,
    -1 for none), adversarial_prediction, adversarial_confidence, size. gallery: some turned examples.
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
    Every result is realized and shown to the model again in its full precision; it counts when it lies in the
    set and in the valid domain, is finite, and still fools. A preflight looks at the first batch and may wrap the model.
    The curve: larger radii are tried on what stands, smaller ones on what fell (what stands at a radius stands at any
    smaller one), with `curve_attacks` (default: `attacks`). `observe` is told the number of examples done.
    Verdicts depend on (seed, position of the example), not on the batch size. Raises PreflightError, ValueError.

    >>> from sparring import Linf, fgsm
    >>> model, data = torch.nn.Linear(4, 3), [(torch.rand(8, 4), torch.arange(8) % 3)]
    >>> evaluate(model, data, Linf(0.1), [fgsm]).robust.n
    8
    """
    started, job, done = time.monotonic(), _Job(threat, attacks, curve_attacks or attacks, seed, gallery_size), 0
    factors = sorted({f for f in curve if f != 1.0})
    for x, y in batches:
        index = torch.arange(done, done + size(x))
        if done == 0:
            checked = preflight(model, x, y, threat)
            model, job.findings = checked.model, list(checked.findings)
        job.batch(model, x, y, index, factors)
        done += size(x)
        if observe:
            observe(done)
    if not done:
        raise ValueError("there is nothing to evaluate: not one batch was given")
    return job.result(factors, time.monotonic() - started)


class _Job:
    """The running totals of one evaluation."""

    def __init__(
        self, threat: ThreatModel, attacks: Sequence[MakeAttack], curve: Sequence[MakeAttack], seed: int, gallery: int
    ) -> None:
        if not attacks:
            raise ValueError("no attack was given: without one, robust accuracy means nothing")
        self.threat, self.makers, self.curve_makers, self.seed, self.gallery_size = (
            threat,
            attacks,
            curve,
            seed,
            gallery,
        )
        self.records = [AttackRecord(_name(make), describe(make(threat))) for make in attacks]
        self.curve_record = AttackRecord("security curve", [_name(make) for make in curve])
        self.columns: dict[str, list[Tensor]] = {}
        self.stands_at: dict[float, list[Tensor]] = {}
        self.gallery: dict[str, list[Tensor]] = {}
        self.findings: list[Finding] = []
        self.cost = Cost()

    def batch(self, model: Model, x: Inputs, y: Tensor, index: Tensor, factors: list[float]) -> None:
        """Everything about one batch."""
        threat, num = take(self.threat, index), size(x)
        y = y.to(device_of(x))
        if not bool(threat.valid(x, threat.realize(x, threat.null(x))).all()):
            raise ValueError("a batch leaves the valid domain of the threat model; scale the data or change its box")
        clean = self._predict(model, x)
        prediction, confidence = _top(clean)
        rows = {
            "label": y, "clean_prediction": prediction, "clean_confidence": confidence,
            "robust": prediction == y, "broken_by": torch.full_like(y, -1),
            "adversarial_prediction": prediction.clone(), "adversarial_confidence": confidence.clone(),
            "size": torch.zeros_like(confidence),
        }  # fmt: skip
        for number, (make, record) in enumerate(zip(self.makers, self.records, strict=True)):
            standing = rows["robust"].nonzero()[:, 0]
            if len(standing):
                self._attack(model, x, y, index, threat, make, record, number, standing, rows)
            record.standing_after += int(rows["robust"].sum())
        correct, fell = rows["clean_prediction"] == y, ~rows["robust"]
        self._curve(model, x, y, index, threat, correct, fell, factors)
        for name, column in {"index": index.to(y), **rows}.items():
            self.columns.setdefault(name, []).append(column.cpu())
        assert num == len(index)

    def _attack(
        self, model: Model, x: Inputs, y: Tensor, index: Tensor, threat: ThreatModel, make: MakeAttack,
        record: AttackRecord, number: int, standing: Tensor, rows: dict[str, Tensor],
    ) -> None:  # fmt: skip
        """One attack on what stands; `rows` is updated."""
        broke, logits, result, x_adv = self._try(model, x, y, index, threat, make, record, standing)
        prediction, confidence = _top(logits)
        hit = standing[broke]
        rows["robust"][hit] = False
        rows["broken_by"][hit] = number
        rows["adversarial_prediction"][hit] = prediction[broke]
        rows["adversarial_confidence"][hit] = confidence[broke]
        rows["size"][hit] = result.size[broke].to(confidence)
        if isinstance(x, Tensor) and isinstance(x_adv, Tensor):
            self._remember(x[hit], x_adv[broke], hit, index, rows)

    def _try(
        self, model: Model, x: Inputs, y: Tensor, index: Tensor, threat: ThreatModel, make: MakeAttack,
        record: AttackRecord, some: Tensor,
    ) -> tuple[Tensor, Tensor, AttackResult, Inputs]:  # fmt: skip
        """Attacks some rows and checks what comes back: which of them are broken, and how the model sees them."""
        part, label, small = take(x, some), y[some], take(threat, some)
        attack = make(small)
        if isinstance(attack, Attack) and attack.keep == "last":
            raise ValueError('an attack with keep="last" returns an iterate that nobody looked at; use "fooled_first"')
        noise = Noise.make(self.seed, f"evaluate/{record.name}", index[some.cpu()])
        result = attack(model, part, label, noise=noise)
        x_adv = small.realize(part, result.z)
        logits = self._predict(model, x_adv)
        lost = logits.argmax(1) != label
        claimed = lost if result.reached is None else lost | result.reached
        checks = {
            "not_finite": logits.isfinite().all(1),
            "outside_set": inside(small, part, result.z),
            "outside_domain": small.valid(part, x_adv),
            "not_reproduced": lost,
        }
        good = torch.ones_like(lost)
        for name, passed in checks.items():
            record.rejected[name] += int((claimed & good & ~passed).sum())
            good = good & passed
        record.ran_on += len(some)
        record.broke += int(good.sum())
        record.cost = record.cost.plus(result.cost)
        self.cost = self.cost.plus(result.cost)
        return good, logits, result, x_adv

    def _curve(
        self, model: Model, x: Inputs, y: Tensor, index: Tensor, threat: ThreatModel, correct: Tensor, fell: Tensor,
        factors: list[float],
    ) -> None:  # fmt: skip
        """Which examples stand at each radius: downwards from what fell, upwards from what stands."""
        stands = correct & ~fell
        self.stands_at.setdefault(1.0, []).append(stands.cpu())
        for direction in (sorted((f for f in factors if f < 1), reverse=True), [f for f in factors if f > 1]):
            now = stands.clone()
            for factor in direction:
                open_ = (correct & ~now if factor < 1 else now).nonzero()[:, 0]
                for make in self.curve_makers:
                    if not len(open_):
                        break
                    broke = self._try(model, x, y, index, at_factor(threat, factor), make, self.curve_record, open_)[0]
                    now[open_[broke]] = False
                    open_ = open_[~broke]
                now[open_] = True
                self.stands_at.setdefault(factor, []).append(now.cpu())

    def _predict(self, model: Model, x: Any) -> Tensor:
        """Logits in the model's own precision, eval mode, no graph; stochastic models draw from a private generator."""
        device = device_of(x)
        self.cost = self.cost.plus(Cost(forwards=size(x)))
        full = torch.autocast(device.type, enabled=False)
        with attack_mode(model) as frozen, private_rng(self.seed, device), torch.no_grad(), full:
            logits = frozen(x)
        return logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits

    def _remember(self, x: Tensor, x_adv: Tensor, hit: Tensor, index: Tensor, rows: dict[str, Tensor]) -> None:
        """Keeps turned examples for the gallery until it is full."""
        room = self.gallery_size - sum(len(part) for part in self.gallery.get("x", []))
        if room <= 0 or not len(hit):
            return
        kept = {"x": x, "x_adv": x_adv, "index": index.to(hit.device)[hit]}
        names = ("label", "clean_prediction", "clean_confidence", "adversarial_prediction", "adversarial_confidence")
        for name, column in (kept | {name: rows[name][hit] for name in names}).items():
            self.gallery.setdefault(name, []).append(column[:room].cpu())

    def result(self, factors: list[float], seconds: float) -> Evaluation:
        """Adds everything up."""
        table = {name: torch.cat(parts) for name, parts in self.columns.items()}
        correct, robust, num = table["clean_prediction"] == table["label"], table["robust"], len(table["label"])
        right = int(correct.sum())
        for record in (*self.records, self.curve_record):
            if any(record.rejected.values()):
                counts = {name: n for name, n in record.rejected.items() if n}
                sentence = (
                    f"{record.name}: {sum(counts.values())} results did not hold when checked and were not counted."
                )
                self.findings.append(Finding("rejected results", sentence, counts))
        stands = {factor: int(torch.cat(parts).sum()) for factor, parts in self.stands_at.items()}
        radius = float(torch.as_tensor(self.threat.radius).float().mean())
        points = [(0.0, wilson(right, num))] + [(f * radius, wilson(stands[f], num)) for f in sorted({*factors, 1.0})]
        return Evaluation(
            threat=self.threat, seed=self.seed, clean=wilson(right, num), robust=wilson(int(robust.sum()), num),
            attack_success=wilson(right - int(robust.sum()), right) if right else None,
            attacks=self.records, curve=points if factors else [],
            curve_attacks=[_name(make) for make in self.curve_makers] if factors else [],
            per_class=_per_class(table["label"], correct, robust), table=table,
            gallery={name: torch.cat(parts) for name, parts in self.gallery.items()},
            findings=self.findings, cost=self.cost, seconds=seconds,
        )  # fmt: skip


def _top(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Prediction and its probability, each (B,)."""
    confidence, prediction = logits.softmax(1).max(1)
    return prediction, confidence


def _per_class(label: Tensor, correct: Tensor, robust: Tensor) -> list[dict[str, Any]]:
    rows = []
    for k in label.unique().tolist():
        own = label == k
        rows.append(
            {
                "label": k,
                "n": int(own.sum()),
                "clean": correct[own].float().mean().item(),
                "robust": robust[own].float().mean().item(),
            }
        )
    return rows


def _name(make: MakeAttack) -> str:
    return getattr(make, "__name__", None) or str(make)
