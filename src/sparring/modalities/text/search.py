"""Searches over real texts that need no gradient: greedy, word after word, and the full search over all single changes.

Shapes: B texts, L units, K substitutes; n candidates of many texts at once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from sparring.attacks.starts import crafting
from sparring.core.noise import Noise
from sparring.core.objectives import Objective, margin
from sparring.core.types import Attacker, AttackResult, Cost, Inputs, Model, size, take
from sparring.modalities.text.threats import Substitutions
from sparring.modalities.text.tokens import UNKNOWN

CANDIDATES, _STEP = 4096, 8
"""How many texts a model is shown at once; to a multiple of what their lengths are rounded up for it."""
Rank = Literal["leave-one-out", "gradient"]


class WordSearch:
    """The state of a search: for each text the substitute chosen at each place (-1: the word itself), and its score.

    Candidates of all texts that are still searched go to the model together.
    """

    def __init__(self, threat: Substitutions, model: Model, x: Any, y: Tensor, objective: Objective) -> None:
        self.threat, self.model, self.y, self.objective = threat, model, y, objective
        longest = int(x["mask"].sum(1).max())
        self.full, self.x = x, {name: tensor[:, :longest] for name, tensor in x.items()}
        self.open, self.choices, self.budget = threat.open(self.x), threat.choices(self.x), threat.budget(self.x)
        self.picked = torch.full_like(self.x["ids"], -1)
        self.forwards = 0
        every = torch.arange(len(y), device=y.device)
        self.score, self.reached = self.ask(every, self.x["ids"])

    def ask(self, rows: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        """(n,) score and whether the goal is reached, of texts (n, L) that are forms of `rows` (n,).

        Texts of about one length go together, since padding is paid for; but first all, whose logits are looked at.
        """
        if not len(rows):
            return self.score[rows], self.reached[rows]
        step = _STEP if self.forwards else ids.shape[1]
        self.forwards += len(rows)
        width = (self.x["mask"].sum(1)[rows] + step - 1) // step * step
        alike = [(width == own).nonzero()[:, 0] for own in width.unique()]
        parts = [part for group in alike for part in group.split(CANDIDATES)]
        found = []
        for part in parts:
            shown = {**take(self.x, rows[part]), "ids": ids[part]}
            shown = {name: tensor[:, : int(width[part[0]])] for name, tensor in shown.items()}
            logits, label = self.model(shown), self.y[rows[part]]
            found.append((self.objective.score(logits, label), self.objective.reached(logits, label)))
        back = torch.cat(parts).argsort()
        score, reached = (torch.cat(column)[back] for column in zip(*found, strict=True))
        return score.nan_to_num(-torch.inf), reached & score.isfinite()

    def ids(self, rows: Tensor) -> Tensor:
        """(n, L) the texts as they are now."""
        return self.choices[rows].gather(2, self.picked[rows][..., None] + 1)[..., 0]

    def changed(self) -> Tensor:
        """(B,) how many words are not the original ones."""
        return (self.picked >= 0).sum(1)

    def try_out(self, rows: Tensor, place: Tensor, number: Tensor) -> tuple[Tensor, Tensor]:
        """The score (n,) of each of `rows` with one more substitute, and the texts that fall by it."""
        ids = self.ids(rows)
        new = self.choices[rows, place, number + 1]
        return self.ask(rows, ids.scatter(1, place[:, None], new[:, None]))

    def take_best(self, rows: Tensor, place: Tensor, number: Tensor) -> Tensor:
        """Tries all, and takes for each text the best one where it beats what it has; (B,) bool, which texts moved."""
        score, reached = self.try_out(rows, place, number)
        best = torch.full_like(self.score, -torch.inf).scatter_reduce(0, rows, score, "amax")
        moved = best > self.score
        first = torch.full_like(self.y, len(rows)).scatter_reduce(
            0, rows, torch.where(score == best[rows], torch.arange(len(rows), device=rows.device), len(rows)), "amin"
        )
        text = moved.nonzero()[:, 0]
        chosen = first[text]
        self.picked[text, place[chosen]] = number[chosen]
        self.score[text], self.reached[text] = score[chosen], reached[chosen]
        return moved

    def result(self) -> AttackResult:
        """What was found, as corners of the threat's set in the length that came in."""
        short = torch.zeros_like(self.open, dtype=torch.float32)
        short.scatter_(2, self.picked.clamp_min(0)[..., None], (self.picked >= 0)[..., None].float())
        z = self.threat.null(self.full)
        z[:, : short.shape[1]] = short
        cost = Cost(self.forwards)
        return AttackResult(
            self.threat.realize(self.full, z), z, self.threat.size(self.full, z), self.score, self.reached, cost
        )


@dataclass(frozen=True)
class GreedySearch:
    """Ranks the words of a text once, then goes along: each becomes the substitute that helps most, if one helps.

    rank "leave-one-out": by what is lost when the word is unknown (no gradient at all); "gradient": by the first-order
    gain of the best substitute. Stops at the goal, or when as many words are changed as may be.
    """

    threat: Substitutions
    rank: Rank = "leave-one-out"
    objective: Objective = margin
    per_example: ClassVar[tuple[str, ...]] = ("threat", "objective")

    @property
    def needs_grad(self) -> bool:
        """Whether the ranking takes a gradient."""
        return self.rank == "gradient"

    def __call__(self, model: Model, x: Inputs, target: Tensor, *, noise: Noise | None = None) -> AttackResult:
        with crafting(self.threat, model, x, target, noise) as (frozen, x, target, noise):
            by_grad = self._by_gradient(frozen, x, target) if self.needs_grad else None
            with torch.no_grad():
                search = WordSearch(self.threat, frozen, x, target, self.objective)
                weight = self._left_out(search) if by_grad is None else by_grad[:, : search.open.shape[1]]
                self._go_along(search, weight.masked_fill(~search.open.any(2), -torch.inf))
                result = search.result()
        return result._replace(cost=result.cost.plus(Cost(size(x), size(x)) if self.needs_grad else Cost()))

    def _by_gradient(self, model: Model, x: Any, target: Tensor) -> Tensor:
        """(B, L) what the best substitute of each place promises."""
        z = self.threat.null(x).requires_grad_()
        with torch.enable_grad():
            score = self.objective.score(model(self.threat.apply(x, z)), target).sum()
        grad = torch.autograd.grad(score, z)[0]
        return grad.where(self.threat.open(x), -torch.inf).amax(2)

    def _left_out(self, search: WordSearch) -> Tensor:
        """(B, L) the score without each word that has substitutes."""
        rows, place = (search.open.any(2) & ~search.reached[:, None]).nonzero(as_tuple=True)
        weight = torch.full(search.picked.shape, -torch.inf, device=search.score.device)
        if len(rows):
            ids = search.x["ids"][rows].scatter(1, place[:, None], UNKNOWN)
            weight[rows, place] = search.ask(rows, ids)[0]
        return weight

    def _go_along(self, search: WordSearch, weight: Tensor) -> None:
        order = weight.argsort(dim=1, descending=True, stable=True)
        for turn in range(order.shape[1]):
            place = order[:, turn]
            here = torch.arange(len(place), device=place.device)
            on = ~search.reached & (search.changed() < search.budget) & search.open[here, place].any(1)
            rows, number = (search.open[here, place] & on[:, None]).nonzero(as_tuple=True)
            if not len(rows):
                if turn >= int(search.open.any(2).sum(1).max()) or bool(search.reached.all()):
                    break
                continue
            search.take_best(rows, place[rows], number)


@dataclass(frozen=True)
class FullSearch:
    """Tries every single change of every word (also of one that is changed already, also back), takes the best, again.

    Steepest ascent over texts that differ in one word, until the goal is reached or nothing helps; num_rounds bounds
    it. Stronger than the greedy search, which looks at each word once.
    """

    threat: Substitutions
    num_rounds: int = 50
    objective: Objective = margin
    needs_grad: ClassVar[bool] = False
    per_example: ClassVar[tuple[str, ...]] = ("threat", "objective")

    def __call__(self, model: Model, x: Inputs, target: Tensor, *, noise: Noise | None = None) -> AttackResult:
        with crafting(self.threat, model, x, target, noise) as (frozen, x, target, noise), torch.no_grad():
            search = WordSearch(self.threat, frozen, x, target, self.objective)
            on = torch.ones_like(search.reached)
            for _ in range(self.num_rounds):
                on = on & ~search.reached
                rows, place, number = self._changes(search, on)
                if not len(rows):
                    break
                on = on & search.take_best(rows, place, number)
            return search.result()

    def _changes(self, search: WordSearch, on: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Every single change that is permitted now: (rows, places, numbers), -1 for the word itself again."""
        may = search.open & on[:, None, None]
        full = (search.changed() >= search.budget)[:, None] & (search.picked < 0)
        may = may & ~full[..., None]
        number = torch.arange(may.shape[2], device=may.device)
        may = may & (number != search.picked[..., None])
        back = (search.picked >= 0) & on[:, None]
        rows, place, slot = torch.cat([back[..., None], may], 2).nonzero(as_tuple=True)
        return rows, place, slot - 1


def greedy(threat: Any, *, rank: Rank = "leave-one-out", objective: Objective = margin) -> Attacker:
    """Word after word, the weightiest first, each to its best substitute; ranked without gradients, or by one.

    Source: Jin 2020 (TextFooler): ranking by deletion, then the best substitute; without its filters for part of speech
    and similarity, which the list has to bring. rank=gradient as in Yoo and Qi 2021 (A2T).
    """
    return GreedySearch(of_words(threat, "greedy"), rank, objective)


def full_search(threat: Any, *, num_rounds: int = 50, objective: Objective = margin) -> Attacker:
    """The best of all single changes, again and again, until the answer turns or nothing helps.

    Source: steepest-ascent hill climbing; for texts the `GreedySearch` of Morris 2020 (TextAttack), where words may not
    change again.
    """
    return FullSearch(of_words(threat, "full-search"), num_rounds, objective)


def of_words(threat: Any, name: str) -> Substitutions:
    """The threat, where it replaces words. Raises ValueError for others."""
    if not isinstance(threat, Substitutions):
        raise ValueError(f"{name} replaces words; the threat is {threat.text()}, not one such as words:1.0")
    return threat
