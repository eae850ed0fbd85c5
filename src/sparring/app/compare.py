"""`sparring compare`: many runs or evaluations as one table, as text, CSV or Markdown. No PyTorch here."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

from sparring.results.read import locate, read_evaluation
from sparring.results.table import Spread, Table, TableRow, tables_of
from sparring.results.table_text import HEAD, cells_of, notes_of, title_of

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
        parts += [title_of(table), draw([HEAD, *map(cells_of, table.rows)]).rstrip()]
        parts += ["\n".join(notes)] if (notes := notes_of(table)) else []
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
