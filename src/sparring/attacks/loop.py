"""The one attack loop: climb an objective inside a threat model, and remember what is worth keeping.

Letters: B batch, *X one input, *Z one perturbation. Nothing waits for the device but keep="drop_fooled".
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple, Protocol, get_args

import torch
from torch import Tensor

from sparring.attacks.rows import put_rows, take_all
from sparring.attacks.starts import Start, crafting, gradient, uniform
from sparring.core.geometry import per_example
from sparring.core.noise import Noise
from sparring.core.objectives import Objective, cross_entropy
from sparring.core.types import AttackResult, Cost, Inputs, Model, size
from sparring.threats.base import ThreatModel

Keep = Literal["fooled_first", "highest_loss", "smallest_fooling", "last", "drop_fooled"]


class Problem(NamedTuple):
    """What a step rule may know about the task."""

    threat: ThreatModel
    x: Inputs
    num_steps: int
    noise: Noise


class Seen(NamedTuple):
    """What one look at the model showed, per example."""

    loss: Tensor  # (B,)
    reached: Tensor  # (B,) bool
    grad: Tensor | None  # (B, *Z) of the loss; None when the rule needs none


class StepRule(Protocol):
    """How to climb. Rules are frozen records; what they remember between steps travels as `state`."""

    @property
    def needs_grad(self) -> bool:
        """Whether `seen.grad` is wanted."""

    def init(self, problem: Problem, z: Tensor) -> Any:
        """The state before the first step; its tensors hold a row per example."""

    def step(self, problem: Problem, z: Tensor, seen: Seen, state: Any, t: int) -> tuple[Tensor, Any]:
        """The next iterate, projected where it must stay in the set, and the next state. z (B, *Z) is not changed."""


@dataclass(frozen=True, kw_only=True)
class Attack:
    """A gradient or query attack as a record; calling it runs the loop.

    keep: which iterate is returned. "fooled_first": one that reaches the goal, among those (or if there is none) the
    highest loss. "highest_loss". "smallest_fooling": the smallest that reaches the goal, else the highest loss.
    "last": the last iterate without a look at it, one forward less; for training. "drop_fooled": as "fooled_first", but
    what reaches the goal leaves the batch after one more step, so that a verdict pays for what stands alone.

    Called with a model, x (B, *X) and a target (labels (B,) or probabilities (B, K)); the model is crafted against in
    eval mode (see `attack_mode`) and handed back untouched. `noise` defaults to seed 0 and the position in the batch.
    Raises ValueError when the target's or the logits' shape is off or no gradient reaches z.

    >>> from sparring import Linf, pgd
    >>> model = torch.nn.Linear(4, 3)
    >>> pgd(Linf(0.1), num_steps=3)(model, torch.rand(2, 4), torch.tensor([0, 2])).x_adv.shape
    torch.Size([2, 4])
    """

    threat: ThreatModel
    rule: StepRule
    num_steps: int
    objective: Objective = cross_entropy
    start: Start = uniform
    keep: Keep = "fooled_first"
    per_example: ClassVar[tuple[str, ...]] = ("threat", "objective", "start")

    def __post_init__(self) -> None:
        if not isinstance(self.threat, ThreatModel):
            raise TypeError(f"got {self.threat!r} for the threat; expected a threat model, such as Linf(8 / 255)")
        if self.num_steps < 0:
            raise ValueError(f"num_steps must not be negative; got {self.num_steps}")
        if self.keep not in get_args(Keep):
            raise ValueError(f"keep={self.keep!r}; expected one of {', '.join(get_args(Keep))}")

    def __call__(self, model: Model, x: Inputs, target: Tensor, *, noise: Noise | None = None) -> AttackResult:
        now, cost, best, done = self, Cost(), None, None
        with crafting(self.threat, model, x, target, noise) as (frozen, x, target, noise):
            whole, z = x, self.start(self.threat, x, noise)
            state = self.rule.init(Problem(self.threat, x, self.num_steps, noise), z)
            rows = torch.arange(size(x), device=z.device)
            for t in range(self.num_steps + (self.keep != "last")):
                climbs = self.rule.needs_grad and t < self.num_steps
                seen = now._look(frozen, x, z, target, climbs)
                cost = cost.plus(Cost(len(rows), len(rows) * climbs))
                before, best = best, now._better(x, z, seen, best)
                if t == self.num_steps:
                    break
                if self.keep == "drop_fooled" and before is not None and bool(before[1].reached.any()):
                    done, stay = put_rows(done, rows, best), (~before[1].reached).nonzero()[:, 0]
                    parts = (now, x, target, noise, z, seen, state, best, rows)
                    now, x, target, noise, z, seen, state, best, rows = take_all(parts, stay)
                    if not len(rows):
                        break
                z, state = self.rule.step(Problem(now.threat, x, self.num_steps, noise), z, seen, state, t)
        found = best if done is None else put_rows(done, rows, best)
        z, loss, reached = (z, None, None) if found is None else (found[0], found[1].loss, found[1].reached)
        return AttackResult(self.threat.realize(whole, z), z, self.threat.size(whole, z), loss, reached, cost)

    @property
    def needs_grad(self) -> bool:
        """Whether its rule asks for gradients."""
        return self.rule.needs_grad

    def _look(self, model: Model, x: Inputs, z: Tensor, target: Tensor, needs_grad: bool) -> Seen:
        """One forward pass, and the gradient of each example's score in its own z."""
        z = z.detach().requires_grad_(needs_grad)
        with torch.set_grad_enabled(needs_grad):
            logits = model(self.threat.apply(x, z))
            loss = self.objective.score(logits, target)
        grad = gradient(loss, z) if needs_grad else None
        return Seen(loss.detach(), self.objective.reached(logits.detach(), target), grad)

    def _better(self, x: Inputs, z: Tensor, seen: Seen, best: tuple[Tensor, Seen] | None) -> tuple[Tensor, Seen] | None:
        """The better of the best so far and this iterate, example by example."""
        if self.keep == "last":
            return None
        seen = Seen(seen.loss, seen.reached & seen.loss.isfinite(), None)  # logits of NaN have an argmax, too
        if best is None:
            return z, seen
        best_z, old = best
        better = (seen.loss > old.loss) | (old.loss.isnan() & ~seen.loss.isnan())
        if self.keep in ("fooled_first", "drop_fooled"):
            better = (seen.reached & ~old.reached) | ((seen.reached == old.reached) & better)
        elif self.keep == "smallest_fooling":
            smaller = self.threat.size(x, z) < self.threat.size(x, best_z)
            better = torch.where(seen.reached, ~old.reached | smaller, ~old.reached & better)
        kept = Seen(torch.where(better, seen.loss, old.loss), torch.where(better, seen.reached, old.reached), None)
        return torch.where(per_example(better, z), z, best_z), kept
