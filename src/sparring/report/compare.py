"""Two results on the same examples: what was gained, what it cost, and whether chance alone explains it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from scipy.stats import binomtest

from sparring.report.account import cascade
from sparring.report.results import Run

_Z = 1.959963984540054  # 97.5 % point of the normal distribution


@dataclass(frozen=True)
class Change:
    """From `before` to `after` (shares of n) with the 95 % interval of the difference.

    lost, gained, p: examples right only before, only after, and McNemar's exact test; None when not paired.
    """

    before: float
    after: float
    n: int
    low: float
    high: float
    lost: int | None = None
    gained: int | None = None
    p: float | None = None

    @property
    def difference(self) -> float:
        return self.after - self.before

    @property
    def within_chance(self) -> bool:
        return self.low <= 0 <= self.high if self.p is None else self.p >= 0.05


def paired(before: Sequence[bool], after: Sequence[bool]) -> Change:
    """The change on the same examples. Interval: Agresti and Min (2005), Wald with 1/2 added to each cell."""
    n = len(before)
    lost = sum(a and not b for a, b in zip(before, after, strict=True))
    gained = sum(b and not a for a, b in zip(before, after, strict=True))
    p = float(binomtest(lost, lost + gained).pvalue) if lost + gained else 1.0
    middle = (gained - lost) / (n + 2)
    half = _Z * math.sqrt((gained + lost + 1) / (n + 2) - middle**2) / math.sqrt(n + 2)
    low, high = max(-1.0, middle - half), min(1.0, middle + half)
    return Change(sum(before) / n, sum(after) / n, n, low, high, lost, gained, p)


def unpaired(before: dict[str, Any], after: dict[str, Any]) -> Change:
    """The change between two sets of examples. Interval: Newcombe (1998), method 10, from Wilson's intervals."""
    a, b = before["value"], after["value"]
    low = b - a - math.hypot(b - after["low"], before["high"] - a)
    high = b - a + math.hypot(after["high"] - b, a - before["low"])
    return Change(a, b, min(before["n"], after["n"]), low, high)


def compare(base: Run, other: Run) -> dict[str, Any]:
    """Everything that the page says about `other` against `base`."""
    one, two = base.results, other.results
    cautions: list[str] = []
    index, why_not = _shared(base, other)
    same_model = _same_model(base, other, index)
    for what, key in (("threat models", "threat"), *([] if same_model else [("attacks", "attacks")])):
        if not cautions and _asked(one[key]) != _asked(two[key]):
            cautions.append(f"Measured with different {what}: the numbers do not answer the same question.")
    doubts = [(run.name, run.results.get("verdict")) for run in (base, other)]
    cautions += [f"The verdict on {name} is {word}: its share under attack may be too high, and the difference wrong."
                 for name, word in doubts if word in ("SUSPECT", "INVALID")]  # fmt: skip
    if why_not:
        cautions.append(f"{why_not} The examples could not be paired, so the intervals are wider.")
    elif len(index) < max(one["clean_accuracy"]["n"], two["clean_accuracy"]["n"]):
        cautions.append(f"The comparison uses the {len(index)} examples that both evaluations share.")
    if index:
        clean, robust = _paired_at(base, other, index)
    else:
        clean = unpaired(one["clean_accuracy"], two["clean_accuracy"])
        robust = unpaired(one["robust_accuracy"], two["robust_accuracy"])
    seconds: list[Any] = [(r.results.get("training") or {}).get("seconds") for r in (base, other)]
    passes: list[Any] = [cascade(r.results).passes for r in (base, other)]
    return {"base": base, "other": other, "clean": clean, "robust": robust, "cautions": cautions,
            "same_model": same_model, "classes": _classes(base, other, index), "seconds": seconds,
            "time_ratio": seconds[1] / seconds[0] if all(seconds) else None,
            "passes": passes, "pass_ratio": passes[1] / passes[0] if all(passes) else None}  # fmt: skip


def _same_model(base: Run, other: Run, index: Sequence[int]) -> bool:
    """Whether these are two measurements of one model: same architecture and weights file, or same predictions."""
    one, two = (
        {k: (r.results.get("model") or {}).get(k) for k in ("name", "parameters", "sha256")} for r in (base, other)
    )
    if one != two or not one["name"]:
        return False
    rows = [((base.examples or {})[i], (other.examples or {})[i]) for i in index]
    return bool(one["sha256"]) or (bool(rows) and all(a.clean == b.clean for a, b in rows))


def _asked(value: Any) -> Any:
    return [(a.get("name"), a.get("settings")) for a in value] if isinstance(value, list) else value


def _shared(base: Run, other: Run) -> tuple[list[int], str]:
    """The indices that both evaluations hold, or none and the reason."""
    if base.examples is None or other.examples is None:
        return [], "The results per example (examples.csv) of at least one model are missing."
    if any(base.results["data"].get(k) != other.results["data"].get(k) for k in ("name", "split")):
        return [], "The two were measured on different data."
    index = sorted(base.examples.keys() & other.examples.keys())
    if not index:
        return [], "The two evaluations have no example in common."
    if any(base.examples[i].label != other.examples[i].label for i in index):
        return [], "The same index has another label in the other evaluation, so the data differ."
    return index, ""


def _paired_at(base: Run, other: Run, index: Sequence[int]) -> tuple[Change, Change]:
    rows = [((base.examples or {})[i], (other.examples or {})[i]) for i in index]
    clean = paired([a.clean for a, _ in rows], [b.clean for _, b in rows])
    return clean, paired([a.robust for a, _ in rows], [b.robust for _, b in rows])


def _classes(base: Run, other: Run, index: Sequence[int]) -> list[dict[str, Any]]:
    """Change per class. Beyond chance is judged with Bonferroni's correction for the number of classes."""
    if not index:
        return []
    by_label: dict[int, list[int]] = {}
    for i in index:
        by_label.setdefault((base.examples or {})[i].label, []).append(i)
    rows = []
    for label in sorted(by_label):
        clean, robust = _paired_at(base, other, by_label[label])
        clean_sure, robust_sure = ((c.p or 0) * len(by_label) < 0.05 for c in (clean, robust))
        rows.append({"name": base.class_name(label), "clean": clean, "robust": robust,
                     "clean_sure": clean_sure, "robust_sure": robust_sure})  # fmt: skip
    return rows
