"""The shared tables: every threat, attack and recipe, and a threat over token ids that keeps the core honest.

A row added here is tested by every contract. Shapes are awkward on purpose: no two axes have the same length.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sparring.attacks.catalogue import CATALOGUE
from sparring.attacks.plans import ATTACKS as NAMED
from sparring.core.geometry import per_example
from sparring.core.noise import Noise
from sparring.core.objectives import cross_entropy, dlr, kl, margin
from sparring.core.types import Attacker
from sparring.threats import L1, L2, Ball, Linf, ThreatModel
from sparring.training.named import RECIPES as RECIPES

SHAPE = (3, 2, 5, 7)
FLAT = (3, 11)
NUM_CLASSES = 4


def seeded(make: Callable[[], Any], seed: int = 0) -> Any:
    """What `make` builds from the global generator seeded with `seed`, which is put back afterwards."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make()


def rand(*shape: int, seed: int = 0) -> Tensor:
    """Uniform float64 numbers."""
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def stream(num: int, seed: int = 0) -> Noise:
    return Noise.make(seed, "test", torch.arange(num))


# Threats ---------------------------------------------------------------------------------------------------------


class ThreatCase(NamedTuple):
    """A threat and inputs that are valid for it."""

    threat: Any
    x: Any


BOXES: dict[str, tuple[Any, Any]] = {"unit": (0.0, 1.0), "nobox": (None, None), "wide": (-3.0, 2.0)}


def _threats() -> dict[str, ThreatCase]:
    cases: dict[str, ThreatCase] = {}
    for shape, name in ((SHAPE, "image"), (FLAT, "flat")):
        masks = {"all": None, "one-mask": rand(1, *shape[1:], seed=5) < 0.6, "masks": rand(*shape, seed=6) < 0.6}
        radii = {"scalar": 0.3, "radii": torch.tensor([0.1, 0.4, 0.2], dtype=torch.float64)}
        for kind, radius, box, mask in itertools.product((Linf, L2, L1), radii, BOXES, masks):
            low, high = BOXES[box]
            x = rand(*shape, seed=1)
            if box == "wide":
                x = 5 * x - 3
            threat = kind(radii[radius], low=low, high=high, mask=masks[mask])
            cases[f"{kind.__name__}-{name}-{radius}-{box}-{mask}"] = ThreatCase(threat, x)
    x = rand(*SHAPE, seed=1)
    cases["Linf-tensor-box"] = ThreatCase(Linf(0.3, low=x[:1] - x[:1], high=torch.ones(7).double()), x)
    cases["Linf-only-low"] = ThreatCase(Linf(0.3, low=0.0, high=None), x)
    cases["L2-only-high"] = ThreatCase(L2(0.3, low=None, high=1.0), x)
    cases["L2-number-tensor"] = ThreatCase(L2(torch.tensor(0.3), low=0.0, high=1.0), x)
    cases["Linf-float32"] = ThreatCase(Linf(8 / 255), x.float())
    cases["L2-float32"] = ThreatCase(L2(0.5), x.float())
    cases["L1-tensor-box"] = ThreatCase(L1(9.0, low=x[:1] - x[:1], high=torch.ones(7).double()), x)
    cases["L1-only-low"] = ThreatCase(L1(3.0, low=0.0, high=None), x)
    cases["L1-only-high"] = ThreatCase(L1(torch.tensor(3.0), low=None, high=1.0), x)
    cases["L1-corners"] = ThreatCase(L1(3.0), x.round())
    cases["L1-float32"] = ThreatCase(L1(12.0), x.float())
    cases["words"] = words_case()
    return cases


# Attacks ---------------------------------------------------------------------------------------------------------

OBJECTIVES = {"ce": cross_entropy, "margin": margin, "dlr": dlr, "kl": kl}
WANTED: dict[str, Any] = {"untargeted": None, "one-class": 1, "classes": torch.tensor([1, 3, 0])}


def _attacks() -> dict[str, Callable[[Any], Attacker]]:
    def entry(name: str, **options: Any) -> Callable[[Any], Attacker]:
        return partial(NAMED[name], **options)

    table: dict[str, Callable[[Any], Attacker]] = {}
    for name, objective, wanted in itertools.product(CATALOGUE, OBJECTIVES, WANTED):
        steps = {} if name == "fgsm" else {"num_steps": 3}
        options = {"objective": OBJECTIVES[objective], "wanted": WANTED[wanted], **steps}
        table[f"{name}-{objective}-{wanted}"] = entry(name, **options)
    for keep in ("drop_fooled", "highest_loss", "smallest_fooling", "last"):
        table[f"pgd-{keep}"] = entry("pgd", num_steps=3, keep=keep)
    table["pgd-restarts"] = entry("pgd", num_steps=2, restarts=3)
    for name in NAMED:
        if name not in CATALOGUE:
            table[name] = entry(name, **({"num_queries": 40} if name == "square" else {"num_steps": 6}))
    table["smooth"] = entry("smooth", num_steps=3, restarts=1)
    table["smooth-restarts"] = entry("smooth", num_steps=3, restarts=2)
    table["apgd-eot-restarts"] = entry("apgd", num_steps=3, eot=2, restarts=2, objective=dlr)
    return table


# Words -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Words(ThreatModel):
    """At most `radius` tokens of a sentence may each be exchanged for one of its C permitted substitutes.

    x: {"ids": (B, T) int64, "mask": (B, T) bool, True on real tokens}. z (B, T, C): how much of each substitute takes
    the token's place, at least 0, at most 1 together; the token itself keeps the rest. size: the amount replaced, in
    tokens. hard: `apply` shows the model a real sentence with the gradient of the mixture (straight through), so what
    is judged while climbing is what is realized; otherwise the mixture itself.
    """

    substitutes: Tensor  # (V, C) int64
    radius: float | Tensor = 2.0
    hard: bool = True
    dtype: torch.dtype = torch.float64

    def null(self, x: Mapping[str, Tensor]) -> Tensor:
        return torch.zeros(*x["ids"].shape, self.substitutes.shape[1], dtype=self.dtype)

    def sample(self, x: Mapping[str, Tensor], noise: Noise) -> Tensor:
        null = self.null(x)
        return self.project(x, noise.uniform(null.shape[1:]).to(null))

    def apply(self, x: Mapping[str, Tensor], z: Tensor) -> dict[str, Tensor]:
        if self.hard:
            z = self._corner(x, z) + (z - z.detach())
        weights = torch.cat([1 - z.sum(2, keepdim=True), z], 2)
        return {"choices": self._choices(x), "weights": weights, "mask": x["mask"]}

    def realize(self, x: Mapping[str, Tensor], z: Tensor) -> dict[str, Tensor]:
        corner = self._corner(x, z)
        pick = torch.cat([1 - corner.sum(2, keepdim=True), corner], 2).argmax(2, keepdim=True)
        return {"ids": self._choices(x).gather(2, pick)[..., 0], "mask": x["mask"]}

    def project(self, x: Mapping[str, Tensor], z: Tensor) -> Tensor:
        z = z.clamp_min(0) * x["mask"][..., None]
        z = z / z.sum(2, keepdim=True).clamp_min(1)
        total = z.flatten(1).sum(1).clamp_min(1e-300)
        return z * per_example((per_example(self.radius, total) / total).clamp_max(1), z)

    def steepest(self, x: Mapping[str, Tensor], grad: Tensor) -> Tensor:
        """A corner of the set over its radius: the best substitute of the `radius` tokens that gain most."""
        gain, pick = grad.max(2)
        gain = gain.clamp_min(0) * x["mask"]
        chosen = self._largest(gain) & (gain > 0)
        corner = torch.zeros_like(grad).scatter(2, pick[..., None], chosen[..., None].to(grad))
        return corner / per_example(self.radius, grad)

    def size(self, x: Mapping[str, Tensor], z: Tensor) -> Tensor:
        return z.abs().flatten(1).sum(1)

    def valid(self, x: Mapping[str, Tensor], adversarial: Mapping[str, Tensor]) -> Tensor:
        permitted = (self._choices(x) == adversarial["ids"][..., None]).any(2)
        changed = adversarial["ids"] != x["ids"]
        few = changed.sum(1) <= torch.as_tensor(self.radius)
        return (permitted & (x["mask"] | ~changed)).all(1) & few & (adversarial["mask"] == x["mask"]).all(1)

    def _choices(self, x: Mapping[str, Tensor]) -> Tensor:
        """(B, T, 1 + C) the token itself and its substitutes."""
        return torch.cat([x["ids"][..., None], self.substitutes[x["ids"]]], 2)

    def _corner(self, x: Mapping[str, Tensor], z: Tensor) -> Tensor:
        """The nearest real sentence: tokens whose strongest substitute outweighs the original, `radius` at most."""
        weight, pick = z.detach().max(2)
        changed = (weight > 1 - z.detach().sum(2)) & self._largest(weight) & x["mask"]
        return torch.zeros_like(z).scatter(2, pick[..., None], changed[..., None].to(z))

    def _largest(self, values: Tensor) -> Tensor:
        """(B, T) bool: the `radius` largest of each row."""
        rank = values.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
        radius = self.radius if not isinstance(self.radius, Tensor) else self.radius[:, None]
        return rank < radius


class BagOfWords(nn.Module):
    """Logits linear in the mean embedding of the real tokens; takes token ids, or a mixture of choices."""

    def __init__(self, num_words: int, num_classes: int) -> None:
        super().__init__()
        self.scores = nn.Embedding(num_words, num_classes, dtype=torch.float64)

    def forward(self, x: Mapping[str, Tensor]) -> Tensor:
        if "ids" in x:
            per_token = self.scores(x["ids"])
        else:
            per_token = (self.scores(x["choices"]) * x["weights"][..., None]).sum(2)
        mask = x["mask"][..., None]
        return (per_token * mask).sum(1) / mask.sum(1)


NUM_WORDS = 23


def sentences() -> dict[str, Tensor]:
    """Three sentences of six, four and five tokens."""
    ids = torch.randint(NUM_WORDS, (3, 6), generator=torch.Generator().manual_seed(3))
    return {"ids": ids, "mask": torch.arange(6) < torch.tensor([[6], [4], [5]])}


def words(radius: float | Tensor = 2.0, hard: bool = True, num_choices: int = 3) -> Words:
    """Substitutes that are never the word itself and never twice the same."""
    shift = torch.tensor([1, 5, 11, 16])[:num_choices]
    return Words((torch.arange(NUM_WORDS)[:, None] + shift) % NUM_WORDS, radius, hard)


def words_case() -> ThreatCase:
    return ThreatCase(words(), sentences())


THREATS = _threats()
ATTACKS = _attacks()
BALLS: dict[str, type[Ball]] = {"Linf": Linf, "L2": L2, "L1": L1}


# Recipes ---------------------------------------------------------------------------------------------------------


def quick(name: str, threat: Any, num_steps: int = 1, **options: Any) -> Any:
    """A recipe by name, of so many steps where it takes a number; against a second threat where it needs one."""
    takes = inspect.signature(RECIPES[name]).parameters
    steps = {"num_steps": num_steps} if "num_steps" in takes else {}
    others = {"others": "l2:0.5"} if "others" in takes else {}
    return RECIPES[name](threat, **steps, **others, **options)
