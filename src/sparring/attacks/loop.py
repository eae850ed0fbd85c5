"""The one attack loop: climb an objective inside a threat model, and remember what is worth keeping.

Letters: B batch, *X one input, *Z one perturbation. Nothing in the loop waits for the device (no `.item()`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple, Protocol, get_args

import torch
from torch import Tensor

from sparring.attacks.starts import Start, crafting, gradient, uniform
from sparring.core.geometry import per_example
from sparring.core.noise import Noise
from sparring.core.objectives import Objective, cross_entropy
from sparring.core.types import AttackResult, Cost, Inputs, Model, size, take
from sparring.threats.base import ThreatModel

Keep = Literal["fooled_first", "first_fooled", "highest_loss", "smallest_fooling", "last"]


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
    "last": the last iterate without a look at it, one forward less; for training. "first_fooled": what reaches the goal
    takes one more step, for the better of the two, and leaves the batch, so that only what stands is climbed on; for
    verdicts. On a GPU that is one wait a step.

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
            raise TypeError(
                f"got {self.threat!r} for the threat; an attack needs a threat model, such as Linf(8 / 255) or "
                "make_threat('linf:8/255')"
            )
        if self.num_steps < 0:
            raise ValueError(f"num_steps must not be negative; got {self.num_steps}")
        if self.keep not in get_args(Keep):
            raise ValueError(f"keep={self.keep!r}; expected one of {', '.join(get_args(Keep))}")

    def __call__(self, model: Model, x: Inputs, target: Tensor, *, noise: Noise | None = None) -> AttackResult:
        if self.keep == "first_fooled":
            return self._until_fooled(model, x, target, noise)
        threat = self.threat
        with crafting(threat, model, x, target, noise) as (frozen, x, target, noise):
            z = self.start(threat, x, noise)
            problem = Problem(threat, x, self.num_steps, noise)
            state = self.rule.init(problem, z)
            best: tuple[Tensor, Seen] | None = None
            for t in range(self.num_steps):
                seen = self._look(frozen, x, z, target, self.rule.needs_grad)
                best = self._better(x, z, seen, best)
                z, state = self.rule.step(problem, z, seen, state, t)
            if self.keep != "last":
                best = self._better(x, z, self._look(frozen, x, z, target, False), best)
        num = size(x)
        backwards = num * self.num_steps * self.rule.needs_grad
        cost = Cost(num * (self.num_steps + (self.keep != "last")), backwards)
        z, loss, reached = (z, None, None) if best is None else (best[0], best[1].loss, best[1].reached)
        return AttackResult(threat.realize(x, z), z, threat.size(x, z), loss, reached, cost)

    def _until_fooled(self, model: Model, x: Inputs, target: Tensor, noise: Noise | None) -> AttackResult:
        """The same loop over ever fewer rows; what a rule remembers must hold one row per example."""
        now, cost = self, Cost()
        with crafting(self.threat, model, x, target, noise) as (frozen, x, target, noise):
            whole, z = x, self.start(self.threat, x, noise)
            state = self.rule.init(Problem(self.threat, x, self.num_steps, noise), z)
            best, rows, done = None, torch.arange(size(x), device=z.device), None
            for t in range(self.num_steps + 1):
                climbs = self.rule.needs_grad and t < self.num_steps
                seen = now._look(frozen, x, z, target, climbs)
                cost = cost.plus(Cost(len(rows), len(rows) * climbs))
                leaves = torch.zeros_like(seen.reached) if best is None else best[1].reached
                best = now._better(x, z, seen, best)
                assert best is not None
                done = best if done is None else _put(done, rows, best)
                stay = (~leaves).nonzero()[:, 0]
                if t == self.num_steps or not len(stay):
                    break
                if len(stay) < len(rows):
                    parts = (now, x, target, noise, z, seen, state, best, rows)
                    now, x, target, noise, z, seen, state, best, rows = _rows(parts, stay)
                z, state = self.rule.step(Problem(now.threat, x, self.num_steps, noise), z, seen, state, t)
        assert done is not None
        z, threat = done[0], self.threat
        return AttackResult(threat.realize(whole, z), z, threat.size(whole, z), done[1].loss, done[1].reached, cost)

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
        if self.keep in ("fooled_first", "first_fooled"):
            better = (seen.reached & ~old.reached) | ((seen.reached == old.reached) & better)
        elif self.keep == "smallest_fooling":
            smaller = self.threat.size(x, z) < self.threat.size(x, best_z)
            better = torch.where(seen.reached, ~old.reached | smaller, ~old.reached & better)
        kept = Seen(torch.where(better, seen.loss, old.loss), torch.where(better, seen.reached, old.reached), None)
        return torch.where(per_example(better, z), z, best_z), kept


def _put(done: tuple[Tensor, Seen], rows: Tensor, best: tuple[Tensor, Seen]) -> tuple[Tensor, Seen]:
    """`best` in its rows of what is done."""
    (z, old), (part, new) = done, best
    loss, reached = old.loss.index_copy(0, rows, new.loss), old.reached.index_copy(0, rows, new.reached)
    return z.index_copy(0, rows, part), Seen(loss, reached, None)


def _rows(value: Any, index: Tensor) -> Any:
    """`take`, through tuples, too; a number of no example stays."""
    if isinstance(value, tuple):
        parts = [_rows(part, index) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
    return value if isinstance(value, Tensor) and value.ndim == 0 else take(value, index)
