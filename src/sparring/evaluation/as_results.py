"""An evaluation as what goes to disk: the records of results.json, a row per example, some turned examples."""

from __future__ import annotations

import dataclasses
import json
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any, NamedTuple

import numpy as np
import torch

from sparring.evaluation.fingerprint import describe
from sparring.evaluation.measure import Evaluation, accuracy_metrics
from sparring.evaluation.one_batch import AttackRecord
from sparring.results.findings import verdict
from sparring.results.schema import FORMAT, Results, Row


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
    radius = torch.as_tensor(e.threat.radius)
    one_radius = radius.ndim == 0 and bool(radius.isfinite())
    record = {
        "schema": FORMAT, "name": name, "version": version("sparring"), **about,
        "data": {"kind": "images", "name": "data", "split": "test", "class_names": names, **(data or {})},
        "threat": {
            "text": e.threat.text(), "words": e.threat.describe(), "settings": describe(e.threat),
            "radius": float(e.threat.radius) if one_radius else None,
        },
        "seed": e.seed,
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
        "findings": [
            dataclasses.replace(finding, numbers=describe(finding.numbers)) for finding in e.findings
        ],
        "cost": {**e.cost._asdict(), "seconds": round(e.seconds, 3)},
        "environment": {
            "python": platform.python_version(), "torch": torch.__version__, "device": device,
            "platform": f"{platform.system()} {platform.machine()}", "threads": torch.get_num_threads(),
        },
    }  # fmt: skip
    text = json.dumps(record, ensure_ascii=False, allow_nan=False, default=dataclasses.asdict)
    results = Results.model_validate_json(text.encode(errors="replace"))
    return Stored(results, _rows(e), {name: tensor.cpu().numpy() for name, tensor in e.gallery.items()})


def _attack(record: AttackRecord, num: int) -> dict[str, Any]:
    names = ("name", "settings", "margin_at_most", "ran_on", "skipped", "broke", "rejected")
    return {
        **{name: getattr(record, name) for name in names}, "robust_after": record.standing_after / num,
        "cost": {**record.cost._asdict(), "seconds": round(record.seconds, 3)},
    }  # fmt: skip


def _rows(e: Evaluation) -> list[Row]:
    columns = {name: e.table[name].tolist() for name in Row._fields}
    names = [*(attack.name for attack in e.attacks), ""]  # -1, which stands for none, is the last
    broken_by = [names[attack] for attack in columns["broken_by"]]
    columns["broken_by"] = broken_by
    for name in ("adversarial_prediction", "adversarial_confidence", "size"):
        columns[name] = [value if by else None for value, by in zip(columns[name], broken_by, strict=True)]
    if not e.certification:
        columns["certified"] = [None] * len(columns["index"])
    return [Row(*row) for row in zip(*columns.values(), strict=True)]
