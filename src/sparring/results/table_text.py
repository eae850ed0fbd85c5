"""A table of many evaluations in words, for the terminal, for documents and for the page."""

from __future__ import annotations

from sparring.results.table import Spread, Table, TableRow

HEAD = (
    "model", "seeds", "clean", "robust", "95 % interval", "certified", "verdict", "passes per example",
    "training", "robust against the first",
)  # fmt: skip


def cells_of(row: TableRow) -> list[str]:
    """The row for people."""
    seconds, against = row.training_seconds, row.against
    change = ""
    if against:
        sure = " *" if against.sure else ""
        change = f"{100 * against.difference:+.1f} points, p = {against.p_value:.2g}{sure}"
    return [
        row.label, str(len(row.seeds) or "?"), _share(row.clean), _share(row.robust),
        f"{100 * row.low:.1f} to {100 * row.high:.1f} %", _share(row.certified) if row.certified else "-",
        row.verdict or "not checked", f"{row.passes:.0f}", "-" if seconds is None else f"{seconds:.0f} s",
        change or ("not paired" if row.why_not else ""),
    ]  # fmt: skip


def _share(spread: Spread) -> str:
    deviation = "" if spread.deviation is None else f" ± {100 * spread.deviation:.1f}"
    return f"{100 * spread.mean:.1f}{deviation} %"


def title_of(table: Table) -> str:
    """What was asked, in a line."""
    counts = {row.n for row in table.rows}
    n = f"n = {min(counts)}" + (f" to {max(counts)}" if len(counts) > 1 else "")
    return f"{table.data} ({table.split}), {table.threat}: {table.words.rstrip('.')}. {n}."


def notes_of(table: Table) -> list[str]:
    """What the reader must know to read the numbers right."""
    notes, first = [], table.rows[0]
    if any(row.robust.deviation is not None for row in table.rows):
        notes.append("±: standard deviation over seeds; the interval reaches over those of all seeds.")
    if any(row.against for row in table.rows):
        notes.append(
            "p: McNemar's test on the same examples, of several seeds the largest (1 where seeds disagree); "
            "*: beyond chance with Bonferroni's correction for all rows."
        )
    for row in table.rows[1:]:
        if row.why_not:
            notes.append(f"{row.label}: {row.why_not}")
        if row.attacks != first.attacks:
            notes.append(f"{row.label} was attacked otherwise than {first.label}, so the two may not be compared.")
    notes += [
        f"{row.label}: the verdict is {row.verdict}, the robust accuracy may be too high; the report says why."
        for row in table.rows if row.verdict in ("SUSPECT", "INVALID")
    ]  # fmt: skip
    return notes
