"""`sparring compare`: many runs or evaluations as one table, as text, CSV or Markdown. No PyTorch here."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

from sparring.results.read import locate, read_evaluation
from sparring.results.table import Spread, Table, TableRow, tables_of

HEAD = (
    "model", "seeds", "clean", "robust", "95 % interval", "certified", "verdict", "passes per example",
    "training", "robust against the first",
)  # fmt: skip
CSV_HEAD = (
    "threat", "data", "split", "n", "model", "runs", "seeds", "clean", "clean_spread", "robust", "robust_spread",
    "robust_low", "robust_high", "certified", "certified_spread", "verdict", "passes_per_example", "training_seconds",
    "attacks", "difference", "p_value", "shared_examples",
)  # fmt: skip
Format = Literal["text", "csv", "markdown"]


def comparison(folders: Sequence[Path], form: Format, say: Callable[[str], object]) -> str:
    """The tables of all folders, written out; what is left out is said."""
    return written(tables_of([read_evaluation(file) for file in find_evaluations(folders, say)]), form)


def find_evaluations(folders: Sequence[Path], say: Callable[[str], object]) -> list[Path]:
    """The results.json of all folders, each once; a folder without any stands for those in it. What has none is said.

    Raises ValueError for a folder that holds none.
    """
    found: dict[Path, Path] = {}
    for folder in folders:
        inside = [locate(folder)]
        if not inside[0].exists() and folder.is_dir():
            children = sorted(path for path in folder.iterdir() if path.is_dir())
            inside = [file for path in children if (file := locate(path)).exists()]
            if inside and (runs := [path for path in children if _is_run(path) and not locate(path).exists()]):
                say(f"left out, not evaluated yet: {', '.join(map(str, runs))}")
        if not inside or not inside[0].exists():
            hint = f"measure it first: sparring evaluate {folder}" if _is_run(folder) else (
                "expected a run or an evaluation folder, or a folder of such; `sparring evaluate` writes them"
            )  # fmt: skip
            what = "holds no results" if folder.exists() else "is not there"
            raise ValueError(f"{folder} {what} (results.json): {hint}")
        found |= {file.resolve(): file for file in inside}
    return list(found.values())


def written(found: Sequence[Table], form: Format) -> str:
    """The tables as text that ends in a line break."""
    if form == "csv":
        lines = io.StringIO()
        writer = csv.writer(lines, lineterminator="\n")
        writer.writerow(CSV_HEAD)
        writer.writerows([t.threat, t.data, t.split, *_values(row)] for t in found for row in t.rows)
        return lines.getvalue()
    draw = _aligned if form == "text" else _markdown
    parts = []
    if len(found) > 1:
        parts.append(
            f"These evaluations answer {len(found)} different questions (another threat, or other data); each has its "
            "own table, and numbers of different tables cannot be compared."
        )
    for table in found:
        parts += [_title(table), draw([HEAD, *map(_cells, table.rows)]).rstrip(), *_notes(table)]
    return "\n\n".join(map(_printable, parts)) + "\n"


def _values(row: TableRow) -> list[Any]:
    """The row in plain numbers: shares from 0 to 1, nothing where nothing was measured."""
    certified, against = row.certified or Spread(None, None), row.against  # type: ignore[arg-type]
    changed = (against.difference, against.p_value, against.n) if against else (None, None, None)
    numbers = (*row.clean, *row.robust, row.low, row.high, *certified)
    return [
        row.n, row.label, " ".join(row.runs), " ".join(map(str, row.seeds)), *map(_number, numbers), row.verdict,
        _number(row.passes), _number(row.training_seconds), ",".join(row.attacks), *map(_number, changed),
    ]  # fmt: skip


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.6g}"


def _cells(row: TableRow) -> list[str]:
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


def _title(table: Table) -> str:
    counts = {row.n for row in table.rows}
    n = f"n = {min(counts)}" + (f" to {max(counts)}" if len(counts) > 1 else "")
    return f"{table.data} ({table.split}), {table.threat}: {table.words.rstrip('.')}. {n}."


def _notes(table: Table) -> list[str]:
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
    return ["\n".join(notes)] if notes else []


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def _markdown(rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])


def _printable(text: str) -> str:
    """Names come from files; what would steer a terminal is shown as a question mark."""
    return "".join(c if c.isprintable() or c == "\n" else "?" for c in text)


def _is_run(folder: Path) -> bool:
    return (folder / "config.json").exists()

