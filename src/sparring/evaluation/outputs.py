"""Models that do not return logits (B, K), made to: how they are recognised, and what is wrapped around them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from sparring.core.types import Model


class LogProbabilities(nn.Module):
    """A model that returns probabilities, with their logarithm as logits: its softmax is the probabilities again."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.model = model
        self.training = getattr(model, "training", False)

    def forward(self, x: Any) -> Tensor:
        p = self.model(x)
        return p.clamp_min(torch.finfo(p.dtype).tiny).log()


class TwoLogits(nn.Module):
    """A binary model that returns one number s for each input, (B,) or (B, 1), with two: [0, s].

    probability: s is the probability of class 1, and the two are [1 - s, s].
    """

    def __init__(self, model: Model, probability: bool = False) -> None:
        super().__init__()
        self.model, self.probability = model, probability
        self.training = getattr(model, "training", False)

    def forward(self, x: Any) -> Tensor:
        s = self.model(x).flatten()
        return torch.stack([1 - s if self.probability else torch.zeros_like(s), s], 1)


def are_probabilities(out: Tensor) -> bool:
    """Rows that are not negative and sum to 1; equal rows of a batch say nothing (a constant model)."""
    told = len(out) == 1 or bool((out != out[0]).any())
    return told and bool((out >= 0).all()) and bool(((out.sum(1) - 1).abs() < 1e-3).all())


def is_probability(one: Tensor) -> bool:
    """Numbers (B,) in [0, 1] on both sides of a half: no logits, which would all be of one class there."""
    return bool(((one >= 0) & (one <= 1)).all()) and bool((one < 0.5).any()) and bool((one > 0.5).any())
