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
from sparring.core.noise import Noise
from sparring.core.objectives import cross_entropy, margin
from sparring.core.types import Attacker, Inputs, Model, take
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
    `number` (B,) are the examples' rows in the evaluation, and key the noise. `standing` (B,) tells those that no
    attack broke and no certificate vouches for; `at_stake` is the share of such among all that were evaluated, and so
    the most that the number can be too high. `seen` holds the findings of the preflight by name.
    """

    model: Model
    whole: Any
    x: Inputs
    y: Tensor
    threat: ThreatModel
    number: Tensor
    standing: Tensor
    at_stake: float
    evaluation: Evaluation
    seed: int
    seen: Mapping[str, Finding]

    @cached_property
    def stood(self) -> Tensor:
        """Rows of the examples that still stand."""
        return self.standing.nonzero()[:, 0]

    @cached_property
    def lost(self) -> Tensor:
        """(b,) bool, of `stood`: what has fallen to any check so far; `lost_to` adds to it."""
        return torch.zeros_like(self.stood, dtype=torch.bool)

    @cached_property
    def has(self) -> set[str]:
        """What checks may need, as far as it is there: a finite radius, a gradient of the model."""
        bounded = bool(torch.as_tensor(self.threat.radius).isfinite().all())
        return {name for name, there in (("radius", bounded), ("gradient", "no_gradient" not in self.seen)) if there}

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

    def lost_to(self, fell: Tensor) -> Measured:
        """How many of the standing examples, `fell` (b,), fell to something else, and the points they are worth."""
        self.lost.logical_or_(fell)
        count, tried = int(fell.sum()), len(fell)
        points = self.at_stake * count / max(tried, 1)
        return {"fell": count, "tried": tried, "points": points, "worth": f"{100 * points:.1f} points"}


Measured = Mapping[str, float | str]
"""What a check measured, by name: the numbers of its finding, and texts that only fill in its sentence."""
Judge = Callable[[Any, Case], Level | None]
"""(what was measured, the case) -> the level of the finding, None for no finding."""


@dataclass(frozen=True)
class Check:
    """One row of the battery.

    name, sentence, next_step: of its finding; sentence and next_step have what was measured filled in. question: what
    it asks. measure: gives None where the question does not arise. level: see `Judge`. needs: "radius" where it takes
    steps of a share of the radius, and so needs a finite one; "gradient" where the model must have one.
    """

    name: str
    question: str
    measure: Callable[[Case], Measured | None]
    level: Judge
    sentence: str
    next_step: str = ""
    needs: tuple[str, ...] = ()

    def run(self, case: Case) -> Finding | None:
        """Its finding, if any."""
        if not set(self.needs) <= case.has:
            return None
        measured = self.measure(case)
        level = None if measured is None else self.level(measured, case)
        if measured is None or level is None:
            return None
        numbers = {name: value for name, value in measured.items() if not isinstance(value, str)}
        return Finding(self.name, self.sentence.format(**measured), numbers, level, self.next_step.format(**measured))


def above(name: str, limit: float, level: Level = "suspect") -> Judge:
    """This level where a number lies above its limit; a note where hardly anything is at stake."""
    return lambda measured, case: case.level(level) if measured[name] > limit else None


def always(level: Level = "suspect") -> Judge:
    """This level wherever something was measured; a note where hardly anything is at stake."""
    return lambda measured, case: case.level(level)


def broken(measured: Any, case: Case) -> Level | None:
    """The level where enough of the standing examples fell to something else."""
    if measured["fell"] < limits.FEWEST_BROKEN or measured["points"] < limits.POINTS_LOST:
        return None
    return "invalid" if measured["fell"] / measured["tried"] >= limits.MOST_OF_IT_LOST else "suspect"


def share_of(mask: Tensor) -> float:
    """The share of True; 0 of nothing."""
    return float(mask.double().mean()) if len(mask) else 0.0
