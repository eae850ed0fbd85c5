"""Adversarial examples of a data set as files: crafted and verified as an evaluation does, then read again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from sparring.app.evaluate_folder import Subject, adversarial_arrays, question_of, write_arrays
from sparring.app.settings import EvaluationSettings
from sparring.core.files import write_text
from sparring.core.machine import Machine, find_machine
from sparring.core.types import take
from sparring.evaluation.all_batches import Progress
from sparring.evaluation.measure import Evaluation, measure
from sparring.evaluation.one_batch import predict
from sparring.modalities.base import Dataset, Modality
from sparring.threats import Ball, ThreatModel, inside


class Reloaded(NamedTuple):
    """What came of examples that went through files: how many, that still fool the model, and that do and are within
    the threat (None where that cannot be told of an input alone)."""

    num: int
    fools: int
    permitted: int | None


@dataclass(frozen=True)
class Crafted:
    """The examples that attacks turned: `arrays` as they go to disk, of one length; `evaluation` is of all tried."""

    arrays: dict[str, np.ndarray]
    evaluation: Evaluation
    modality: Modality
    threat: ThreatModel
    machine: Machine
    data: Dataset

    @property
    def num(self) -> int:
        return len(self.arrays["index"])

    def save(self, path: Path) -> None:
        """Writes the .npz, which `numpy.load(path)` reads without pickle, or a format of the kind's own; atomically."""
        if path.suffix != ".npz":
            write_text(path, self.modality.formats[path.suffix](self.arrays, self.data))
            return
        write_arrays(path, self.arrays)

    def write_pictures(self, folder: Path) -> Reloaded:
        """Writes them by the kind's own writer, reads the files again and shows what they hold to the model.

        ValueError where these inputs are none that such files could hold.
        """
        assert self.modality.write is not None  # `craft` was told
        x, x_adv, y = (torch.from_numpy(self.arrays[name]) for name in ("x", "x_adv", "y"))
        facts = zip(*(self.arrays[name].tolist() for name in ("index", "y", "prediction_after")), strict=True)
        names = [f"{index:06d}-{label}-seen-as-{after}" for index, label, after in facts]
        index = torch.from_numpy(self.arrays["index"])
        again = self.modality.write(folder, x, x_adv, names, take(self.threat, index))
        logits = [
            predict(self.evaluation.model, self.machine.place(part), self.evaluation.seed).cpu()
            for part in again.split(250)
        ]
        fools = torch.cat(logits).argmax(1) != y if logits else torch.zeros(0, dtype=torch.bool)
        permitted = within(take(self.threat, index), x, again)
        both = None if permitted is None else int((fools & permitted).sum())
        return Reloaded(len(y), int(fools.sum()), both)


def craft(
    subject: Subject, settings: EvaluationSettings, observe: Callable[[Progress], object] | None = None, *,
    pictures: bool = False, suffix: str = ".npz",
) -> Crafted:  # fmt: skip
    """Attacks the examples that an evaluation with these settings judges, and keeps all that were turned.

    Each was realized, shown to the model again, and lies in the set and in the valid domain, as in an evaluation.
    pictures: they are to be written as such, too. suffix: of the file they are for. Raises ValueError (PreflightError
    among them), OSError, RuntimeError.
    """
    s, machine = settings, find_machine(settings.device)
    question = question_of(subject, s, machine)
    dataset, modality, threat, stages, rows, pairs = question
    if suffix not in (there := (".npz", *modality.formats)):
        forms = " or ".join(there)
        raise ValueError(
            f"{modality.name}: expected a file that ends in {forms}, got {suffix or 'no ending'}; .npz holds all "
            "inputs exactly"
        )
    if pictures and modality.write is None:
        raise ValueError(f"{modality.name}: this kind of input has no pictures; leave out --png, --out holds them all")
    found = measure(
        machine.place(subject.model), pairs, threat, stages, seed=s.seed, curve=(), gallery_size=len(rows),
        numbers=rows, observe=observe,
    )  # fmt: skip
    return Crafted(adversarial_arrays(found, question, s), found, modality, threat, machine, dataset)


def within(threat: ThreatModel, x: Any, x_adv: Any) -> torch.Tensor | None:
    """(B,) bool: x_adv is a permitted change of x; None for threats of which an input alone does not tell."""
    if not isinstance(threat, Ball):
        return None
    return inside(threat, x, x_adv - x) & threat.valid(x, x_adv)
