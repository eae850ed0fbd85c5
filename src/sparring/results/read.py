"""The one reader of evaluations on disk. Reading runs no code from the files, and their parts must agree."""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ValidationError

from sparring.core.files import read_json
from sparring.core.unpacking import read_npz
from sparring.results.schema import FORMAT, Results, Row

GALLERY = ("index", "label", "clean_prediction", "clean_confidence", "adversarial_prediction", "adversarial_confidence")
"""What gallery.npz holds beside the inputs: `x` and `x_adv`, or `x/NAME` and `x_adv/NAME` for each named tensor."""


@dataclass(frozen=True)
class StoredEvaluation:
    """What the three files hold; `rows` (by index) and `gallery` are None when their file is missing."""

    results: Results
    rows: Mapping[int, Row] | None = None
    gallery: Mapping[str, np.ndarray] | None = None

    @property
    def name(self) -> str:
        return self.results.name

    def answer(self, i: int) -> dict[str, Any]:
        """Of kept example i: its `index` and `label`, what it was taken for `before` and `after`, how surely (`was`,
        `now`); classes by name, confidences in percent."""
        assert self.gallery is not None
        classes = {"label": "label", "before": "clean_prediction", "after": "adversarial_prediction"}
        found = {name: self.results.data.class_name(int(self.gallery[key][i])) for name, key in classes.items()}
        for name, side in (("was", "clean"), ("now", "adversarial")):
            found[name] = f"{100 * self.gallery[f'{side}_confidence'][i]:.1f}\N{NO-BREAK SPACE}%"
        return {"index": int(self.gallery["index"][i]), **found}


def locate(path: Path | str) -> Path:
    """The results.json that a path means: the file, that of an evaluation folder, or that of a run's evaluation."""
    path = Path(path)
    if path.is_file() or (path.suffix == ".json" and not path.is_dir()):
        return path
    inside = path / "evaluation" / "results.json"
    return inside if inside.exists() else path / "results.json"


def read_evaluation(path: Path | str) -> StoredEvaluation:
    """The evaluation that a path means (see `locate`), checked: ValueError says what is wrong, where, and what to do.

    examples.csv and gallery.npz beside results.json may be missing: then nothing can be paired or shown. What is there
    must agree: each example once, as many rows right, robust, certified and broken by each attack as results.json
    counts. A results file under another name stands alone.
    """
    file = locate(path)
    results = _results(file)
    if file.name != "results.json":
        return StoredEvaluation(results)
    table, pictures = file.with_name("examples.csv"), file.with_name("gallery.npz")
    rows = _rows(table, results) if table.exists() else None
    return StoredEvaluation(results, rows, _gallery(pictures) if pictures.exists() else None)


def _results(path: Path) -> Results:
    plain = read_json(path, "the results that `sparring evaluate` wrote")
    found = plain.get("schema", "nothing") if isinstance(plain, dict) else type(plain).__name__
    if found == "sparring.results/1":
        command = plain.get("command") or "`sparring evaluate`, or sparring.evaluate from Python"
        raise ValueError(f"{path} was written by Sparring 0.1 ({found}), whose results lack what is needed now; "
                         f"measure again: {command}")  # fmt: skip
    if found != FORMAT:
        raise _wrong(path, f'results with "schema": "{FORMAT}", got {found!s:.60}')
    try:
        return Results.model_validate_json(path.read_bytes())
    except ValidationError as error:
        first = error.errors()[0]
        where = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in first["loc"]).lstrip(".")
        got = f", got {first['input']!r:.60}" if where and first["type"] != "missing" else ""
        what = first["msg"].removeprefix("Value error, ")
        raise _wrong(path, f"what docs/results-schema.md says; {where}{': ' if where else ''}{what}{got}") from None


def _rows(path: Path, results: Results) -> dict[int, Row]:
    rows: dict[int, Row] = {}
    try:
        with path.open(newline="", encoding="utf-8") as file:
            lines = csv.DictReader(file)
            for line in lines:
                row = _row(line)
                if row.index in rows:
                    raise ValueError(f"index {row.index} twice")
                rows[row.index] = row
    except (KeyError, TypeError, ValueError, csv.Error) as error:
        raise _wrong(path, f"{', '.join(Row._fields)} in every row; line {lines.line_num}: got {error}") from None
    _check_sums(path, list(rows.values()), results)
    return rows


_FLAGS = {"1": True, "0": False}


def _row(line: Mapping[str, str]) -> Row:
    """One row; raises KeyError, TypeError or ValueError for what is none, or contradicts itself."""

    def given(name: str, kind: Any) -> Any:
        return kind(line[name]) if line[name] else None

    row = Row(
        int(line["index"]), int(line["label"]), int(line["clean_prediction"]), float(line["clean_confidence"]),
        _FLAGS[line["correct"]], _FLAGS[line["robust"]], line["broken_by"], given("adversarial_prediction", int),
        given("adversarial_confidence", float), given("size", float), float(line["margin_left"]),
        given("certified", _FLAGS.__getitem__),
    )  # fmt: skip
    if not 0 <= row.margin_left <= 1:
        raise ValueError(f"margin_left {row.margin_left}, which is no share")
    if row.correct and row.clean_prediction != row.label:
        raise ValueError(f"label {row.label} as correct, with prediction {row.clean_prediction}")
    if (row.robust and not row.correct) or (row.certified and not row.robust):
        raise ValueError("an example that is certified but not robust, or robust but not correct")
    if bool(row.broken_by) != (row.correct and not row.robust):
        raise ValueError(f"correct {line['correct']} and robust {line['robust']} with broken_by {row.broken_by!r}")
    return row


def _check_sums(path: Path, rows: list[Row], results: Results) -> None:
    """Raises ValueError unless the table adds up to what results.json says."""
    stated = Counter(examples=results.metrics["clean_accuracy"].n)
    counted = Counter(examples=len(rows))
    for what, name in (("correct", "clean"), ("robust", "robust"), ("certified", "certified")):
        if metric := results.metrics.get(f"{name}_accuracy"):
            stated[what] = metric.count or 0
            counted[what] = sum(bool(getattr(row, what)) for row in rows)
    for attack in results.attacks:
        stated[f"broken by {attack.name}"] += attack.broke
    counted.update(f"broken by {row.broken_by}" for row in rows if row.broken_by)
    for what in stated | counted:
        if counted[what] != stated[what]:
            raise _wrong(path, f"the {stated[what]} {what} that results.json beside it counts, got {counted[what]}")


def _gallery(path: Path) -> dict[str, np.ndarray]:
    try:
        arrays = read_npz(path)
    except (OSError, ValueError) as error:
        raise _wrong(path, f"an npz without pickle, got {error}") from None
    missing = [name for name in GALLERY if name not in arrays]
    missing += [side for side in ("x", "x_adv") if not any(name.split("/")[0] == side for name in arrays)]
    if missing or len({len(array) if array.ndim else -1 for array in arrays.values()}) > 1:
        raise _wrong(path, f"{', '.join(GALLERY)}, x and x_adv of one length, got {', '.join(arrays) or 'nothing'}")
    return arrays


def _wrong(path: Path, expected: str) -> ValueError:
    return ValueError(f"{path}: expected {expected}. It cannot be trusted; run `sparring evaluate` again")
