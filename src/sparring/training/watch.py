"""A guard that knows the ways in which adversarial training collapses, and what to do about each.

It looks at held-out training examples. Shapes: N examples, K classes.
"""

from __future__ import annotations

import math
from dataclasses import KW_ONLY, dataclass, field
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparring.attacks.around import SmoothBackward, part_of
from sparring.attacks.catalogue import fgsm, pgd
from sparring.attacks.loop import Attack
from sparring.attacks.starts import Corner
from sparring.attacks.steps import Ascent
from sparring.core.model_state import attack_mode
from sparring.core.noise import Noise
from sparring.core.objectives import margin
from sparring.core.types import Inputs, size
from sparring.threats.base import ThreatModel
from sparring.training.guard import Rollback, Stop, Wait, field_of

if TYPE_CHECKING:
    from sparring.training.state import TrainingState

Reaction = Literal["slower", "anneal", "multi-step", "ramp", "stop", "off"]
"""What follows the way back. slower: a quarter of the learning rate. anneal: a twentieth. multi-step: PGD on the margin
instead of the recipe. ramp: the radius grows from 0 again over a fifth of the run. stop: the run ends. off: nobody
looks. Whatever the reaction, the second way back also divides the rate by 4, the third by 16, the fourth by 64."""


@dataclass(frozen=True, kw_only=True)
class Switched:
    """`recipe`, or `other` once `use_other` is set, as a guard may do in the middle of a run."""

    recipe: Any
    other: Any
    use_other: bool = False

    def at(self, progress: float) -> Any:
        """The one in use, at this moment of the run."""
        recipe = self.other if self.use_other else self.recipe
        return recipe.at(progress) if hasattr(recipe, "at") else recipe

    def __call__(self, model: Any, x: Inputs, y: Tensor, *, noise: Noise | None = None) -> Any:
        return (self.other if self.use_other else self.recipe)(model, x, y, noise=noise)


def look(model: nn.Module, x: Inputs, y: Tensor, threat: ThreatModel) -> dict[str, float]:
    """What a network does with N examples, in eval mode; the model and the global generators stay as they were.

    clean, one_step (FGSM), multi_step (PGD, 10 steps), noise (a random corner of the set) and unmasked (PGD on the
    margin with a smoothed backward pass, and the others): the shares that stand. loss: clean cross-entropy. largest:
    how much more often the commonest answer is given than its class occurs. flat: the share without any gradient.
    """
    noise = Noise.make(0, "watch", torch.arange(size(x)))
    still = Attack(threat=threat, rule=Ascent(1.0), num_steps=0, start=Corner())
    attacks = {
        "one_step": fgsm(threat), "multi_step": pgd(threat, num_steps=10, step=0.25), "noise": still,
        "unmasked": SmoothBackward(pgd(threat, num_steps=10, step=0.25, objective=margin)),
    }  # fmt: skip
    with attack_mode(model) as frozen:
        z = threat.null(x).requires_grad_()
        logits = frozen(threat.apply(x, z))
        losses = F.cross_entropy(logits, y, reduction="none")
        grad = torch.autograd.grad(losses.sum(), z)[0]
        right, answers = logits.argmax(1) == y, logits.argmax(1).bincount(minlength=logits.shape[1])
        stands = {}
        for name, attack in attacks.items():
            reached = attack(frozen, x, y, noise=noise).reached
            assert reached is not None
            stands[name] = right & ~reached
    stands["unmasked"] = stands["unmasked"] & stands["noise"]
    label = int(answers.argmax())
    return {
        "clean": float(right.double().mean()), **{name: float(s.double().mean()) for name, s in stands.items()},
        "loss": float(losses.detach().double().mean()), "classes": float(logits.shape[1]),
        "largest": float(answers.max()) / len(y) - float((y == label).double().mean()),
        "flat": float((grad.flatten(1) == 0).all(1).double().mean()),
    }  # fmt: skip


@dataclass(frozen=True)
class Watch:
    """Sees six kinds of collapse on held-out training examples (x, y), goes back to the last sound look, and reacts.

    divergence: a loss or gradient is not finite, or the clean loss is over 1.2 log K and clean accuracy fell by 20
    points. constant: one answer is given `common` more often than its class occurs, in 5 looks running, in 2 where
    most examples have no gradient; until then nothing else is said. dying: more than half of the examples have no
    gradient at all. catastrophic: one step of attack leaves `gap` more than ten do, which leave 5 points less than they
    did and less than 0.6 of what one does, or one of the two in 3 looks running. masking: what random noise and a
    smoothed backward pass leave, and what the gradient leaves, lie `gap` apart. overfitting: the mean of five looks is
    `drop` below its best.
    The fields of those names say how to react; after `num_rollbacks` the run stops. A moment that is half as bad, or
    below the best mean, is no place to go back to. One look costs 26 forward and 22 backward passes an example.
    ValueError for numbers out of range and unknown reactions.

    Reactions `multi-step` and `ramp` need a recipe in `Switched` and `Ramped`. Source of the phenomena: Wong 2020 and
    Andriushchenko 2020 (catastrophic overfitting), Rice 2020 (robust), Athalye 2018 (masking); thresholds are ours.
    """

    threat: ThreatModel
    x: Inputs = field(repr=False)
    y: Tensor = field(repr=False)
    _: KW_ONLY
    every: int = 50
    gap: float = 0.2
    drop: float = 0.04
    common: float = 0.7
    num_rollbacks: int = 4
    divergence: Reaction = "slower"
    constant: Reaction = "ramp"
    dying: Reaction = "multi-step"
    catastrophic: Reaction = "multi-step"
    masking: Reaction = "multi-step"
    overfitting: Reaction = "anneal"

    def __post_init__(self) -> None:
        shares = (self.gap, self.drop, self.common)
        if self.every < 1 or self.num_rollbacks < 0 or not all(0 < share < 1 for share in shares):
            raise ValueError(
                f"watch: every {self.every} at least 1, num_rollbacks {self.num_rollbacks} at least 0, gap {self.gap}, "
                f"drop {self.drop} and common {self.common} shares between 0 and 1"
            )
        for kind in COLLAPSES:
            if (reaction := getattr(self, kind)) not in get_args(Reaction):
                raise ValueError(f"watch: {kind}={reaction!r} is not one of {', '.join(get_args(Reaction))}")

    def __call__(self, state: TrainingState) -> Rollback | Stop | Wait | None:
        notes = state.notes
        if state.trouble:
            return self._react(state, "divergence", state.trouble)
        reach = _reach(state)
        now = look(state.model, self.x, self.y, self.threat if reach == 1 else self.threat.at(reach))
        robust = min(now["multi_step"], now["unmasked"]) if reach == 1 else 0.0
        best = notes.setdefault("best", {"clean": 0.0, "robust": 0.0, "mean": 0.0})
        recent = notes["recent"] = [*notes.get("recent", []), *([robust] if reach == 1 else [])][-5:]
        now = now | {"robust": robust, "mean": sum(recent) / 5 if len(recent) == 5 else best["mean"]}
        many = state.options.get("use_other")  # many steps on the margin are what is trained on already
        done = {kind for kind in COLLAPSES if many and getattr(self, kind) == "multi-step"}
        kind, sentence = self._seen(now, best, notes, done)
        if kind and getattr(self, kind) != "off":
            notes["constant"], notes["single"], notes["recent"], best["mean"] = 0, 0, [], 0.0
            return self._react(state, kind, sentence)
        best.update({name: max(value, now[name]) for name, value in best.items()})
        doubtful = notes["single"] or now["largest"] > self.common / 2 or (now["flat"] > 0.25 and "dying" not in done)
        lower = best["mean"] - now["mean"] > 1e-9  # more than the rounding of the same five in another order
        return Wait() if doubtful or lower else None

    def _seen(
        self, now: dict[str, float], best: dict[str, float], notes: dict[str, Any], done: set[str]
    ) -> tuple[str, str]:
        """The kind of collapse and a sentence with its numbers; ("", "") for a sound network."""
        notes["constant"] = notes.get("constant", 0) + 1 if now["largest"] > self.common else 0
        clean, one, many, open_ = (now[name] for name in ("clean", "one_step", "multi_step", "unmasked"))
        mean, apart = now["mean"], one - many > self.gap and "catastrophic" not in done
        low, fell = many < 0.6 * one, many < best["robust"] - 0.05
        notes["single"] = notes.get("single", 0) + 1 if apart and (low or fell) else 0
        lost = now["loss"] > 1.2 * math.log(now["classes"]) and clean < best["clean"] - 0.2
        if lost or not math.isfinite(now["loss"]):
            return "divergence", f"the clean loss is {now['loss']:.2f} and clean accuracy {clean:.1%}"
        if notes["constant"]:
            said = f"one answer is given {now['largest']:.1%} more often than its class occurs"
            return ("constant", said) if notes["constant"] >= (2 if now["flat"] > 0.5 else 5) else ("", "")
        if now["flat"] > 0.5 and "dying" not in done:
            return "dying", f"{now['flat']:.1%} of the held-out examples have no gradient"
        if notes["single"] >= 3 or (apart and low and fell):
            return "catastrophic", (
                f"{one:.1%} stand one step of attack and {many:.1%} ten, of which {best['robust']:.1%} did before"
            )
        if abs(many - open_) > self.gap and "masking" not in done:
            return "masking", f"{many:.1%} stand the gradient, and {open_:.1%} what does not trust it"
        if mean < best["mean"] - self.drop:
            return "overfitting", f"{mean:.1%} stand over the last five looks, at best {best['mean']:.1%} did"
        return "", ""

    def _react(self, state: TrainingState, kind: str, sentence: str) -> Rollback | Stop:
        reaction, num = getattr(self, kind), len(state.rollbacks)
        what = f"{COLLAPSES[kind]} at step {state.step}: {sentence}"
        if reaction in ("stop", "off") or num >= self.num_rollbacks:
            again = f" It came after {num} ways back." if reaction != "stop" and num else ""
            return Stop(f"{what}.{again} The last sound weights are kept, and the best epoch.")
        options: dict[str, Any] = {}
        if reaction == "multi-step":
            options, what = {"use_other": True}, f"{what}; from here on many steps"
        elif reaction == "ramp":
            begin = state.step / max(1, state.total)
            options, what = {"anew": (begin, min(1.0, begin + 0.2))}, f"{what}; the radius grows anew"
        factor = 0.25**num * {"slower": 0.25, "anneal": 0.05}.get(reaction, 1.0)
        return Rollback(
            rate_factor=factor, options=options,
            reason=what if factor == 1 else f"{what}; from here on {factor:g} of the learning rate",
        )  # fmt: skip


def _reach(state: TrainingState) -> float:
    """How much of its radius the recipe trains on at this moment."""
    now, whole = (part_of(field_of(r, "attack", None), "threat") for r in (state.current, state.recipe))
    return 1.0 if now is None or whole is None or now.radius == whole.radius else float(now.radius / whole.radius)


COLLAPSES = {
    "divergence": "Divergence", "constant": "A constant answer", "dying": "A dying attack",
    "catastrophic": "Catastrophic overfitting", "masking": "Masked gradients", "overfitting": "Robust overfitting",
}  # fmt: skip
"""What a guard sees, by the field of `Watch` that says how to react."""
