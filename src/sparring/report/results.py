"""The files of an evaluation (docs/results-schema.md), read and checked. Reading runs no code from them."""

from __future__ import annotations

import csv
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sparring.files import read_json

SCHEMA = "sparring.results/1"

_KEYS: dict[str, type] = {  # without these there is no page; everything else may be absent
    "name": str, "data": dict, "threat": str, "clean_accuracy": dict, "robust_accuracy": dict,
    "attacks": list, "curve": list, "per_class": list, "findings": list,
}  # fmt: skip
GALLERY = ("index", "x", "x_adv", "label", "clean_prediction", "clean_confidence",
            "adversarial_prediction", "adversarial_confidence")  # fmt: skip


class Example(NamedTuple):
    """One row of examples.csv, as far as models are compared by it."""

    label: int
    clean: bool
    robust: bool


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
    shares: dict[str, dict[str, Any]] = {key: results[key] for key in ("clean_accuracy", "robust_accuracy")}
    shares |= {f"curve[{i}]": point for i, point in enumerate(results["curve"])}
    for where, share in shares.items():
        for key in ("value", "low", "high", "n", *(["radius"] if "curve" in where else [])):
            if not isinstance(share.get(key), int | float):
                raise _wrong(path, f"a number at {where}.{key}, got {share.get(key)!r:.60}")
    return results


def _examples(path: Path) -> dict[int, Example] | None:
    if not path.exists():
        return None
    try:
        with path.open(newline="", encoding="utf-8") as file:
            return {int(row["index"]): _example(row) for row in csv.DictReader(file)}
    except (KeyError, TypeError, ValueError) as error:
        raise _wrong(path, f"index, label, clean_prediction and robust in every row, got {error}") from None


def _example(row: Mapping[str, str]) -> Example:
    label = int(row["label"])
    robust = {"1": True, "true": True, "0": False, "false": False}[row["robust"].strip().lower()]
    return Example(label, int(row["clean_prediction"]) == label, robust)


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
