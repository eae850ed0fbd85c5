"""Folders of evaluations as `sparring evaluate` writes them, and what a reader sees of the page made from them."""

from __future__ import annotations

import csv
import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np

N = 400
CLASSES = ["aeroplane", "car", "bird", "cat"]


def share(right: np.ndarray) -> dict[str, Any]:
    """A metric of value, Wilson interval, n and count."""
    n, count, z = len(right), int(right.sum()), 1.959963984540054
    p, middle = count / n, (count / n + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return {"value": p, "low": max(0.0, middle - half), "high": min(1.0, middle + half), "n": n, "count": count}


def metrics(clean: np.ndarray, robust: np.ndarray, **more: Any) -> dict[str, Any]:
    found = {"clean_accuracy": share(clean), "robust_accuracy": share(robust), **more}
    return found | ({"attack_success": share(~robust[clean]) | {"higher_is_better": False}} if clean.any() else {})


def attack(name: str, ran_on: int, broke: int, after: float, passes: tuple[int, int], **more: Any) -> dict[str, Any]:
    """An entry of `attacks`; passes: forwards and backwards in all."""
    cost = {"forwards": passes[0], "backwards": passes[1], "seconds": 1.5}
    rejected = dict.fromkeys(("outside_set", "outside_domain", "not_finite", "not_reproduced"), 0)
    return {"name": name, "settings": {}, "ran_on": ran_on, "skipped": 0, "broke": broke, "robust_after": after,
            "rejected": rejected, "cost": cost, **more}  # fmt: skip


def history(hard: bool, epochs: int = 20) -> list[dict[str, Any]]:
    lines = []
    for e in range(1, epochs + 1):  # the files count epochs from 0, the page from 1
        fall = max(0, e - 12) * 0.008
        robust = 0.62 * (1 - math.exp(-e / 4)) - fall if hard else 0.05
        loss, clean = 1.8 * math.exp(-e / 8) + 0.3 * hard, 0.97 - 0.5 * math.exp(-e / 3)
        lines.append({"epoch": e - 1, "step": e * 50, "learning_rate": 0.1, "radius_factor": 1.0, "seconds": 2.0 * e,
                      "train_loss": loss, "clean_accuracy": clean, "robust_accuracy": robust,
                      "examples": 10_000})  # fmt: skip
    return lines


def sha_of(name: str) -> str:
    """Stands for the hash of a weights file: another name, another model."""
    return name.encode().hex().ljust(64, "0")[:64]


def write_run(folder: Path, name: str, clean: np.ndarray, robust: np.ndarray, shape: tuple[int, ...] = (3, 16, 16),
              *, labels: np.ndarray | None = None, index: np.ndarray | None = None, left: np.ndarray | None = None,
              certified: np.ndarray | None = None, **changes: Any) -> Path:  # fmt: skip
    """A schema-true folder: metrics, counts and rows follow from `clean` and `robust`, bools per example."""
    folder.mkdir(parents=True, exist_ok=True)
    n, hard = len(clean), bool(robust.mean() > 0.3)
    labels = np.arange(n) % len(CLASSES) if labels is None else labels
    lines = history(hard)
    best = max(lines, key=lambda line: line["robust_accuracy"])
    turned = np.flatnonzero(clean & ~robust)
    slope = -255 / 8 * math.log(max(robust.mean(), 0.01) / max(clean.mean(), 0.01))
    curve = [{"radius": r / 255,
              "robust_accuracy": share(clean & (np.arange(n) % 97 / 97 < math.exp(-r / 255 * slope)))}
             for r in (0, 2, 4, 8, 16, 32)]  # fmt: skip
    first = int(clean.sum()) - len(turned) // 2
    attacks = [
        attack("fgsm", int(clean.sum()), len(turned) // 2, first / n, (5000, 4600), settings={"num_steps": 1}),
        attack("pgd", first, len(turned) - len(turned) // 2, float(robust.mean()), (200_000, 184_000),
               settings={"num_steps": 40}),
    ]  # fmt: skip
    proven = {} if certified is None else {"certified_accuracy": share(certified)}
    results = {
        "schema": "sparring.results/2", "name": name, "version": "0.2.0", "created": "2026-01-02T03:04:05+00:00",
        "command": f"sparring evaluate runs/{name} --threat linf:8/255",
        "model": {"name": "small_cnn", "parameters": 123456, "weights": "best.safetensors", "sha256": sha_of(name)},
        "data": {"kind": "images", "name": "toy", "split": "test", "shape": list(shape), "class_names": CLASSES},
        "threat": {"text": "linf:8/255", "words": "Every value of the input may change by at most 8/255.",
                   "radius": 8 / 255,
                   "settings": {"type": "Linf", "radius": 8 / 255, "low": 0.0, "high": 1.0, "mask": None}},
        "seed": 0, "metrics": metrics(clean, robust, **proven), "attacks": attacks,
        "curve": curve, "curve_attacks": ["pgd"],
        "per_class": [{"label": int(k), "name": CLASSES[k], "n": int((labels == k).sum()),
                       "clean": float(clean[labels == k].mean()), "robust": float(robust[labels == k].mean())}
                      for k in np.unique(labels)],
        "findings": [], "cost": {"forwards": 900_000, "backwards": 800_000, "seconds": 75.0},
        "training": {"recipe": "pgd_at" if hard else "standard", "recipe_settings": {}, "epochs": 20,
                     "seconds": 600.0 if hard else 80.0, "best_epoch": best["epoch"], "best": best, "last": lines[-1],
                     "checkpoint": "best", "stopped": None, "config": {"batch_size": 128}, "history": lines},
        "environment": {"python": "3.12", "torch": "2.8", "platform": "linux", "device": "cpu", "threads": 2},
    }  # fmt: skip
    results |= changes
    (folder / "results.json").write_text(json.dumps(results), encoding="utf-8")
    names = [a["name"] for a in results["attacks"] for _ in range(a["broke"])]
    index = np.arange(n) if index is None else index
    write_examples(folder / "examples.csv", index, labels, clean, robust, names, left, certified)
    draw = np.random.default_rng(len(turned))
    g = turned[:6]
    if len(g):
        x = np.clip(np.linspace(0, 1, math.prod(shape)).reshape(shape) + 0.1 * draw.random((len(g), *shape)), 0, 1)
        x_adv = np.clip(x + 8 / 255 * np.sign(draw.standard_normal(x.shape)), 0, 1)
        np.savez(folder / "gallery.npz", index=g, x=x.astype("f4"), x_adv=x_adv.astype("f4"), label=labels[g],
                 clean_prediction=labels[g], clean_confidence=np.full(len(g), 0.98, "f4"),
                 adversarial_prediction=(labels[g] + 1) % 4,
                 adversarial_confidence=np.full(len(g), 0.87, "f4"))  # fmt: skip
    return folder


def write_examples(path: Path, index: np.ndarray, labels: np.ndarray, clean: np.ndarray, robust: np.ndarray,
                   names: list[str], left: np.ndarray | None, certified: np.ndarray | None) -> None:  # fmt: skip
    """names: the attacks that broke the turned examples, in order."""
    broken = iter(names)
    with path.open("w", newline="", encoding="utf-8") as file:
        out = csv.writer(file)
        out.writerow(["index", "label", "clean_prediction", "clean_confidence", "correct", "robust", "broken_by",
                      "adversarial_prediction", "adversarial_confidence", "size", "margin_left",
                      "certified"])  # fmt: skip
        for i, (k, y, c, r) in enumerate(zip(index, labels, clean, robust, strict=True)):
            turned = ["", "", "", ""] if r or not c else [next(broken, "pgd"), (y + 1) % 4, 0.9, 0.03]
            margin = float(r) if left is None else float(left[i])
            proven = "" if certified is None else int(certified[i])
            out.writerow([k, y, y if c else (y + 1) % 4, 0.95, int(c), int(r), *turned, margin, proven])


def changed(folder: Path, **keys: Any) -> Path:
    """The folder with these keys of its results replaced."""
    path = folder / "results.json"
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | keys), encoding="utf-8")
    return folder


def right(count: int, n: int = N, shift: int = 0) -> np.ndarray:
    """`count` of n True, beginning at `shift`."""
    return np.roll(np.arange(n) < count, shift)


def text_of(page: Path) -> str:
    """What a reader sees, spaces made plain."""
    body = re.sub(r"<style>.*?</style>|<[^>]+>", " ", page.read_text(encoding="utf-8"), flags=re.S)
    return re.sub(r"\s+", " ", body.replace("\u2019", "'").replace("\N{MINUS SIGN}", "-"))
