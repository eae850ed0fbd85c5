"""Two evaluations held against each other: whether they answer one question, and what changed beyond chance."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from sparring.results.read import StoredEvaluation
from sparring.results.schema import ModelEntry, Results, Row
from sparring.results.statistics import Change, paired_change, unpaired_change


class ClassChange(NamedTuple):
    """The changes in one class."""

    name: str
    clean: Change
    robust: Change


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
    pairs, why_not = shared_examples(base, other)
    same_model = _same_model(one.model, two.model, pairs)
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
    elif len(pairs) < max(one.metrics["clean_accuracy"].n, two.metrics["clean_accuracy"].n):
        cautions.append(f"The comparison uses the {len(pairs)} examples that both evaluations share.")
    if pairs:
        clean, robust = _paired(pairs)
    else:
        clean, robust = (unpaired_change(one.metrics[f"{kind}_accuracy"], two.metrics[f"{kind}_accuracy"])
                         for kind in ("clean", "robust"))  # fmt: skip
    by_label: dict[int, list[tuple[Row, Row]]] = {}
    for pair in pairs:
        by_label.setdefault(pair[0].label, []).append(pair)
    classes = tuple(ClassChange(one.data.class_name(label), *_paired(by_label[label])) for label in sorted(by_label))
    return Comparison(base, other, clean, robust, same_model, tuple(cautions), classes)


def differences(one: Results, two: Results) -> list[tuple[str, Any, Any]]:
    """In what two evaluations were asked differently: (what, of the one, of the other)."""
    same_text = one.threat.text == two.threat.text

    def asked(results: Results) -> dict[str, Any]:
        threat, data, n = results.threat, results.data, results.metrics["robust_accuracy"].n
        return {
            "threat": threat.settings if same_text else threat.text, "kind of input": data.kind, "data": data.name,
            "split": data.split, "way of reading": data.settings, "number of examples": n,
        }  # fmt: skip

    first, second = asked(one), asked(two)
    return [(what, first[what], second[what]) for what in first if first[what] != second[what]]


def attacks_of(results: Results) -> list[tuple[str, Any]]:
    """What decides about the strength of the attacks."""
    return [(attack.name, attack.settings) for attack in results.attacks]


def shared_examples(base: StoredEvaluation, other: StoredEvaluation) -> tuple[list[tuple[Row, Row]], str]:
    """The examples that both evaluations hold, by index, or none and the reason."""
    if base.rows is None or other.rows is None:
        return [], "The results per example (examples.csv) of at least one model are missing."
    if {what for what, _, _ in differences(base.results, other.results)} - {"threat", "number of examples"}:
        return [], "The two were measured on different data."
    pairs = [(base.rows[index], other.rows[index]) for index in sorted(base.rows.keys() & other.rows.keys())]
    if not pairs:
        return [], "The two evaluations have no example in common."
    if wrong := [one.index for one, two in pairs if one.label != two.label]:
        say = f"{len(wrong)} examples have another label in the other evaluation, the first is index {wrong[0]}"
        return [], f"{say}, so the data differ."
    return pairs, ""


def _same_model(one: ModelEntry | None, two: ModelEntry | None, pairs: Sequence[tuple[Row, Row]]) -> bool:
    """Whether two entries mean one model: same architecture and weights file, or same predictions."""
    if one is None or two is None or not one.name:
        return False
    if (one.name, one.parameters, one.sha256) != (two.name, two.parameters, two.sha256):
        return False
    return bool(one.sha256) or (bool(pairs) and all(a.correct == b.correct for a, b in pairs))


def _paired(pairs: Sequence[tuple[Row, Row]]) -> tuple[Change, Change]:
    """The changes of the clean and of the robust accuracy."""
    clean = paired_change([a.correct for a, _ in pairs], [b.correct for _, b in pairs])
    return clean, paired_change([a.robust for a, _ in pairs], [b.robust for _, b in pairs])
