"""The way through the batches of an evaluation: which are computed here, which were before, and how far it is."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sparring.core.model_state import aligned
from sparring.core.types import Cost, Inputs, Model, device_of, map_inputs, size, take
from sparring.evaluation.fingerprint import describe, digest, digest_of_model, digest_of_package
from sparring.evaluation.one_batch import Plan, judge
from sparring.evaluation.parts import Part
from sparring.evaluation.preflight import Preflight, check_data, preflight
from sparring.evaluation.shards import Crew
from sparring.evaluation.shelf import Key, Shelf
from sparring.evaluation.verify import AttackRecord, Batch
from sparring.results.findings import Finding


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


@dataclass
class Walk:
    """One pass over the batches."""

    plan: Plan
    seed: int
    shelf: Shelf | None
    crew: Crew
    observe: Callable[[Progress], object] | None
    done: int = 0
    fresh: int = 0
    kept: int = 0
    planned: int = 0
    batches: int | None = None
    cost: Cost = field(default_factory=Cost)
    model: Any = None

    def over(
        self, model: Model | Preflight, batches: Iterable[tuple[Inputs, Tensor]]
    ) -> Iterator[tuple[Key, Part | None]]:
        """For each batch what its part is known by, and the part, None where another process computes it."""
        self._count(batches)
        number = 0
        findings: list[Finding] = []
        for x, y in batches:
            if number and not size(x):
                continue
            if number == 0:
                checked = model if isinstance(model, Preflight) else preflight(model, x, y, self.plan.threat)
                self.model, findings = checked.model, list(checked.findings)
            x = map_inputs(aligned, x)  # so that whoever goes on gets the same bits
            key = Key(number, self.done, digest(x, y) if self.shelf else "")
            part = None
            if self.crew.mine(number):
                part = self.shelf.read(key) if self.shelf else None
                if part is None:
                    part = self._compute(key, self.model, x, y, [] if number else findings)
                self.cost = self.cost.plus(part.cost)
            self.done += size(x)
            if part:
                self._tell(0, "", Cost())
            number += 1
            yield key, part

    def _compute(self, key: Key, model: Model, x: Inputs, y: Tensor, findings: list[Finding]) -> Part:
        threat, index = self.plan.threat, torch.arange(self.done, self.done + size(x), device=device_of(x))
        check_data(x, take(threat, index))
        part = judge(Batch(model, x, y.to(device_of(x)), index, threat, self.seed), self.plan, self._tell)
        part.findings = findings
        if self.shelf:
            self.shelf.write(key, part)
        self.fresh += 1
        return part

    def _count(self, batches: Any) -> None:
        there = set(self.shelf.numbers()) if self.shelf else set()
        self.kept = len(there)
        with suppress(TypeError):  # a stream has no length
            self.batches = len(batches)
            self.planned = sum(self.crew.mine(number) for number in {*range(self.batches)} - there)

    def _tell(self, stage: int, running: str, cost: Cost) -> None:
        """Tells the observer; what an earlier run did is no work of this one."""
        if self.observe:
            share = (self.fresh + stage / self.plan.num_stages) / max(1, self.planned)
            fraction = None if self.batches is None else min(1.0, share)
            self.observe(Progress(self.done, self.batches, self.kept, self.cost.plus(cost), running, fraction))


def settings_of(plan: Plan, model: Model, seed: int, about: str) -> dict[str, Any]:
    """Everything that decides about the parts but the batches themselves, as plain data."""

    def told(records: Sequence[AttackRecord]) -> list[Any]:
        both = ((record, record.make(plan.threat)) for record in records)
        return [
            [r.name, r.margin_at_most, describe(r.make, exact=True), describe(attack, exact=True)] for r, attack in both
        ]

    return {
        "about": about, "model": digest_of_model(model), "threat": describe(plan.threat, exact=True), "seed": seed,
        "attacks": told(plan.records), "curve_attacks": told(plan.curve_records), "curve": list(plan.factors),
        "certify": describe(plan.certify, exact=True), "gallery_size": plan.gallery_size,
        "sparring": version("sparring"), "code": digest_of_package(), "torch": torch.__version__,
    }  # fmt: skip
