"""A table for the eye and for numbers: rows before and after with what changed marked, recall and false alarms."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from markupsafe import Markup

from sparring.evaluation.measure import accuracy_metrics
from sparring.modalities.base import Shown
from sparring.modalities.tables.threats import Columns
from sparring.results.read import StoredEvaluation
from sparring.results.schema import Metric
from sparring.results.statistics import wilson

NUM_CARRIERS = 12
"""Columns that the report names."""
_CARD = Markup(
    '<figure class="card"><table><thead><tr><th>column</th><th>before</th><th>after</th></tr></thead><tbody>{rows}'
    "</tbody></table><figcaption>{before} → <b>{after}</b><br><small>row {index}; the other {same} columns "
    "stay</small></figcaption></figure>\n"
)
_ROW = Markup("<tr><td>{name}</td><td>{before}</td><td><mark>{after}</mark></td></tr>")
_CARRIED = Markup(
    '<div class="scroll" tabindex="0" role="region" aria-label="What carries the attack"><table><thead><tr><th '
    'scope="col">what carries the attack, in {num} turned rows</th><th scope="col">rows in which it changes</th><th '
    'scope="col">median change</th><th scope="col">median cost, units of the threat</th></tr></thead><tbody>{rows}'
    "</tbody></table></div>\n"
)
_COLUMN = Markup("<tr><td>{name}</td><td>{rows}</td><td>{change:.4g}</td><td>{cost:.3g}</td></tr>")


class Carrier(NamedTuple):
    """A column that attacks change: in how many rows, and the medians over these of the change and of its cost."""

    name: str
    rows: int
    change: float
    cost: float


def carriers(names: Sequence[str], x: np.ndarray, x_adv: np.ndarray, cost: np.ndarray) -> list[Carrier]:
    """The columns that changed between rows (N, D), the costliest in all rows together first.

    cost (N, D): of each change, in units of the threat.

    >>> carriers("ab", np.zeros((2, 2)), np.array([[0, 5], [0, 7]]), np.array([[0, 1], [0, 3]]))
    [Carrier(name='b', rows=2, change=6.0, cost=2.0)]
    """
    moved, change = x != x_adv, x_adv - x
    order = [j for j in np.argsort(-np.abs(cost).sum(0), kind="stable") if moved[:, j].any()]
    return [
        Carrier(names[j], int(own.sum()), float(np.median(change[own, j])), float(np.median(np.abs(cost[own, j]))))
        for j in order for own in [moved[:, j]]
    ]  # fmt: skip


def costs(data: Any, gallery: Mapping[str, Any], split: str, threat: Any) -> dict[str, np.ndarray]:
    """What each change costs the attacker, (N, D) in units of the threat, for `show_rows`."""
    if not isinstance(threat, Columns):
        return {}
    x, x_adv = ({name: torch.as_tensor(gallery[f"{side}/{name}"]) for name in ("rows", "may_change")}
                for side in ("x", "x_adv"))  # fmt: skip
    return {"cost": threat.measured(x, x_adv["rows"]).abs().numpy()}


def show_rows(run: StoredEvaluation) -> Shown:
    """A card for each turned row that was kept, with the cells that changed; before them what carries the attack."""
    gallery, settings = run.gallery, run.results.threat.settings
    if gallery is None or "x/rows" not in gallery or not len(gallery["x/rows"]):
        return Shown()
    before, after = gallery["x/rows"], gallery["x_adv/rows"]
    told = settings.get("names") if isinstance(settings, Mapping) else None
    names = told or [f"column {j}" for j in range(before.shape[1])]
    cards = []
    for i, (x, x_adv) in enumerate(zip(before, after, strict=True)):
        changed = np.flatnonzero(x != x_adv)
        rows = Markup().join(_ROW.format(name=names[j], before=f"{x[j]:.6g}", after=f"{x_adv[j]:.6g}") for j in changed)
        cards.append(_CARD.format(rows=rows, same=len(x) - len(changed), **run.answer(i)))
    if gallery.get("cost", np.zeros(0)).shape != before.shape:
        return Shown(cards)
    found = carriers(names, before, after, gallery["cost"])[:NUM_CARRIERS]
    rows = Markup().join(_COLUMN.format(**column._asdict()) for column in found)
    return Shown(cards, before=_CARRIED.format(num=len(before), rows=rows))


def as_csv(arrays: Mapping[str, Any], data: Any) -> str:
    """Attacked rows as a CSV file with the columns of the table and its label, which the same schema reads again."""
    schema = data.schema
    named = next((label for label in schema.attacked if not label.startswith("not ")), "attacked")
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow([*(column.name for column in schema.columns), schema.label])
    writer.writerows([*row, named] for row in schema.cells(np.asarray(arrays["x_adv/rows"])))
    return stream.getvalue()


def table_metrics(table: Mapping[str, Any]) -> dict[str, Metric]:
    """The shared ones, and: recall of the attacked class clean and attacked, the share of detected rows that evade,
    false alarms, balanced accuracy clean and attacked (its interval takes recall and false alarms as independent)."""
    found = accuracy_metrics(table)
    label, right, stands = (np.asarray(table[name]) for name in ("label", "correct", "robust"))
    theirs = label == 1
    if theirs.any():
        found["recall"] = wilson(int(right[theirs].sum()), int(theirs.sum()))
        found["recall_attacked"] = wilson(int(stands[theirs].sum()), int(theirs.sum()))
    if (theirs & right).any():
        evaded = wilson(int((theirs & right & ~stands).sum()), int((theirs & right).sum()))
        found["evasion_rate"] = replace(evaded, higher_is_better=False)
    if (~theirs).any():
        alarms = wilson(int((~right[~theirs]).sum()), int((~theirs).sum()), higher_is_better=False)
        found["false_alarm_rate"] = alarms
        for name in ("", "_attacked"):
            if theirs.any():
                found[f"balanced_accuracy{name}"] = _balanced(found[f"recall{name}"], alarms)
    return found


def _balanced(recall: Metric, alarms: Metric) -> Metric:
    quiet = 1 - alarms.value
    value = (recall.value + quiet) / 2
    down = np.hypot(recall.value - recall.low, alarms.high - alarms.value) / 2
    up = np.hypot(recall.high - recall.value, alarms.value - alarms.low) / 2
    return Metric(value, max(0.0, float(value - down)), min(1.0, float(value + up)), recall.n + alarms.n, None, True)
