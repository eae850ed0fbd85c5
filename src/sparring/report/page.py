"""The page: read the folders, compare, draw, fill the template, write."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
from markupsafe import Markup

from sparring.core.files import write_text
from sparring.modalities import MODALITIES, find
from sparring.modalities.base import Shown
from sparring.report import plots, words
from sparring.report.examples import nearest_to_falling, side_by_side
from sparring.results.compare import compare
from sparring.results.read import StoredEvaluation, read_evaluation
from sparring.results.schema import AttackEntry, Results
from sparring.results.table import Table, tables_of
from sparring.results.table_text import HEAD, cells_of, notes_of, title_of

TEMPLATES = Path(__file__).parent / "templates"


def write_report(folders: Sequence[Path], out: Path, *, title: str | None = None) -> Path:
    """The path of the page: one HTML file that loads nothing from outside, the same bytes for the same input.

    folders: of evaluations (docs/results-schema.md), or what `read_evaluation` takes. With several, the first is the
        baseline, usually the model without adversarial training, and the others are compared with it.
    Raises ValueError when there is no folder, or a file in it is not what it should be.
    """
    if not folders:
        raise ValueError("a report needs at least one folder with a results.json, got none")
    runs: list[StoredEvaluation] = []
    names: set[str] = set()
    for run in map(read_evaluation, folders):
        again = {"name": f"{run.name} ({len(runs) + 1})"} if run.name in names else {}
        runs.append(replace(run, results=run.results.model_copy(update=again)))
        names.add(run.name)
    loader = jinja2.FileSystemLoader(TEMPLATES)
    environment = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= words.FILTERS
    environment.globals["plots"] = plots
    page = environment.get_template("page.html.j2").render(_content(runs, title))
    write_text(Path(out), with_contents(page))
    return Path(out)


CONTENTS = Markup("<!-- contents -->")
FOOLED = "What fooled it"


def with_contents(page: str) -> str:
    """The page with an address for every part, and the list of them where `CONTENTS` stands."""
    headings: list[str] = []

    def anchored(found: re.Match[str]) -> str:
        headings.append(found[1])
        return f'<h2 id="{_address(found[1])}">{found[1]}</h2>'

    page = re.sub(r"<h2>(.*?)</h2>", anchored, page)
    lines = "".join(f'<li><a href="#{_address(heading)}">{heading}</a></li>' for heading in headings)
    return page.replace(CONTENTS, f'<nav class="contents" aria-label="Contents"><ol>{lines}</ol></nav>', 1)


def _address(heading: str) -> str:
    return "part-" + re.sub(r"[^a-z0-9]+", "-", heading.lower()).strip("-")


def _content(runs: list[StoredEvaluation], title: str | None) -> dict[str, Any]:
    *others, last = (run.name for run in runs)
    names = f"{', '.join(others)} and {last}" if others else last
    curves = [{point.radius: point.robust_accuracy for point in run.results.curve} for run in runs]
    findings = [(run, finding) for run in runs for finding in run.results.findings]
    galleries = [_gallery(run) for run in runs]
    return {
        "contents": CONTENTS, "fooled": _address(FOOLED), "firsts": [(*shown.cards, "")[0] for shown in galleries],
        "title": title or f"How robust {'is' if len(runs) == 1 else 'are'} {names}?", "names": names, "runs": runs,
        "threat": runs[0].results.threat, "findings": sorted(findings, key=lambda pair: -pair[1].severity),
        "bars": [bracket(run.results) for run in runs], "cascades": [cascade(run.results) for run in runs],
        "closeness": [margins(run) for run in runs], "curves": curves, "radii": sorted(set().union(*curves)),
        "effects": [_effect(runs[0], other) for other in runs[1:]], "galleries": galleries,
        "per_class": [{row.label: row for row in run.results.per_class} for run in runs],
        "shared": side_by_side(runs, galleries), "fragile": [nearest_to_falling(run) for run in runs],
        "table_head": HEAD, "tables": [_told(table) for table in tables_of(runs)],
        "others": list(dict.fromkeys(name for run in runs for name in run.results.metrics if name not in _SHOWN)),
    }  # fmt: skip


def _told(table: Table) -> dict[str, Any]:
    """A table in words."""
    return {"title": title_of(table), "rows": [cells_of(row) for row in table.rows], "notes": notes_of(table)}


_SHOWN = ("clean_accuracy", "robust_accuracy", "certified_accuracy", "attack_success")


class BarPart(NamedTuple):
    """A share of all examples: from `start`, `share` wide, `num` examples; `kind` is how it is drawn."""

    kind: str
    words: str
    start: float
    share: float
    num: int


def bracket(results: Results) -> tuple[BarPart, ...]:
    """What became of all examples, from certified to wrong without an attack: the shares add up to 1."""
    clean, robust, certified = (results.metrics.get(f"{kind}_accuracy") for kind in ("clean", "robust", "certified"))
    assert clean and robust  # the schema asks for them
    right, stand, proven, n = clean.count or 0, robust.count or 0, (certified and certified.count) or 0, clean.n
    counts = [
        ("stands", "stands, but is not certified" if certified else "stands: no attack broke it", stand - proven),
        ("broken", "broken by an attack", right - stand),
        ("wrong", "wrong without any attack", n - right),
    ]
    counts = [("certified", "certified: no change can break it", proven), *counts] if certified else counts
    parts: list[BarPart] = []
    for kind, text, count in counts:
        parts.append(BarPart(kind, text, sum(part.num for part in parts) / n, count / n, count))
    return tuple(parts)


class Line(NamedTuple):
    """One attack of the cascade: `passes` per image are forwards + 2 x backwards, `share` is that of all passes."""

    attack: AttackEntry
    name: str
    options: str
    rejected: int
    passes: float
    share: float | None


class Cascade(NamedTuple):
    """The attacks in order, passes per image and seconds of them all; `whole` with the curve and the checks."""

    lines: tuple[Line, ...]
    passes: float
    seconds: float
    whole: float | None


def cascade(results: Results) -> Cascade:
    """What each attack ran on, skipped, broke and cost."""
    n = results.metrics["robust_accuracy"].n
    total = sum(attack.cost.passes(n) for attack in results.attacks)
    lines = []
    for attack in results.attacks:
        name, _, options = attack.name.partition(":")
        settings = attack.settings if isinstance(attack.settings, dict) else {}
        known = [f"{key}={settings[key]}" for key in ("num_steps", "restarts") if settings.get(key) is not None]
        options, passes = options.replace(",", ", ") or ", ".join(known), attack.cost.passes(n)
        share = passes / total if total else None
        lines.append(Line(attack, name, options, sum(attack.rejected.values()), passes, share))
    seconds = sum(attack.cost.seconds for attack in results.attacks)
    return Cascade(tuple(lines), total, seconds, results.cost.passes(n) if results.cost else None)


class Margins(NamedTuple):
    """Share of the clean margin left to each example that stands without a certificate, ascending."""

    left: tuple[float, ...]
    certified: int

    def below(self, share: float) -> int:
        return sum(left < share for left in self.left)


def margins(run: StoredEvaluation) -> Margins | None:
    """How far from falling the standing examples are; None when the files do not tell."""
    if run.rows is None:
        return None
    standing = [row for row in run.rows.values() if row.robust]
    left = sorted(row.margin_left for row in standing if not row.certified)
    return Margins(tuple(left), len(standing) - len(left))


def _effect(base: StoredEvaluation, other: StoredEvaluation) -> dict[str, Any]:
    seconds: list[Any] = [(run.results.training or {}).get("seconds") for run in (base, other)]
    passes = [cascade(run.results).passes for run in (base, other)]
    return {
        **vars(compare(base, other)), "seconds": seconds, "passes": passes,
        "time_ratio": seconds[1] / seconds[0] if all(seconds) else None,
        "pass_ratio": passes[1] / passes[0] if all(passes) else None,
    }  # fmt: skip


def _gallery(run: StoredEvaluation) -> Shown:
    """What the kind of input shows of the turned examples; it escapes what comes from the files."""
    kind = run.results.data.kind
    show = find(kind).show if kind in MODALITIES else None
    return show(run) if show else Shown()
