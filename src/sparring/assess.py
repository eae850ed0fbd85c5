"""Evaluating a model into a folder: results.json, examples.csv, gallery.npz and report.html."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from torch import nn

from sparring import runs
from sparring.attacks.text import STANDARD_ATTACKS, NamedAttack
from sparring.data import Batches
from sparring.data import load as load_data
from sparring.evaluation.findings import Finding
from sparring.evaluation.results import write_results
from sparring.evaluation.robustness import evaluate
from sparring.models import build, from_file, load_weights
from sparring.report import write_report
from sparring.threats import parse_threat


@dataclass(frozen=True)
class Subject:
    """A model to be evaluated, and what its results should say about it."""

    model: nn.Module
    name: str
    architecture: str
    weights: Path | None
    training: dict[str, Any] | None


def from_run(run: Path, which: str = "best", model_file: str | None = None) -> Subject:
    """The model of a run folder; see `runs.load` for `model_file`."""
    config = runs.read_config(run)
    model, weights = runs.load(run, which, model=model_file), run / f"{which}.safetensors"
    training = runs.training_record(run, which) if (run / "training.json").exists() else None
    return Subject(model, run.resolve().name, str(config.model), weights, training)


def from_weights(model: str, weights: Path | None, data: str) -> Subject:
    """The model of a user's file ("file.py:function") or a known name, with the weights of a file."""
    if ":" in model:
        built = from_file(model)
    else:
        dataset = load_data(data)
        built = build(model, dataset.shape, dataset.num_classes, 0)
    if weights:
        load_weights(built, weights)
    elif ":" not in model:
        raise ValueError(f"--model {model} without --weights is a network that has learned nothing")
    return Subject(built.eval(), weights.stem if weights else model.rpartition(":")[2], model, weights, None)


def assess(
    subject: Subject,
    out: Path,
    *,
    data: str,
    threat: str,
    split: str = "test",
    attacks: Sequence[NamedAttack] = STANDARD_ATTACKS,
    num_examples: int = 1000,
    seed: int = 0,
    device: str = "auto",
    command: str | None = None,
    name: str | None = None,
    observe: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Evaluates on the first `num_examples` of a split, writes the folder, and returns what results.json holds.

    The security curve runs the attacks with one restart each. Raises ValueError (PreflightError among them), OSError.
    """
    if not 0 <= seed <= 2**31:
        raise ValueError(f"the seed must be between 0 and 2^31; got {seed}")
    if num_examples < 1:
        raise ValueError(f"the number of examples must be at least 1; got {num_examples}")
    dataset, on = load_data(data), runs.pick_device(device)
    sides = {"test": (dataset.x_test, dataset.y_test), "train": (dataset.x_train, dataset.y_train)}
    if split not in sides:
        raise ValueError(f"split {split!r} is unknown; there are {', '.join(sides)}")
    x, y = (part[:num_examples].to(on) for part in sides[split])
    evaluation = evaluate(
        subject.model.to(on), Batches(x, y, 250), parse_threat(threat), attacks, seed=seed,
        curve_attacks=[a.but(restarts=1) if "restarts" in dict(a.options) else a for a in attacks],
        observe=lambda done: observe(done, len(y)) if observe else None,
    )  # fmt: skip
    names = list(dataset.class_names)
    if len(seen := y.unique()) < dataset.num_classes:
        sentence = f"Only {len(seen)} of {dataset.num_classes} classes occur in the {len(y)} examples that were tried."
        evaluation.findings.append(Finding("missing classes", sentence, {"seen": len(seen)}))
    record = write_results(
        out, evaluation, class_names=names, name=name or subject.name,
        created=datetime.now(UTC).isoformat(timespec="seconds"), command=command,
        model={
            "name": subject.architecture,
            "parameters": sum(p.numel() for p in subject.model.parameters()),
            "weights": str(subject.weights) if subject.weights else None,
            "sha256": hashlib.sha256(subject.weights.read_bytes()).hexdigest() if subject.weights else None,
        },
        data={"name": dataset.name, "split": split, "shape": list(dataset.shape), "class_names": names},
        training=subject.training, device=str(on),
    )  # fmt: skip
    write_report([out], out / "report.html")
    return record
