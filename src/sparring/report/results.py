"""The files of an evaluation (docs/results-schema.md), read and checked. Reading runs no code from them."""

from __future__ import annotations

import csv
import math
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sparring.core.files import read_json

SCHEMA = "sparring.results/1"
LEVELS = {"note": "TRUSTED", "suspect": "SUSPECT", "invalid": "INVALID"}
"""The levels of a finding, mildest first, and the best verdict that each allows."""

_KEYS: dict[str, type] = {  # without these there is no page; everything else may be absent
    "name": str, "data": dict, "threat": str, "clean_accuracy": dict, "robust_accuracy": dict,
    "attacks": list, "curve": list, "per_class": list, "findings": list,
}  # fmt: skip
_COUNTS = ("ran_on", "skipped", "broke", "robust_after", "near")
GALLERY = ("index", "x", "x_adv", "label", "clean_prediction", "clean_confidence",
            "adversarial_prediction", "adversarial_confidence")  # fmt: skip


class Example(NamedTuple):
    """One row of examples.csv; `margin_left` (share of the clean margin) and `certified` are None where not told."""

    label: int
    clean: bool
    robust: bool
    margin_left: float | None = None
    certified: bool | None = None


@dataclass(frozen=True)
class Run:
    """One evaluation; `examples` (by index) and `gallery` are None when their file is missing."""

    name: str
    results: dict[str, Any]
    examples: dict[int, Example] | None
    gallery: Mapping[str, np.ndarray] | None

    def class_name(self, label: int) -> str:
        names = self.results["data"].get("class_names") or []
        return str(names[label]) if 0 <= label < len(names) else f"class {label}"


def read_run(folder: Path) -> Run:
    """The evaluation in the folder; raises ValueError when a file is there but not what it should be."""
    results = _results(folder / "results.json")
    return Run(results["name"], results, _examples(folder / "examples.csv"), _gallery(folder / "gallery.npz"))


def _results(path: Path) -> dict[str, Any]:
    results = read_json(path, "the results that `sparring evaluate` wrote")
    schema = results.get("schema", "nothing") if isinstance(results, dict) else type(results).__name__
    if schema != SCHEMA:
        raise _wrong(path, f'results with "schema": "{SCHEMA}", got {schema}')
    for key, kind in _KEYS.items():
        good = isinstance(results.get(key), kind)
        if good and kind is list:
            good = all(isinstance(entry, dict) for entry in results[key])
        if not good:
            what = "a list of objects" if kind is list else f"a {kind.__name__}"
            raise _wrong(path, f"{what} at {key}, got {results.get(key)!r:.60}")
    _check_shares(path, results)
    _check_attacks(path, results["attacks"])
    _check_verdict(path, results)
    return results


def _check_shares(path: Path, results: Mapping[str, Any]) -> None:
    """Numbers where a share has them, and no more certified than robust, no more robust than clean."""
    kinds = ("clean_accuracy", "robust_accuracy", "certified_accuracy")
    shares = {key: results[key] for key in kinds if results.get(key) is not None}
    for where, share in [*shares.items(), *((f"curve[{i}]", point) for i, point in enumerate(results["curve"]))]:
        if not isinstance(share, dict):
            raise _wrong(path, f"an object or null at {where}, got {share!r:.60}")
        for key in ("value", "low", "high", "n", *(["radius"] if "curve" in where else [])):
            if not _is_number(share.get(key)):
                raise _wrong(path, f"a number at {where}.{key}, got {share.get(key)!r:.60}")
    values = [share["value"] for share in shares.values()]
    if not all(1 >= a >= b >= 0 for a, b in pairwise(values)) or shares["clean_accuracy"]["n"] < 1:
        raise _wrong(path, f"shares of n >= 1 with clean >= robust >= certified in [0, 1], got {values}")
    if len({share["n"] for share in shares.values()}) > 1:
        raise _wrong(path, f"clean, robust and certified accuracy of the same examples, got n {_all(shares, 'n')}")


def _check_attacks(path: Path, attacks: list[dict[str, Any]]) -> None:
    for i, attack in enumerate(attacks):
        cost = attack.get("cost")
        if not isinstance(cost, dict | None):
            raise _wrong(path, f"an object at attacks[{i}].cost, got {cost!r:.60}")
        numbers = {key: attack.get(key) for key in _COUNTS}
        numbers |= {f"cost.{key}": (cost or {}).get(key) for key in ("forwards", "backwards", "seconds")}
        for key, value in numbers.items():
            if value is not None and not (_is_number(value) and value >= 0):
                raise _wrong(path, f"a number >= 0 at attacks[{i}].{key}, got {value!r:.60}")


def _check_verdict(path: Path, results: Mapping[str, Any]) -> None:
    """A known word, known levels, and no verdict milder than its findings."""
    levels, verdicts = list(LEVELS), list(LEVELS.values())
    found = [finding.get("level", "note") for finding in results["findings"]]
    for i, level in enumerate(found):
        if level not in levels:
            raise _wrong(path, f"one of {', '.join(levels)} at findings[{i}].level, got {level!r:.60}")
    verdict = results.get("verdict")
    if verdict is None:
        return
    if verdict not in verdicts:
        raise _wrong(path, f"one of {', '.join(verdicts)} or null at verdict, got {verdict!r:.60}")
    worst = max((levels.index(level) for level in found), default=0)
    if verdicts.index(verdict) < worst:
        raise _wrong(
            path, f"a verdict no milder than its findings, got {verdict} beside a finding that is {levels[worst]}"
        )


def _all(shares: Mapping[str, Any], key: str) -> str:
    return ", ".join(str(share[key]) for share in shares.values())


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _examples(path: Path) -> dict[int, Example] | None:
    if not path.exists():
        return None
    try:
        with path.open(newline="", encoding="utf-8") as file:
            return {int(row["index"]): _example(row) for row in csv.DictReader(file)}
    except (KeyError, TypeError, ValueError) as error:
        raise _wrong(path, f"index, label, clean_prediction and robust in every row, got {error}") from None


_FLAGS = {"1": True, "true": True, "0": False, "false": False}


def _example(row: Mapping[str, str]) -> Example:
    label, left, certified = int(row["label"]), row.get("margin_left"), row.get("certified")
    margin_left = float(left) if left else None
    if margin_left is not None and not 0 <= margin_left <= 1:
        raise ValueError(f"margin_left {left}, which is no share")
    return Example(
        label, int(row["clean_prediction"]) == label, _FLAGS[row["robust"].strip().lower()], margin_left,
        _FLAGS[certified.strip().lower()] if certified else None,
    )  # fmt: skip


def _gallery(path: Path) -> dict[str, np.ndarray] | None:
    if not path.exists():
        return None
    try:
        with np.load(path, allow_pickle=False) as file:
            return {key: file[key] for key in GALLERY}
    except (KeyError, OSError, ValueError, zipfile.BadZipFile) as error:
        raise _wrong(path, f"an npz without pickle that holds {', '.join(GALLERY)}, got {error}") from None


def _wrong(path: Path, expected: str) -> ValueError:
    return ValueError(f"{path}: expected {expected}. The report would mislead; run `sparring evaluate` again.")
