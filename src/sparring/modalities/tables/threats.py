"""Rows of a table under an opponent who obeys the rules: z is the change of each column in units.

Shapes: B rows, D columns. Inputs are {"rows" (B, D) float64, "may_change" (B,) bool}.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from sparring.core import geometry
from sparring.core.geometry import per_example
from sparring.core.noise import Noise
from sparring.core.registry import text_of
from sparring.core.types import take
from sparring.modalities.base import Dataset
from sparring.modalities.tables.check import unlawful
from sparring.modalities.tables.rules import FOLLOWS, compute, kept
from sparring.modalities.tables.schema import Schema
from sparring.threats.base import ThreatModel, not_finite

Rows = Mapping[str, Tensor]
NORMS = ("l2", "l1", "linf")
SHRINKS = (1.0, 0.75, 0.5, 0.25, 0.1)
"""What is tried of a change that the rules do not let through, before the row stays as it is."""


class _Facts(NamedTuple):
    """The schema's arrays where the rows are; `free`: columns that the opponent sets, and that do not follow."""

    unit: Tensor
    log: Tensor
    low: Tensor
    high: Tensor
    step: Tensor
    grows: Tensor
    falls: Tensor
    free: Tensor


@dataclass(frozen=True)
class Columns(ThreatModel):
    """Changes whose `measure` norm, in units of the columns, is at most `radius`, of rows that the rules permit.

    z (B, D): change in units; of columns on a log scale, of log(1 + value) in units. `project` knows ranges, directions
    and the norm. `realize` goes on to rows that exist: values snap towards the clean ones, columns that follow are
    computed, columns of a rule that would newly break go back, and what is still against the rules is shrunk; if need
    be to the clean row. So every realized row is lawful, and its own change at most the radius. `apply` shows the model
    that row, with the gradient of z before the snap; relaxed: the row before the snap (for training: cheaper).
    units: "schema", or "range" (each column's whole range is 1, booleans too). laws: "ignored" of a schema
    `without_laws`. `realize` waits for the device.
    """

    radius: Any
    schema: Schema
    measure: Literal["l2", "l1", "linf"] = "l2"
    units: Literal["schema", "range"] = "schema"
    relaxed: bool = False
    names: tuple[str, ...] = ()
    laws: Literal["kept", "ignored"] = "kept"
    discrete: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not torch.all(torch.as_tensor(self.radius) >= 0):
            raise ValueError(f"radius must not be negative, in units of the columns; got {self.radius}")
        if self.measure not in NORMS:
            raise ValueError(f"norm {self.measure!r} is unknown; there are {', '.join(NORMS)}")

    @property
    def norm(self) -> str | None:  # type: ignore[override]
        return self.measure

    def null(self, x: Rows) -> Tensor:
        return torch.zeros_like(x["rows"])

    def sample(self, x: Rows, noise: Noise) -> Tensor:
        z, free = self.null(x), self._free(x)
        if self.measure == "linf":
            drawn = geometry.uniform_linf(noise, z)
        else:
            drawn = (geometry.uniform_l1 if self.measure == "l1" else geometry.uniform_l2)(noise, z, free)
        return self.project(x, drawn * free * per_example(self.radius, z))

    def apply(self, x: Rows, z: Tensor) -> dict[str, Tensor]:
        near = self._moved(x, z)
        rows = near if self.relaxed else self.realize(x, z.detach())["rows"] + (near - near.detach())
        return {**x, "rows": rows}

    def realize(self, x: Rows, z: Tensor) -> dict[str, Tensor]:
        clean, z = x["rows"], z.detach()
        rows, left = clean.clone(), torch.arange(len(clean), device=clean.device)
        for share in SHRINKS:
            part = take(x, left)
            tried = self._repaired(part, self._snapped(part, share * z[left]))
            lawful = take(self, left)._lawful(part, tried)
            rows[left] = torch.where(lawful[:, None], tried, part["rows"])
            left = left[~lawful]
            if not len(left):
                break
        return {**x, "rows": rows}

    def project(self, x: Rows, z: Tensor) -> Tensor:
        low, high = self.room(x)
        if self.measure == "l1":
            return geometry.project_l1_box(z, self.radius, low, high)
        shrink = geometry.shrink_l2 if self.measure == "l2" else geometry.shrink_linf
        return shrink(z.clamp(low, high), self.radius)

    def steepest(self, x: Rows, grad: Tensor) -> Tensor:
        grad = grad * self._free(x)
        if self.measure == "l2":
            return geometry.unit_l2(grad)
        if self.measure == "linf":
            return grad.sign()
        first = grad.abs().argmax(1, keepdim=True)
        return torch.zeros_like(grad).scatter_(1, first, grad.gather(1, first).sign())

    def size(self, x: Rows, z: Tensor) -> Tensor:
        return getattr(geometry, f"{self.measure}_norm")(z)

    def valid(self, x: Rows, adversarial: Rows) -> Tensor:
        before, after, may = (t.cpu().numpy() for t in (x["rows"], adversarial["rows"], x["may_change"]))
        lawful = ~torch.from_numpy(np.logical_or.reduce([*unlawful(self.schema, before, after, may).values()]))
        same = (adversarial["may_change"] == x["may_change"]) & self._within(x, adversarial["rows"], 1e-6)
        return lawful.to(same.device) & same

    def room(self, x: Rows) -> tuple[Tensor, Tensor]:
        low, high = self._ends(x)
        free = self._facts(x).free
        return tuple(torch.where(free, self.measured(x, end), 0.0) for end in (low, high))  # type: ignore[return-value]

    def measured(self, x: Rows, rows: Tensor) -> Tensor:
        """(B, D) the z of which these rows are the change, column by column."""
        f, change = self._facts(x), rows - x["rows"]
        ratio = change / (1 + x["rows"].clamp_min(0))
        return torch.where(f.log, torch.log1p(ratio.clamp_min(-1 + 1e-15)), change) / f.unit

    def complaints(self, x: Any) -> list[str]:
        if isinstance(x, Tensor) or {*x} != {"rows", "may_change"} or x["rows"].shape[1:] != (len(self.schema.names),):
            got = f"a tensor {tuple(x.shape)}" if isinstance(x, Tensor) else {k: tuple(t.shape) for k, t in x.items()}
            return [f"inputs are {got}; expected rows (B, {len(self.schema.names)}) and may_change (B,) of this schema"]
        return not_finite(x)

    def describe(self) -> str:
        amount = text_of(float(self.radius)) if torch.as_tensor(self.radius).ndim == 0 else "a radius of each row"
        unit = "their whole range" if self.units == "range" else "the units of the schema"
        free, num = int(self.schema.movable.sum()), len(self.schema.rules)
        kept = f"rows that keep types, ranges, directions and {num} rule{'s' * (num != 1)}"
        return (
            f"Of the rows of the attacked class the opponent may change {free} of {len(self.schema.names)} columns, "
            f"{self.measure} at most {amount} in {unit}, to "
            f"{kept if self.laws == 'kept' else 'any numbers inside the ranges, as if there were no other law'}."
        )

    def text(self) -> str:
        if isinstance(self.radius, Tensor):
            return f"columns with a radius of each row, norm={self.measure}"
        units = "" if self.units == "schema" else f",units={self.units}"
        laws = "" if self.laws == "kept" else f",laws={self.laws}"
        return f"columns:{text_of(float(self.radius))},norm={self.measure}{units}{laws}"

    def _facts(self, x: Rows) -> _Facts:
        s, like = self.schema, x["rows"]
        unit = s.unit if self.units == "schema" else s.range_units
        free = s.movable & ~s.derived
        rest = (s.log, s.low, s.high, s.step, s.may_grow, s.may_fall, free)
        made = (torch.as_tensor(a, device=like.device) for a in rest)
        return _Facts(torch.as_tensor(unit, dtype=like.dtype, device=like.device), *made)

    def _free(self, x: Rows) -> Tensor:
        """(B, D) bool: what z may move at all."""
        return self._facts(x).free & x["may_change"][:, None]

    def _ends(self, x: Rows) -> tuple[Tensor, Tensor]:
        """(B, D) the lowest and highest value of each cell; a clean value outside the range may stay."""
        f, rows, may = self._facts(x), x["rows"], x["may_change"][:, None]
        low = torch.where(f.falls & may, torch.minimum(f.low.to(rows), rows), rows)
        return low, torch.where(f.grows & may, torch.maximum(f.high.to(rows), rows), rows)

    def _moved(self, x: Rows, z: Tensor) -> Tensor:
        """The rows at z before anything snaps; bit for bit the clean ones at 0."""
        f, rows = self._facts(x), x["rows"]
        change = z * f.unit
        grown = (1 + rows.clamp_min(0)) * torch.expm1(torch.where(f.log, change, 0.0))
        return rows + torch.where(f.log, grown, change)

    def _snapped(self, x: Rows, z: Tensor) -> Tensor:
        """Whole steps, rounded towards the clean value, and one value of each category; inside the range."""
        f, rows, relaxed = self._facts(x), x["rows"], self._moved(x, z)
        steps = (relaxed - rows) / torch.where(f.step > 0, f.step, 1.0)
        steps = (steps + 1e-6 * steps.sign()).trunc()  # log and exp come back a little short
        moved = torch.where(f.step > 0, rows + steps * f.step, relaxed)
        low, high = self._ends(x)
        moved = torch.where(x["may_change"][:, None], torch.minimum(torch.maximum(moved, low), high), rows)
        for group in self.schema.groups:
            if not self.schema.movable[group].any():
                continue
            old, near = rows[:, group], relaxed[:, group]
            pick = torch.zeros_like(near).scatter_(1, (near - 1e-6 * old).argmax(1, keepdim=True), 1.0)
            stays = (near == old).all(1, keepdim=True) | (old.sum(1, keepdim=True) != 1)
            moved[:, group] = torch.where(stays, old, pick)
        return moved

    def _repaired(self, x: Rows, rows: Tensor) -> Tensor:
        """Follows and goes back, twice; what then is still against a rule is not lawful."""
        clean = x["rows"]
        for _ in range(2):
            for rule, places in zip(self.schema.rules, self.schema.places, strict=True):
                if rule.target is None:
                    bad = (~kept(rule, rows, 0.5)).nonzero()[:, 0]  # mostly none: the clean row is asked of these alone
                    if len(bad):
                        bad = bad[kept(rule, clean[bad], 2.0)][:, None]
                        rows[bad, places] = clean[bad, places]
                    continue
                value, now = compute(rule.tree, rows), rows[:, rule.target]
                off = (value - now).abs() > 0.5 * FOLLOWS * value.abs().clamp_min(1)
                if bool(off.any()):
                    touched = (rows[:, places] != clean[:, places]).any(1)
                    rows[:, rule.target] = torch.where(touched & off, value, now)
        return rows

    def _lawful(self, x: Rows, rows: Tensor) -> Tensor:
        low, high = self._ends(x)
        good = rows.isfinite().all(1) & ((rows >= low) & (rows <= high)).all(1) & self._within(x, rows, 1e-9)
        for rule in self.schema.rules:
            bad = (good & ~kept(rule, rows, 0.5)).nonzero()[:, 0]
            if len(bad):
                good[bad] = ~kept(rule, x["rows"][bad], 2.0)
        return good

    def _within(self, x: Rows, rows: Tensor, rounding: float) -> Tensor:
        """(B,) bool: the row's own change is at most the radius."""
        found = self.size(x, self.measured(x, rows))
        return found <= per_example(self.radius, found) * (1 + rounding) + rounding


def columns(
    radius: float, data: Dataset, *, norm: Literal["l2", "l1", "linf"] = "l2",
    units: Literal["schema", "range"] = "schema", laws: Literal["kept", "ignored"] = "kept",
) -> Columns:  # fmt: skip
    """Rows of the attacked class may change by that much, as the schema of the table permits.

    laws: "ignored" leaves the norm and the ranges alone: what an opponent would do who sets columns as he likes.
    """
    schema = getattr(data, "schema", None)
    if not isinstance(schema, Schema) or not 0 < radius < math.inf:
        got = f"radius {radius:g} and data of type {type(data).__name__}"
        raise ValueError(f"got {got}; expected a finite radius above 0, and a table with its schema")
    schema = schema if laws == "kept" else schema.without_laws()
    threat = Columns(radius, schema, norm, units, names=schema.names, laws=laws)
    threat._facts({"rows": torch.zeros(1, 1)})  # units=range may be refused
    return threat


def climbed_relaxed(threat: ThreatModel) -> ThreatModel:
    """The threat for the inner attack of training: it climbs before the snap, and what is learned are real rows."""
    return replace(threat, relaxed=True) if isinstance(threat, Columns) else threat
