"""Searches without gradients among the rows that the rules permit: one step at a time, and by evolution.

Shapes: B rows, D columns, P members of a population, Q candidates of a row.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from sparring.attacks.starts import check_logits, crafting
from sparring.core.geometry import per_example
from sparring.core.noise import Noise
from sparring.core.objectives import margin
from sparring.core.registry import Builder
from sparring.core.types import Attacker, AttackResult, Cost, Model, labels_of, take
from sparring.modalities.tables.threats import Columns, Rows
from sparring.threats.base import ThreatModel

AT_ONCE = 20_000
"""Rows that are realized together: more would not be faster, and need memory."""
_SHARES = (-1.0, -0.5, 0.0, 0.5, 1.0)
"""What the greedy search tries of what the radius leaves for a column."""


@dataclass
class _Best:
    """What was found so far for all rows, and the queries."""

    z: Tensor
    loss: Tensor
    reached: Tensor
    queries: int = 0

    def see(self, rows: Tensor, z: Tensor, score: Tensor) -> None:
        """Keeps the best of candidates z (b, Q, D) with scores (b, Q) for the rows (b,)."""
        top, which = score.max(1)
        better = top > self.loss[rows]
        self.z[rows] = torch.where(better[:, None], z[torch.arange(len(z), device=z.device), which], self.z[rows])
        self.loss[rows] = torch.where(better, top, self.loss[rows])
        self.reached[rows] |= top > 0

    def open(self, x: Rows) -> Tensor:
        """Numbers of the rows that are the opponent's and do not fool yet."""
        return (x["may_change"] & ~self.reached).nonzero()[:, 0]


def _scores(threat: Columns, model: Model, x: Rows, z: Tensor, label: Tensor, best: _Best) -> tuple[Tensor, Tensor]:
    """What candidates z (b, Q, D) come to once realized, as changes (b, Q, D), and their margins (b, Q)."""
    num, many, width = z.shape
    index = torch.arange(num, device=z.device).repeat_interleave(many)
    made, scores = [], []
    for some, part in zip(index.split(AT_ONCE), z.reshape(-1, width).split(AT_ONCE), strict=True):
        near = take(x, some)
        real = take(threat, some).realize(near, part)
        logits = model(real)
        check_logits(logits, len(some))
        score = margin.score(logits, label[some])
        scores.append(score.where(logits.isfinite().all(1), -torch.inf))
        made.append(threat.measured(near, real["rows"]))
    best.queries += num * many
    return torch.cat(made).view(num, many, width), torch.cat(scores).view(num, many)


@dataclass(frozen=True)
class TableSearch(ABC):
    """What both searches share: the clean row first, then rounds on the rows that do not fool yet."""

    threat: Columns
    needs_grad: ClassVar[bool] = False
    per_example: ClassVar[tuple[str, ...]] = ("threat",)

    @torch.no_grad()
    def __call__(self, model: Model, x: Any, target: Tensor, *, noise: Any = None) -> AttackResult:
        with crafting(self.threat, model, x, target, noise) as (frozen, x, target, noise):
            label, z = labels_of(target), self.threat.null(x)
            first = margin.score(frozen(x), label)
            best = _Best(z, first, first > 0, len(z))
            self.rounds(frozen, x, label, noise, best)
            x_adv = self.threat.realize(x, best.z)
            cost = Cost(best.queries)
            return AttackResult(x_adv, best.z, self.threat.size(x, best.z), best.loss, best.reached, cost)

    @abstractmethod
    def rounds(self, model: Model, x: Rows, label: Tensor, noise: Noise, best: _Best) -> None:
        """Improves `best`."""


@dataclass(frozen=True)
class Greedy(TableSearch):
    """Sets one column at a time to what raises the margin most; see `greedy_columns`."""

    num_rounds: int = 4

    def rounds(self, model: Model, x: Rows, label: Tensor, noise: Noise, best: _Best) -> None:
        free = self.threat._facts(x).free.nonzero()[:, 0]
        at = best.z.clone()
        for _ in range(self.num_rounds):
            rows = best.open(x)
            if not len(rows) or not len(free):
                return
            threat, near, now = take(self.threat, rows), take(x, rows), at[rows]
            low, high = threat.room(near)
            shares = torch.tensor(_SHARES, dtype=now.dtype, device=now.device)
            tried = (_left(threat, now)[:, :, None] * shares).clamp(low[:, :, None], high[:, :, None])[:, free]
            many = len(free) * len(_SHARES)
            z = now[:, None].repeat(1, many, 1)
            place = free.repeat_interleave(len(_SHARES)).expand(len(rows), -1)[..., None]
            z.scatter_(2, place, tried.reshape(len(rows), many, 1))
            made, score = _scores(threat, model, near, z, label[rows], best)
            best.see(rows, z, score)
            at[rows] = made[torch.arange(len(rows), device=z.device), score.argmax(1)]


def _left(threat: Columns, z: Tensor) -> Tensor:
    """(B, ..., D) how far each column may go alone, the others as they are."""
    radius, size = per_example(threat.radius, z), z.abs()
    if threat.measure == "linf":
        return torch.zeros_like(z) + radius
    if threat.measure == "l1":
        return (radius - (size.sum(-1, keepdim=True) - size)).clamp_min(0)
    return (radius**2 - ((z**2).sum(-1, keepdim=True) - z**2)).clamp_min(0).sqrt()


@dataclass(frozen=True)
class Evolution(TableSearch):
    """Rows compete by their margin, mix and mutate; see `evolve`."""

    num_generations: int = 60
    population: int = 32

    def rounds(self, model: Model, x: Rows, label: Tensor, noise: Noise, best: _Best) -> None:
        width, size = best.z.shape[1], self.population
        members = best.z[:, None].repeat(1, size, 1)  # as they were realized
        scores = best.loss[:, None].repeat(1, size)
        for t in range(self.num_generations):
            rows = best.open(x)
            if not len(rows):
                return
            threat, near, old = take(self.threat, rows), take(x, rows), members[rows]
            children = self.children(threat, near, old, noise.take(rows), t)
            made, score = _scores(threat, model, near, children, label[rows], best)
            best.see(rows, children, score)
            pool, ranks = torch.cat([old, made], 1), torch.cat([scores[rows], score], 1)
            ranks, order = ranks.sort(dim=1, descending=True, stable=True)
            pool = pool.gather(1, order[..., None].expand(-1, -1, width))
            twin = torch.nn.functional.pad((pool[:, 1:] == pool[:, :-1]).all(2), (1, 0))  # else all become one row
            ranks, again = ranks.masked_fill(twin, -torch.inf).sort(dim=1, descending=True, stable=True)
            members[rows] = pool.gather(1, again[:, :size, None].expand(-1, -1, width))
            scores[rows] = ranks[:, :size]

    def children(self, threat: Columns, x: Rows, old: Tensor, noise: Noise, t: int) -> Tensor:
        """(b, P, D): a better member, with a quarter of the columns of another one, and one to four drawn anew."""
        num, size, _ = old.shape
        s, facts = threat.schema, threat._facts(x)
        at = torch.from_numpy(s.movable | s.derived).to(old.device).nonzero()[:, 0]  # all else stays 0
        u = noise.uniform((size, 3 * len(at) + 3), draw=t + 1).to(old)
        mix, move, value, rest = u.split([len(at)] * 3 + [3], 2)
        half, each = (rest[:, :, :2] ** 2 * size).long(), torch.arange(num, device=old.device)[:, None]
        one, other = (old[:, :, at][each, half[:, :, i]] for i in range(2))
        child = torch.where(mix < 0.25, other, one)
        free = threat._free(x)[:, at]
        among = move.masked_fill(~free[:, None], -1.0)
        count = 1 + (rest[:, :, 2:] * 4).long()
        order = among.argsort(dim=2, descending=True, stable=True)
        low, high = (end[:, None, at] for end in threat.room(x))
        # back, one step down or up, to either end of what is left, or anywhere between
        left, rows = _left(threat, child), x["rows"]
        down, up = (threat.measured(x, rows + sign * facts.step)[:, None, at] for sign in (-1, 1))
        ends = torch.where(value < 0.6, left.where(value < 0.5, -left), (5 * value - 4) * left)
        steps = child + torch.where(value < 0.3, down, up)
        drawn = torch.where(value < 0.2, 0.0, steps.where(value < 0.4, ends)).clamp(low, high)
        child = torch.where((order.argsort(2) < count) & free[:, None], drawn, child)
        found = torch.zeros_like(child).scatter(2, order, _within_radius(threat, child.gather(2, order)))
        return torch.zeros_like(old).index_copy(2, at, found)


def _within_radius(threat: Columns, z: Tensor) -> Tensor:
    """Each column (of b, P, D, in order) up to what those before it leave of the radius: whole steps stay whole."""
    radius, power = per_example(threat.radius, z), 2 if threat.measure == "l2" else 1
    spent = (z.abs() ** power).cumsum(2) - z.abs() ** power
    most = radius + 0 * z if threat.measure == "linf" else (radius**power - spent).clamp_min(0) ** (1 / power)
    return z.clamp(-most, most)


def greedy_columns(threat: ThreatModel, *, rounds: int = 4) -> Attacker:
    """A search without gradients: in each round every column is tried at five values, and the best change stays.

    Values: both ends of what the radius leaves for the column, half of each, and the clean one. Raises TypeError for
    threats other than `columns`, ValueError for fewer than one round.

    Source: the greedy coordinate search of many papers on tables, such as Yang 2020 ("Greedy Attack and Gumbel
    Attack"); the values are ours.
    """
    _check(threat, "greedy", rounds=rounds)
    return Greedy(threat, rounds)  # type: ignore[arg-type]


def evolve(threat: ThreatModel, *, generations: int = 60, population: int = 32) -> Attacker:
    """A search without gradients: a population of each row, mixed, mutated, realized, and chosen by the margin alone.

    All rows at once; `generations` x `population` queries of each row that does not fall. Raises TypeError for threats
    other than `columns`, ValueError for counts below one.

    Source: after MoEvA2 (Simonetto 2022, "A unified framework for adversarial attack and defense in constrained feature
    space"), which ranks misclassification, distance and broken rules (NSGA); here every candidate is lawful and within
    the radius, so that the margin is the only aim.
    """
    _check(threat, "evolve", generations=generations, population=population)
    return Evolution(threat, generations, population)  # type: ignore[arg-type]


def _check(threat: ThreatModel, name: str, **counts: int) -> None:
    if not isinstance(threat, Columns):
        raise TypeError(f"{name} searches rows of a table; got the threat {type(threat).__name__}, expected `columns`")
    for option, count in counts.items():
        if count < 1:
            raise ValueError(f"{name}: {option}={count}; expected at least 1")


TABLE_ATTACKS: dict[str, Builder] = {"evolve": evolve, "greedy": greedy_columns}


def fast_for_tables(threat: ThreatModel) -> str:
    """A gradient attack and two searches, 20 x 16 and 2 rounds of queries for each row that stands."""
    return f"{_gradients(threat, 20)},greedy:rounds=2,evolve:generations=20,population=16"


def full_for_tables(threat: ThreatModel) -> str:
    """Two gradient attacks with restarts, greedy in 4 rounds, evolution of 60 x 32 twice."""
    return f"pgd:num_steps=40,restarts=2,{_gradients(threat, 50)},greedy,evolve,evolve:population=48"


def queries_for_tables(threat: ThreatModel) -> str:
    """Searches alone, for models without a gradient: greedy in 4 rounds, evolution of 60 x 32."""
    return "greedy,evolve"


def _gradients(threat: ThreatModel, steps: int) -> str:
    return f"apgd:num_steps={steps},objective=margin" + (",slide:num_steps=20" if threat.norm == "l1" else "")


TABLE_PLANS = {"fast": fast_for_tables, "full": full_for_tables, "queries": queries_for_tables}
