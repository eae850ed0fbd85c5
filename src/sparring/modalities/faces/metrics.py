"""What is asked of a verifier: error rates clean and under attack, with intervals over persons.

Shapes: P pairs, T thresholds, R resamples of the persons.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from sparring.evaluation.measure import accuracy_metrics
from sparring.results.schema import Metric
from sparring.results.statistics import wilson

FALSE_ACCEPT = 0.01  # the false-accept rate at which the true-accept rate is told
RESAMPLES = 400


def error_rates(similarity: np.ndarray, same: np.ndarray, weight: Any = None) -> tuple[np.ndarray, Any, Any]:
    """Thresholds (T,) between the similarities and beyond both ends, shares rejected of the pairs that show the same
    person and accepted of the others, (..., T); accepted is what lies above. From similarities (P,), whether a pair
    shows the same person (P,), and how often each counts (..., P). NaN where a side counts nothing.
    """
    order = np.argsort(similarity, kind="stable")
    s, own = similarity[order].astype(float), same[order]
    counts = np.ones(len(s)) if weight is None else weight[..., order]
    last = np.append(s[1:] != s[:-1], True)  # no threshold lies between equal similarities
    s, start = s[last], np.zeros((*counts.shape[:-1], 1))
    mine, other = (np.concatenate([start, np.cumsum(counts * side, -1)[..., last]], -1) for side in (own, ~own))
    with np.errstate(invalid="ignore"):
        rejected, accepted = mine / mine[..., -1:], (other[..., -1:] - other) / other[..., -1:]
    return np.concatenate([[s[0] - 1], (s[1:] + s[:-1]) / 2, [s[-1] + 1]]), rejected, accepted


def equal_error(similarity: np.ndarray, same: np.ndarray, weight: Any = None) -> tuple[Any, Any]:
    """Where both errors are equal on the line between the rates at two thresholds, and the threshold next to it.

    >>> rate, threshold = equal_error(np.array([0.1, 0.4, 0.6, 0.9]), np.array([False, True, False, True]))
    >>> float(rate), float(threshold)
    (0.5, 0.5)
    """
    thresholds, rejected, accepted = error_rates(similarity, same, weight)
    gap = rejected - accepted  # grows from -1 to 1
    after = np.maximum((gap >= 0).argmax(-1), 1)[..., None]
    low, high, start, end = (np.take_along_axis(r, after - b, -1)[..., 0] for r in (gap, rejected) for b in (1, 0))
    return start - low / (high - low) * (end - start), thresholds[after[..., 0] - (-low < high)]


def true_accept(similarity: np.ndarray, same: np.ndarray, weight: Any = None) -> Any:
    """The share accepted of the same person at the lowest threshold that keeps FALSE_ACCEPT; see `error_rates`."""
    _, rejected, accepted = error_rates(similarity, same, weight)
    return (1 - rejected + 0 * accepted).max(-1, where=~(accepted > FALSE_ACCEPT), initial=0.0)


def resampled(subjects: np.ndarray, seed: int = 0) -> np.ndarray:
    """How often each pair counts (R, P) when the persons are drawn anew with replacement; subjects (P, 2).

    A pair of one person counts as often as that one was drawn, a pair of two as often as the product of their draws.
    Source: Snijders and Borgatti 1999 (vertex bootstrap); Bolle 2004 (subsets bootstrap) for pairs of one person.
    """
    names, place = np.unique(subjects, return_inverse=True)
    left, right = place.reshape(subjects.shape).T
    drawn = np.random.default_rng(seed).multinomial(len(names), np.full(len(names), 1 / len(names)), RESAMPLES)
    return np.where(left == right, drawn[:, left], drawn[:, left] * drawn[:, right]).astype(float)


def similarities(table: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """(P,) similarity less threshold in logits, clean and at the worst point shown, from columns; wrong ones stay."""

    def logit(side: str) -> np.ndarray:
        sure = np.asarray(table[f"{side}_confidence"], float).clip(0.5, 1 - 1e-7)
        return np.log(sure / (1 - sure)) * np.where(np.asarray(table[f"{side}_prediction"]) == 1, 1, -1)

    clean, right, stands = logit("clean"), np.asarray(table["correct"], bool), np.asarray(table["robust"], bool)
    left = clean * np.asarray(table["margin_left"], float)
    return clean, np.where(stands, left, np.where(right, logit("adversarial"), clean))


def verification_metrics(table: Mapping[str, Any]) -> dict[str, Metric]:
    """The shared ones; of pairs equal-error and true-accept rates, clean and attacked, and the share of right answers
    turned by each goal. 95 % intervals over persons: `resampled`; Wilson's where all resamples agree. ValueError."""
    found, columns = accuracy_metrics(table), {name: np.asarray(column) for name, column in table.items()}
    if "x/probe_subject" not in columns:
        return found
    same, right, turned = columns["label"] == 1, columns["correct"], columns["correct"] & ~columns["robust"]
    if same.all() or not same.any():
        kinds = ("the same person", "different persons")[:: 1 if same.all() else -1]
        text = f"all {len(same)} pairs show {kinds[0]}; expected pairs of {kinds[1]} too"
        raise ValueError(f"{text}, or a verifier that has only one answer would look perfect: add such pairs")
    subjects = np.stack([columns[f"x/{s}_subject"] for s in ("reference", "probe")], 1)
    persons, weight = len(np.unique(subjects)), np.concatenate([np.ones((1, len(same))), resampled(subjects)])

    def told(spread: np.ndarray, n: int, up: bool = False) -> Metric:
        value, rest = float(spread[0]), spread[np.isfinite(spread)]
        few = wilson(round(value * persons), persons)  # none of 3 persons turned is no certainty
        low, high = np.percentile(rest, [2.5, 97.5]) if np.ptp(rest) else (few.low, few.high)
        return Metric(value, min(float(low), value), max(float(high), value), n, None, up)

    for when, s in zip(("", "_attacked"), similarities(columns), strict=True):
        found[f"equal_error_rate{when}"] = told(equal_error(s, same, weight)[0], len(s))
        found[f"true_accept_at_far_{FALSE_ACCEPT:g}{when}"] = told(true_accept(s, same, weight), len(s), True)
    for name, own in (("dodging_success", same & right), ("impersonation_success", ~same & right)):
        if own.any():  # NaN: a resample without such pairs
            found[name] = told(weight @ (turned & own) / np.where((n := weight @ own) > 0, n, np.nan), int(own.sum()))
    return found
