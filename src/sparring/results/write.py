"""An evaluation as files: results.json, examples.csv, gallery.npz (see docs/results-schema.md)."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from sparring.core.files import write_atomically, write_json, write_text
from sparring.results.schema import Results, Row


def write_evaluation(
    folder: Path, results: Results, rows: Iterable[Row], gallery: Mapping[str, np.ndarray] | None = None
) -> Path:
    """The path of results.json, which is written last, so that a folder that has it is complete; each file atomically.

    gallery: arrays of some turned examples by name, of the same length; without any the file is left out.
    """
    for old in ("results.json", "gallery.npz"):
        (folder / old).unlink(missing_ok=True)
    if gallery:
        arrays: dict[str, Any] = dict(gallery)
        write_atomically(folder / "gallery.npz", lambda stream: np.savez_compressed(stream, **arrays))
    table = io.StringIO()
    cells = ([_cell(value) for value in row] for row in rows)
    csv.writer(table, lineterminator="\n").writerows([Row._fields, *cells])
    write_text(folder / "examples.csv", table.getvalue())
    write_json(folder / "results.json", results.plain())
    return folder / "results.json"


def _cell(value: Any) -> Any:
    """Flags as 1 and 0, floats in six digits; None is written as nothing."""
    return int(value) if isinstance(value, bool) else f"{value:.6g}" if isinstance(value, float) else value
