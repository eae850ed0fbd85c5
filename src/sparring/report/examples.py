"""Single examples on the page: the same ones model by model, and those that stand nearest to falling."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from markupsafe import Markup

from sparring.modalities.base import Shown
from sparring.results.read import StoredEvaluation
from sparring.results.schema import Row

MOST = 8
"""Examples that are shown of each kind."""


class SharedExample(NamedTuple):
    """One example under each model: a picture of what fooled it where one was kept, else None, and words."""

    number: int
    label: str
    cards: tuple[Markup | None, ...]
    words: tuple[str, ...]


def side_by_side(runs: Sequence[StoredEvaluation], galleries: Sequence[Shown]) -> list[SharedExample]:
    """The examples that every model was measured on and that fooled at least one, most pictures first; [] for one run,
    and where the files do not tell. All text is escaped by the kinds of input that made the galleries."""
    if len(runs) < 2 or any(run.rows is None for run in runs) or len({run.results.data.name for run in runs}) > 1:
        return []
    cards = [_cards(run, gallery) for run, gallery in zip(runs, galleries, strict=True)]
    tables: list[Mapping[int, Row]] = [run.rows or {} for run in runs]
    known = {index for shown in cards for index in shown if all(index in table for table in tables)}
    ordered = sorted(known, key=lambda index: (-sum(index in shown for shown in cards), index))
    return [
        SharedExample(
            index, runs[0].results.data.class_name(tables[0][index].label),
            tuple(shown.get(index) for shown in cards),
            tuple(fate(run, table[index]) for run, table in zip(runs, tables, strict=True)),
        )
        for index in ordered[:MOST]
    ]  # fmt: skip


def fate(run: StoredEvaluation, row: Row) -> str:
    """What became of one example, in words."""
    name = run.results.data.class_name
    if not row.correct:
        return f"wrong without any attack: taken for {name(row.clean_prediction)}"
    if row.certified:
        return "certified: no permitted change can turn it"
    if row.robust:
        return f"stands, with {100 * row.margin_left:.0f}\N{NO-BREAK SPACE}% of its margin left"
    after = "" if row.adversarial_prediction is None else f", taken for {name(row.adversarial_prediction)}"
    return f"broken by {row.broken_by}{after}"


def nearest_to_falling(run: StoredEvaluation) -> list[Row]:
    """The examples that stand without a certificate with the least of their margin left, least first."""
    standing = [row for row in (run.rows or {}).values() if row.robust and not row.certified]
    return sorted(standing, key=lambda row: (row.margin_left, row.index))[:MOST]


def _cards(run: StoredEvaluation, gallery: Shown) -> dict[int, Markup]:
    """The cards of a gallery by the number of their example."""
    if run.gallery is None or not gallery.cards:
        return {}
    return dict(zip(map(int, run.gallery["index"]), gallery.cards, strict=True))
