"""What the settings of a run name, read and built: data, network, recipe, augmentation, validation."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from sparring.app.extra import Extra, read_extra
from sparring.app.settings import TrainingSettings
from sparring.app.tasks import LoopParts, parts_of_task, refuse_for_task
from sparring.attacks.around import part_of, seeking
from sparring.core.batches import Augment, Batches, draw, hold_out
from sparring.core.blend import Blended
from sparring.core.machine import Machine
from sparring.core.noise import Noise
from sparring.core.objectives import margin
from sparring.core.registry import Named, named, text_of
from sparring.core.types import take
from sparring.evaluation.measure import measure
from sparring.evaluation.preflight import preflight
from sparring.modalities import find_data
from sparring.modalities.base import Dataset, Modality, Task
from sparring.threats.inputs import check_inputs
from sparring.training.guard import field_of
from sparring.training.schedules import Ramp, Ramped
from sparring.training.supervised import Supervised, read_class_weights
from sparring.training.watch import Switched, Watch
from sparring.training.weights import awp


class Job(NamedTuple):
    """What the settings of a run name, read and built once."""

    settings: TrainingSettings
    data: Dataset
    modality: Modality
    model: nn.Module
    threat: Any
    recipe: Named
    weights: list[float] | None = None
    task: Task | None = None
    extra: Extra | None = None


def prepare(settings: TrainingSettings, text: str = "") -> Job:
    """Everything that can be wrong with the settings says so here. text: of the data, where the run has kept some."""
    data, modality, _ = find_data(text or settings.data)
    recipe, task = modality.named_recipe(settings.recipe), modality.task(settings.recipe)
    if task:
        refuse_for_task(settings)
        return Job(settings, data, modality, task.model(data.given, settings.seed), None, recipe, task=task)
    weights = Path(settings.weights) if settings.weights else None
    given = {**data.given, "class_names": data.class_names}
    model = modality.make_model(str(settings.model), settings.seed, given, weights)
    if not any(p.requires_grad for p in model.parameters()):
        raise ValueError(
            f"model {str(settings.model)!r} has no weights to learn; a model without them, such as an estimator or a "
            "function, can be evaluated: sparring evaluate --model"
        )
    if data.start and not weights:
        data.start(model)
    threat = modality.make_threat(settings.threat, data, model)
    if not math.isfinite(threat.radius):
        raise ValueError(f"threat {settings.threat!r}: training needs a finite radius, not an infinite one")
    for x, _ in data.batches("train", 1000):
        check_inputs(x, threat)
    told = settings.class_weights
    of_classes = None if told is None else read_class_weights(told, data.y_train, data.class_names)
    extra = None
    if settings.extra:
        alone = field_of(recipe(threat), "unlabelled", False)
        extra = read_extra(Path(settings.extra).expanduser(), data, threat, unlabelled=alone)
    if extra and extra.y.ndim == 2 and of_classes:
        raise ValueError(f"class_weights need one class for each example; the labels of {settings.extra} are soft")
    job = Job(settings, data, modality, model, threat, recipe, of_classes, extra=extra)
    if guard := named_guard(settings.guard):
        guard(threat, None, None)
    make_recipe(job)
    return job


def make_recipe(job: Job) -> Any:
    """The recipe as the run has it: classes weighted, the radius growing, weights perturbed; ValueError."""
    made, other = job.recipe(job.threat), None
    if job.settings.guard != "none":
        if part_of(getattr(made, "attack", None), "threat") is None:
            raise ValueError(
                f"guard {job.settings.guard}: the recipe {job.recipe.name} attacks nothing; leave guard out"
            )
        other = job.modality.named_recipe("pgd-at")(job.threat)
        # the margin has a gradient where the cross-entropy has none left
        other = _around(job, replace(other, attack=seeking(other.attack, margin)))
    return _around(job, made) if other is None else Switched(recipe=_around(job, made), other=other)


def _around(job: Job, recipe: Any) -> Any:
    """One recipe with all that the settings put around it."""
    s = job.settings
    if job.weights is not None:
        if not isinstance(recipe, Supervised):
            raise ValueError(
                f"the recipe {job.recipe.name} takes no class_weights; pgd-at, trades and others for single labels do"
            )
        recipe = replace(recipe, class_weights=job.weights)
    assert s.radius_ramp is not None
    if part_of(getattr(recipe, "attack", None), "threat") is not None:
        recipe = Ramped(recipe, Ramp(s.radius_ramp))
    return recipe if s.awp == 0 else awp(recipe, gamma=s.awp)


def make_parts(job: Job, model: nn.Module, machine: Machine, out: Path) -> tuple[tuple[Any, Any], LoopParts]:
    """(x, y) to train on, and what the loop is given beside: the task's own, or that of a classifier."""
    s, data = job.settings, job.data
    if job.task:
        return (data.x_train, data.y_train), parts_of_task(job.task, data, model, s, out)
    used, held = split_data(s, data)
    batches = Batches(machine.place(held[0]), machine.place(held[1]), 500, prepare=data.prepare)
    learning: dict[str, Any] = {"params": model.parameters(), "lr": s.learning_rate, "weight_decay": s.weight_decay}
    sgd = s.optimizer == "sgd"
    optimizer = torch.optim.SGD(**learning, momentum=0.9) if sgd else torch.optim.AdamW(**learning)
    recipe = make_recipe(job)
    certifies = field_of(recipe, "certifies", False)  # a recipe that trains for a certificate, which chooses the epoch
    validate, score = make_validation(job, model, batches, certifies), score_of(job, certifies)
    return used, LoopParts(recipe, optimizer, validate, score, make_guard(job, held, machine))


def named_guard(text: str) -> Named | None:
    """The guard that a text names, waiting for threat, x and y; None for "none". ValueError."""
    return None if text == "none" else named(text, {"watch": Watch}, "guard", given=("threat", "x", "y"))


def make_guard(job: Job, held: tuple[Any, Any], machine: Machine) -> Any:
    """The guard of a run, which looks at 256 of the held-out training examples at most."""
    if (waiting := named_guard(job.settings.guard)) is None:
        return None
    rows = draw(held[1], 256, job.settings.seed)
    x, y = machine.place(take(held[0], rows)), machine.place(held[1][rows])
    return waiting(job.threat, job.data.prepare(x) if job.data.prepare else x, y)


def make_batches(job: Job, x: Any, y: Any, machine: Machine) -> Batches | Blended:
    """The batches of a run: of (x, y), with extra examples where there are some."""
    s, prepare = job.settings, job.data.prepare
    assert s.batch_size
    options: dict[str, Any] = {"prepare": prepare, "augment": make_augment(job)}
    own = Batches(
        machine.place(x), machine.place(y), s.batch_size, seed=s.seed, shuffle=True, drop_last=len(y) >= s.batch_size,
        **options,
    )  # fmt: skip
    if job.extra is None:
        return own
    seed = int(Noise.make(s.seed, "extra", torch.arange(1)).keys) & 0x7FFFFFFF  # of other draws than the data's own
    extra = Batches(machine.place(job.extra.x), machine.place(job.extra.y), s.batch_size, seed=seed, **options)
    return Blended(own, extra, s.extra_share)


def make_augment(job: Job) -> Augment | None:
    """The augmentation with its options, checked as the grammar checks them."""
    make = job.modality.augment
    if make is None:
        return None
    options = "".join(f",{key}={text_of(value)}" for key, value in (job.settings.augment or {}).items())
    augment: Augment | None = named(f"augment{options}", {"augment": make}, "setting", given=())()
    return augment


def split_data(settings: TrainingSettings, data: Dataset) -> tuple[Any, Any]:
    """(x, y) to train on, and (x, y) that choose the best epoch."""
    if data.validation:
        return (data.x_train, data.y_train), data.validation
    num_held = min(settings.held_out, max(len(data.y_train) // 10, data.num_classes))
    keep, held = hold_out(data.y_train, num_held / len(data.y_train), seed=settings.seed)
    return (take(data.x_train, keep), data.y_train[keep]), (take(data.x_train, held), data.y_train[held])


def make_validation(job: Job, model: nn.Module, batches: Batches, certifies: bool) -> Callable[[Any], dict[str, float]]:
    """What chooses the best epoch: a light attack on held-out examples. ValueError for a model without logits.

    With class weights it is the share of weight that stands, not of examples.
    """
    job.modality.calibrate(model, job.data)
    checked = preflight(model, *next(iter(batches)), job.threat)
    if "probabilities" in {finding.name for finding in checked.findings}:
        raise ValueError("the model returns probabilities; training needs logits: leave out its softmax or sigmoid")
    stages, certify = job.modality.make_plan(job.modality.validation, job.threat), None
    if certifies:
        certify, reason = job.modality.certify(model, job.threat)
        if certify is None:
            raise ValueError(f"the recipe {job.recipe.name} trains for a certificate, and there is none: {reason}")

    def validate(candidate: Any) -> dict[str, float]:
        job.modality.calibrate(candidate, job.data)
        found = measure(candidate, batches, job.threat, stages, seed=job.settings.seed, curve=(), certify=certify)
        figures = {"clean_accuracy": found.clean.value, "robust_accuracy": found.robust.value}
        if found.certified is not None:
            figures["certified_accuracy"] = found.certified.value
        if job.weights:
            each = torch.tensor(job.weights, dtype=torch.float64)[found.table["label"]]
            for name, column in (("clean", "correct"), ("robust", "robust")):
                figures[f"weighted_{name}_accuracy"] = float((each * found.table[column]).sum() / each.sum())
        return {**figures, "examples": found.robust.n}

    return validate


def score_of(job: Job, certifies: bool) -> str:
    """The figure that chooses the best epoch."""
    if certifies:
        return "certified_accuracy"
    return f"{'weighted_' if job.weights else ''}{'clean' if job.recipe.name == 'standard' else 'robust'}_accuracy"
