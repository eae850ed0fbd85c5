"""`sparring.evaluate`: what the command `sparring evaluate` measures, for models and batches in memory."""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from sparring.adapters.black_box import as_module
from sparring.attacks.around import needs_grad
from sparring.certify import SmoothedNet, SmoothingBound
from sparring.checks.battery import examine
from sparring.core.files import write_text
from sparring.core.machine import Machine
from sparring.core.registry import Named, options_of
from sparring.core.types import Inputs, Model, map_inputs
from sparring.evaluation.all_batches import Progress
from sparring.evaluation.as_results import as_results
from sparring.evaluation.measure import CURVE, GALLERY_SIZE, ONE_PROCESS, Evaluation, accuracy_metrics, measure
from sparring.evaluation.one_batch import Certify
from sparring.evaluation.preflight import Preflight, preflight
from sparring.modalities import find
from sparring.modalities.base import Modality
from sparring.report import write_report
from sparring.results.findings import Finding, verdict
from sparring.results.schema import Results
from sparring.results.write import write_evaluation
from sparring.threats import L2
from sparring.threats.base import ThreatModel
from sparring.threats.inputs import pair_of

COSTLY = ("fab", "fab-t", "square")
FEWEST_FOR_GUESSING = 30
"""Examples below which a recall near chance is told to nobody: it may be chance itself."""


@dataclass(repr=False)
class CheckedEvaluation(Evaluation):
    """An evaluation with what its results say beside it.

    checks: what the battery cost, whose findings are among those of the evaluation; None where it did not run.
    no_certificate: why there is no lower bound. class_names: for tables and pages.
    """

    checks: dict[str, Any] | None = None
    no_certificate: str = ""
    class_names: list[str] = field(default_factory=list)

    def told(self) -> dict[str, str]:
        told = super().told()
        return {**told, "verdict": self.verdict or "not checked"}

    @property
    def verdict(self) -> str | None:
        """TRUSTED, SUSPECT or INVALID by the findings; None where no check was made."""
        return None if self.checks is None else verdict(self.findings)

    def save(self, folder: str | Path, *, name: str = "model", caption: Any = None, **about: Any) -> Results:
        """Writes results.json, examples.csv, gallery.npz and report.html; returns what results.json holds.

        about: more of what the results tell: model, data, training (dictionaries), command, device. caption: gallery ->
        further arrays for it (see `Modality`).
        """
        folder = Path(folder)
        about.setdefault("created", datetime.now(UTC).isoformat(timespec="seconds"))
        stored = as_results(
            self, name=name, class_names=self.class_names, sanity=self.checks, no_certificate=self.no_certificate,
            **about,
        )  # fmt: skip
        if caption and stored.gallery:
            stored = stored._replace(gallery={**stored.gallery, **caption(gallery=stored.gallery)})
        write_evaluation(folder, *stored)
        write_report([folder], folder / "report.html")
        return stored.results

    def report(self, path: str | Path, *, name: str = "model", **about: Any) -> Path:
        """Writes the page alone, for people; see `save`."""
        with tempfile.TemporaryDirectory() as folder:
            self.save(folder, name=name, **about)
            write_text(Path(path), (Path(folder) / "report.html").read_text(encoding="utf-8"))
        return Path(path)


def evaluate(
    model: Model,
    batches: Iterable[tuple[Inputs, Tensor]],
    threat: ThreatModel | str,
    attacks: str | Sequence[Any] = "fast",
    *,
    seed: int = 0,
    certify: Literal["auto", "interval", "none"] | Certify = "auto",
    smooth: float | None = None,
    checks: bool = True,
    curve: Sequence[float] = CURVE,
    class_names: Sequence[str] = (),
    modality: Modality | None = None,
    numbers: Tensor | None = None,
    keep: Path | None = None,
    about: str = "",
    machine: Machine = ONE_PROCESS,
    observe: Any = None,
    gallery_size: int = GALLERY_SIZE,
) -> CheckedEvaluation:
    """Clean, robust and certified accuracy with findings that say whether to believe them: `measure`, and the battery.

    model: a network; or an estimator, or its `predict_proba`, which become a `BlackBox`: the default attacks are then
    those without gradients. batches: (x, y) pairs, read once. threat: the record, or its text. attacks: a plan, a list
    as text, or stages (see `measure`). The security curve runs them with one restart each, and without the costly ones
    (FAB, Square, and what is kept for a few examples).
    certify: auto takes a bound where there is one, interval demands it; or a function, see `measure`. smooth: judge the
    model under that much Gaussian noise, certified by randomised smoothing (L2 only). modality: the kind of input,
    images unless given. numbers: see `measure`. machine: where several processes share the work (then only rank 0 runs
    the battery). Raises ValueError (PreflightError among them), TypeError, RuntimeError.

    >>> from sparring import Linf
    >>> model, data = torch.nn.Linear(4, 3), [(torch.rand(8, 4), torch.arange(8) % 3)]
    >>> evaluate(model, data, Linf(0.1), "fgsm").verdict in ("TRUSTED", "SUSPECT", "INVALID")
    True
    """
    pairs, modality = _pairs(batches), modality or find("images")
    threat = modality.make_threat(threat) if isinstance(threat, str) else threat
    model = as_module(model, class_names=class_names)
    stages = modality.make_plan(attacks, threat, model) if isinstance(attacks, str) else list(attacks)
    wanted = any(needs_grad(stage(threat)) for stage in stages)
    checked = preflight(model, *pairs[0], threat, needs_grad=wanted)
    bound, no_certificate = _certificate(certify, modality, checked.model, threat, smooth)
    if smooth:
        checked = Preflight(SmoothedNet(checked.model, smooth), checked.findings)
    found = measure(
        checked, pairs, threat, stages, seed=seed, curve=curve, curve_stages=for_curve(stages), certify=bound,
        metrics=modality.metrics or accuracy_metrics, numbers=numbers, keep=keep, about=about, machine=machine,
        observe=observe, gallery_size=gallery_size,
    )  # fmt: skip
    names = list(class_names) or [str(k) for k in range(int(max(y.max() for _, y in pairs)) + 1)]
    evaluation = CheckedEvaluation(**vars(found), no_certificate=no_certificate, class_names=names)
    if machine.rank == 0:
        evaluation.findings += [*_missing_classes(evaluation, len(names)), *_guessing(evaluation)]
        if checks:
            if observe:
                observe(Progress(evaluation.robust.n, len(pairs), 0, found.cost, "checks", 1.0))
            _check(evaluation, checked.model if smooth else model, pairs)
    return evaluation


def _pairs(batches: Iterable[Any]) -> list[tuple[Inputs, Tensor]]:
    """All batches but the empty ones; ValueError for none, and for what is no (x, y)."""
    pairs = []
    for batch in batches:
        x, y = pair_of(batch)
        pairs += [(x, y)] if len(y) else []
    if not pairs:
        raise ValueError("there is nothing to evaluate: not one batch was given")
    return pairs


def _missing_classes(evaluation: Evaluation, num_classes: int) -> list[Finding]:
    label = evaluation.table["label"]
    seen = len(label.unique())
    sentence = f"Only {seen} of {num_classes} classes occur in the {len(label)} examples that were tried."
    return [Finding("missing classes", sentence, {"seen": seen})] if seen < num_classes else []


def _guessing(evaluation: Evaluation) -> list[Finding]:
    """Whether the mean recall of the classes is what a constant answer, or dice, would get.

    That is 1 / K whatever the shares of the K classes; told where the mean lies less than two standard errors above.
    """
    label, correct = evaluation.table["label"], evaluation.table["correct"].double()
    counts = torch.stack([(label == k).sum() for k in label.unique()])
    num, recalls = len(counts), torch.stack([correct[label == k].mean() for k in label.unique()])
    chance, recall = 1 / num, float(recalls.mean())
    error = math.sqrt(float((chance * (1 - chance) / counts).sum())) / num
    if num < 2 or len(label) < FEWEST_FOR_GUESSING or recall > chance + 2 * error:
        return []
    sentence = (
        f"The model is right on {recall:.1%} of each class on the mean, and a constant answer gets {chance:.1%}: model "
        "and data do not seem to belong together, and robustness says nothing then."
    )
    step = "Look at the weights, the order of the classes, and the normalisation that the model was trained with."
    return [Finding("guessing", sentence, {"mean_recall": recall, "chance": chance}, "suspect", step)]


def for_curve(stages: Sequence[Any]) -> list[Any]:
    """What the security curve can afford at each of its radii: light attacks, with one restart."""

    def light(stage: Any) -> bool:
        costly = getattr(getattr(stage, "attack", None), "name", "") in COSTLY
        return not costly and (getattr(stage, "margin_at_most", None) or 1) >= 0.5

    def once(stage: Any) -> Any:
        attack = getattr(stage, "attack", None)
        if not isinstance(attack, Named) or "restarts" not in options_of(attack.builder, attack.given):
            return stage
        return replace(stage, attack=attack.but(restarts=1))

    return [once(stage) for stage in stages if light(stage)] or [once(stage) for stage in stages]


def _certificate(
    how: Any, modality: Modality, model: Any, threat: ThreatModel, smooth: float | None
) -> tuple[Any, str]:
    """The certificate of a margin and "", or None and why there is none. Raises ValueError where it was demanded."""
    if callable(how):
        return how, ""
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


def _check(evaluation: CheckedEvaluation, model: Any, pairs: Sequence[tuple[Inputs, Tensor]]) -> None:
    """Adds what the battery finds to the findings, and what it cost."""
    started = time.monotonic()
    xs, y = [x for x, _ in pairs], torch.cat([y for _, y in pairs])
    x = map_inputs(lambda *parts: torch.cat(parts), *xs)
    evaluation.findings += examine(model, x, y, evaluation.threat, evaluation, seed=evaluation.seed)
    evaluation.checks = {"seconds": round(time.monotonic() - started, 3)}
