"""What a certificate says of a batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sparring.core.model_state import attack_mode, private_rng
from sparring.core.types import Inputs, Model, device_of, map_inputs, take
from sparring.evaluation.verify import Batch
from sparring.threats.base import ThreatModel

Certify = Callable[[Model, Inputs, Tensor, ThreatModel], Tensor]
"""(model, x, y, threat) -> (B,): a margin (logit of y minus the largest other) that no permitted change goes below."""


def spares(certify: Certify | None) -> bool:
    """Whether the certificate is about the very model that is attacked, so that what it vouches for needs no attack."""
    return getattr(certify, "spares", True)


def certified(batch: Batch, rows: Tensor, certify: Certify) -> Tensor:
    """(b,) bool: the bound of the margin is above 0. Raises ValueError for a bound of another shape."""
    x, y, threat = take(batch.x, rows), batch.y[rows], take(batch.threat, batch.number[rows])
    with attack_mode(batch.model), private_rng(batch.seed, device_of(x)), torch.no_grad():
        bound: Any = certify(batch.model, map_inputs(torch.clone, x), y.clone(), threat)
    if not isinstance(bound, Tensor) or bound.shape != y.shape:
        got = tuple(bound.shape) if isinstance(bound, Tensor) else type(bound).__name__
        raise ValueError(f"certify returned {got}; expected a lower bound of the margin for each example, {len(y)}")
    return bound > 0
