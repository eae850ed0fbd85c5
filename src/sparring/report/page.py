"""The page: read the folders, compare, draw, fill the template, write."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2

from sparring.core.files import write_text
from sparring.report import plots, words
from sparring.report.account import Cascade, Margins, bracket, cascade, margins, worst_first
from sparring.report.compare import compare
from sparring.report.results import GALLERY, Run, read_run


def write_report(folders: Sequence[Path], out: Path, *, title: str | None = None) -> Path:
    """The path of the page: one HTML file that loads nothing from outside, the same bytes for the same input.

    folders: of evaluations (docs/results-schema.md). With several, the first is the baseline, usually the model
        without adversarial training, and the others are compared with it.
    Raises ValueError when there is no folder, or a file in it is not what it should be.
    """
    if not folders:
        raise ValueError("a report needs at least one folder with a results.json, got none")
    runs = _distinct([read_run(Path(folder)) for folder in folders])
    page = _environment().get_template("template.html.j2").render(_content(runs, title))
    write_text(Path(out), page.encode(errors="replace").decode())  # JSON may hold halves of characters
    return Path(out)


def _distinct(runs: list[Run]) -> list[Run]:
    """The same runs, a name that occurs again made distinct by its place."""
    names = [run.name for run in runs]
    return [
        dataclasses.replace(run, name=f"{run.name} ({i + 1})") if run.name in names[:i] else run
        for i, run in enumerate(runs)
    ]


def _content(runs: list[Run], title: str | None) -> dict[str, Any]:
    data = runs[0].results["data"]
    threat = words.read_threat(runs[0].results["threat"], data.get("shape") or [])
    *others, last = (run.name for run in runs)
    names = f"{', '.join(others)} and {last}" if others else last
    label = f"Security curve of {names}: accuracy under attack against the radius. Its numbers follow as a table."
    curves = [{point["radius"]: point for point in run.results["curve"]} for run in runs]
    cascades, closeness = [cascade(run.results) for run in runs], [margins(run) for run in runs]
    return {
        "title": title or f"How robust {'is' if len(runs) == 1 else 'are'} {names}?", "runs": runs, "threat": threat,
        "verdicts": [words.VERDICTS[run.results.get("verdict")] for run in runs],
        "brackets": [bracket(run.results) for run in runs], "findings": worst_first(runs),
        "doubts": [any(f.get("level", "note") != "note" for f in run.results["findings"]) for run in runs],
        "cascades": cascades, "closeness": closeness,
        "cascade_plots": [_cascade(run, c, i) for i, (run, c) in enumerate(zip(runs, cascades, strict=True))],
        "margin_plots": [_margins(run, m, i) for i, (run, m) in enumerate(zip(runs, closeness, strict=True))],
        "image": len(data.get("shape") or []) == 3,
        "curve": plots.security_curve(runs, threat.radius, label) if any(curves) else None,
        "curves": curves, "radii": sorted(set().union(*curves)),
        "effects": [compare(runs[0], other) for other in runs[1:]],
        "learning": [_learning(run, i) for i, run in enumerate(runs)],
        "galleries": [_gallery(run) for run in runs],
        "per_class": [{c.get("label"): c for c in run.results["per_class"]} for run in runs],
    }  # fmt: skip


def _cascade(run: Run, told: Cascade, series: int) -> Any:
    if not told.complete:
        return None
    label = f"Attacks on {run.name}: what stands after each, what it broke, and its passes per image, as in the table."
    clean = run.results["clean_accuracy"]
    return plots.cascade(told.lines, clean["value"], clean["n"], series, label)


def _margins(run: Run, told: Margins | None, series: int) -> Any:
    label = f"Histogram for {run.name}: how much of its clean margin each standing example has left."
    return plots.margin_histogram(told, series, label) if told and told.left else None


def _learning(run: Run, series: int) -> Any:
    training = run.results.get("training") or {}
    if not training.get("history"):
        return None
    label = f"Learning curves of {run.name}: training loss and validation accuracy for each epoch."
    return plots.learning_curves(training["history"], training.get("best_epoch"), series, label)


def _gallery(run: Run) -> list[dict[str, Any]]:
    """One card per turned example."""
    if run.gallery is None or not len(run.gallery["x"]):
        return []
    x = run.gallery["x"]
    box = words.read_threat(run.results["threat"], x.shape[1:])
    low = float(x.min()) if box.low is None else box.low
    high = float(x.max()) if box.high is None else box.high
    cards = []
    for row in zip(*(run.gallery[key] for key in GALLERY), strict=True):
        card = dict(zip(GALLERY, row, strict=True))
        for key in ("label", "clean_prediction", "adversarial_prediction"):
            card[key] = run.class_name(int(card[key]))
        card["pictures"] = plots.pictures(card["x"], card["x_adv"], low, high)
        card["features"] = plots.most_changed(card["x"], card["x_adv"])
        cards.append(card)
    return cards


def _environment() -> jinja2.Environment:
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    for name in ("percent", "interval", "points", "number", "passes", "duration", "times", "p_value", "how_often"):
        environment.filters[name] = getattr(words, name)
    environment.filters["pretty"] = lambda value: json.dumps(value, indent=2, ensure_ascii=False, default=str)
    return environment
