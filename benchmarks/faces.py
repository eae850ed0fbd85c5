"""Faces before and after hardening: ORL, every person unseen once, PGD with restarts on one side of each pair.

For each fold, standard training, PGD-AT and training on batches attacked in part, into a run folder beside OUT.jsonl,
then the attack on all pairs of the unseen persons: at the larger radius, at half of it (there only on what fell at the
larger one: what stands there stands), and on the pixels of a pair of glasses. Thresholds come from persons who are
neither trained on nor tested. Intervals are over persons. Every finished part is stored and not computed again. Needs
$SPARRING_DATA/orl_faces.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from common import Lines, percent, provenance, table
from sparring.app import train_run as runs
from sparring.app.settings import TrainingSettings
from sparring.core.batches import Batches
from sparring.core.types import take
from sparring.evaluation.measure import measure
from sparring.modalities import find, load_data
from sparring.modalities.faces.metrics import verification_metrics

COLUMNS = (
    "label", "clean_prediction", "clean_confidence", "correct", "robust", "adversarial_prediction",
    "adversarial_confidence", "margin_left", "x/reference_subject", "x/probe_subject",
)  # fmt: skip
RECIPES = {
    "standard": ("standard:label_smoothing=0.2", 40, 3),
    "hardened": ("pgd-at:num_steps=3,step=0.5", 50, 0),
    "mixed": ("mixed:share=0.6,num_steps=3,step=0.5,label_smoothing=0.1", 80, 3),
}
"""With the number of epochs, and by how many pixels pictures are shifted."""


def data_of(fold: int, args: argparse.Namespace) -> str:
    return f"faces:orl_faces,fold={fold},folds={args.folds},seed={args.seed}"


def trained(name: str, fold: int, args: argparse.Namespace, lines: Lines) -> tuple[Any, float]:
    """The model, and the CPU seconds of its training."""
    run = Path(args.out).with_suffix("") / f"{name}-{fold}"
    if not (run / "training.json").exists():
        started = time.process_time()
        recipe, epochs, crop = RECIPES[name]
        asked = {"data": data_of(fold, args), "threat": args.train_threat, "recipe": recipe, "epochs": epochs}
        runs.start_run(TrainingSettings(**asked, augment={"crop": crop}, seed=args.seed), run)
        lines.add({"name": name, "fold": fold, "part": "training", "cpu": time.process_time() - started})
    found = lines.find(name=name, fold=fold, part="training") or {"cpu": float("nan")}
    return runs.load(run), found["cpu"]


def attacked(model: Any, fold: int, text: str, args: argparse.Namespace, fell: Any = None) -> dict[str, list[Any]]:
    """The table of all pairs, or of those that `fell` (N,) alone."""
    data, faces = load_data(data_of(fold, args)), find("faces")
    threat = faces.make_threat(text, data)
    rows = torch.arange(len(data.y_test)) if fell is None else torch.from_numpy(np.flatnonzero(fell))
    batches = Batches(take(data.x_test, rows), data.y_test[rows], 250, prepare=data.prepare)
    stages = faces.make_plan(args.attack, threat)
    found = measure(model, batches, threat, stages, seed=args.seed, curve=(), gallery_size=0)
    return {name: found.table[name].tolist() for name in COLUMNS}


def part(lines: Lines, name: str, fold: int, text: str, args: argparse.Namespace) -> dict[str, Any]:
    """One model under one threat, from the file or computed."""
    key = {"name": name, "fold": fold, "part": text}
    if found := lines.find(**key):
        return found
    model, _ = trained(name, fold, args, lines)
    started, wider = time.process_time(), lines.find(name=name, fold=fold, part=f"linf:{args.radius}/255")
    if text == f"linf:{args.radius / 2:g}/255" and wider:
        whole = {column: list(values) for column, values in wider["table"].items()}
        right, stands = (np.array(whole[column]) for column in ("correct", "robust"))
        fell = right & ~stands
        rows = attacked(model, fold, text, args, fell) if fell.any() else {}
        for column, values in rows.items():
            for place, value in zip(np.flatnonzero(fell), values, strict=True):
                whole[column][place] = value
    else:
        whole = attacked(model, fold, text, args)
    return lines.add({**key, "cpu": time.process_time() - started, "table": whole})


def figures(tables: list[dict[str, list[Any]]]) -> dict[str, Any]:
    """Success pooled over the folds, and the mean of the folds' equal-error rates, each fold with its own threshold."""
    pooled = {column: np.concatenate([t[column] for t in tables]) for column in COLUMNS}
    each = [verification_metrics({column: np.array(t[column]) for column in COLUMNS}) for t in tables]
    return {"pooled": verification_metrics(pooled), "eer": [m["equal_error_rate"].value for m in each],
            "eer_attacked": [m["equal_error_rate_attacked"].value for m in each]}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("out", help="JSON lines to keep results in")
    parser.add_argument("--folds", type=int, default=4)
    parser.add_argument("--only-folds", type=int, nargs="*", help="of these folds alone")
    parser.add_argument("--radius", type=int, default=8, help="the larger one, in 1/255")
    parser.add_argument("--train-threat", default="linf:16/255")
    parser.add_argument("--attack", default="pgd:num_steps=40,restarts=2")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    lines = Lines(Path(args.out))
    threats = [f"linf:{args.radius}/255", f"linf:{args.radius / 2:g}/255", "glasses:1"]
    folds = range(args.folds) if args.only_folds is None else args.only_folds
    for text in threats:  # what matters most first
        for fold in folds:
            for name in RECIPES:
                print(name, fold, text, f"{part(lines, name, fold, text, args)['cpu']:.0f} s", flush=True)
    report(lines, threats, folds, args)


def report(lines: Lines, threats: list[str], folds: Any, args: argparse.Namespace) -> None:
    rows, seconds = [], []
    for name in RECIPES:
        for text in threats:
            parts = [part(lines, name, fold, text, args) for fold in folds]
            found = figures([p["table"] for p in parts])
            cells = [name, text, percent(float(np.mean(found["eer"]))), percent(float(np.mean(found["eer_attacked"])))]
            for goal in ("dodging_success", "impersonation_success"):
                m = found["pooled"][goal]
                cells.append(f"{percent(m.value)} ({100 * m.low:.1f} to {100 * m.high:.1f})")
            rows.append([*cells, ", ".join(f"{100 * e:.1f}" for e in found["eer"])])
            seconds.append((name, text, ", ".join(f"{p['cpu']:.0f}" for p in parts)))
        cpu = ", ".join(f"{trained(name, fold, args, lines)[1]:.0f}" for fold in folds)
        seconds.append((name, "training", cpu))
    head = ("model", "threat on the probe", "equal-error rate", "attacked", "dodging", "impersonation", "by fold (%)")
    print("\n" + table(head, rows) + "\n\n" + table(("model", "part", "CPU seconds by fold"), seconds) + "\n")
    n = sum(len(part(lines, "standard", fold, threats[0], args)["table"]["label"]) for fold in folds)
    print(provenance(seed=args.seed, n=f"{n} pairs of {len(folds)} folds", packages=("numpy",)))


if __name__ == "__main__":
    main()
