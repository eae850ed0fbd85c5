"""The page on a generator: its images over time, their quality with floor and controls, its nearest training images."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from sparring.core.files import read_json, write_text
from sparring.report import plots, words
from sparring.report.page import CONTENTS, TEMPLATES, with_contents

NUM_GRIDS = 6
"""Grids of samples over time that a page shows."""
NAMES = {
    "generated": "generated", "floor": "floor: real images", "noise": "control: noise", "blurred": "control: blurred",
    "repeated": "control: a few repeated",
}  # fmt: skip


def quality_folder(folder: Path) -> tuple[Path, Path | None] | None:
    """Where a quality.json lies in a folder or in its quality/, and the run folder around it; None where none does."""
    for place, run in ((folder / "quality", folder), (folder, folder.parent)):
        if (place / "quality.json").exists():
            return place, run if (run / "metrics.jsonl").exists() else None
    return None


def write_quality_page(folder: Path, run: Path | None, out: Path | None = None) -> Path:
    """The path of the page on what `folder`/quality.json holds; `run` adds the images and the figures over time.

    One HTML file that loads nothing from outside. ValueError when a file is not what it should be.
    """
    found = read_json(folder / "quality.json", "the quality of images")
    if not isinstance(found, dict) or found.get("schema") != "sparring.quality/1":
        raise ValueError(f"{folder / 'quality.json'} should have the schema sparring.quality/1; measure again")
    history, rollbacks, grids = _over_time(run) if run else ([], [], [])
    loader = jinja2.FileSystemLoader(TEMPLATES)
    environment = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= words.FILTERS
    page = environment.get_template("generated.html.j2").render(
        q=found, rows=found["rows"], names=NAMES, title=f"How good are the images of {found['fake']}?",
        contents=CONTENTS, grids=grids, closest=_picture(folder / "closest.png"),
        samples=_picture(folder / "samples.png"), rollbacks=rollbacks, history=history,
        curves=plots.quality_curves(history, rollbacks) if len(history) > 1 else "", classes=_classes(found),
    )  # fmt: skip
    out = out or folder / "report.html"
    write_text(out, with_contents(page))
    return out


def _over_time(run: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]], list[tuple[str, Markup]]]:
    """The lines of history, the guard's rollbacks, and some grids of samples from the first epoch to the last."""
    try:
        lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        history = [json.loads(line) for line in lines]
    except json.JSONDecodeError as error:
        raise ValueError(f"{run / 'metrics.jsonl'} should hold a line for each epoch ({error})") from None
    ended = run / "training.json"
    rollbacks = read_json(ended, "how the training ended").get("rollbacks", []) if ended.exists() else []
    paths = sorted((run / "samples").glob("epoch-*.png"))
    places = sorted({round(i * (len(paths) - 1) / max(1, NUM_GRIDS - 1)) for i in range(NUM_GRIDS)}) if paths else []
    grids = [(str(int(paths[i].stem.removeprefix("epoch-"))), _picture(paths[i])) for i in places]
    return history, rollbacks, grids


def _picture(path: Path) -> Markup:
    if not path.exists():
        return Markup("")
    return Markup("data:image/png;base64," + base64.b64encode(path.read_bytes()).decode())


def _classes(found: dict[str, Any]) -> list[tuple[str, float, float]]:
    """Name, share among generated and among real images, of each class; the first thirty."""
    made, real = found["rows"]["generated"]["class_shares"], found["real_class_shares"]
    return list(zip(found["class_names"], made, real, strict=False))[:30]
