"""An evaluation as files: results.json, examples.csv, gallery.npz (see docs/results-schema.md)."""

from __future__ import annotations

import csv
import io
import math
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sparring.core.files import write_atomically, write_json, write_text
from sparring.evaluation.fingerprint import describe
from sparring.evaluation.measure import Evaluation
from sparring.evaluation.one_batch import AttackRecord
from sparring.results.findings import verdict
from sparring.results.schema import Metric
from sparring.threats import threat_text

SCHEMA = "sparring.results/1"

COLUMNS = (
    "index", "label", "clean_prediction", "clean_confidence", "robust", "broken_by", "adversarial_prediction",
    "adversarial_confidence", "size", "margin_left", "certified",
)  # fmt: skip


def write_results(folder: Path, evaluation: Evaluation, **about: Any) -> dict[str, Any]:
    """Writes the three files and returns what results.json holds.

    `about` adds what the evaluation itself cannot know: name, created, command, model, data, training, class_names,
    device, sanity (what the sanity battery cost, when its findings are among those of the evaluation),
    no_certificate (why none was tried).
    """
    record = to_record(evaluation, **about)
    for old in ("results.json", "gallery.npz"):  # results.json comes last: a folder that has it is complete
        (folder / old).unlink(missing_ok=True)
    if evaluation.gallery:
        arrays: dict[str, Any] = {name: tensor.numpy() for name, tensor in evaluation.gallery.items()}
        write_atomically(folder / "gallery.npz", lambda stream: np.savez_compressed(stream, **arrays))
    write_text(folder / "examples.csv", _examples(evaluation))
    write_json(folder / "results.json", record)
    return record


def to_record(
    evaluation: Evaluation,
    *,
    class_names: list[str] | None = None,
    device: str = "cpu",
    sanity: dict[str, Any] | None = None,
    no_certificate: str = "none was asked for",
    **about: Any,
) -> dict[str, Any]:
    """The content of results.json as plain data; see `write_results` for the options."""
    e = evaluation
    names = class_names or []
    return {
        "schema": SCHEMA,
        "version": version("sparring"),
        **about,
        "threat": threat_text(e.threat),
        "threat_settings": describe(e.threat),
        "seed": e.seed,
        "clean_accuracy": _share(e.clean),
        "robust_accuracy": _share(e.robust),
        "certified_accuracy": _share(e.certified) if e.certified else None,
        "certification": e.certification or {"name": None, "reason": no_certificate},
        "verdict": verdict(e.findings) if sanity is not None else None,
        "sanity": sanity,
        "attack_success": _share(e.attack_success) if e.attack_success else None,
        "attacks": [_attack(record, e.robust.n) for record in e.attacks],
        "curve": [{"radius": radius, **_share(share)} for radius, share in e.curve],
        "curve_attacks": e.curve_attacks,
        "per_class": [
            {**row, "name": names[row["label"]] if row["label"] < len(names) else str(row["label"])}
            for row in e.per_class
        ],
        "findings": [_plain_finding(finding) for finding in e.findings],
        "cost": {**e.cost._asdict(), "seconds": round(e.seconds, 3)},
        "environment": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "platform": f"{platform.system()} {platform.machine()}",
            "device": device,
            "threads": torch.get_num_threads(),
        },
    }


def _share(metric: Metric) -> dict[str, Any]:
    return {name: getattr(metric, name) for name in ("value", "low", "high", "n", "count")}


def _attack(record: AttackRecord, num: int) -> dict[str, Any]:
    return {
        "name": record.name,
        "settings": record.settings,
        "near": record.margin_at_most,
        "ran_on": record.ran_on,
        "skipped": record.skipped,
        "broke": record.broke,
        "robust_after": record.standing_after / num,
        "rejected": record.rejected,
        "cost": {**record.cost._asdict(), "seconds": round(record.seconds, 3)},
    }


def _plain_finding(finding: Any) -> dict[str, Any]:
    numbers = {k: v if not isinstance(v, float) or math.isfinite(v) else str(v) for k, v in finding.numbers.items()}
    told = {"name": finding.name, "level": finding.level, "sentence": finding.sentence, "numbers": numbers}
    return {**told, "next_step": finding.next_step}


def _examples(evaluation: Evaluation) -> str:
    """The table of examples as CSV text."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(COLUMNS)
    attack_names = [record.name for record in evaluation.attacks]
    columns = {name: evaluation.table[name].tolist() for name in COLUMNS}
    for row in zip(*columns.values(), strict=True):
        values = dict(zip(COLUMNS, row, strict=True))
        turned = values["broken_by"] >= 0
        values |= {"robust": int(values["robust"]), "broken_by": attack_names[values["broken_by"]] if turned else ""}
        values["certified"] = "" if evaluation.certified is None else int(values["certified"])
        if not turned:
            values |= dict.fromkeys(("adversarial_prediction", "adversarial_confidence", "size"), "")
        writer.writerow(f"{v:.6g}" if isinstance(v, float) else v for v in values.values())
    return stream.getvalue()
