"""One batch measured: clean, certified, attacked at the radius and along the curve. No other batch is known here.

Every result of an attack is checked before it counts. Shapes: B the batch, b some of its examples, K classes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from sparring.attacks.around import part_of
from sparring.attacks.loop import Attack
from sparring.core.model_state import attack_mode, private_rng
from sparring.core.noise import Noise
from sparring.core.objectives import margin
from sparring.core.registry import name_of
from sparring.core.types import Attacker, AttackResult, Cost, Inputs, Model, device_of, map_inputs, take
from sparring.evaluation.fingerprint import describe
from sparring.threats.base import ThreatModel, inside
from sparring.threats.inputs import check_labels

MakeAttack = Callable[[ThreatModel], Attacker]
Tell = Callable[[int, str, Cost], None]
"""Called before each stage of a batch with its number, what it runs, and the cost of the batch so far."""
REJECTIONS = ("not_finite", "outside_set", "outside_domain", "not_reproduced")
_PICTURED = (
    "index", "label", "clean_prediction", "clean_confidence", "adversarial_prediction", "adversarial_confidence",
)  # fmt: skip


class Certify(Protocol):
    """A certificate as `measure` takes it.

    One that is not about the very model that is attacked has an attribute `attack_certified` that is true: what it
    vouches for is attacked all the same.
    """

    def __call__(self, model: Model, x: Any, y: Tensor, threat: Any, *, noise: Noise) -> Tensor:
        """(b,) a margin (logit of y minus the largest other) that no permitted change goes below."""
        ...


@dataclass(frozen=True)
class AttackRecord:
    """What one attack did, as counts that add up over batches.

    ran_on: examples that still stood. skipped: standing ones of which more than `margin_at_most` of the clean margin
    was left. rejected: results that did not hold when checked, by reason.
    """

    name: str
    settings: Any = None
    margin_at_most: float | None = None
    ran_on: int = 0
    broke: int = 0
    standing_after: int = 0
    skipped: int = 0
    cost: Cost = field(default_factory=Cost)
    seconds: float = 0.0
    rejected: Mapping[str, int] = field(default_factory=lambda: dict.fromkeys(REJECTIONS, 0))

    def plus(self, other: AttackRecord) -> AttackRecord:
        """The counts of both together."""
        names = ("ran_on", "broke", "standing_after", "skipped", "seconds")
        return replace(
            self, cost=self.cost.plus(other.cost),
            rejected={name: count + other.rejected[name] for name, count in self.rejected.items()},
            **{name: getattr(self, name) + getattr(other, name) for name in names},
        )  # fmt: skip


class Step(NamedTuple):
    """One attack of a plan: its number, which keys its noise, what makes it, and its record with no counts yet."""

    number: int
    make: MakeAttack
    record: AttackRecord

    @staticmethod
    def of(number: int, make: MakeAttack, threat: ThreatModel) -> Step:
        """The step for a stage; raises TypeError for what makes no attack of a threat model."""
        if part_of(make, "threat") is not None or not callable(make):
            raise TypeError(
                f"attacks are functions from a threat model to an attack, such as sparring.pgd; "
                f"got a {type(make).__name__}. Write lambda threat: ... with the attack built on that threat"
            )
        at_most = getattr(make, "margin_at_most", None)
        return Step(number, make, AttackRecord(name_of(make), describe(make(threat)), at_most))


@dataclass(frozen=True)
class BatchPlan:
    """What is done with every batch. `factors`: the radii of the curve, as shares of the threat's."""

    threat: ThreatModel
    steps: tuple[Step, ...]
    curve_steps: tuple[Step, ...]
    factors: tuple[float, ...]
    certify: Certify | None
    gallery_size: int
    seed: int

    @staticmethod
    def make(
        threat: ThreatModel, stages: Sequence[MakeAttack], curve: Sequence[float], curve_stages: Sequence[MakeAttack],
        certify: Certify | None, gallery_size: int, seed: int,
    ) -> BatchPlan:  # fmt: skip
        """The plan; raises ValueError or TypeError for attacks that are none. An infinite radius has no curve."""
        if not stages:
            raise ValueError("no attack was given: without one, robust accuracy means nothing")
        bounded = bool(torch.as_tensor(threat.radius).isfinite().all())
        steps = tuple(Step.of(number, stage, threat) for number, stage in enumerate(stages))
        curve_steps = tuple(Step.of(100 + number, stage, threat) for number, stage in enumerate(curve_stages))
        radius = torch.as_tensor(threat.radius)  # some cannot grow: all words are all words
        moved = [f for f in sorted({*curve}) if bool((torch.as_tensor(threat.at(f).radius) != radius).any())]
        return BatchPlan(threat, steps, curve_steps, tuple(moved) if bounded else (), certify, gallery_size, seed)

    @property
    def num_stages(self) -> int:
        """Of one batch: the look at the clean inputs, the attacks, the attacks at each radius of the curve."""
        return 1 + len(self.steps) + len(self.factors) * len(self.curve_steps)


class Batch(NamedTuple):
    """Examples under evaluation, and the model that is attacked. The running numbers (B,) key their noise, and find
    their part of the plan's threat, which is that of all examples."""

    model: Model
    x: Inputs
    y: Tensor
    number: Tensor

    def rows(self, index: Tensor) -> Batch:
        """Some of the examples."""
        return Batch(self.model, take(self.x, index), self.y[index], self.number[index])


@dataclass
class BatchOutcome:
    """Everything about some examples, on the CPU; outcomes add up (`merge`).

    table: a value per example (B,). stands_at: radius factor -> (B,) bool. attacks, curve_attacks: what each did there.
    gallery: some turned examples. seconds: of work.
    """

    table: dict[str, Tensor]
    stands_at: dict[float, Tensor]
    attacks: list[AttackRecord]
    curve_attacks: list[AttackRecord]
    gallery: dict[str, Tensor]
    cost: Cost
    seconds: float


class Attempt(NamedTuple):
    """What an attack did to some examples: `broke` (b,) tells where it holds; `logits` (b, K) are the model's on x_adv.

    `sound` (b,): x_adv is a permitted input with finite logits, whether or not it fools.
    """

    broke: Tensor
    logits: Tensor
    x_adv: Inputs
    size: Tensor
    sound: Tensor


def predict(model: Model, x: Any, seed: int) -> Tensor:
    """Logits in the model's own precision, eval mode, no graph; stochastic models draw from a private generator."""
    device = device_of(x)
    full = torch.autocast(device.type, enabled=False)
    with attack_mode(model) as frozen, private_rng(seed, device), torch.no_grad(), full:
        logits = frozen(x)
    return logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits


def attempt(plan: BatchPlan, step: Step, batch: Batch, factor: float = 1.0) -> tuple[Attempt, AttackRecord]:
    """Attacks the examples at `factor` times the radius; realizes what comes back, shows it to the model, checks it.

    The record counts this attempt alone.
    """
    started = time.monotonic()
    model, x, y, number = batch
    whole = plan.threat.at(factor)
    threat, noise = take(whole, number), Noise.make(plan.seed, f"evaluate/{step.number}", number)
    attack = step.make(whole)
    split = any(hasattr(attack, name) for name in ("per_example", "take"))
    attack = take(attack, number) if split else step.make(threat)
    if isinstance(attack, Attack) and attack.keep == "last":
        raise ValueError('an attack with keep="last" returns an iterate that nobody looked at; use "fooled_first"')
    # copies and a private generator: a hand-written attack may write into its arguments and draw as it likes
    with attack_mode(model) as frozen, private_rng(noise.seed, y.device):
        result = attack(frozen, map_inputs(torch.clone, x), y.clone(), noise=noise)
    if not isinstance(result, AttackResult):
        raise TypeError(f"{step.record.name} returned a {type(result).__name__}; an attack returns an AttackResult")
    z = result.z.detach()
    x_adv = threat.realize(x, z)
    logits = predict(model, x_adv, noise.seed ^ 0x2545F491)  # other draws than the attack has seen
    lost = logits.argmax(1) != y
    goal = part_of(attack, "objective")  # a targeted claim is judged by its own goal
    again = lost if goal is None else goal.reached(logits, y)
    claimed = lost if result.reached is None else lost | (result.reached & ~again)
    good, failed = torch.ones_like(lost), []
    for passed in (logits.isfinite().all(1), inside(threat, x, z), threat.valid(x, x_adv), lost):  # as in REJECTIONS
        sound, good = good, good & passed
        failed.append((claimed & sound & ~good).sum())
    *rejected, broke = torch.stack([*failed, good.sum()]).tolist()  # the one wait for the device
    record = replace(
        step.record, ran_on=len(y), broke=broke, cost=result.cost, seconds=time.monotonic() - started,
        rejected=dict(zip(REJECTIONS, rejected, strict=True)),
    )  # fmt: skip
    return Attempt(good, logits, x_adv, threat.size(x, z), sound), record


def certified(plan: BatchPlan, batch: Batch) -> Tensor:
    """(b,) bool: the bound of the margin is above 0. Raises ValueError for a bound of another shape."""
    assert plan.certify is not None
    x, y, noise = batch.x, batch.y, Noise.make(plan.seed, "certify", batch.number)
    with attack_mode(batch.model), private_rng(plan.seed, device_of(x)), torch.no_grad():
        copies, threat = map_inputs(torch.clone, x), take(plan.threat, batch.number)
        bound: Any = plan.certify(batch.model, copies, y.clone(), threat, noise=noise)
    if not isinstance(bound, Tensor) or bound.shape != y.shape:
        got = tuple(bound.shape) if isinstance(bound, Tensor) else type(bound).__name__
        raise ValueError(f"certify returned {got}; expected a lower bound of the margin for each example, {len(y)}")
    return bound > 0


class Measuring:
    """The state while one batch is measured: a table (a value per example), and what adds up."""

    def __init__(self, batch: Batch, plan: BatchPlan, tell: Tell) -> None:
        self.batch, self.plan, self.tell = batch, plan, tell
        self.table: dict[str, Tensor] = {}
        self.pictures: dict[str, list[Tensor]] = {}
        self.cost, self.stage = Cost(), 0
        self.clean_margin = torch.empty(0)

    def run(self) -> BatchOutcome:
        """Everything about the batch. Raises PreflightError for labels that are no classes."""
        started = time.monotonic()
        self._look()
        records = [self._attack(step) for step in self.plan.steps]
        curve_records = [step.record for step in self.plan.curve_steps]
        stands_at = self._curve(curve_records)
        return BatchOutcome(
            {name: column.cpu() for name, column in self.table.items()},
            {factor: stands_at[factor].cpu() for factor in sorted(stands_at)}, records, curve_records,
            {name: stacked(pieces)[: self.plan.gallery_size] for name, pieces in self.pictures.items()},
            self.cost, time.monotonic() - started,
        )  # fmt: skip

    def _look(self) -> None:
        """The clean predictions, and what the certificate says of them."""
        batch = self.batch
        self._say("clean inputs")
        logits = predict(batch.model, batch.x, self.plan.seed + int(batch.number[0]))
        check_labels(batch.y, *logits.shape)
        self.cost = self.cost.plus(Cost(forwards=len(batch.y)))
        # of a margin that is almost nothing no share can be told: such an example counts as near the boundary
        spread = logits.amax(1) - logits.amin(1)
        self.clean_margin = torch.maximum(-margin.score(logits, batch.y), 0.01 * spread)
        prediction, confidence = predicted(logits)
        robust = (prediction == batch.y) & logits.isfinite().all(1)
        self.table = {
            "index": batch.number, "label": batch.y, "clean_prediction": prediction, "clean_confidence": confidence,
            "correct": robust.clone(), "certified": torch.zeros_like(robust), "robust": robust,
            "broken_by": torch.full_like(batch.y, -1), "adversarial_prediction": prediction.clone(),
            "adversarial_confidence": confidence.clone(), "size": torch.zeros_like(confidence),
            "margin_left": robust.to(confidence),
        }  # fmt: skip
        if not isinstance(batch.x, Tensor):  # facts about an example, such as whose it is, for the metrics
            self.table |= {f"x/{name}": tensor for name, tensor in batch.x.items() if tensor.ndim == 1}
        rows = robust.nonzero()[:, 0]
        if self.plan.certify and len(rows):
            self.table["certified"][rows] = certified(self.plan, batch.rows(rows))

    def _attack(self, step: Step) -> AttackRecord:
        """One attack on what stands and needs one; the table is updated."""
        table = self.table
        attacked = table["robust"]
        if not getattr(self.plan.certify, "attack_certified", False):
            attacked = attacked & ~table["certified"]
        hit, found, record = self._attempt(step, attacked.nonzero()[:, 0], table["margin_left"])
        if found and len(hit):
            prediction, confidence = predicted(found.logits[found.broke])
            table["robust"][hit] = False
            table["broken_by"][hit] = step.number
            table["adversarial_prediction"][hit] = prediction
            table["adversarial_confidence"][hit] = confidence
            table["size"][hit] = found.size[found.broke].to(confidence)
            pictures = _columns("x", take(self.batch.x, hit)) | _columns("x_adv", take(found.x_adv, found.broke))
            for name, column in (pictures | {name: table[name][hit] for name in _PICTURED}).items():
                column = column.float() if column.dtype == torch.bfloat16 else column  # which numpy does not know
                self.pictures.setdefault(name, []).append(column[: self.plan.gallery_size].cpu())
        return replace(record, standing_after=int(table["robust"].sum()))

    def _curve(self, records: list[AttackRecord]) -> dict[float, Tensor]:
        """Which examples stand at each radius: downwards from what fell, upwards from what stands."""
        table, plan = self.table, self.plan
        stands_at = {1.0: table["robust"].clone()}
        for below in (True, False):
            stands, left = table["robust"].clone(), table["margin_left"].clone()
            for factor in sorted((f for f in plan.factors if (f < 1) == below), reverse=below):
                if below:  # other points are permitted there; upwards the old ones stay permitted
                    left = table["correct"].to(left)
                # what fell to a small change has fallen at every radius that permits it
                radius = take(plan.threat.at(factor), self.batch.number).radius
                fell = ~stands & (table["size"] > radius) if below else stands
                rows = (table["correct"] & fell).nonzero()[:, 0]
                stands[rows] = True  # until an attack says otherwise
                for i, step in enumerate(plan.curve_steps):
                    hit, _, record = self._attempt(step, rows[stands[rows]], left, factor)
                    records[i] = records[i].plus(record)
                    stands[hit] = False
                stands_at[factor] = stands.clone()
        return stands_at

    def _attempt(
        self, step: Step, rows: Tensor, left: Tensor, factor: float = 1.0
    ) -> tuple[Tensor, Attempt | None, AttackRecord]:
        """Attacks those of the rows that have little enough of the margin left, if any: the rows that broke.

        `left` (B,) falls to what it showed at permitted points, as shares of the clean margin.
        """
        self._say(step.record.name + (f" at {factor:g} times the radius" if factor != 1 else ""))
        at_most = step.record.margin_at_most
        near = rows if at_most is None else rows[left[rows] <= at_most]
        skipped = len(rows) - len(near)
        if not len(near):
            return near, None, replace(step.record, skipped=skipped)
        found, record = attempt(self.plan, step, self.batch.rows(near), factor)
        self.cost = self.cost.plus(record.cost).plus(Cost(forwards=len(near)))
        share = (-margin.score(found.logits, self.batch.y[near]) / self.clean_margin[near]).nan_to_num(0.0)
        share = torch.where(found.broke, 0.0, torch.where(found.sound, share.clamp(0, 1), 1.0))
        left[near] = torch.minimum(left[near], share.to(left))
        return near[found.broke], found, replace(record, skipped=skipped)

    def _say(self, what: str) -> None:
        self.tell(self.stage, what, self.cost)
        self.stage += 1


def _columns(name: str, value: Inputs) -> dict[str, Tensor]:
    """A tensor by `name`, or named tensors by NAME/THEIRS."""
    return {name: value} if isinstance(value, Tensor) else {f"{name}/{key}": tensor for key, tensor in value.items()}


def predicted(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Prediction and its probability, each (B,)."""
    prediction = logits.argmax(1)  # not of the softmax, where small logits are equal once rounded
    return prediction, logits.softmax(1).gather(1, prediction[:, None])[:, 0]


def stacked(pieces: Sequence[Tensor]) -> Tensor:
    """All rows of tensors (b, ...); where these differ in another axis, the shorter end in zeros."""
    shape = [max(lengths) for lengths in zip(*(piece.shape[1:] for piece in pieces), strict=True)]
    filled = []
    for piece in pieces:
        missing = [most - length for most, length in zip(shape, piece.shape[1:], strict=True)]
        filled.append(F.pad(piece, [number for most in reversed(missing) for number in (0, most)]))
    return torch.cat(filled)
