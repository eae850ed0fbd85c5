"""A verifier for the eye: its errors as a curve, and turned pairs with their similarity before and after."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from markupsafe import Markup

from sparring.modalities.base import Shown
from sparring.modalities.faces.metrics import error_rates, similarities
from sparring.modalities.faces.models import SHARPNESS
from sparring.modalities.images.show import pictures
from sparring.results.read import StoredEvaluation

_CARD = Markup(
    '<figure class="card"><div class="trio">{shown}</div><figcaption>{goal}<br>{strip}<small>example {index}: '
    "similarity less threshold {before} → <b>{after}</b></small></figcaption></figure>\n"
)
_PICTURE = Markup('<div><img src="{source}" alt="{words} of example {index}"><small>{words}</small></div>')
_STRIP = Markup(
    '<svg viewBox="0 0 200 16" role="img" aria-label="From {before} to {after}, the threshold at 0"><path d="M0 8H200" '
    'stroke="currentColor" opacity=".3"/><path d="M100 0V16" stroke="currentColor" stroke-dasharray="2 2"/>'
    '<circle cx="{x}" cy="8" r="4" fill="none" stroke="var(--s0)" stroke-width="2"/>'
    '<circle cx="{x_adv}" cy="8" r="4" fill="var(--s1)"/></svg>'
)
_ROC = Markup(
    '<figure><svg viewBox="-46 -12 300 252" role="img" aria-label="Accepted of the same person against accepted of '
    'different persons, clean and under attack" font-size="11" fill="currentColor">'
    '<path d="M0 0V200H200M0 200L200 0" fill="none" stroke="currentColor" opacity=".4"/>{lines}'
    '<text x="-40" y="8">100 %</text><text x="-22" y="204">0</text><text x="170" y="216">100 %</text>'
    '<text x="0" y="234">different persons accepted</text></svg><figcaption>Accepted of the same person (upwards) '
    "against accepted of different persons, at every threshold: solid clean, dashed under attack. Dots: the threshold "
    "in use, set on other persons. What was wrong before any attack counts as it was.</figcaption></figure>\n"
)
_LEGEND = Markup(
    '<p class="soft-text">Each pair: the reference, which stays, and the probe before and after. Ring: the similarity '
    "before; dot: after; dashed line: the threshold, to its right the same person.</p>"
)


def show_pairs(run: StoredEvaluation) -> Shown:
    """The curve of all pairs, and cards of the turned ones that were kept."""
    curve, gallery = _curve(run), run.gallery
    if gallery is None or "x/reference" not in gallery:
        return Shown(before=curve)
    return Shown([_card(gallery, i) for i in range(len(gallery["index"]))], before=curve, after=_LEGEND)


def _curve(run: StoredEvaluation) -> Markup:
    """Both curves of the pairs in examples.csv; nothing where the rows are no pairs."""
    rows = list((run.rows or {}).values())
    if "equal_error_rate" not in run.results.metrics or not rows:
        return Markup()
    table = {name: [getattr(row, name) for row in rows] for name in rows[0]._fields}
    table["adversarial_confidence"] = [0.5 if value is None else value for value in table["adversarial_confidence"]]
    lines, same = Markup(), np.array(table["label"]) == 1
    for dashes, colour, s in zip(("none", "5 3"), ("var(--s0)", "var(--s1)"), similarities(table), strict=True):
        _, rejected, accepted = error_rates(s, same)
        points = " ".join(f"{200 * a:.1f},{200 * r:.1f}" for a, r in zip(accepted, rejected, strict=True))
        lines += Markup(
            '<polyline points="{}" fill="none" stroke="{}" stroke-width="2" stroke-dasharray="{}"/>'
            '<circle cx="{:.1f}" cy="{:.1f}" r="4" fill="{}"/>'
        ).format(points, colour, dashes, 200 * (s[~same] > 0).mean(), 200 * (s[same] <= 0).mean(), colour)
    return _ROC.format(lines=lines)


def _card(gallery: Mapping[str, np.ndarray], i: int) -> Markup:
    turned = {"robust": False, "correct": True, "margin_left": 0.0} | {name: gallery[name][i] for name in gallery}
    before, after = (float(s) / SHARPNESS for s in similarities(turned))
    index, shown = int(gallery["index"][i]), Markup()
    for name, words in (("x/reference", "reference"), ("x/probe", "probe"), ("x_adv/probe", "attacked")):
        found = pictures(gallery[name][i], gallery[name][i], 0.0, 1.0)
        shown += _PICTURE.format(source=found["clean"], words=words, index=index) if found else Markup()
    told = {"before": f"{before:+.2f}", "after": f"{after:+.2f}"}
    x, x_adv = (f"{100 + 100 * max(-1.0, min(1.0, value)):.0f}" for value in (before, after))
    goal = ("impersonation: taken for the same person", "dodging: the same person, missed")[int(gallery["label"][i])]
    return _CARD.format(shown=shown, goal=goal, index=index, strip=_STRIP.format(x=x, x_adv=x_adv, **told), **told)
