"""What recipes for single labels share: the loss of a batch, weights of classes, and when to look at what comes in.

Shapes: B examples, K classes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sparring.core.model_state import class_logits
from sparring.core.registry import read_number
from sparring.core.types import Inputs, size
from sparring.threats.base import ThreatModel
from sparring.threats.inputs import check_inputs, check_kind, check_one_logit, check_target


@dataclass(frozen=True, kw_only=True)
class Supervised:
    """label_smoothing: of the labels. class_weights: one for each class, above 0; None: all alike.

    The loss of a batch is sum_i w[y_i] loss_i / sum_i w[y_i], as with `torch.nn.CrossEntropyLoss(weight=w)`. Attacks
    work example by example and know no weights.
    """

    label_smoothing: float = 0.0
    class_weights: Sequence[float] | None = None
    calls: list[int] = field(default_factory=lambda: [0], repr=False, compare=False)
    """How often it was called, which `at` and `take` hand on."""

    def __post_init__(self) -> None:
        if not isinstance(self.label_smoothing, int | float) or not 0 <= self.label_smoothing < 1:
            raise ValueError(f"label_smoothing must be in [0, 1), mostly 0 to 0.2; got {self.label_smoothing!r}")
        if self.class_weights is not None:
            weights = tuple(float(weight) for weight in self.class_weights)
            if not weights or not all(0 < weight < math.inf for weight in weights):
                raise ValueError(f"class_weights {weights}: expected a number above 0 for each class, such as (1, 5)")
            object.__setattr__(self, "class_weights", weights)

    def _begin(self, x: Inputs, y: Tensor, threat: ThreatModel | None = None) -> None:
        """Counts this call; where it looks, refuses what `evaluate` refuses, in its words."""
        check_kind(x)
        self.calls[0] += 1
        if self._looks:
            if threat is not None:
                check_inputs(x, threat)
            check_target(y, size(x))

    @property
    def _looks(self) -> bool:
        """Whether this call looks at values: the first and every hundredth, since a GPU would wait."""
        return self.calls[0] % 100 == 1

    def _logits(self, out: Any, x: Inputs, y: Tensor) -> Tensor:
        """The logits (B, K) of what a model returned; where this call looks, what means nothing is refused."""
        logits = class_logits(out)
        if self._looks:
            check_one_logit(out)
            check_target(y, size(x), logits.shape[1])
        return logits

    def _mean(self, losses: Tensor, y: Tensor) -> Tensor:
        """The mean of one loss for each example (B,), by the weights of their classes."""
        if self.class_weights is None:
            return losses.mean()
        if y.ndim == 2:
            raise ValueError("class_weights need one class for each example; these labels are probabilities (B, K)")
        weights = torch.tensor(self.class_weights, dtype=losses.dtype, device=losses.device)[y]
        return (weights * losses).sum() / weights.sum()

    def _cross_entropy(self, logits: Tensor, y: Tensor) -> Tensor:
        """The loss of a batch. ValueError where there are not as many weights as classes."""
        if self.class_weights is None:
            return F.cross_entropy(logits, y, label_smoothing=self.label_smoothing)
        if len(self.class_weights) != logits.shape[1]:
            raise ValueError(
                f"class_weights has {len(self.class_weights)} numbers and the model {logits.shape[1]} classes; one each"
            )
        return self._mean(F.cross_entropy(logits, y, label_smoothing=self.label_smoothing, reduction="none"), y)


def read_class_weights(text: str, y: Tensor, class_names: Sequence[str]) -> list[float]:
    """A weight for each class: the numbers of `1..5..2`, or for "balanced" N / (K * the class's number of labels y),
    with which every class counts alike. ValueError for anything else.

    >>> read_class_weights("balanced", torch.tensor([0, 0, 0, 1]), ["no", "yes"])
    [0.6666666666666666, 2.0]
    """
    num_classes = len(class_names)
    if text == "balanced":
        counts = torch.bincount(y, minlength=num_classes).clamp_min(1)
        weights: list[float] = (len(y) / (num_classes * counts.double())).tolist()
        return weights
    try:
        weights = [read_number(part) for part in text.split("..")]
    except (ValueError, ZeroDivisionError):
        weights = []
    if len(weights) != num_classes:
        raise ValueError(
            f"class_weights {text!r}: expected balanced, or {num_classes} numbers with two dots between them, one for "
            f"each of {', '.join(class_names[:5])}{', ...' * (num_classes > 5)}"
        )
    return weights
