"""What a check of the battery is, and what it is given.

Letters: B sampled examples, K classes, *X one input, *Z one perturbation.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sparring.attacks.auto_pgd import apgd
from sparring.attacks.catalogue import pgd
from sparring.checks import limits
from sparring.core.model_state import private_rng
from sparring.core.noise import Noise
from sparring.core.objectives import cross_entropy, margin
from sparring.core.types import Attacker, Inputs, Model, device_of, take
from sparring.evaluation.measure import Evaluation
from sparring.evaluation.one_batch import MakeAttack
from sparring.results.findings import Finding, Level
from sparring.threats.base import ThreatModel


def short_attack(threat: ThreatModel) -> Attacker:
    """Ten steps on the margin: PGD, and on L1 balls, where its steps are stopped by the box, APGD."""
    if threat.norm == "l1":
        return apgd(threat, num_steps=10, objective=margin)
    return pgd(threat, num_steps=10, step=0.25, objective=margin)


class Outcome(NamedTuple):
    """What an attack did to some rows: who fell when the model itself was asked again, and what it was shown."""

    fell: Tensor  # (b,) bool
    x_adv: Inputs


class Slopes(NamedTuple):
    """The clean input seen with gradients: (B, K) logits, and the gradients of two losses, (B, *Z) each."""

    logits: Tensor
    by_margin: Tensor
    by_loss: Tensor


@dataclass(frozen=True, eq=False)
class Case:
    """A sample of examples that the model got right, with the evaluation they come from.

    `model` is a plain function in eval mode that returns logits; `whole` is the caller's object, to look at only.
    `rows` (B,) are the examples' rows in the evaluation, `number` (B,) their numbers, which key the noise. `stood`
    (b,) are the rows of those that no attack broke and no certificate vouches for; `at_stake` is the share of such
    among all that were evaluated, and so the most that the number can be too high. `seen` holds the findings of the
    preflight by name.
    """

    model: Model
    whole: Any
    x: Inputs
    y: Tensor
    threat: ThreatModel
    rows: Tensor
    number: Tensor
    stood: Tensor
    at_stake: float
    evaluation: Evaluation
    seed: int
    seen: Mapping[str, Finding]

    @cached_property
    def lost(self) -> Tensor:
        """(b,) bool, of `stood`: what has fallen to any check so far; `lost_to` adds to it."""
        return torch.zeros_like(self.stood, dtype=torch.bool)

    @cached_property
    def has(self) -> set[str]:
        """What checks may need, as far as it is there."""
        there = {
            "radius": bool(torch.as_tensor(self.threat.radius).isfinite().all()),
            "gradient": "no_gradient" not in self.seen,
            "repeats": "random_output" not in self.seen,
            "standing": len(self.stood) > 0,
        }
        return {name for name, given in there.items() if given}

    @cached_property
    def every(self) -> Tensor:
        """All rows."""
        return torch.arange(len(self.y), device=self.y.device)

    @cached_property
    def clean(self) -> Tensor:
        """(B, K) logits on the clean inputs."""
        return self.logits(self.shown)

    @cached_property
    def shown(self) -> Inputs:
        """The clean inputs as the model is judged on them."""
        return self.threat.realize(self.x, self.threat.null(self.x))

    @cached_property
    def slopes(self) -> Slopes:
        """Logits and gradients at the clean inputs; one forward and two backwards."""
        z = self.threat.null(self.x).requires_grad_()
        with torch.enable_grad():
            logits = self.model(self.threat.apply(self.x, z))
            scores = [objective.score(logits, self.y).sum() for objective in (margin, cross_entropy)]
        grads = [torch.autograd.grad(s, z, retain_graph=True, allow_unused=True)[0] for s in scores]
        return Slopes(logits.detach(), *(torch.zeros_like(z) if g is None else g for g in grads))

    @cached_property
    def reference(self) -> Outcome:
        """A short attack on the margin from fresh random starts, on all rows."""
        return self.attack("reference", short_attack)

    def attack(
        self, name: str, make: MakeAttack, rows: Tensor | None = None, *, model: Model | None = None,
        threat: ThreatModel | None = None,
    ) -> Outcome:  # fmt: skip
        """Crafts on `model` (default: the model itself) around some rows (default: all), and asks the model itself."""
        rows = self.every if rows is None else rows
        threat, x, y = take(threat or self.threat, rows), take(self.x, rows), self.y[rows]
        noise = Noise.make(self.seed, f"sanity/{name}", self.number[rows])
        z = make(threat)(model or self.model, x, y, noise=noise).z.detach()
        x_adv = threat.realize(x, z)
        return Outcome(self.wrong(x_adv, y) & threat.valid(x, x_adv), x_adv)

    def wrong(self, shown: Any, y: Tensor) -> Tensor:
        """(b,) bool: the prediction is not y; of a random model, the mean over several looks is judged."""
        looks = limits.LOOKS if "random_output" in self.seen else 1
        mean = torch.stack([self.logits(shown).softmax(1) for _ in range(looks)]).mean(0)
        return (mean.argmax(1) != y) & mean.isfinite().all(1)

    def logits(self, shown: Any) -> Tensor:
        """(b, K) logits without a graph, at least in float32."""
        with torch.no_grad():
            out = self.model(shown)
        return out.float() if out.dtype in (torch.float16, torch.bfloat16) else out

    def level(self, wanted: Level) -> Level:
        """`wanted`; only a note where so few examples stand that the number can hardly be too high."""
        return wanted if self.at_stake >= limits.POINTS_LOST else "note"

    def lost_to(self, fell: Tensor, **texts: str) -> Measured | None:
        """How many of the standing examples, `fell` (b,), fell to something else, where that is no luck and matters."""
        self.lost.logical_or_(fell)
        count, tried = int(fell.sum()), len(fell)
        points = self.at_stake * count / tried
        if count < limits.FEWEST_BROKEN or points < limits.POINTS_LOST:
            return None
        level = "invalid" if count / tried >= limits.MOST_OF_IT_LOST else "suspect"
        worth = f"{100 * points:.1f} points"
        return {"level": level, "fell": count, "tried": tried, "points": points, "worth": worth, **texts}


Measured = Mapping[str, Any]
"""What a check tells: its `level`, the numbers of its finding, and texts that only fill in its sentence."""


class Check(NamedTuple):
    """One row of the battery.

    name, sentence, next_step: of its finding; sentence and next_step have what was measured filled in. question: what
    it asks. measure: gives None where there is nothing to tell. needs: what it cannot do without, of "radius" (a finite
    one), "gradient" (of the model), "repeats" (the model answers the same twice), "standing" (examples that still do).
    """

    name: str
    question: str
    measure: Callable[[Case], Measured | None]
    sentence: str
    next_step: str = ""
    needs: tuple[str, ...] = ()

    def run(self, case: Case) -> Finding | None:
        """Its finding, if any."""
        if not case.has.issuperset(self.needs):
            return None
        with private_rng(case.seed, device_of(case.x)):
            told = self.measure(case)
        if told is None:
            return None
        numbers = {name: value for name, value in told.items() if not isinstance(value, str)}
        return Finding(self.name, self.sentence.format(**told), numbers, told["level"], self.next_step.format(**told))


def share_of(mask: Tensor) -> float:
    """The share of True."""
    return float(mask.double().mean())
