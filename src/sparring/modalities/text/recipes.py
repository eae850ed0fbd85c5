"""Training that stands replaced words or moved word vectors, beside the recipes that all kinds of input share.

Shapes: B texts, L units, K substitutes.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from sparring.attacks.loop import Attack, Problem, Seen
from sparring.attacks.starts import null
from sparring.attacks.steps import Ascent
from sparring.core.geometry import per_example
from sparring.core.model_state import private_rng
from sparring.core.noise import Noise
from sparring.core.objectives import kl
from sparring.core.registry import Builder
from sparring.core.types import Inputs, Model, size
from sparring.modalities.text.certify import words_gaps
from sparring.modalities.text.search import of_words
from sparring.modalities.text.threats import Substitutions
from sparring.threats import ThreatModel
from sparring.training.certified import CertifiedTraining
from sparring.training.named import RECIPES
from sparring.training.recipes import Crafting, Trades
from sparring.training.supervised import Supervised


@dataclass(frozen=True, kw_only=True)
class Beside(Crafting):
    """clean_weight * cross_entropy(model(x), y) + weight * cross_entropy(model(x_adv), y)."""

    clean_weight: float = 1.0
    weight: float = 1.0

    def loss_on(self, model: Model, x: Inputs, x_adv: Inputs, y: Tensor) -> Tensor:
        clean, attacked = (self._cross_entropy(model(v), y) for v in (x, x_adv))
        return self.clean_weight * clean + self.weight * attacked


@dataclass(frozen=True, kw_only=True)
class FreeLB(Supervised):
    """The mean cross-entropy over `num_steps` moments of an ascent of the word vectors, from a random start.

    Every moment trains, so its backward pass serves twice. Dropout draws the same at each (so says the paper).
    """

    threat: ThreatModel
    num_steps: int = 3
    step: float = 0.5

    def __call__(self, model: Model, x: Any, y: Tensor, *, noise: Noise | None = None) -> Tensor:
        noise = Noise.from_torch(size(x)) if noise is None else noise
        z, losses = self.threat.sample(x, noise), []
        for t in range(self.num_steps):
            z = z.requires_grad_()
            with private_rng(noise.seed, y.device):
                losses.append(self._cross_entropy(model(self.threat.apply(x, z)), y))
            if t + 1 < self.num_steps:
                grad = torch.autograd.grad(losses[-1], z, retain_graph=True)[0]
                ahead = self.step * per_example(self.threat.radius, z) * self.threat.steepest(x, grad)
                z = self.threat.project(x, z.detach() + ahead)
        return torch.stack(losses).mean()


@dataclass(frozen=True)
class SomeWords:
    """z <- the corner that the gradient points to, each changed word kept with the chance `share`, drawn anew."""

    share: float = 0.75
    needs_grad: ClassVar[bool] = True

    def init(self, problem: Problem, z: Tensor) -> None:
        return None

    def step(self, problem: Problem, z: Tensor, seen: Seen, state: None, t: int) -> tuple[Tensor, None]:
        assert seen.grad is not None
        keep = problem.noise.uniform((z.shape[1], 1), draw=50 + t).to(z.device) < self.share
        return problem.threat.corner(problem.x, seen.grad) * keep, None


@dataclass(frozen=True)
class AnyMixture:
    """Start at a random mixture: the weights of each word and its substitutes are the softmax of normal numbers."""

    def __call__(self, threat: Any, x: Any, noise: Noise) -> Tensor:
        like = threat.null(x)
        draw = noise.normal((*like.shape[1:-1], like.shape[-1] + 1)).to(like)
        return threat.project(x, _softmax(draw, threat.open(x)))


@dataclass(frozen=True)
class HullAscent:
    """One step of length `length` for each word in the logits of its mixture, along their gradient."""

    length: float = 10.0
    needs_grad: ClassVar[bool] = True

    def init(self, problem: Problem, z: Tensor) -> None:
        return None

    def step(self, problem: Problem, z: Tensor, seen: Seen, state: None, t: int) -> tuple[Tensor, None]:
        assert seen.grad is not None
        own = (1 - z.sum(2, keepdim=True)).clamp_min(0)
        weights, grad = torch.cat([own, z], 2), F.pad(seen.grad, (1, 0))
        slope = weights * (grad - (weights * grad).sum(2, keepdim=True))
        step = self.length * slope / slope.norm(dim=2, keepdim=True).clamp_min(torch.finfo(z.dtype).tiny)
        threat: Any = problem.threat
        mixed = _softmax(weights.clamp_min(1e-12).log() + step, threat.open(problem.x))
        return threat.project(problem.x, mixed), None


def _softmax(logits: Tensor, there: Tensor) -> Tensor:
    """(B, L, K) the substitutes' part of the softmax over the word and those that there are."""
    there = F.pad(there, (1, 0), value=True)
    return logits.where(there, -torch.inf).softmax(2)[..., 1:]


@dataclass(frozen=True, kw_only=True)
class IntervalTraining(CertifiedTraining):
    """`CertifiedTraining` over substitutions: the box of each word's vectors is that share `reach` of all of them."""

    threat: Substitutions
    ramp: tuple[float, float] = (0.1, 0.7)
    certifies: ClassVar[bool] = False  # what stands under attack chooses the epoch, as for the other recipes of texts

    def _gaps(self, model: Any, x: Any, y: Tensor, noise: Noise | None) -> Tensor:
        return words_gaps(model, x, y, self.threat, self.reach)


def fgm(threat: ThreatModel, *, weight: float = 1.0, label_smoothing: float = 0.0) -> Beside:
    """Clean texts, and beside them texts whose word vectors moved one step along the gradient.

    Source: Miyato 2017, eq. 2 to 5, without their normalised vectors: the radius counts in mean lengths of a vector.
    """
    attack = Attack(threat=threat, rule=Ascent(1.0), num_steps=1, start=null, keep="last")
    return Beside(attack=attack, weight=weight, label_smoothing=label_smoothing)


def freelb(threat: ThreatModel, *, num_steps: int = 3, step: float = 0.5) -> FreeLB:
    """Texts whose word vectors move for a few steps, each of which trains.

    Source: Zhu 2020, algorithm 1 (K 2 to 5, steps by the normalised gradient); the start is uniform in direction and on
    the edge here. With `trades:num_steps=1,beta=1` the same threat gives virtual adversarial training (Miyato 2017).
    """
    if num_steps < 1:
        raise ValueError(f"num_steps must be at least 1; got {num_steps}")
    return FreeLB(threat=threat, num_steps=num_steps, step=step)


def substituted(
    threat: ThreatModel, *, num_steps: int = 2, share: float = 0.75, clean_weight: float = 0.3,
    label_smoothing: float = 0.0,
) -> Beside:  # fmt: skip
    """Clean texts, and beside them texts whose words were replaced by gradient, all at once, each with a chance.

    Source: after Yoo and Qi 2021 (A2T), in parallel for a whole batch by HotFlip's first order (Ebrahimi 2018) instead
    of word after word, each time training sees a text; the weights are ours.
    """
    words = of_words(threat, "substituted")
    attack = Attack(threat=words, rule=SomeWords(share), num_steps=num_steps, start=null, keep="last")
    return Beside(attack=attack, clean_weight=clean_weight, weight=1 - clean_weight, label_smoothing=label_smoothing)


def hull(
    threat: ThreatModel, *, beta: float = 1.0, num_steps: int = 1, length: float = 10.0, label_smoothing: float = 0.0
) -> Trades:
    """Clean loss plus beta times the KL to the worst mixture of each word's substitutes.

    Source: Dong 2021 (ASCC; beta 4 there, and a penalty for mixtures that are not sparse); Zhou 2021 (DNE).
    """
    start, rule, words = AnyMixture(), HullAscent(length), of_words(threat, "hull")
    attack = Attack(threat=words, rule=rule, num_steps=num_steps, objective=kl, start=start, keep="last")
    return Trades(attack=attack, beta=beta, train_on="applied", label_smoothing=label_smoothing)


def interval_training(
    threat: ThreatModel, *, weight: float = 0.5, ramp: tuple[float, float] = (0.1, 0.7)
) -> IntervalTraining:
    """Clean loss and the loss of interval bounds over all substitutions: certified training, for bag and cnn-text.

    Source: Jia 2019, section 4 (kappa and the growing box); Gowal 2018. There kappa ends at 0.8.
    """
    if not 0 < weight <= 1:
        raise ValueError(f"weight={weight}; expected the share of the bound in the loss, above 0, at most 1")
    return IntervalTraining(threat=of_words(threat, "ibp"), weight=weight, ramp=ramp)


def _not_for_words(name: str, builder: Builder) -> Builder:
    @functools.wraps(builder)
    def checked(threat: Any, **options: Any) -> Any:
        if isinstance(threat, Substitutions):
            raise ValueError(
                f"{name} climbs in small steps, which end between sentences; for replaced words take --recipe hull, "
                "substituted or ibp"
            )
        return builder(threat, **options)

    return checked


TEXT_RECIPES: dict[str, Builder] = {
    **{name: _not_for_words(name, RECIPES[name]) for name in RECIPES if name != "standard"},
    "fgm": fgm, "freelb": freelb, "substituted": substituted, "hull": hull, "ibp": interval_training,
}  # fmt: skip
