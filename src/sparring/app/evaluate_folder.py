"""Evaluating a model of a run folder, a user's file or a known name into a folder of results."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor, nn

from sparring.adapters.files import file_and_key, runs_a_file
from sparring.app import train_run as runs
from sparring.app.evaluate import evaluate
from sparring.app.settings import EvaluationSettings
from sparring.app.tasks import next_step
from sparring.attacks.plans import Stage
from sparring.core.batches import draw
from sparring.core.files import sole_writer, write_atomically
from sparring.core.machine import Machine, find_machine
from sparring.core.registry import name_of, parse
from sparring.core.types import Inputs, map_inputs
from sparring.evaluation.all_batches import Progress
from sparring.evaluation.kept import OtherSettings, clear
from sparring.evaluation.measure import GALLERY_SIZE, Evaluation
from sparring.modalities import find_data
from sparring.modalities.base import Dataset, Modality
from sparring.results.schema import Results
from sparring.threats import ThreatModel


class Subject(NamedTuple):
    """A model to be evaluated, and what its results should say about it."""

    model: nn.Module
    name: str
    architecture: str
    weights: Path | None
    training: dict[str, Any] | None
    run: Path | None = None


def from_run(run: Path, which: str = "best", model_file: str | None = None) -> Subject:
    """The model of a run folder; see `runs.load` for `model_file`."""
    settings = runs.read_config(run)
    if settings.threat == "none":
        raise ValueError(
            f"{run} was trained by {settings.recipe}, which makes no classifier, so there is no robust accuracy to "
            f"measure; {next_step(settings).format(run=run, model='')} shows what it learned"
        )
    model, weights = runs.load(run, which, model=model_file), run / f"{which}.safetensors"
    training = runs.training_record(run, which) if (run / "training.json").exists() else None
    return Subject(model, run.resolve().name, str(settings.model), weights, training, run)


def from_weights(model: str, weights: Path | None, data: str) -> Subject:
    """The model of a user's file ("file.py:function") or a known name, with the weights of a file."""
    dataset, modality, _ = find_data(data)
    built = modality.make_model(model, 0, {**dataset.given, "class_names": dataset.class_names}, weights, dataset)
    brought: Path | None = weights or getattr(built, "weights_file", None)  # of a model that was saved with them
    if not brought and not runs_a_file(model):
        raise ValueError(
            f"--model {model} without --weights is a network that has learned nothing; one of your own, with what it "
            "learned, is FILE.py:FUNCTION"
        )
    name = weights.stem if weights else Path(model.rpartition(":")[2]).name
    return Subject(built.eval(), name, model, brought, None)


class Question(NamedTuple):
    """What a model is to be measured with: the examples that the seed draws, the threat, the attacks."""

    data: Dataset
    modality: Modality
    threat: ThreatModel
    stages: tuple[Stage, ...]
    rows: Tensor
    pairs: list[tuple[Inputs, Tensor]]


def question_of(subject: Subject, settings: EvaluationSettings, machine: Machine) -> Question:
    """What the settings ask of a subject; the batches lie on the machine's device."""
    s = settings
    data, modality, _ = find_data(runs.data_text(subject.run, s.data) if subject.run else s.data)
    threat = modality.make_threat(s.threat, data, subject.model)
    stages = modality.make_plan(s.attacks, threat, subject.model)
    rows = draw(getattr(data, f"y_{s.split}"), s.num_examples, s.seed, balanced=s.balanced)
    batches = data.batches(s.split, s.batch_size, rows=rows)
    batches.x, batches.y = machine.place(batches.x), machine.place(batches.y)
    return Question(data, modality, threat, stages, rows, list(batches))


def adversarial_arrays(found: Evaluation, question: Question, settings: EvaluationSettings) -> dict[str, np.ndarray]:
    """The turned examples of an evaluation that kept them all, as `sparring attack` writes them."""
    dataset, modality, threat, stages, _, pairs = question
    arrays = {name: tensor.cpu().numpy() for name, tensor in found.gallery.items()} or _none_of(pairs[0][0])
    if modality.caption:
        arrays |= modality.caption(dataset, gallery=arrays, split=settings.split, threat=threat)
    words = {"label": "y", "clean": "before", "adversarial": "after"}
    told = {}
    for name, array in arrays.items():
        side, _, what = name.partition("_")
        told[f"{what}_{words[side]}" if what and side in words else words.get(name, name)] = array
    sizes = dict(zip(found.table["index"].tolist(), found.table["size"].tolist(), strict=True))
    told["size"] = np.array([sizes[index] for index in told["index"].tolist()], np.float32)
    about = {"threat": settings.threat, "attacks": ",".join(map(name_of, stages)), "data": dataset.name}
    about["split"] = settings.split
    return told | {name: np.array(text) for name, text in about.items()} | {"seed": np.array(settings.seed)}


def _none_of(x: Inputs) -> dict[str, np.ndarray]:
    """The arrays of no example."""
    empty = map_inputs(lambda rows: rows[:0].cpu(), x)
    parts = {"": empty} if isinstance(empty, Tensor) else {f"/{name}": rows for name, rows in empty.items()}
    arrays = {f"{side}{name}": rows.numpy() for side in ("x", "x_adv") for name, rows in parts.items()}
    whole = dict.fromkeys(("index", "label", "clean_prediction", "adversarial_prediction"), np.zeros(0, np.int64))
    return arrays | whole | dict.fromkeys(("clean_confidence", "adversarial_confidence"), np.zeros(0, np.float32))


def write_arrays(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Writes an .npz atomically, which `numpy.load(path)` reads without pickle."""
    write_atomically(path, lambda stream: np.savez_compressed(stream, **arrays))  # type: ignore[arg-type]


def evaluate_folder(
    subject: Subject, out: Path, settings: EvaluationSettings, *, command: str | None = None,
    observe: Callable[[Progress], object] | None = None,
) -> Results | None:  # fmt: skip
    """Evaluates on examples of a split that the seed draws, writes the folder, and returns what results.json holds.

    Finished batches lie in `out`/parts until all is done: a call with the same settings goes on there. Where
    torch.distributed is initialised the processes share the work; the first writes, the others return None. Raises
    ValueError (PreflightError among them), OSError, RuntimeError.
    """
    s, machine = settings, find_machine(settings.device)
    question = question_of(subject, s, machine)
    dataset, modality, threat, stages, rows, pairs = question
    keep = out / "parts"
    digest = _sha256(file_and_key(subject.weights)[0]) if subject.weights else None
    file = Path(parse(subject.architecture).name.rpartition(":")[0]).expanduser()
    code = _sha256(file) if file.suffix == ".py" and file.is_file() else None  # of a model of the user's own
    told = [dataset.name, s.split, len(rows), s.batch_size, digest, code]
    run = functools.partial(
        evaluate, machine.place(subject.model), pairs, threat, stages, seed=s.seed, certify=s.certify,
        smooth=s.smooth, checks=s.checks, class_names=dataset.class_names, modality=modality, numbers=rows,
        keep=keep, about=json.dumps(told), machine=machine, observe=observe,
        gallery_size=len(rows) if s.keep_examples else GALLERY_SIZE,
    )  # fmt: skip
    about: dict[str, Any] = {
        "name": s.name or subject.name, "command": command, "training": subject.training, "device": str(machine.device),
        "model": {
            "name": subject.architecture, "parameters": sum(p.numel() for p in subject.model.parameters()),
            "weights": str(subject.weights) if subject.weights else None, "sha256": digest, "smooth": s.smooth,
        },
        "data": {
            "kind": dataset.kind, "name": dataset.name, "split": s.split, "shape": dataset.shape,
            "settings": dict(dataset.facts),
        },
        "caption": modality.caption and functools.partial(modality.caption, dataset, split=s.split, threat=threat),
    }  # fmt: skip
    with sole_writer(out) if machine.rank == 0 else nullcontext():
        for name in ("results.json", "adversarial.npz"):  # nobody shall take them for what is measured now
            if machine.rank == 0 and (out / name).exists():
                (out / name).replace(out / name.replace(".", ".before."))
        try:
            evaluation = run()
        except OtherSettings:  # of an evaluation that is not wanted any more
            if machine.rank == 0:  # the others wait for it at the start of the second call
                clear(keep)
            evaluation = run()
        if machine.rank:
            return None
        if s.keep_examples:
            write_arrays(out / "adversarial.npz", adversarial_arrays(evaluation, question, s))
            evaluation.gallery = {name: column[:GALLERY_SIZE] for name, column in evaluation.gallery.items()}
        results = evaluation.save(out, **about)
        clear(keep)
        return results


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
