"""All batches of an evaluation: which are computed here, which were before, how far it is, and what they add up to."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from functools import reduce
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sparring.core.machine import Machine
from sparring.core.model_state import aligned
from sparring.core.types import Cost, Inputs, Model, device_of, map_inputs, size, take
from sparring.evaluation.fingerprint import digest
from sparring.evaluation.kept import BatchKey, Kept
from sparring.evaluation.one_batch import AttackRecord, Batch, BatchOutcome, BatchPlan, Measuring, stacked
from sparring.threats.inputs import PreflightError, check_inputs, pair_of


class Progress(NamedTuple):
    """How far an evaluation is; told before each attack of each batch, and after each batch.

    done: examples with a verdict. batches: how many there are, None when that is not known. kept: how many of them an
    earlier run had finished. cost: of all so far. running: what comes now. fraction: of the work of this process in
    this run, from 0 to 1, counted in batches and attacks; None when `batches` is.
    """

    done: int
    batches: int | None
    kept: int
    cost: Cost
    running: str
    fraction: float | None


class AllBatches:
    """One pass over the batches of an evaluation, in this process. batches: how many there are, where that is known."""

    def __init__(
        self, plan: BatchPlan, machine: Machine, kept: Kept | None, observe: Callable[[Progress], object] | None,
        batches: int | None, numbers: Tensor | None = None,
    ) -> None:  # fmt: skip
        self.plan, self.machine, self.kept, self.observe, self.batches = plan, machine, kept, observe, batches
        self.numbers = numbers
        there = kept.numbers() if kept else []
        self.num_kept, self.num_fresh, self.done, self.cost = len(there), 0, 0, Cost()
        self.planned = sum(machine.mine(number) for number in {*range(batches or 0)} - {*there})

    def run(self, model: Model, batches: Iterable[Any]) -> BatchOutcome:
        """The whole, of all processes. Raises RuntimeError where they saw other batches, or one of them ended."""
        seen: list[str] = []
        own: list[tuple[int, BatchOutcome]] = []
        room = self.plan.gallery_size
        types = None
        for batch in batches:
            (x, y), number = pair_of(batch), len(seen)
            types = types or _types(x)
            if _types(x) != types:
                raise PreflightError(
                    f"batch {number}: inputs are {_types(x)}, as those of the first batch were {types}; expected one "
                    "type, since a model computes otherwise in another"
                )
            if number and not size(x):
                continue
            key = BatchKey(number, self.done, digest(x, y) if self.kept or self.machine.world > 1 else "")
            seen.append(key.content)
            if not self.machine.mine(number):
                self.done += size(x)
                continue
            kept = self.kept.read(key) if self.kept else None
            known = kept is not None and torch.equal(kept.table["label"], y.cpu())
            outcome = kept if kept and known else self._compute(key, model, x, y)
            # copies of the first pictures alone, so that the others are not held
            outcome.gallery = {name: value[:room].clone() for name, value in outcome.gallery.items()} if room else {}
            room -= len(outcome.gallery.get("index", ()))
            own.append((number, outcome))
            self.cost = self.cost.plus(outcome.cost)
            self.done += size(x)
            self._tell(0, "", Cost())
        told = self.machine.gather((digest(*seen), own))
        if differ := [rank for rank, (theirs, _) in enumerate(told) if theirs != told[self.machine.rank][0]]:
            raise RuntimeError(
                f"process {differ[0]} saw other batches than process {self.machine.rank}: all processes must see the "
                "same batches in the same order (unshuffled), or their parts do not make a whole"
            )
        numbered = sorted((pair for _, theirs in told for pair in theirs), key=lambda pair: pair[0])
        return merge([outcome for _, outcome in numbered], self.plan.gallery_size)

    def _compute(self, key: BatchKey, model: Model, x: Inputs, y: Tensor) -> BatchOutcome:
        own = torch.arange(key.first, key.first + size(x))
        index = (own if self.numbers is None else self.numbers[own]).to(device_of(x))
        x = map_inputs(aligned, x)  # so that whoever goes on gets the same bits
        check_inputs(x, take(self.plan.threat, index))
        outcome = Measuring(Batch(model, x, y.to(device_of(x)), index), self.plan, self._tell).run()
        if self.kept:
            self.kept.write(key, outcome)
        self.num_fresh += 1
        return outcome

    def _tell(self, stage: int, running: str, cost: Cost) -> None:
        """Tells the observer; what an earlier run did is no work of this one."""
        if self.observe:
            share = (self.num_fresh + stage / self.plan.num_stages) / max(1, self.planned)
            fraction = None if self.batches is None else min(1.0, share)
            self.observe(Progress(self.done, self.batches, self.num_kept, self.cost.plus(cost), running, fraction))


def count_batches(batches: Any) -> int | None:
    """How many there are; None for a stream, which has no length."""
    with suppress(TypeError):
        return len(batches)
    return None


def _types(x: Inputs) -> str:
    """The type of the inputs, in words."""
    return str(x.dtype) if isinstance(x, Tensor) else ", ".join(f"{name} {t.dtype}" for name, t in x.items())


def merge(outcomes: Sequence[BatchOutcome], gallery_size: int) -> BatchOutcome:
    """One outcome of them all, in that order, with the first `gallery_size` pictures. Raises ValueError for none."""
    if not outcomes:
        raise ValueError("there is nothing to evaluate: not one batch was given")
    pictures = _joined([outcome.gallery for outcome in outcomes if outcome.gallery])
    return BatchOutcome(
        table=_joined([outcome.table for outcome in outcomes]),
        stands_at=_joined([outcome.stands_at for outcome in outcomes]),
        attacks=_added([outcome.attacks for outcome in outcomes]),
        curve_attacks=_added([outcome.curve_attacks for outcome in outcomes]),
        gallery={name: value[:gallery_size] for name, value in pictures.items()} if gallery_size else {},
        cost=reduce(Cost.plus, [outcome.cost for outcome in outcomes]),
        seconds=sum(outcome.seconds for outcome in outcomes),
    )


def _joined(tables: Sequence[dict[Any, Tensor]]) -> dict[Any, Tensor]:
    return {name: stacked([table[name] for table in tables]) for name in (tables[0] if tables else ())}


def _added(records: Sequence[list[AttackRecord]]) -> list[AttackRecord]:
    return [reduce(AttackRecord.plus, of_one) for of_one in zip(*records, strict=True)]
