"""Certified margins of the pooled networks: what no replacement of words can fall below.

Shapes: B texts, L units, K substitutes, U different words of a batch, H features, C classes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from sparring.certify import gaps_from_box, rules
from sparring.core.model_state import attack_mode
from sparring.modalities.text.models import PooledNet
from sparring.modalities.text.threats import Substitutions

Box = tuple[Tensor, Tensor]


def find_words_bound(model: Any, threat: Any) -> tuple[Callable[..., Tensor] | None, str]:
    """`words_margin` and "" where it can bound this model under this threat, else None and why it cannot."""
    if not isinstance(threat, Substitutions):
        return None, "interval bounds of texts know words that are replaced, not vectors that move"
    if type(model) is not PooledNet:
        return None, f"interval bounds of texts know bag and cnn-text; this is a {type(model).__name__}"
    unknown = rules.supported(model.head)
    return (None, f"interval bounds have no rule for {unknown}") if unknown else (words_margin, "")


def words_margin(model: Any, x: Any, y: Tensor, threat: Substitutions, *, noise: Any = None) -> Tensor:
    """(B,) a lower bound of logit_y minus the largest other logit over all permitted texts; above 0 is certified.

    It covers every combination of substitutes, whatever share of the words may change, and the rounding of the model.
    `noise` is left aside. Raises ValueError for a model that is no `PooledNet`.

    Source: Jia 2019, "Certified robustness to adversarial word substitutions", section 3: the smallest and largest
    feature over the substitutes after the layer on each word, then interval bounds (Gowal 2018).
    """
    with attack_mode(model), torch.no_grad():
        return words_gaps(model, x, y, threat).scatter(1, y[:, None], math.inf).amin(1)


def words_gaps(model: Any, x: Any, y: Tensor, threat: Substitutions, reach: float = 1.0) -> Tensor:
    """(B, C) a lower bound of logit_y - logit_c; 0 at c = y. Differentiable in the weights, for training.

    reach: how far the box goes from each word towards the corners of its substitutes, 0 to 1.
    """
    if type(model) is not PooledNet:
        raise ValueError(f"interval bounds of texts know bag and cnn-text; got a {type(model).__name__}")
    there = x["mask"][..., None].to(model.words.weight)
    low, high = (corner.relu() * there for corner in _words_box(model, x, threat, reach))
    if model.along is not None:
        ends = rules.propagate(model.along, low.transpose(1, 2), high.transpose(1, 2))
        low, high = (end.transpose(1, 2).relu() * there for end in ends)
    num = there.sum(1)
    size = rules.largest(low, high).sum(1) / num
    return gaps_from_box(model.head, *rules.outward(low.sum(1) / num, high.sum(1) / num, size, low.shape[1] + 1), y)


def _words_box(model: PooledNet, x: Any, threat: Substitutions, reach: float) -> Box:
    """(B, L, H) corners after the layer on each word; every different word of the batch is computed once."""
    ids, place = x["ids"].unique(return_inverse=True)
    choices = threat.choices({"ids": ids[None], "mask": torch.ones_like(ids, dtype=torch.bool)[None]})[0]
    vectors, layer = model.look_up(choices), model.each
    features = layer(vectors)  # (U, 1 + K, H)
    slack = rules.product_rounding(layer.weight) * nn.functional.linear(vectors.abs(), *rules.absolute(layer))
    own, (low, high) = features[:, :1], ((features - slack).amin(1, True), (features + slack).amax(1, True))
    if reach < 1:
        low, high = own + reach * (low - own), own + reach * (high - own)
    return low[:, 0][place], high[:, 0][place]
