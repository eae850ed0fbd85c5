"""Two evaluations held against each other: whether they answer one question, and what changed beyond chance."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sparring.results.read import StoredEvaluation
from sparring.results.schema import Results
from sparring.results.statistics import Change, paired_change, unpaired_change


@dataclass(frozen=True)
class ClassChange:
    """The changes in one class; sure: beyond chance, with Bonferroni's correction for the number of classes."""

    name: str
    clean: Change
    robust: Change
    clean_sure: bool
    robust_sure: bool


@dataclass(frozen=True)
class Comparison:
    """`other` against `base`: the changes, whether both measured one model, and cautions to be read with them."""

    base: StoredEvaluation
    other: StoredEvaluation
    clean: Change
    robust: Change
    same_model: bool
    cautions: tuple[str, ...]
    classes: tuple[ClassChange, ...]


def compare(base: StoredEvaluation, other: StoredEvaluation) -> Comparison:
    """What changed from `base` to `other`, paired by index where both hold the same examples.

    `compare(read_evaluation("a"), read_evaluation("b")).robust.test` is McNemar's.
    """
    one, two = base.results, other.results
    index, why_not = shared_examples(base, other)
    same_model = _same_model(base, other, index)
    cautions = []
    asked = {what for what, _, _ in differences(one, two)}
    other_attacks = not same_model and attacks_of(one) != attacks_of(two)
    what = "threat models" if "threat" in asked else "attacks" if other_attacks else ""
    if what:
        cautions.append(f"Measured with different {what}: the numbers do not answer the same question.")
    cautions += [
        f"The verdict on {run.name} is {run.results.verdict}: its share under attack may be too high, and the "
        "difference wrong." for run in (base, other) if run.results.verdict in ("SUSPECT", "INVALID")
    ]  # fmt: skip
    if why_not:
        cautions.append(f"{why_not} The examples could not be paired, so the intervals are wider.")
    elif len(index) < max(one.metrics["clean_accuracy"].n, two.metrics["clean_accuracy"].n):
        cautions.append(f"The comparison uses the {len(index)} examples that both evaluations share.")
    if index:
        clean, robust = _paired_at(base, other, index)
    else:
        clean, robust = (unpaired_change(one.metrics[f"{kind}_accuracy"], two.metrics[f"{kind}_accuracy"])
                         for kind in ("clean", "robust"))  # fmt: skip
    return Comparison(base, other, clean, robust, same_model, tuple(cautions), _classes(base, other, index))


def differences(one: Results, two: Results) -> list[tuple[str, Any, Any]]:
    """In what two evaluations were asked differently: (what, of the one, of the other)."""
    same_text = one.threat.text == two.threat.text
    keys = {"kind of input": "kind", "data": "name", "split": "split", "way of reading": "settings"}
    pairs: list[tuple[str, Any, Any]] = [
        ("threat", one.threat.settings, two.threat.settings) if same_text
        else ("threat", one.threat.text, two.threat.text),
        *((what, getattr(one.data, key), getattr(two.data, key)) for what, key in keys.items()),
        ("number of examples", one.metrics["robust_accuracy"].n, two.metrics["robust_accuracy"].n),
    ]  # fmt: skip
    return [(what, a, b) for what, a, b in pairs if a != b]


def attacks_of(results: Results) -> list[tuple[str, Any]]:
    """What decides about the strength of the attacks."""
    return [(attack.name, attack.settings) for attack in results.attacks]


def shared_examples(base: StoredEvaluation, other: StoredEvaluation) -> tuple[list[int], str]:
    """The indices that both evaluations hold, or none and the reason."""
    if base.rows is None or other.rows is None:
        return [], "The results per example (examples.csv) of at least one model are missing."
    if {what for what, _, _ in differences(base.results, other.results)} - {"threat", "number of examples"}:
        return [], "The two were measured on different data."
    index = sorted(base.rows.keys() & other.rows.keys())
    if not index:
        return [], "The two evaluations have no example in common."
    if wrong := [i for i in index if base.rows[i].label != other.rows[i].label]:
        say = f"{len(wrong)} examples have another label in the other evaluation, the first is index {wrong[0]}"
        return [], f"{say}, so the data differ."
    return index, ""


def _same_model(base: StoredEvaluation, other: StoredEvaluation, index: Sequence[int]) -> bool:
    """Whether these are two measurements of one model: same architecture and weights file, or same predictions."""
    one, two = (
        (run.results.model.name, run.results.model.parameters, run.results.model.sha256) if run.results.model else None
        for run in (base, other)
    )
    if one != two or one is None or not one[0]:
        return False
    rows = [((base.rows or {})[i], (other.rows or {})[i]) for i in index]
    return bool(one[2]) or (bool(rows) and all(a.correct == b.correct for a, b in rows))


def _paired_at(base: StoredEvaluation, other: StoredEvaluation, index: Sequence[int]) -> tuple[Change, Change]:
    rows = [((base.rows or {})[i], (other.rows or {})[i]) for i in index]
    clean = paired_change([a.correct for a, _ in rows], [b.correct for _, b in rows])
    return clean, paired_change([a.robust for a, _ in rows], [b.robust for _, b in rows])


def _classes(base: StoredEvaluation, other: StoredEvaluation, index: Sequence[int]) -> tuple[ClassChange, ...]:
    by_label: dict[int, list[int]] = {}
    for i in index:
        by_label.setdefault((base.rows or {})[i].label, []).append(i)

    def sure(change: Change) -> bool:
        return change.test is not None and change.test.p_value * len(by_label) < 0.05

    changes = [
        (base.results.data.class_name(label), *_paired_at(base, other, by_label[label])) for label in sorted(by_label)
    ]
    return tuple(ClassChange(name, clean, robust, sure(clean), sure(robust)) for name, clean, robust in changes)
