"""Evaluations on disk: what is written is read back, and files whose parts disagree are refused."""

from __future__ import annotations

import csv
import dataclasses
import json
import math
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sparring.results.compare import compare
from sparring.results.findings import Finding
from sparring.results.read import StoredEvaluation, read_evaluation
from sparring.results.schema import (
    AttackEntry,
    CostEntry,
    CurvePoint,
    DataEntry,
    Results,
    Row,
    ThreatEntry,
    json_schema,
)
from sparring.results.statistics import McNemar, wilson
from sparring.results.write import write_evaluation

SCHEMA = Path(__file__).parents[2] / "docs" / "results-schema.json"
NAMES = ("fgsm", "square:num_queries=5,restarts=2")
"""Of the attacks; the second holds what CSV must quote."""


def rows_of(robust: list[int], labels: list[int] | None = None, wrong: tuple[int, ...] = ()) -> list[Row]:
    """Everything is right before the attacks but for `wrong`; the attacks take turns with what is not robust."""
    labels = labels or [i % 3 for i in range(len(robust))]
    rows = []
    for i, (label, stands) in enumerate(zip(labels, robust, strict=True)):
        correct = i not in wrong
        found: tuple[Any, ...] = ("", None, None, None)
        if correct and not stands:
            found = (NAMES[i % 2], 7, 0.75, 0.125)
        prediction = label if correct else label + 1
        rows.append(Row(i, label, prediction, 0.875, correct, bool(stands), *found, 0.5 * stands, None))
    return rows


def results_of(rows: list[Row], **changes: Any) -> Results:
    right, left = sum(row.correct for row in rows), sum(row.robust for row in rows)
    cost = CostEntry(forwards=5, backwards=2, seconds=0.5)
    attacks, broke = [], [sum(row.broken_by == name for row in rows) for name in NAMES]
    for name, count, after in zip(NAMES, broke, (right - broke[0], left), strict=True):
        attacks.append(
            AttackEntry(name=name, ran_on=count, skipped=0, broke=count, robust_after=after / len(rows), rejected={},
                        cost=cost)
        )  # fmt: skip
    told: dict[str, Any] = {
        "name": "net", "data": DataEntry(kind="images", name="toy", split="test", shape=(2, 5)),
        "threat": ThreatEntry(text="linf:0.1", words="Little.", radius=0.1, settings={"type": "Linf"}),
        "metrics": {"clean_accuracy": wilson(right, len(rows)), "robust_accuracy": wilson(left, len(rows))},
        "attacks": tuple(attacks), "findings": (Finding("odd", "So.", {"share": 0.5, "far": "inf"}, "suspect", "Go."),),
        "curve": (CurvePoint(radius=0.0, robust_accuracy=wilson(1, 2)),), "verdict": "SUSPECT", "cost": cost,
    }  # fmt: skip
    return Results(**(told | changes))


def gallery(count: int = 2) -> dict[str, np.ndarray]:
    names = ("index", "label", "clean_prediction", "clean_confidence", "adversarial_prediction")
    found = dict.fromkeys((*names, "adversarial_confidence"), np.arange(count))
    return found | {"x/ids": np.zeros((count, 3)), "x_adv/ids": np.ones((count, 3))}


def save(folder: Path, robust: list[int], **options: Any) -> Path:
    rows = rows_of(robust, **options)
    write_evaluation(folder, results_of(rows), rows, gallery())
    return folder


STANDS = [1, 0, 1, 1, 0, 0, 0, 1]


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    rows = rows_of(STANDS, wrong=(5,))
    assert write_evaluation(tmp_path, results_of(rows), rows, gallery()) == tmp_path / "results.json"
    found = read_evaluation(tmp_path)
    assert found.results == results_of(rows) and found.rows == {row.index: row for row in rows}
    assert found.gallery is not None and set(found.gallery) == set(gallery())
    for name, array in gallery().items():
        assert np.array_equal(found.gallery[name], array) and found.gallery[name].dtype == array.dtype
    assert sorted(path.name for path in tmp_path.iterdir()) == ["examples.csv", "gallery.npz", "results.json"]
    write_evaluation(tmp_path, results_of(rows), rows)
    assert read_evaluation(tmp_path / "results.json").gallery is None  # the old one is gone
    (tmp_path / "examples.csv").unlink()
    assert read_evaluation(str(tmp_path)) == StoredEvaluation(results_of(rows))
    with pytest.raises(ValueError, match=r"none/results.json is not there"):
        read_evaluation(tmp_path / "none")


def test_a_file_under_another_name_stands_alone(tmp_path: Path) -> None:
    save(tmp_path, STANDS)
    other = rows_of([1, 1, 1])
    write_evaluation(tmp_path / "b", results_of(other), other)
    (tmp_path / "old.json").write_bytes((tmp_path / "b" / "results.json").read_bytes())
    assert read_evaluation(tmp_path / "old.json") == StoredEvaluation(results_of(other))


def replaced(column: str, value: str, line: int = 0) -> Callable[[list[dict[str, str]]], object]:
    return lambda table: table[line].update({column: value})


TABLES: dict[str, tuple[Callable[[list[dict[str, str]]], object], str]] = {
    "a row missing": (lambda table: table.pop(), "8 examples that results.json beside it counts, got 7"),
    "a row more": (lambda table: table.append(table[0] | {"index": "8"}), "8 examples .* got 9"),
    "a row doubled": (lambda table: table.append(table[3]), "line 10: got index 3 twice"),
    "another index twice": (replaced("index", "3"), "line 5: got index 3 twice"),
    "fell, says the table": (
        lambda table: table[0].update(robust="0", broken_by="fgsm", margin_left="0"), "4 robust .* got 3",
    ),
    "stands, says the table": (
        lambda table: table[1].update(robust="1", broken_by=""), "4 robust .* got 5",
    ),
    "wrong, says the table": (
        lambda table: table[1].update(correct="0", broken_by=""), "8 correct .* got 7",
    ),
    "another attack": (replaced("broken_by", "fgsm", 1), r"2 broken by fgsm .* got 3"),
    "an attack that nobody ran": (replaced("broken_by", "pgd", 1), "broken by square.* got 1|0 broken by pgd .* got 1"),
    "robust but broken": (replaced("broken_by", "fgsm"), "robust 1 with broken_by 'fgsm'"),
    "broken by nothing": (replaced("broken_by", "", 1), "robust 0 with broken_by ''"),
    "robust but wrong": (replaced("correct", "0"), "robust but not correct"),
    "certified but broken": (replaced("certified", "1", 1), "certified but not robust"),
    "correct with another prediction": (replaced("clean_prediction", "2"), "label 0 as correct, with prediction 2"),
    "a margin that is none": (replaced("margin_left", "1.5"), "margin_left 1.5, which is no share"),
    "no margin": (replaced("margin_left", ""), "line 2: got could not convert"),
    "a flag that is none": (replaced("robust", "yes"), "line 2: got 'yes'"),
    "half an index": (replaced("index", "0.5"), "line 2: got .*'0.5'"),
}  # fmt: skip


@pytest.mark.parametrize("name", TABLES)
def test_a_table_that_disagrees_is_refused(name: str, tmp_path: Path) -> None:
    change, fragment = TABLES[name]
    path = save(tmp_path, STANDS) / "examples.csv"
    with path.open(newline="", encoding="utf-8") as file:
        table = list(csv.DictReader(file))
    change(table)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, Row._fields)
        writer.writeheader()
        writer.writerows(table)
    with pytest.raises(ValueError, match=rf"examples\.csv: expected .*{fragment}.*run `sparring evaluate` again"):
        read_evaluation(tmp_path)


@pytest.mark.parametrize(
    ("content", "fragment"),
    [("", "8 examples .* got 0"), (",".join(Row._fields), "got 0"), ("index,label\n0,1", "line 2: got 'clean_"),
     ("label,robust\n0,1", "line 2: got 'index'"), (",".join(Row._fields) + "\n0,0", "line 2: got int"),
     (b"index\n\xff", "got 'utf-8'")],
)  # fmt: skip
def test_damaged_tables(content: str | bytes, fragment: str, tmp_path: Path) -> None:
    path = save(tmp_path, STANDS) / "examples.csv"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=fragment):
        read_evaluation(tmp_path)


@pytest.mark.parametrize(
    "change", [{"index": None}, {"x/ids": None}, {"x_adv/ids": None}, {"label": np.zeros(3)}, {"label": np.array(1)}]
)
def test_damaged_galleries(change: dict[str, Any], tmp_path: Path) -> None:
    arrays = {name: array for name, array in (gallery() | change).items() if array is not None}
    np.savez(save(tmp_path, STANDS) / "gallery.npz", **arrays)
    with pytest.raises(ValueError, match=r"gallery\.npz: expected .* of one length"):
        read_evaluation(tmp_path)


# Two evaluations -------------------------------------------------------------------------------------------------


def test_compare_counts_what_only_one_gets_right(tmp_path: Path) -> None:
    a, b = [1] * 9 + [0] * 2 + [1] * 30 + [0] * 30, [0] * 9 + [1] * 2 + [1] * 30 + [0] * 30
    first, second = read_evaluation(save(tmp_path / "a", a)), read_evaluation(save(tmp_path / "b", b))
    p_value = 2 * sum(math.comb(11, k) for k in (0, 1, 2)) / 2**11
    expected = McNemar(9, 2, pytest.approx(p_value, abs=1e-12))
    assert compare(first, second).robust.test == expected
    assert compare(second, first).robust.test == McNemar(2, 9, expected.p_value)
    assert compare(first, first).robust.test == McNemar(0, 0, 1.0)
    path = tmp_path / "b" / "examples.csv"
    head, *lines = path.read_text().splitlines(keepends=True)
    path.write_text(head + "".join(random.Random(3).sample(lines, len(lines))))
    assert compare(first, read_evaluation(tmp_path / "b")).robust.test == expected  # paired by index


@pytest.mark.parametrize(
    ("labels", "data", "says"),
    [([3] * 8, {}, "another label"), (None, {"name": "b"}, "different data"),
     (None, {"kind": "text"}, "different data"), (None, {"settings": {"size": 9}}, "different data")],
)  # fmt: skip
def test_other_examples_are_not_paired(labels: list[int] | None, data: dict[str, Any], says: str) -> None:
    rows, others = rows_of(STANDS), rows_of(STANDS, labels)
    one = results_of(rows)
    two = results_of(others, data=one.data.model_copy(update=data))
    pair = [StoredEvaluation(r, {row.index: row for row in table}) for r, table in ((one, rows), (two, others))]
    found = compare(*pair)
    assert found.robust.test is None and any(says in caution for caution in found.cautions) and found.classes == ()


# The format ------------------------------------------------------------------------------------------------------


def test_the_schema_on_paper_is_that_of_the_code() -> None:
    """Written by: `json.dumps(json_schema(), indent=2)` and a new line."""
    assert SCHEMA.read_text(encoding="utf-8") == json.dumps(json_schema(), indent=2) + "\n"


def test_results_do_not_change_and_hold_nothing_odd() -> None:
    found = results_of(rows_of(STANDS))
    with pytest.raises(ValueError, match="frozen"):
        found.name = "other"
    with pytest.raises(dataclasses.FrozenInstanceError):
        found.metrics["robust_accuracy"].value = 1.0  # type: ignore[misc]
    with pytest.raises(ValueError, match="certified"):
        results_of(rows_of(STANDS), metrics=dict(found.metrics) | {"certified_accuracy": wilson(5, 8)})
    assert Results.model_validate_json(json.dumps(found.plain())) == found
    plain = found.plain()
    assert plain["schema"] == "sparring.results/2" and "format" not in plain


def test_reading_and_judging_load_no_torch(tmp_path: Path) -> None:
    """Nor what takes long: scipy, matplotlib."""
    save(tmp_path, STANDS)
    code = (
        "import sys; from sparring.results.gate import Demands, judge; "
        "from sparring.results.read import read_evaluation; "
        f"judge(read_evaluation({str(tmp_path)!r}), Demands(allow_suspect=True)); "
        "print([name for name in ('torch', 'scipy', 'matplotlib', 'jinja2') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120)
    assert done.stdout == "[]\n", done.stderr
