"""One attack on some examples of a batch, with every result checked before it counts."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sparring.attacks.around import part_of
from sparring.attacks.loop import Attack
from sparring.core.model_state import attack_mode, private_rng
from sparring.core.noise import Noise
from sparring.core.types import Attacker, AttackResult, Cost, Inputs, Model, device_of, map_inputs, size, take
from sparring.evaluation.fingerprint import describe, name_of
from sparring.threats.base import ThreatModel, inside

MakeAttack = Callable[[ThreatModel], Attacker]
COUNTS = ("ran_on", "broke", "standing_after", "skipped", "seconds", "rejected")
REJECTIONS = ("not_finite", "outside_set", "outside_domain", "not_reproduced")


@dataclass
class AttackRecord:
    """What one attack did. `rejected` counts the results that did not hold when checked, `skipped` the standing
    examples that were too far from falling for it (see `Stage`)."""

    number: int
    make: MakeAttack
    name: str
    settings: Any
    ran_on: int = 0
    broke: int = 0
    standing_after: int = 0
    skipped: int = 0
    cost: Cost = field(default_factory=Cost)
    seconds: float = 0.0
    rejected: dict[str, int] = field(default_factory=lambda: dict.fromkeys(REJECTIONS, 0))

    @property
    def margin_at_most(self) -> float | None:
        """The largest margin left, as a share of the clean one, at which an example is still attacked; None: any."""
        return getattr(self.make, "margin_at_most", None)

    def counts(self) -> dict[str, Any]:
        """What adds up over batches, as plain data."""
        return {name: getattr(self, name) for name in COUNTS} | {"cost": list(self.cost)}

    def counting(self, counts: Mapping[str, Any] | None = None) -> AttackRecord:
        """The same attack with these counts (default: none yet)."""
        if counts is None:
            return AttackRecord(self.number, self.make, self.name, self.settings)
        return replace(self, **{**counts, "cost": Cost(*counts["cost"]), "rejected": dict(counts["rejected"])})


class Batch(NamedTuple):
    """A batch under evaluation. The examples' running numbers (B,) key their noise, and find their part of `threat`,
    which is the threat of all examples."""

    model: Model
    x: Inputs
    y: Tensor
    number: Tensor
    threat: ThreatModel
    seed: int


class Trial(NamedTuple):
    """What an attack did to some rows: `broke` (b,) tells where it holds; `logits` (b, K) are the model's on x_adv.

    `sound` (b,): x_adv is a permitted input with finite logits, whether or not it fools.
    """

    broke: Tensor
    logits: Tensor
    x_adv: Inputs
    size: Tensor
    cost: Cost
    sound: Tensor


def new_record(number: int, make: MakeAttack, threat: ThreatModel) -> AttackRecord:
    """An empty record; raises TypeError for what is not a function from a threat model to an attack."""
    if part_of(make, "threat") is not None or not callable(make):
        raise TypeError(
            f"attacks are functions from a threat model to an attack, such as sparring.pgd; "
            f"got a {type(make).__name__}. Write lambda threat: ... with the attack built on that threat"
        )
    return AttackRecord(number, make, name_of(make), describe(make(threat)))


def predict(model: Model, x: Any, seed: int) -> tuple[Tensor, Cost]:
    """Logits in the model's own precision, eval mode, no graph; stochastic models draw from a private generator."""
    device = device_of(x)
    full = torch.autocast(device.type, enabled=False)
    with attack_mode(model) as frozen, private_rng(seed, device), torch.no_grad(), full:
        logits = frozen(x)
    logits = logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
    return logits, Cost(forwards=size(x))


def attempt(batch: Batch, record: AttackRecord, rows: Tensor, factor: float = 1.0) -> Trial:
    """Attacks the rows at `factor` times the radius; realizes what comes back, shows it to the model, checks it."""
    started = time.monotonic()
    whole, numbers = batch.threat.at(factor), batch.number[rows]
    threat, x, y = take(whole, numbers), take(batch.x, rows), batch.y[rows]
    noise = Noise.make(batch.seed, f"evaluate/{record.number}", numbers)
    attack = record.make(whole)
    attack = take(attack, numbers) if hasattr(attack, "take") or hasattr(attack, "per_example") else record.make(threat)
    if isinstance(attack, Attack) and attack.keep == "last":
        raise ValueError('an attack with keep="last" returns an iterate that nobody looked at; use "fooled_first"')
    # copies and a private generator: a hand-written attack may write into its arguments and draw as it likes
    with attack_mode(batch.model) as frozen, private_rng(noise.seed, y.device):
        result = attack(frozen, map_inputs(torch.clone, x), y.clone(), noise=noise)
    if not isinstance(result, AttackResult):
        raise TypeError(f"{record.name} returned a {type(result).__name__}; an attack returns an AttackResult")
    z = result.z.detach()
    x_adv = threat.realize(x, z)
    logits, cost = predict(batch.model, x_adv, noise.seed ^ 0x2545F491)  # other draws than the attack has seen
    lost = logits.argmax(1) != y
    goal = part_of(attack, "objective")  # a targeted claim is judged by its own goal
    again = lost if goal is None else goal.reached(logits, y)
    claimed = lost if result.reached is None else lost | (result.reached & ~again)
    checks = {
        "not_finite": logits.isfinite().all(1),
        "outside_set": inside(threat, x, z),
        "outside_domain": threat.valid(x, x_adv),
        "not_reproduced": lost,
    }
    good = torch.ones_like(lost)
    for name, passed in checks.items():
        record.rejected[name] += int((claimed & good & ~passed).sum())
        good = good & passed
    sound = checks["not_finite"] & checks["outside_set"] & checks["outside_domain"]
    record.ran_on += len(rows)
    record.broke += int(good.sum())
    record.cost = record.cost.plus(result.cost)
    record.seconds += time.monotonic() - started
    return Trial(good, logits, x_adv, threat.size(x, z), result.cost.plus(cost), sound)
