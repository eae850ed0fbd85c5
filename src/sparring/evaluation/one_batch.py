"""One batch judged: clean, certified, attacked at the radius and along the curve. No other batch is known here."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from sparring.core.objectives import margin
from sparring.core.types import Cost, take
from sparring.evaluation.bounds import Certify, certified, spares
from sparring.evaluation.parts import Part
from sparring.evaluation.preflight import check_labels
from sparring.evaluation.verify import AttackRecord, Batch, MakeAttack, Trial, attempt, new_record, predict
from sparring.threats.base import ThreatModel

Tell = Callable[[int, str, Cost], None]
"""Called before each stage of a batch with its number, what it runs, and the cost of the batch so far."""


@dataclass(frozen=True)
class Plan:
    """What is done with every batch. `records` and `curve_records` are the attacks, with no counts yet."""

    threat: ThreatModel
    records: tuple[AttackRecord, ...]
    curve_records: tuple[AttackRecord, ...]
    factors: tuple[float, ...]
    certify: Certify | None
    gallery_size: int

    @property
    def num_stages(self) -> int:
        """Of one batch: the look at the clean inputs, the attacks, the attacks at each radius of the curve."""
        return 1 + len(self.records) + len(self.factors) * len(self.curve_records)


def make_plan(
    threat: ThreatModel, attacks: Sequence[MakeAttack], curve: Sequence[float], curve_attacks: Sequence[MakeAttack],
    certify: Certify | None, gallery_size: int,
) -> Plan:  # fmt: skip
    """The plan; raises ValueError or TypeError for attacks that are none. An infinite radius has no curve."""
    if not attacks:
        raise ValueError("no attack was given: without one, robust accuracy means nothing")
    bounded = bool(torch.as_tensor(threat.radius).isfinite().all())
    records = tuple(new_record(number, make, threat) for number, make in enumerate(attacks))
    curve_records = tuple(new_record(100 + number, make, threat) for number, make in enumerate(curve_attacks))
    factors = tuple(sorted({*curve} - {1.0})) if bounded else ()
    return Plan(threat, records, curve_records, factors, certify, gallery_size)


def judge(batch: Batch, plan: Plan, tell: Tell) -> Part:
    """Everything about one batch. Raises PreflightError for labels that are no classes."""
    return _Judge(batch, plan, tell).run()


@dataclass
class _Judge:
    """The state while one batch is judged: `table` (a value per example), and the part that it becomes."""

    batch: Batch
    plan: Plan
    tell: Tell
    part: Part = field(default_factory=Part)
    pictures: dict[str, list[Tensor]] = field(default_factory=dict)
    table: dict[str, Tensor] = field(init=False)
    clean_margin: Tensor = field(init=False)
    stage: int = 0

    def run(self) -> Part:
        started = time.monotonic()
        self._look()
        records = [record.counting() for record in self.plan.records]
        for record in records:
            self._say(record.name)
            self._attack(record)
            record.standing_after += int(self.table["robust"].sum())
        curve_records = [record.counting() for record in self.plan.curve_records]
        self._curve(curve_records)
        self.part.attacks = [record.counts() for record in records]
        self.part.curve_attacks = [record.counts() for record in curve_records]
        self.part.columns = {name: column.cpu() for name, column in self.table.items()}
        self.part.gallery = {name: torch.cat(pieces) for name, pieces in self.pictures.items()}
        self.part.seconds = time.monotonic() - started
        return self.part

    def _look(self) -> None:
        """The clean predictions, and what the certificate says of them."""
        batch = self.batch
        self._say("clean inputs")
        logits, cost = predict(batch.model, batch.x, batch.seed + int(batch.number[0]))
        check_labels(batch.y, logits)
        self._pay(cost)
        # of a margin that is almost nothing no share can be told: such an example counts as near the boundary
        spread = logits.amax(1) - logits.amin(1)
        self.clean_margin = torch.maximum(-margin.score(logits, batch.y), 0.01 * spread)
        prediction, confidence = _top(logits)
        robust = (prediction == batch.y) & logits.isfinite().all(1)
        self.table = {
            "index": batch.number, "label": batch.y, "clean_prediction": prediction, "clean_confidence": confidence,
            "correct": robust.clone(), "certified": torch.zeros_like(robust), "robust": robust,
            "broken_by": torch.full_like(batch.y, -1), "adversarial_prediction": prediction.clone(),
            "adversarial_confidence": confidence.clone(), "size": torch.zeros_like(confidence),
            "margin_left": robust.to(confidence),
        }  # fmt: skip
        rows = robust.nonzero()[:, 0]
        if self.plan.certify and len(rows):
            self.table["certified"][rows] = certified(batch, rows, self.plan.certify)

    def _attack(self, record: AttackRecord) -> None:
        """One attack on what stands and is not certified; the table is updated."""
        table, batch = self.table, self.batch
        spared = table["certified"] if spares(self.plan.certify) else torch.zeros_like(table["certified"])
        rows = _near(record, (table["robust"] & ~spared).nonzero()[:, 0], table["margin_left"])
        if not len(rows):
            return
        trial = attempt(batch, record, rows)
        self._pay(trial.cost)
        prediction, confidence = _top(trial.logits[trial.broke])
        hit = rows[trial.broke]
        table["robust"][hit] = False
        table["broken_by"][hit] = record.number
        table["adversarial_prediction"][hit] = prediction
        table["adversarial_confidence"][hit] = confidence
        table["size"][hit] = trial.size[trial.broke].to(confidence)
        self._note_margin(table["margin_left"], trial, rows)
        if isinstance(batch.x, Tensor) and isinstance(trial.x_adv, Tensor):
            self._remember({"x": batch.x[hit], "x_adv": trial.x_adv[trial.broke]}, hit)

    def _curve(self, records: Sequence[AttackRecord]) -> None:
        """Which examples stand at each radius: downwards from what fell, upwards from what stands."""
        table, radius = self.table, take(self.batch.threat, self.batch.number).radius
        stands_at = {1.0: table["robust"].clone()}
        for below in (True, False):
            stands, left = table["robust"].clone(), table["margin_left"].clone()
            for factor in sorted((f for f in self.plan.factors if (f < 1) == below), reverse=below):
                if below:  # other points are permitted there; upwards the old ones stay permitted
                    left = table["correct"].to(left)
                # what fell to a small change has fallen at every radius that permits it
                fell = ~stands & (table["size"] > factor * radius) if below else stands
                rows = (table["correct"] & fell).nonzero()[:, 0]
                stands[rows] = True  # until an attack says otherwise
                for record in records:
                    self._say(f"{record.name} at {factor:g} times the radius")
                    tried = _near(record, rows[stands[rows]], left)
                    if len(tried):
                        trial = attempt(self.batch, record, tried, factor)
                        self._pay(trial.cost)
                        self._note_margin(left, trial, tried)
                        stands[tried[trial.broke]] = False
                stands_at[factor] = stands.clone()
        self.part.stands_at = {factor: stands_at[factor].cpu() for factor in sorted(stands_at)}

    def _note_margin(self, left: Tensor, trial: Trial, rows: Tensor) -> None:
        """Lowers the share of the clean margin that is left (B,) to what the trial showed at permitted points."""
        share = (-margin.score(trial.logits, self.batch.y[rows]) / self.clean_margin[rows]).nan_to_num(0.0)
        share = torch.where(trial.broke, 0.0, torch.where(trial.sound, share.clamp(0, 1), 1.0))
        left[rows] = torch.minimum(left[rows], share.to(left))

    def _remember(self, pictures: dict[str, Tensor], hit: Tensor) -> None:
        """Keeps turned examples for the gallery until it is full."""
        room = self.plan.gallery_size - sum(len(piece) for piece in self.pictures.get("x", []))
        if room <= 0 or not len(hit):
            return
        names = ("label", "clean_prediction", "clean_confidence", "adversarial_prediction", "adversarial_confidence")
        for name, column in (pictures | {name: self.table[name][hit] for name in ("index", *names)}).items():
            column = column.float() if column.dtype == torch.bfloat16 else column  # which numpy does not know
            self.pictures.setdefault(name, []).append(column[:room].cpu())

    def _pay(self, cost: Cost) -> None:
        self.part.cost = self.part.cost.plus(cost)

    def _say(self, what: str) -> None:
        self.tell(self.stage, what, self.part.cost)
        self.stage += 1


def _near(record: AttackRecord, rows: Tensor, left: Tensor) -> Tensor:
    """The rows that are near enough to falling for this attack; the others are counted as skipped."""
    if record.margin_at_most is None:
        return rows
    near = rows[left[rows] <= record.margin_at_most]
    record.skipped += len(rows) - len(near)
    return near


def _top(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Prediction and its probability, each (B,)."""
    confidence, prediction = logits.softmax(1).max(1)
    return prediction, confidence
