"""A table for the eye and for numbers: rows before and after with what changed marked, recall and false alarms."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from markupsafe import Markup

from sparring.evaluation.measure import accuracy_metrics
from sparring.modalities.base import Shown
from sparring.results.read import StoredEvaluation
from sparring.results.schema import Metric
from sparring.results.statistics import wilson

_CARD = Markup(
    '<figure class="card"><table><thead><tr><th>column</th><th>before</th><th>after</th></tr></thead><tbody>{rows}'
    "</tbody></table><figcaption>{before} → <b>{after}</b><br><small>row {index}; the other {same} columns "
    "stay</small></figcaption></figure>\n"
)
_ROW = Markup("<tr><td>{name}</td><td>{before}</td><td><mark>{after}</mark></td></tr>")


def show_rows(run: StoredEvaluation) -> Shown:
    """A card for each turned row that was kept, with the cells that changed."""
    gallery, settings = run.gallery, run.results.threat.settings
    if gallery is None or "x/rows" not in gallery:
        return Shown()
    names = settings.get("names") if isinstance(settings, Mapping) else None
    cards = []
    for i, (x, x_adv) in enumerate(zip(gallery["x/rows"], gallery["x_adv/rows"], strict=True)):
        changed = np.flatnonzero(x != x_adv)
        rows = Markup().join(
            _ROW.format(name=names[j] if names else f"column {j}", before=f"{x[j]:.6g}", after=f"{x_adv[j]:.6g}")
            for j in changed
        )
        cards.append(_CARD.format(rows=rows, same=len(x) - len(changed), **run.answer(i)))
    return Shown(cards)


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
