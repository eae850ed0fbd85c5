"""Turned texts for the eye: the original and the changed one side by side, changed words marked."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from markupsafe import Markup

from sparring.modalities.base import Shown
from sparring.results.read import StoredEvaluation

_CARD = Markup(
    '<figure class="card text"><div class="sides"><p dir="auto">{original}</p><p dir="auto">{attacked}</p></div>'
    "<figcaption>{before} ({was}) → <b>{after}</b> ({now})<br>"
    "<small>example {index}, in truth {label}; {changed}</small></figcaption></figure>\n"
)
_STYLE = Markup(
    "<style>.cards .card.text{max-width:none;width:100%;grid-column:1/-1;text-align:start}"
    ".card.text .sides{display:grid;grid-template-columns:1fr 1fr;gap:1.2em;overflow-wrap:anywhere}"
    "@media (max-width:40em){.card.text .sides{grid-template-columns:1fr}}"
    ".card.text mark{background:none;color:inherit;font-weight:bold;text-decoration:underline 2px}</style>"
)
_LEGEND = Markup(
    '<p class="soft-text">On the left the text as it was, on the right as attacked; changed words are underlined. '
    "Below: the model\N{RIGHT SINGLE QUOTATION MARK}s answer before and after, with its confidence. "
    "{average:.0%} of the words of these texts were changed, most often {often}.</p>"
)


def show_texts(run: StoredEvaluation) -> Shown:
    """Cards of the turned texts that were kept with their `words` (see `caption`)."""
    gallery = run.gallery
    if gallery is None or not len(gallery["index"]):
        return Shown()
    if "words" not in gallery:
        return Shown(before=Markup("<p>The texts behind these examples were not kept: there is nothing to read.</p>"))
    cards, shares, often = [], [], Counter[str]()
    for i, told in enumerate(gallery["words"]):
        pairs: list[Sequence[str]] = json.loads(str(told))
        changed, length = sum(a != b for a, b in pairs), int(gallery["x/mask"][i].sum())
        shares.append(changed / max(1, length))
        often.update(sorted({a.lower() for a, b in pairs if a != b}))  # once a text
        cards.append(_CARD.format(
            original=_side(pairs, 0), attacked=_side(pairs, 1), changed=f"{changed} of {length} words changed",
            **run.answer(i),
        ))  # fmt: skip
    named = Markup(", ").join(Markup("<i>{}</i> ({})").format(*one) for one in often.most_common(8))
    legend = _LEGEND.format(average=float(np.mean(shares)), often=named)
    return Shown(cards, before=_STYLE, after=legend)


def as_jsonl(arrays: Mapping[str, Any], data: Any) -> str:
    """A line of JSON for each turned text: index, before, after, and what it is, was taken for, and is taken for."""
    lines = []
    for i, told in enumerate(arrays["words"]):
        pairs: list[Sequence[str]] = json.loads(str(told))
        before, after = ("".join(pair[side] for pair in pairs) for side in (0, 1))
        names = {name: data.class_names[int(arrays[key][i])] for name, key in _JSON_CLASSES.items()}
        line = {"index": int(arrays["index"][i]), "before": before, "after": after, **names}
        lines.append(json.dumps(line, ensure_ascii=False) + "\n")
    return "".join(lines)


_JSON_CLASSES = {"label": "y", "taken_before": "prediction_before", "taken_after": "prediction_after"}


def _side(pairs: Sequence[Sequence[str]], side: int) -> Markup:
    parts = (Markup("<mark>{}</mark>").format(pair[side]) if pair[0] != pair[1] else pair[side] for pair in pairs)
    return Markup().join(parts)
