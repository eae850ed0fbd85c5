"""The genetic search over real texts, which needs no gradient.

Shapes: B texts, P members of a population, L units, K substitutes; n members of many texts at once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from sparring.attacks.starts import crafting
from sparring.core.noise import Noise
from sparring.core.objectives import Objective, margin
from sparring.core.types import Attacker, AttackResult, Inputs, Model
from sparring.modalities.text.search import WordSearch, of_words
from sparring.modalities.text.threats import Substitutions

_TEMPERATURE = 0.3
"""Of the softmax by which parents are drawn, as in the authors' code."""


@dataclass(frozen=True)
class GeneticSearch:
    """A population of each text: parents are drawn by their scores, mixed word by word, and one word is changed anew.

    The word is drawn by how many substitutes it has, and becomes the best of them: K queries for each child. The best
    member lives on. Stops at the goal, or after `num_generations`.
    """

    threat: Substitutions
    num_generations: int = 20
    population: int = 20
    objective: Objective = margin
    needs_grad: ClassVar[bool] = False
    per_example: ClassVar[tuple[str, ...]] = ("threat", "objective")

    def __post_init__(self) -> None:
        if self.num_generations < 1 or self.population < 2:
            raise ValueError(
                f"genetic: num_generations={self.num_generations}, population={self.population}; expected at least 1 "
                "generation of at least 2"
            )

    def __call__(self, model: Model, x: Inputs, target: Tensor, *, noise: Noise | None = None) -> AttackResult:
        with crafting(self.threat, model, x, target, noise) as (frozen, x, target, noise), torch.no_grad():
            search = WordSearch(self.threat, frozen, x, target, self.objective)
            members = search.picked[:, None].repeat(1, self.population, 1)
            scores = search.score[:, None].repeat(1, self.population)
            for generation in range(self.num_generations):
                rows = (~search.reached & search.open.flatten(1).any(1) & (search.budget > 0)).nonzero()[:, 0]
                if not len(rows):
                    break
                draws = noise.take(rows).restart(generation)
                children = members[rows]
                if generation:
                    children = self._mixed(search, rows, children, scores[rows], draws)
                members[rows], scores[rows] = self._mutated(search, rows, children, draws)
                if generation:  # the best so far, in place of the first child
                    members[rows, 0], scores[rows, 0] = search.picked[rows], search.score[rows]
                self._keep(search, rows, members[rows], scores[rows])
            return search.result()

    def _mixed(self, search: WordSearch, rows: Tensor, members: Tensor, scores: Tensor, draws: Noise) -> Tensor:
        """(b, P, L) each child has every word from one of two parents; of too many changes the last ones are undone."""
        num, size, length = members.shape
        upto = (scores / _TEMPERATURE).softmax(1).cumsum(1)
        drawn = draws.uniform((2, size), draw=1).to(upto)
        parents = torch.searchsorted(upto, drawn.flatten(1)).clamp_max(size - 1).view(num, 2, size)
        one, other = (members.gather(1, parents[:, k, :, None].expand(-1, -1, length)) for k in range(2))
        first = draws.uniform((size, search.full["ids"].shape[1]), draw=2)[:, :, :length] < 0.5
        child = torch.where(first.to(one.device), one, other)
        over = (child >= 0).cumsum(2) > search.budget[rows][:, None, None]
        return child.masked_fill(over, -1)

    def _mutated(self, search: WordSearch, rows: Tensor, members: Tensor, draws: Noise) -> tuple[Tensor, Tensor]:
        """The members (b, P, L) with one word each at its best substitute, and their scores (b, P)."""
        num, size, length = members.shape
        may = search.open[rows].sum(2).float()[:, None].expand(num, size, length)
        full = ((members >= 0).sum(2) >= search.budget[rows][:, None])[..., None]
        may = torch.where(full & (members < 0), 0.0, may)
        drawn = draws.uniform((size,), draw=3).to(may.device)[..., None] * may.sum(2, keepdim=True)
        place = torch.searchsorted(may.cumsum(2), drawn, right=True).clamp_max(length - 1)
        open_here = search.open[rows][:, None].expand(-1, size, -1, -1)
        open_here = open_here.gather(2, place[..., None].expand(-1, -1, -1, search.open.shape[2]))[:, :, 0]
        of, member, number = open_here.nonzero(as_tuple=True)
        tried = members[of, member].scatter(1, place[of, member], number[:, None])
        ids = search.choices[rows[of]].gather(2, tried[..., None] + 1)[..., 0]
        found = torch.full(open_here.shape, -torch.inf, device=search.score.device)
        found[of, member, number] = search.ask(rows[of], ids)[0]
        score, best = found.max(2)
        return members.scatter(2, place, best[..., None]), score

    def _keep(self, search: WordSearch, rows: Tensor, members: Tensor, scores: Tensor) -> None:
        """What is best so far."""
        score, best = scores.max(1)
        better = score > search.score[rows]
        taken, member = rows[better], members[torch.arange(len(rows), device=rows.device), best][better]
        search.picked[taken], search.score[taken] = member, score[better]
        search.reached[taken] = search.ask(taken, search.ids(taken))[1]


def genetic(threat: Any, *, num_generations: int = 20, population: int = 20, objective: Objective = margin) -> Attacker:
    """Populations of texts that are mixed and mutated; no gradient.

    Source: Alzantot 2018, "Generating natural language adversarial examples", without its language model: substitutes
    are those of the list. Parents are drawn by margins, theirs by the probability of the wanted class.
    """
    return GeneticSearch(of_words(threat, "genetic"), num_generations, population, objective)
