"""Evaluating a model into a folder: results.json, examples.csv, gallery.npz and report.html."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from torch import nn

from sparring.adapters.files import build_model, load_weights
from sparring.app import train_run as runs
from sparring.attacks.plans import DEFAULT_PLAN, Stage, make_plan
from sparring.certify import SmoothedNet, SmoothingBound
from sparring.core.machine import find_machine
from sparring.core.registry import Named
from sparring.evaluation.all_batches import Progress
from sparring.evaluation.kept import OtherSettings, clear
from sparring.evaluation.measure import Evaluation, measure
from sparring.evaluation.preflight import preflight
from sparring.modalities import find_data
from sparring.modalities.base import Modality
from sparring.report import write_report
from sparring.results.findings import Finding
from sparring.results.write import write_results
from sparring.threats import L2, make_threat


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
    dataset, modality, _ = find_data(data)
    built = build_model(model, modality.models, 0, dataset.given)
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
    attacks: Sequence[Stage] | None = None,
    num_examples: int = 1000,
    batch_size: int = 250,
    seed: int = 0,
    device: str = "auto",
    certify: str = "auto",
    smooth: float | None = None,
    sanity: bool = True,
    command: str | None = None,
    name: str | None = None,
    observe: Callable[[Progress], object] | None = None,
) -> dict[str, Any] | None:
    """Evaluates on the first `num_examples` of a split, writes the folder, and returns what results.json holds.

    attacks: by default the fast verdict. The security curve runs them with one restart each, and without the costly
    ones (FAB, Square, and what is kept for a few near examples). certify: auto, interval or none. smooth: judge the
    model under that much Gaussian noise instead, certified by randomised smoothing (L2 only). sanity: whether the
    battery looks for signs that the number is too high. Finished batches lie in `out`/parts until all is done: a call
    with the same settings goes on there. Where torch.distributed is initialised the processes share the work; the
    first writes, the others return None. Raises ValueError (PreflightError among them), OSError, RuntimeError.
    """
    if not 0 <= seed <= 2**31:
        raise ValueError(f"the seed must be between 0 and 2^31; got {seed}")
    for count, what in ((num_examples, "the number of examples"), (batch_size, "the batch size")):
        if count < 1:
            raise ValueError(f"{what} must be at least 1; got {count}")
    machine = find_machine(device)
    (dataset, modality, _), on = find_data(data), machine.device
    batches = dataset.batches(split, batch_size, num_examples)
    batches.x, batches.y = machine.place(batches.x), machine.place(batches.y)
    x, y = batches.x, batches.y
    model, ball = subject.model.to(on), make_threat(threat)
    first = preflight(model, *next(iter(batches)), ball)
    bound, no_certificate = _certificate(certify, modality, first.model, ball, smooth)
    model = SmoothedNet(first.model, smooth) if smooth else model  # else `measure` wraps it, and tells
    attacks = attacks or make_plan(DEFAULT_PLAN, ball)
    digest = hashlib.sha256(subject.weights.read_bytes()).hexdigest() if subject.weights else None
    keep = out / "parts"
    evaluation = _evaluate(
        keep, model, batches, ball, attacks, seed=seed, certify=bound, observe=observe,
        curve_stages=_for_curve(attacks), machine=machine,
        about=json.dumps([dataset.name, split, len(y), batch_size, digest, _code(subject.architecture)]),
    )  # fmt: skip
    if machine.rank:
        return None
    evaluation.findings += first.findings if smooth else ()
    names = list(dataset.class_names)
    if len(seen := y.unique()) < dataset.num_classes:
        sentence = f"Only {len(seen)} of {dataset.num_classes} classes occur in the {len(y)} examples that were tried."
        evaluation.findings.append(Finding("missing classes", sentence, {"seen": len(seen)}))
    checks = None
    if sanity:
        if observe:
            observe(Progress(len(y), len(batches), 0, evaluation.cost, "sanity checks", 1.0))
        checks = _sanity(model, batches.prepare(x) if batches.prepare else x, y, ball, evaluation, seed)
    record = write_results(
        out, evaluation, class_names=names, name=name or subject.name,
        created=datetime.now(UTC).isoformat(timespec="seconds"), command=command,
        model={
            "name": subject.architecture,
            "parameters": sum(p.numel() for p in subject.model.parameters()),
            "weights": str(subject.weights) if subject.weights else None,
            "sha256": digest,
            "smooth": smooth,
        },
        data={"name": dataset.name, "split": split, "shape": list(dataset.shape), "class_names": names},
        training=subject.training, device=str(on), sanity=checks, no_certificate=no_certificate,
    )  # fmt: skip
    write_report([out], out / "report.html")
    clear(keep)
    return record


def _for_curve(stages: Sequence[Stage]) -> list[Stage]:
    """What the security curve can afford at each of its radii."""

    def light(stage: Stage) -> bool:
        costly = getattr(stage.attack, "name", "") in ("fab", "fab-t", "square")
        return not costly and (stage.margin_at_most is None or stage.margin_at_most >= 0.5)

    once = [stage for stage in stages if light(stage)] or list(stages)
    return [
        replace(stage, attack=stage.attack.but(restarts=1))
        if isinstance(stage.attack, Named) and "restarts" in stage.attack.options
        else stage
        for stage in once
    ]


def _evaluate(keep: Path, *arguments: Any, **options: Any) -> Evaluation:
    """`measure`, going on where the folder ends; batches of other settings are thrown away."""
    try:
        return measure(*arguments, keep=keep, **options)
    except OtherSettings:
        if find_machine().rank == 0:  # the others wait for it at the start of the second call
            clear(keep)
        return measure(*arguments, keep=keep, **options)


def _certificate(how: str, modality: Modality, model: Any, threat: Any, smooth: float | None) -> tuple[Any, str]:
    """The certificate of a margin and "", or None and why there is none. Raises ValueError where it was demanded."""
    if how not in ("auto", "interval", "none"):
        raise ValueError(f"certify={how!r}; expected auto, interval or none")
    if smooth and type(threat) is not L2:
        raise ValueError(f"--smooth certifies L2 radii; the threat is {type(threat).__name__}: take one such as l2:0.5")
    if smooth and how == "interval":
        raise ValueError("interval bounds do not reach through the noise of --smooth; leave out --certify interval")
    if how == "none":
        return None, "none was asked for"
    if smooth:
        return SmoothingBound(model, smooth), ""
    bound, reason = modality.certify(model, threat)
    if reason and how == "interval":
        raise ValueError(f"{reason}; leave out --certify interval")
    return bound, reason


def _sanity(model: nn.Module, x: Any, y: Any, threat: Any, evaluation: Evaluation, seed: int) -> dict[str, Any]:
    """Adds what the battery finds to the findings; what it cost."""
    from sparring.checks.battery import examine

    started = time.monotonic()
    evaluation.findings += examine(model, x, y, threat, evaluation, seed=seed)
    return {"seconds": round(time.monotonic() - started, 3)}


def _code(architecture: str) -> str | None:
    """SHA-256 of the file that builds the model, when it is the user's own."""
    path = Path(architecture.rpartition(":")[0]).expanduser()
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.suffix == ".py" and path.is_file() else None
