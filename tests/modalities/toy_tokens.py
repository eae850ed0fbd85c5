"""A kind of input that the package does not know: rows of tokens, words that may be replaced, and a greedy search."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from markupsafe import Markup
from torch import Tensor, nn

from sparring.core.noise import Noise
from sparring.core.objectives import margin
from sparring.core.types import AttackResult, Cost, Model
from sparring.evaluation.measure import accuracy_metrics
from sparring.modalities.base import Dataset, Modality, Shown
from sparring.results.statistics import wilson
from sparring.threats import ThreatModel

Tokens = Mapping[str, Tensor]


def load(path: str, *, length: int = 8, vocabulary: int = 20) -> Dataset:
    """Rows of tokens 1 ... vocabulary - 1 (0 is no token); class 1 where their mean lies above the middle."""
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(1, vocabulary, (400, length), generator=draw)
    mask = torch.arange(length) < torch.randint(length // 2, length + 1, (400, 1), generator=draw)
    ids, y = ids * mask, ((ids - vocabulary / 2) * mask).sum(1).gt(0).long()
    x = {"ids": ids, "mask": mask}
    train, test = ({name: value[part] for name, value in x.items()} for part in (slice(300), slice(300, None)))
    return Dataset(path, "tokens", train, y[:300], test, y[300:], ("low", "high"), {"vocabulary": vocabulary})


class Bag(nn.Module):
    """The mean of word vectors, or of mixtures of word vectors where `weights` are there."""

    def __init__(self, vocabulary: int, num_classes: int, width: int) -> None:
        super().__init__()
        self.words, self.out = nn.Embedding(vocabulary, width), nn.Linear(width, num_classes)

    def forward(self, x: Tokens) -> Tensor:
        vectors = self.words(x["ids"])
        vectors = (vectors * x["weights"][..., None]).sum(2) if "weights" in x else vectors
        return self.out((vectors * x["mask"][..., None]).sum(1) / x["mask"].sum(1, keepdim=True))


def bag(vocabulary: int, num_classes: int, *, width: int = 8) -> nn.Module:
    """The mean of word vectors and a linear layer."""
    return Bag(vocabulary, num_classes, width)


@dataclass(frozen=True)
class Substitutions(ThreatModel):
    """A share `radius` of the words may each become one of K others: z (B, L, K) is how much of each it is."""

    radius: Any
    table: Tensor  # (V, K)
    discrete: ClassVar[bool] = True

    def null(self, x: Tokens) -> Tensor:
        return torch.zeros(*x["ids"].shape, self.table.shape[1])

    def sample(self, x: Tokens, noise: Noise) -> Tensor:
        return self.project(x, noise.uniform(self.null(x).shape[1:]))

    def choices(self, x: Tokens) -> Tensor:
        return torch.cat([x["ids"][..., None], self.table[x["ids"]]], 2)

    def apply(self, x: Tokens, z: Tensor) -> Tokens:
        return {"ids": self.choices(x), "weights": torch.cat([1 - z.sum(2, keepdim=True), z], 2), "mask": x["mask"]}

    def realize(self, x: Tokens, z: Tensor) -> Tokens:
        pick = self.corner(x, z, z - 0.5)
        own = torch.cat([1 - pick.sum(2, keepdim=True), pick], 2).argmax(2, keepdim=True)
        return {"ids": self.choices(x).gather(2, own)[..., 0], "mask": x["mask"]}

    def corner(self, x: Tokens, like: Tensor, gain: Tensor) -> Tensor:
        """The best substitute of the words that gain most, where they gain at all and as many as may change."""
        best, pick = gain.max(2)
        rank = best.masked_fill(~x["mask"], -torch.inf).argsort(dim=1, descending=True, stable=True).argsort(dim=1)
        chosen = (rank < self.budget(x)[:, None]) & (best > 0) & x["mask"]
        return torch.zeros_like(like).scatter(2, pick[..., None], chosen[..., None].to(like))

    def budget(self, x: Tokens) -> Tensor:
        return (torch.as_tensor(self.radius) * x["mask"].sum(1) + 1e-6).floor()

    def project(self, x: Tokens, z: Tensor) -> Tensor:
        z = z.clamp_min(0) * x["mask"][..., None]
        z = z / z.sum(2, keepdim=True).clamp_min(1)
        most = torch.as_tensor(self.radius) / self.size(x, z).clamp_min(1e-9)
        return z * most.clamp_max(1)[:, None, None]

    def steepest(self, x: Tokens, grad: Tensor) -> Tensor:
        gain = (grad * x["mask"][..., None]).flatten(1)
        best = gain.argmax(1, keepdim=True)
        amount = x["mask"].sum(1, keepdim=True) * (gain.gather(1, best) > 0)
        return torch.zeros_like(gain).scatter(1, best, amount.to(grad)).view_as(grad)

    def size(self, x: Tokens, z: Tensor) -> Tensor:
        return z.flatten(1).sum(1) / x["mask"].sum(1)

    def valid(self, x: Tokens, adversarial: Tokens) -> Tensor:
        return (self.choices(x) == adversarial["ids"][..., None]).any(2).all(1)

    def text(self) -> str:
        return f"words:{self.radius:g}"


def words(radius: float, data: Dataset) -> Substitutions:
    """A share of the words may each become one of its neighbours."""
    ids = torch.arange(data.facts["vocabulary"])[:, None]
    neighbours = (ids + torch.tensor([-1, 1])).clamp(1, data.facts["vocabulary"] - 1)
    return Substitutions(radius, torch.where(ids > 0, neighbours, 0))


@dataclass(frozen=True)
class Greedy:
    """Tries every single replacement, keeps the one that takes most of the margin, and goes on within the budget."""

    threat: Substitutions
    needs_grad: ClassVar[bool] = False

    def __call__(self, model: Model, x: Tokens, target: Tensor, *, noise: Any = None) -> AttackResult:
        z, tries = self.threat.null(x), 0
        length, num = z.shape[1:]
        best = margin.score(model(self.threat.realize(x, z)), target)
        for turn in range(length):
            start = z
            open_ = x["mask"] & (start.sum(2) == 0) & (turn < self.threat.budget(x))[:, None]
            for place in range(length):
                for number in range(num):
                    candidate = start.clone()
                    candidate[:, place, number] = open_[:, place].to(z)
                    score = margin.score(model(self.threat.realize(x, candidate)), target)
                    better = score > best
                    z, best, tries = torch.where(better[:, None, None], candidate, z), best.maximum(score), tries + 1
        x_adv = self.threat.realize(x, z)
        cost = Cost((tries + 1) * len(z), 0)
        return AttackResult(x_adv, z, self.threat.size(x, z), best, best > 0, cost)


def greedy(threat: Substitutions) -> Greedy:
    """One word after the other, by the margin alone."""
    return Greedy(threat)


def metrics(table: Mapping[str, Tensor]) -> dict[str, Any]:
    """The shared ones, and how often a row that turned needed more than a quarter of its words."""
    turned = table["correct"] & ~table["robust"]
    hard = wilson(int((turned & (table["size"] > 0.25)).sum()), max(1, int(turned.sum())))
    return {**accuracy_metrics(table), "hard_to_turn": replace(hard, higher_is_better=False)}


def show(run: Any) -> Shown:
    """The rows before and after."""
    gallery = run.gallery
    pairs = zip(gallery["x/ids"].tolist(), gallery["x_adv/ids"].tolist(), strict=True)
    lines = Markup().join(Markup("<li>{} became {}</li>").format(*pair) for pair in pairs)
    return Shown(before=Markup("<ul class='tokens'>{}</ul>").format(lines))


MODALITY = Modality(
    name="tokens", load=load, known={"toy": "400 rows of tokens."}, reads=lambda path: Path(path).suffix == ".tok",
    models={"bag": bag}, threats={"words": words}, attacks={"greedy": greedy}, validation="greedy",
    plans={"fast": lambda threat: "gradient-ascent:num_steps=3,greedy"}, metrics=metrics, show=show,
    presets=lambda data: {"model": "bag", "epochs": 20, "learning_rate": 0.03, "batch_size": 50},
)  # fmt: skip
