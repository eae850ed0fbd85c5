"""An evaluation on disk, read again and checked as far as a verdict needs it. Reading runs no code from the files."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any, NamedTuple, get_args

from sparring.core.files import read_json
from sparring.results.findings import Verdict
from sparring.results.write import SCHEMA


class Row(NamedTuple):
    """What pairing needs of one row of examples.csv."""

    label: int
    robust: bool


def locate(path: Path) -> Path:
    """The results.json that a path means: the file, that of an evaluation folder, or that of a run's evaluation."""
    if not path.is_dir():
        return path
    inside = path / "evaluation" / "results.json"
    if not inside.exists() and not (path / "results.json").exists():
        raise ValueError(f"{path} holds no results.json and no evaluation/results.json; run `sparring evaluate` first")
    return inside if inside.exists() else path / "results.json"


def read_results(path: Path) -> dict[str, Any]:
    """The results that a path means (see `locate`), checked as far as a judgement needs them. Raises ValueError."""
    path = locate(path)
    record = read_json(path, "the results that `sparring evaluate` wrote")
    schema = record.get("schema", "nothing") if isinstance(record, dict) else type(record).__name__
    if schema != SCHEMA:
        raise _wrong(path, f'results with "schema": "{SCHEMA}", got {schema!r:.60}')
    data = record.get("data")
    asked = {"threat": record.get("threat")}
    asked |= {f"data.{key}": data.get(key) if isinstance(data, dict) else None for key in ("name", "split")}
    for where, text in asked.items():
        if not isinstance(text, str):
            raise _wrong(path, f"text at {where}, got {text!r:.60}")
    for key in ("findings", "attacks"):
        entries = record.get(key, [])
        if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
            raise _wrong(path, f"a list of objects at {key}, got {entries!r:.60}")
    if record.get("verdict") not in (None, *get_args(Verdict)):
        raise _wrong(path, f"one of {', '.join(get_args(Verdict))} at verdict, got {record['verdict']!r:.60}")
    n, other = (_examples(path, record.get(key), key) for key in ("clean_accuracy", "robust_accuracy"))
    if n != other:
        raise _wrong(path, f"clean and robust accuracy of the same examples, got n {n} and {other}")
    return record


def _examples(path: Path, share: Any, key: str) -> int:
    """n of a share that is one."""
    found: list[Any] = [share.get(k) for k in ("count", "n", "value")] if isinstance(share, dict) else [None] * 3
    count, n, value = found
    whole = type(count) is int and type(n) is int and 0 <= count <= n and n >= 1
    if not whole or not isinstance(value, int | float) or not abs(value - count / n) < 1e-9:
        raise _wrong(path, f"count, n >= 1 and value = count / n at {key}, got {share!r:.80}")
    return int(n)


def read_rows(source: Path | str) -> dict[int, Row]:
    """Label and verdict by index, from an examples.csv or the folder that holds it. Raises ValueError."""
    path = Path(source)
    path = path / "examples.csv" if path.is_dir() else path
    rows: dict[int, Row] = {}
    try:
        with path.open(newline="", encoding="utf-8") as file:
            lines = csv.DictReader(file)
            for line in lines:
                index = int(line["index"])
                if index in rows:
                    raise ValueError(f"index {index} twice")
                rows[index] = Row(int(line["label"]), {"1": True, "0": False}[line["robust"]])
    except FileNotFoundError:
        raise ValueError(
            f"{path} is not there; it should hold one row per example, as `sparring evaluate` writes it"
        ) from None
    except (KeyError, TypeError, ValueError, csv.Error) as error:
        raise ValueError(
            f"{path}, line {lines.line_num}: expected index, label and robust (0 or 1) in every row, each index once; "
            f"got {error}. The pairing would be wrong; run `sparring evaluate` again"
        ) from None
    if not rows:
        raise ValueError(f"{path} holds no examples, so there is nothing to pair; run `sparring evaluate` again")
    return rows


def _wrong(path: Path, expected: str) -> ValueError:
    return ValueError(f"{path}: expected {expected}. It cannot be judged; run `sparring evaluate` again")
