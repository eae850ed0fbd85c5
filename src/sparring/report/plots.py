"""Plots as inline SVG, which take their colours from the page, light or dark."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from markupsafe import Markup, escape
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from sparring.report import words
from sparring.results.schema import Metric

# Stand-ins for the colours of the page, var(--s0) and so on; marker and dashes carry the meaning too.
_INK = "#010203"
_SERIES = tuple(f"#0a0b{i:02x}" for i in range(6))
_MARKERS, _DASHES = "os^Dv*", ("-", (0, (5, 2)), (0, (1, 1.5)), (0, (6, 2, 1, 2)), (0, (3, 1)), (0, (8, 3)))
_INKED = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color", "grid.color")
_QUARTERS = ([0, 0.25, 0.5, 0.75, 1], ["0 %", "25 %", "50 %", "75 %", "100 %"])
_HISTORY = ("train_loss", "clean_accuracy", "robust_accuracy")
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none", "font.family": "sans-serif", "font.size": 10.5, "text.usetex": False,
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "axes.axisbelow": True, "grid.alpha": 0.15,
    "axes.titlelocation": "left", "axes.titlesize": 10.5, "legend.frameon": False, "legend.fontsize": 9.5,
    "lines.linewidth": 1.8, "lines.markersize": 4.5, **dict.fromkeys(_INKED, _INK),
}  # fmt: skip


def _svg(figure: Figure, label: str) -> Markup:
    text = io.StringIO()
    figure.savefig(text, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = re.sub(r"^.*?(?=<svg)|<metadata>.*?</metadata>", "", text.getvalue(), flags=re.S)
    head, _, body = svg.partition(">")
    svg = re.sub(r' (xmlns(:xlink)?|width|height|version)="[^"]*"', "", head) + ">" + body
    svg = re.sub(r'<g id="[^"]*"', "<g", svg).replace(_INK, "currentColor")
    svg = re.sub(r"font-family: [^;\"]*|'DejaVu Sans'[^;\"]*", "system-ui, sans-serif", svg)
    for i, colour in enumerate(_SERIES):
        svg = svg.replace(colour, f"var(--s{i})")
    return Markup(svg.replace("<svg", f'<svg role="img" aria-label="{escape(label)}"', 1))


def _percent_axis(axes: Axes) -> None:
    axes.set_ylim(-0.02, 1.02)
    axes.set_yticks(*_QUARTERS)


def security_curve(curves: Sequence[Mapping[float, Metric]], radius: float | None, names: str) -> Markup:
    """Accuracy against the radius, one line with its 95 % band per model, the threat's radius marked."""
    with matplotlib.rc_context({**_STYLE, "svg.hashsalt": "curve"}):
        figure = Figure(figsize=(5.4, 3.3), layout="constrained")
        axes = figure.add_subplot()
        for i, curve in enumerate(curves):
            x, shares = list(curve), curve.values()
            y, low, high = ([getattr(share, key) for share in shares] for key in ("value", "low", "high"))
            colour = _SERIES[i % 6]
            axes.fill_between(x, low, high, color=colour, alpha=0.16, linewidth=0)
            axes.plot(x, y, color=colour, linestyle=_DASHES[i % 6], marker=_MARKERS[i % 6])
        if radius is not None:
            axes.axvline(radius, color=_INK, linewidth=1, linestyle=(0, (2, 2)))
            axes.text(radius, 1.03, "this report", ha="center", va="bottom", fontsize=9.5)
        _percent_axis(axes)
        axes.set_xlabel("radius: how much may change")
        axes.set_title("right under attack", pad=18)
        label = f"Security curve of {names}: accuracy under attack against the radius. Its numbers follow as a table."
        return _svg(figure, label)


def learning_curves(training: Mapping[str, Any], series: int, name: str) -> Markup:
    """Training loss above, validation accuracy below, the best epoch marked."""
    history, best = training["history"], training.get("best_epoch")
    with matplotlib.rc_context({**_STYLE, "svg.hashsalt": f"learning{series}"}):
        figure = Figure(figsize=(5.4, 4.2), layout="constrained")
        top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=[2, 3])
        epoch = [1 + _number(line.get("epoch")) for line in history]  # people count from 1
        loss, clean, robust = ([_number(line.get(key)) for line in history] for key in _HISTORY)
        look: dict[str, Any] = {"color": _SERIES[series % 6], "marker": "o" if len(history) < 25 else ""}
        top.plot(epoch, loss, **look)
        if np.isfinite(clean).any():
            bottom.plot(epoch, clean, linestyle=_DASHES[1], mfc="none", label="clean", **look)
        if np.isfinite(robust).any():
            bottom.plot(epoch, robust, label="under attack", **look)
        for axes in (top, bottom) if best is not None and best >= 0 else ():
            axes.axvline(1 + (best or 0), color=_INK, linewidth=1, linestyle=(0, (2, 2)), label="best epoch")
        _percent_axis(bottom)
        top.set_title("training loss")
        bottom.set_title("validation accuracy")
        bottom.set_xlabel("epoch")
        bottom.xaxis.set_major_locator(MaxNLocator(integer=True))
        figure.legend(loc="outside lower center", ncols=3, handles=bottom.get_legend_handles_labels()[0])
        return _svg(figure, f"Learning curves of {name}: training loss and validation accuracy for each epoch.")


def cascade_bars(lines: Sequence[Any], clean: Metric, series: int, name: str) -> Markup:
    """One bar per attack: what stands after it and what it broke on the left, its passes per image on the right."""
    stand = [line.attack.robust_after for line in lines]
    fell, passes = [line.attack.broke for line in lines], [line.passes for line in lines]
    with matplotlib.rc_context({**_STYLE, "svg.hashsalt": f"cascade{series}", "hatch.linewidth": 0.9}):
        figure = Figure(figsize=(5.4, 1.1 + 0.27 * len(lines)), layout="constrained")
        left, right = figure.subplots(1, 2, sharey=True)
        colour, rows = _SERIES[series % 6], range(1, len(lines) + 1)
        left.barh([0, *rows], [clean.value, *stand], 0.62, color=colour, alpha=0.85)
        broken: dict[str, Any] = {"color": "none", "edgecolor": colour, "hatch": "////", "linewidth": 0.8}
        left.barh(rows, [f / clean.n for f in fell], 0.62, left=stand, **broken)
        right.barh(rows, passes, 0.62, color=_INK, alpha=0.45)
        for row, (base, count, cost) in enumerate(zip(stand, fell, passes, strict=True), 1):
            left.text(base + count / clean.n + 0.03, row, f"{count}", va="center", fontsize=9.5)
            right.text(cost + 0.03 * max(passes), row, words.passes(cost), va="center", fontsize=9.5)
        left.set_yticks([0, *rows], ["none", *map(str, rows)])
        left.invert_yaxis()
        left.set_ylabel("attack")
        left.set_xticks([0, 0.5, 1], ["0 %", "50 %", "100 %"])
        left.set_xlim(0, 1.2)
        right.set_xlim(0, 1.3 * max(max(passes), 1e-9))
        right.xaxis.set_major_locator(MaxNLocator(3))
        for axes, title in ((left, "stand, and broken"), (right, "passes per image")):
            axes.set_title(title)
            axes.grid(False, axis="y")
            axes.tick_params(axis="y", length=0)
        label = f"Attacks on {name}: what stands after each, what it broke, and its passes per image, as in the table."
        return _svg(figure, label)


def margin_histogram(left: Sequence[float], series: int, name: str) -> Markup:
    """How many standing examples have how much of their clean margin left, in steps of 5 %."""
    with matplotlib.rc_context({**_STYLE, "svg.hashsalt": f"margins{series}"}):
        figure = Figure(figsize=(5.4, 2.3), layout="constrained")
        axes = figure.add_subplot()
        axes.hist(left, bins=np.linspace(0, 1, 21).tolist(), color=_SERIES[series % 6], rwidth=0.9)
        axes.set_xticks(*_QUARTERS)
        axes.set_xlim(0, 1)
        axes.set_xlabel("margin left: 0 % would fall")
        axes.yaxis.set_major_locator(MaxNLocator(4, integer=True))
        axes.set_title("standing examples")
        return _svg(figure, f"Histogram for {name}: how much of its clean margin each standing example has left.")


def quality_curves(history: Sequence[Mapping[str, Any]], rollbacks: Sequence[Mapping[str, Any]]) -> Markup:
    """FID above, coverage below, over the steps; the floors dashed, rollbacks as vertical lines."""
    with matplotlib.rc_context({**_STYLE, "svg.hashsalt": "quality"}):
        figure = Figure(figsize=(5.4, 4.2), layout="constrained")
        step = [_number(line.get("step")) for line in history]
        for axes, key, title in zip(
            figure.subplots(2, 1, sharex=True), ("fid", "coverage"), ("FID x 1000", "coverage"), strict=True
        ):
            value, floor = ([_number(line.get(name)) for line in history] for name in (key, f"floor_{key}"))
            axes.plot(step, value, color=_SERIES[0], marker="o" if len(history) < 25 else "")
            axes.plot(step, floor, color=_INK, linewidth=1, linestyle=_DASHES[1])
            for rollback in rollbacks:
                axes.axvline(_number(rollback.get("step")), color=_SERIES[1], linewidth=1, linestyle=_DASHES[2])
            axes.set_title(title)
            axes.set_ylim(bottom=0)
        axes.set_xlabel("step")
        return _svg(figure, "FID and coverage after each epoch, with those of real images as a dashed line.")


def _number(value: Any) -> float:
    return float(value) if isinstance(value, int | float) else float("nan")
