"""Turned examples for the eye: clean, magnified change, attacked; of plain vectors the features that changed most."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from typing import Any

import numpy as np
from markupsafe import Markup

from sparring.modalities.base import Shown
from sparring.results.read import StoredEvaluation

_CARD = Markup(
    '<figure class="card">{body}<figcaption>{before} ({was}) → <b>{after}</b> ({now})<br>'
    "<small>example {index}, in truth {label}</small></figcaption></figure>\n"
)
_PICTURE = Markup('<div><img src="{source}" alt="{alt}"><small>{words}</small></div>')
_TABLE = Markup(
    '<div class="scroll" tabindex="0" role="region" aria-label="Most changed features of example {index}"><table>'
    '<thead><tr><th scope="col">feature</th><th scope="col">clean</th><th scope="col">attacked</th></tr></thead>'
    "<tbody>{rows}</tbody></table></div>"
)
_ROW = Markup('<tr><th scope="row">{feature}</th><td>{before}</td><td>{after}</td></tr>')
_LEGEND = Markup(
    '<p class="soft-text">Below each example: the model\N{RIGHT SINGLE QUOTATION MARK}s answer before and after, '
    "with its confidence. {what}</p>"
)


def show(run: StoredEvaluation) -> Shown:
    """Cards of the turned examples that were kept, and how to read them."""
    gallery, results = run.gallery, run.results
    if gallery is None or not len(gallery["index"]):
        return Shown()
    x, x_adv = gallery["x"], gallery["x_adv"]
    threat = results.threat.settings if isinstance(results.threat.settings, dict) else {}
    box = {"low": x.min(), "high": x.max()}
    low, high = (float(threat[side] if isinstance(threat.get(side), int | float) else box[side]) for side in box)
    cards = [_card(run.answer(i), x[i], x_adv[i], low, high) for i in range(len(x))]
    what = "The features that changed most, counted from 0."
    if pictures(x[0], x_adv[0], low, high):
        middle = ", orange darker and violet brighter" if x.shape[1] == 1 else ""
        what = f"The change is magnified by the factor given; the middle tone means no change{middle}."
    return Shown(cards, after=_LEGEND.format(what=what))


def _card(answer: Mapping[str, Any], x: np.ndarray, x_adv: np.ndarray, low: float, high: float) -> Markup:
    index = answer["index"]
    found = pictures(x, x_adv, low, high)
    if found:
        factor = found["factor"]
        times = f"change \N{MULTIPLICATION SIGN}{_short(factor) if factor < 10 else round(factor)}"
        body = Markup('<div class="trio">{}{}{}</div>').format(
            _PICTURE.format(source=found["clean"], alt=f"Example {index} as it was, {answer['label']}", words="clean"),
            _PICTURE.format(source=found["change"], alt="The change, magnified", words=times),
            _PICTURE.format(source=found["adversarial"], words="attacked",
                            alt=f"Example {index} after the attack, taken for {answer['after']}"),
        )  # fmt: skip
    else:
        rows = Markup().join(
            _ROW.format(feature=f["feature"], before=_short(f["before"]), after=_short(f["after"]))
            for f in most_changed(x, x_adv)
        )
        body = _TABLE.format(index=index, rows=rows)
    return _CARD.format(body=body, **answer)


def _short(value: float) -> str:
    return f"{value:.4g}".replace("-", "\N{MINUS SIGN}")


def pictures(x: np.ndarray, x_adv: np.ndarray, low: float, high: float) -> dict[str, Any] | None:
    """Clean, change and adversarial image (C, H, W) with C 1 or 3 as PNG; None when the input is no image."""
    if x.ndim != 3 or x.shape[0] not in (1, 3):
        return None
    from matplotlib import colormaps  # slow to import, and few need it

    span, change = high - low or 1.0, x_adv - x
    factor = span / (2 * float(np.abs(change).max()) or 1.0)
    middle = 0.5 + change * factor / span
    shown = colormaps["PuOr"](0.1 + 0.8 * middle[0])[..., :3] if len(x) == 1 else middle.transpose(1, 2, 0)
    rgb = [np.broadcast_to((v - low) / span, (3, *x.shape[1:])).transpose(1, 2, 0) for v in (x, x_adv)]
    return {"clean": _png(rgb[0]), "change": _png(shown), "adversarial": _png(rgb[1]), "factor": factor}


def _png(pixels: np.ndarray) -> str:
    """(H, W, 3) shares of full brightness, as a data address."""
    from matplotlib.image import imsave

    file = io.BytesIO()
    whole = (np.clip(pixels, 0, 1) * 255).round().astype(np.uint8)
    imsave(file, whole, format="png", metadata={"Software": ""})  # the default names the version of matplotlib
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def most_changed(x: np.ndarray, x_adv: np.ndarray, count: int = 6) -> list[dict[str, float]]:
    """The entries that changed most, largest first."""
    before, after = x.ravel().astype(float), x_adv.ravel().astype(float)
    order = np.argsort(-np.abs(after - before), kind="stable")[:count]
    return [{"feature": int(i), "before": before[i], "after": after[i]} for i in order if after[i] != before[i]]
