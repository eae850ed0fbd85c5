"""What may be changed in a text: words, each into one of its substitutes; or word vectors, by a small offset.

Shapes: B texts, L units, V words in the lexicon, K substitutes, D numbers in a vector.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from sparring.core.geometry import per_example, unit_l2
from sparring.core.noise import Noise
from sparring.core.registry import Builder
from sparring.modalities.text.data import Texts
from sparring.modalities.text.lists import Substitutes, find_list, read_list
from sparring.modalities.text.misspellings import misspellings
from sparring.modalities.text.tokens import Lexicon
from sparring.threats import ThreatModel

Units = Mapping[str, Tensor]


@dataclass(frozen=True, eq=False)
class Substitutions(ThreatModel):
    """A share `radius` of the words that have substitutes may each become one of them.

    table (V, K): the substitutes of each word, filled up with the word itself; allowed (V, K) tells the real ones.
    z (B, L, K) is how much of each substitute a place holds, at most 1 in all, and the word itself has the rest: a
    mixture that a network can be shown (`weights`), and whose corners are real texts. Size: the sum of z over the
    number of words that have substitutes.
    """

    radius: Any
    table: Tensor
    allowed: Tensor
    lexicon: Lexicon
    options: str = "k=8"
    name: str = "words"
    discrete: ClassVar[bool] = True

    def at(self, factor: float) -> Substitutions:
        """Never more than all words."""
        radius = self.radius * factor
        return replace(self, radius=radius.clamp_max(1.0) if isinstance(radius, Tensor) else min(1.0, radius))

    def open(self, x: Units) -> Tensor:
        """(B, L, K) bool: the substitutes that there are; none of what is padded or beyond the lexicon."""
        ids = x["ids"]
        here = x["mask"] & (ids < len(self.table))
        return self.allowed.to(ids.device)[ids.where(here, 0)] & here[..., None]

    def choices(self, x: Units) -> Tensor:
        """(B, L, 1 + K) the word itself and what may stand for it."""
        ids = x["ids"]
        others = self.table.to(ids.device)[ids.where(ids < len(self.table), 0)]
        return torch.cat([ids[..., None], others.where(self.open(x), ids[..., None])], 2)

    def changeable(self, x: Units) -> Tensor:
        """(B,) how many words have substitutes, as floats."""
        return self.open(x).any(2).sum(1).float()

    def budget(self, x: Units) -> Tensor:
        """(B,) how many words may change."""
        return (per_example(self.radius, self.changeable(x)) * self.changeable(x) + 1e-4).floor().long()

    def null(self, x: Units) -> Tensor:
        return torch.zeros(*x["ids"].shape, self.table.shape[1], device=x["ids"].device)

    def sample(self, x: Units, noise: Noise) -> Tensor:
        """A random permitted text: as many words changed as may be, each to any of its substitutes alike."""
        return self.corner(x, noise.uniform(self.null(x).shape[1:]).to(x["ids"].device) + 0.5)

    def apply(self, x: Units, z: Tensor) -> dict[str, Tensor]:
        weights = torch.cat([1 - z.sum(2, keepdim=True), z], 2)
        return {**x, "ids": self.choices(x), "weights": weights}

    def realize(self, x: Units, z: Tensor) -> dict[str, Tensor]:
        """The text of the words that hold most of their place; where too many changed, those that moved furthest."""
        moved = z.sum(2)
        best, pick = z.max(2)
        rank = torch.where((best > 1 - moved) & (best > 0), moved, -1.0)
        chosen = self._foremost(x, rank) & (rank > 0)
        number = torch.where(chosen, pick + 1, 0)[..., None]
        return {**x, "ids": self.choices(x).gather(2, number)[..., 0]}

    def corner(self, x: Units, grad: Tensor) -> Tensor:
        """The best substitute of each of the words that gain most by it, as many as may change."""
        gain, pick = grad.where(self.open(x), -torch.inf).max(2)
        chosen = self._foremost(x, gain) & (gain > 0)
        return torch.zeros_like(grad).scatter(2, pick[..., None], chosen[..., None].to(grad))

    def _foremost(self, x: Units, rank: Tensor) -> Tensor:
        """(B, L) bool: the places that rank highest, as many as may change; of equals the first."""
        order = rank.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
        return order < self.budget(x)[:, None]

    def project(self, x: Units, z: Tensor) -> Tensor:
        """Each place into the simplex by scaling, then all towards the clean text by as much as the radius wants."""
        z = z.clamp_min(0) * self.open(x)
        z = z / z.sum(2, keepdim=True).clamp_min(1)
        size = self.size(x, z).clamp_min(torch.finfo(z.dtype).tiny)
        return z * per_example((per_example(self.radius, size) / size).clamp_max(1), z)

    def steepest(self, x: Units, grad: Tensor) -> Tensor:
        """All of it on the one substitute that gains most."""
        gain = grad.where(self.open(x), 0).flatten(1)
        best = gain.argmax(1, keepdim=True)
        amount = self.changeable(x)[:, None] * (gain.gather(1, best) > 0)
        return torch.zeros_like(gain).scatter(1, best, amount.to(grad)).view_as(grad)

    def size(self, x: Units, z: Tensor) -> Tensor:
        return z.flatten(1).sum(1) / self.changeable(x).clamp_min(1)

    def valid(self, x: Units, adversarial: Units) -> Tensor:
        """Every word is one of its place's, and nothing else differs."""
        rest = [name for name in x if name != "ids"]
        alike = torch.stack([(x[name] == adversarial[name]).flatten(1).all(1) for name in rest])
        return (self.choices(x) == adversarial["ids"][..., None]).any(2).all(1) & alike.all(0)

    def complaints(self, x: Any) -> list[str]:
        return unit_complaints(x) or super().complaints(x)

    def describe(self) -> str:
        radius = float(torch.as_tensor(self.radius, dtype=torch.float32).mean())
        share = "all" if radius == 1 else f"{radius:.0%} of the"
        most = self.allowed.sum(1).max().item()
        if self.name == "characters":
            return f"The opponent may misspell {share} words of four letters or more, each in one of {most} ways."
        return (
            f"The opponent may replace {share} words that have substitutes, each by one of at most {most}; stop words "
            "and marks stay."
        )

    def text(self) -> str:
        return f"{self.name}:{self.radius:g},{self.options}"


def unit_complaints(x: Any) -> list[str]:
    """Why these are no texts that can be attacked."""
    form = "named tensors ids (B, L) int64 and mask (B, L) bool"
    if not isinstance(x, Mapping) or not {"ids", "mask"} <= set(x):
        got = ", ".join(x) if isinstance(x, Mapping) else f"a {type(x).__name__}"
        return [f"inputs are {got}; texts come as {form}"]
    ids, mask = x["ids"], x["mask"]
    if ids.dtype != torch.int64 or mask.dtype != torch.bool or ids.shape != mask.shape or ids.ndim != 2:
        return [f"ids are {ids.dtype} {tuple(ids.shape)}, mask {mask.dtype} {tuple(mask.shape)}; texts come as {form}"]
    if bool((ids < 0).any()):
        return [f"ids go down to {int(ids.min())}; a word's number is at least 0"]
    if empty := int((~mask.any(1)).sum()):
        return [f"{empty} of {len(ids)} texts are empty: there is nothing to change; drop them"]
    return []


@dataclass(frozen=True)
class EmbeddingBall(ThreatModel):
    """Word vectors may move: z (B, L, D) is added to them, of Euclidean length at most `radius` times `unit`.

    per: "sequence" measures all words of a text together, "token" each by itself (the largest counts). unit: the mean
    length of a word vector as training began, so that a radius means the same to every network. What is padded stays.
    """

    radius: Any
    dimension: int
    unit: float = 1.0
    per: Literal["sequence", "token"] = "sequence"

    def null(self, x: Units) -> Tensor:
        return torch.zeros(*x["ids"].shape, self.dimension, device=x["ids"].device)

    def sample(self, x: Units, noise: Noise) -> Tensor:
        """Any direction, as far as the radius."""
        null = self.null(x)
        return self.corner(x, noise.normal(null.shape[1:]).to(null))

    def apply(self, x: Units, z: Tensor) -> dict[str, Tensor]:
        return {**x, "offset": z * x["mask"][..., None]}

    def realize(self, x: Units, z: Tensor) -> dict[str, Tensor]:
        return self.apply(x, z)

    def project(self, x: Units, z: Tensor) -> Tensor:
        z = z * x["mask"][..., None]
        norm = self._norms(z).clamp_min(torch.finfo(z.dtype).tiny)
        return z * (per_example(self.radius, norm) / norm).clamp_max(1)

    def steepest(self, x: Units, grad: Tensor) -> Tensor:
        grad = grad * x["mask"][..., None]
        if self.per == "sequence":
            return unit_l2(grad) * self.unit
        return unit_l2(grad.flatten(0, 1)).view_as(grad) * self.unit

    def size(self, x: Units, z: Tensor) -> Tensor:
        return self._norms(z * x["mask"][..., None]).flatten(1).amax(1)

    def _norms(self, z: Tensor) -> Tensor:
        """In units, (B, 1, 1) or (B, L, 1)."""
        norm = z.flatten(1).norm(dim=1)[:, None, None] if self.per == "sequence" else z.norm(dim=2, keepdim=True)
        return norm / self.unit

    def valid(self, x: Units, adversarial: Units) -> Tensor:
        offset = adversarial["offset"]
        still = (offset.where(~x["mask"][..., None], 0) == 0).flatten(1).all(1)
        return still & offset.isfinite().flatten(1).all(1) & (adversarial["ids"] == x["ids"]).all(1)

    def complaints(self, x: Any) -> list[str]:
        return unit_complaints(x) or super().complaints(x)

    def describe(self) -> str:
        which = "all word vectors of a text together" if self.per == "sequence" else "each word vector"
        return (
            f"The opponent may move {which} by {self.radius:g} of the mean length of a word vector: no text does that."
        )

    def text(self) -> str:
        return f"embedding:{self.radius:g},per={self.per},unit={self.unit:g}"


def words(share: float, data: Any, *, k: int = 8, list: str | None = None, model: Any = None) -> Substitutions:
    """That share of the words that have substitutes may each become one of the first k of a list (the data's own).

    Source: the set of Jia and Liang 2019, without a language model; the nearest words in counter-fitted vectors.
    """
    if not isinstance(data, Texts):
        raise ValueError("words are replaced in texts; the data are none (--data text:FILE.csv)")
    listed = data.substitutes if list is None else read_list(find_list(list))
    if not listed:
        find_list("counterfitted")  # says where lists come from, where there is none
        raise ValueError(
            "the data were read without a list of substitutes; name one, such as list=counterfitted or a path"
        )
    new = () if list is None else (other for word in data.lexicon.words for other in listed.get(word, ())[:k])
    return _of_list(share, data, data.lexicon.plus(new), listed, k, f",list={list}" if list else "", "words", model)


def characters(share: float, data: Any, *, k: int = 8, model: Any = None) -> Substitutions:
    """That share of the words of four letters or more may each be misspelled in one of k ways that a reader forgives.

    A misspelling is a word of its own, mostly one that no model has seen, or another that it knows. Stop words, too.
    Source: the edits of Gao 2018 (DeepWordBug) and Li 2019 (TextBugger), of which a list is made for each word.
    """
    if not isinstance(data, Texts) or data.unit != "words":
        raise ValueError("words are misspelled in texts that are read as words (--data text:FILE.csv,tokens=words)")
    known = set(data.lexicon.words[: data.lexicon.known])
    listed = {word: misspellings(word, k, known) for word in data.lexicon.words}
    lexicon = data.lexicon.plus(form for forms in listed.values() for form in forms)
    return _of_list(share, data, lexicon, listed, k, "", "characters", model)


def _of_list(
    share: float, data: Texts, lexicon: Lexicon, listed: Substitutes, k: int, options: str, name: str, model: Any
) -> Substitutions:
    """The threat, of whose words a model that reads them by their letters is told."""
    if not 0 < share <= 1 or k < 1:
        raise ValueError(f"expected a share above 0, at most 1, and k at least 1; got {share:g}, k={k}")
    table, allowed = substitution_table(lexicon, listed, k)
    if not bool(allowed.any()):
        raise ValueError("there is a substitute for none of the words of the data; is the list of this language?")
    _tell(model, lexicon, data)
    return Substitutions(share, table, allowed, lexicon, f"k={k}{options}", name)


def _tell(model: Any, lexicon: Lexicon, data: Any) -> None:
    if hasattr(model, "read_words"):
        model.read_words(lexicon.words)
        model.expect_alike(data.strings["test"], data.x_test["ids"])


def substitution_table(lexicon: Lexicon, listed: Substitutes, k: int) -> tuple[Tensor, Tensor]:
    """(V, K) the first k substitutes of each word as numbers, filled up with the word itself; and which are real."""
    rows = [lexicon.numbers(listed.get(word, ())[:k]) for word in lexicon.words]
    most = max(1, *map(len, rows))
    table = torch.arange(len(lexicon))[:, None].repeat(1, most)
    for number, row in enumerate(rows):
        table[number, : len(row)] = torch.tensor(row, dtype=torch.int64)
    count = torch.tensor([len(row) for row in rows])
    return table, torch.arange(most) < count[:, None]


def embedding(
    radius: float, model: Any, *, per: Literal["sequence", "token"] = "sequence", unit: float | None = None,
    data: Any = None,
) -> EmbeddingBall:  # fmt: skip
    """Word vectors may move by that many times their mean length, as it was when training began (or times `unit`)."""
    vectors, norm = getattr(model, "words", None), getattr(model, "token_norm", None)
    if not isinstance(vectors, torch.nn.Embedding) or norm is None:
        raise ValueError(
            f"a {type(model).__name__} has no word vectors that could move: expected `words`, an nn.Embedding, "
            "`token_norm`, and a forward pass that adds `offset`"
        )
    if not radius > 0 or (unit is not None and not unit > 0):
        raise ValueError(
            f"radius and unit must be above 0; got {radius:g}" + ("" if unit is None else f", unit={unit:g}")
        )
    if isinstance(data, Texts):
        _tell(model, data.lexicon, data)
    return EmbeddingBall(radius, vectors.embedding_dim, float(norm) if unit is None else unit, per)


TEXT_THREATS: dict[str, Builder] = {"words": words, "characters": characters, "embedding": embedding}
