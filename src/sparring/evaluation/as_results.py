"""An evaluation as what goes to disk: the records of results.json, a row per example, some turned examples."""

from __future__ import annotations

import dataclasses
import json
import math
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any, NamedTuple

import numpy as np
import torch

from sparring.evaluation.fingerprint import describe
from sparring.evaluation.measure import Evaluation, accuracy_metrics
from sparring.evaluation.one_batch import AttackRecord
from sparring.results.findings import Finding, verdict
from sparring.results.schema import FORMAT, Results, Row
from sparring.threats import threat_text


class Stored(NamedTuple):
    """What `write_evaluation` takes after the folder."""

    results: Results
    rows: list[Row]
    gallery: dict[str, np.ndarray]


def as_results(
    evaluation: Evaluation,
    *,
    name: str = "model",
    class_names: Sequence[str] = (),
    data: Mapping[str, Any] | None = None,
    device: str = "cpu",
    sanity: Mapping[str, float] | None = None,
    no_certificate: str = "none was asked for",
    **about: Any,
) -> Stored:
    """(results, rows, gallery) of an evaluation, ready for `write_evaluation`.

    The options add what it cannot know: what the reports call the model, `data` (see `DataEntry`; what is left out is
    filled in), sanity (what the sanity battery cost, when its findings are among those of the evaluation),
    no_certificate (why none was tried); about: created, command, model, training. Raises ValueError for what
    results.json cannot hold. Text that is no Unicode (a file name in another encoding) gets question marks.
    """
    e, names = evaluation, list(class_names)
    told = {column: values for column, values in e.table.items() if e.certification or column != "certified"}
    record = {
        "schema": FORMAT, "name": name, "version": version("sparring"), **about,
        "data": {"kind": "images", "name": "data", "split": "test", "class_names": names, **(data or {})},
        "threat": _threat(e.threat), "seed": e.seed,
        "verdict": verdict(e.findings) if sanity is not None else None, "sanity": sanity,
        "metrics": accuracy_metrics(told) | e.metrics,
        "certification": e.certification or {"name": None, "reason": no_certificate},
        "attacks": [_attack(attack, len(e.table["label"])) for attack in e.attacks],
        "curve": [{"radius": radius, "robust_accuracy": share} for radius, share in e.curve],
        "curve_attacks": e.curve_attacks,
        "per_class": [
            {**row, "name": names[row["label"]] if row["label"] < len(names) else str(row["label"])}
            for row in e.per_class
        ],
        "findings": [_finding(finding) for finding in e.findings],
        "cost": {**e.cost._asdict(), "seconds": round(e.seconds, 3)},
        "environment": {
            "python": platform.python_version(), "torch": torch.__version__, "device": device,
            "platform": f"{platform.system()} {platform.machine()}", "threads": torch.get_num_threads(),
        },
    }  # fmt: skip
    text = json.dumps(record, ensure_ascii=False, allow_nan=False, default=dataclasses.asdict)
    results = Results.model_validate_json(text.encode(errors="replace"))
    return Stored(results, _rows(e), {name: tensor.cpu().numpy() for name, tensor in e.gallery.items()})


def _threat(threat: Any) -> dict[str, Any]:
    text, radius = threat_text(threat), torch.as_tensor(threat.radius)
    words = threat.describe() if hasattr(threat, "describe") else text
    one = radius.ndim == 0 and math.isfinite(float(radius))
    return {"text": text, "words": words, "radius": float(threat.radius) if one else None, "settings": describe(threat)}


def _attack(record: AttackRecord, num: int) -> dict[str, Any]:
    names = ("name", "settings", "margin_at_most", "ran_on", "skipped", "broke", "rejected")
    return {
        **{name: getattr(record, name) for name in names}, "robust_after": record.standing_after / num,
        "cost": {**record.cost._asdict(), "seconds": round(record.seconds, 3)},
    }  # fmt: skip


def _finding(finding: Finding) -> Finding:
    """The same; numbers that are not finite as text, since JSON has none."""
    numbers = {k: v if not isinstance(v, float) or math.isfinite(v) else str(v) for k, v in finding.numbers.items()}
    return dataclasses.replace(finding, numbers=numbers)


def _rows(e: Evaluation) -> list[Row]:
    columns = [e.table[name].tolist() for name in Row._fields]
    rows = []
    for row in map(Row._make, zip(*columns, strict=True)):
        attack: Any = row.broken_by  # its number in the table, -1 for none
        blank: dict[str, Any] = (
            {} if attack >= 0 else dict.fromkeys(("adversarial_prediction", "adversarial_confidence", "size"))
        )
        blank |= {} if e.certification else {"certified": None}
        rows.append(row._replace(broken_by=e.attacks[attack].name if attack >= 0 else "", **blank))
    return rows
