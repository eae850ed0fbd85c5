"""When two evaluations are the same but for the time they took."""

from __future__ import annotations

from typing import Any

import torch

from sparring.evaluation.as_results import as_results
from sparring.evaluation.measure import Evaluation


def untimed(value: Any) -> Any:
    """The same without what differs from run to run: seconds, and when it was made."""
    if isinstance(value, dict):
        return {key: untimed(inner) for key, inner in value.items() if key not in ("seconds", "created")}
    return [untimed(inner) for inner in value] if isinstance(value, (list, tuple)) else value


def check_same(a: Evaluation, b: Evaluation) -> None:
    """Raises AssertionError unless both hold the same: every count, every column bit by bit, pictures, findings."""
    (one, rows, _), (two, others, _) = as_results(a), as_results(b)
    assert untimed(one.plain()) == untimed(two.plain()) and rows == others
    for tensors, others in ((a.table, b.table), (a.gallery, b.gallery)):
        assert list(tensors) == list(others)
        for name, tensor in tensors.items():
            assert tensor.dtype == others[name].dtype and torch.equal(tensor, others[name]), name
