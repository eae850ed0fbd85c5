"""Fitted models of scikit-learn as networks, so that gradients reach their inputs: no search needs to guess."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sparring.core.layers import Normalize
from sparring.core.model_state import class_logits

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "identity": nn.Identity, "logistic": nn.Sigmoid, "tanh": nn.Tanh, "relu": nn.ReLU
}  # fmt: skip


def network_from(fitted: Any) -> nn.Sequential:
    """The network that computes what a fitted classifier or pipeline computes: rows (B, D) -> logits (B, K), float64.

    Its softmax is `predict_proba`, its argmax the row of `predict` in `classes_`. StandardScaler, MinMaxScaler (without
    clip), LogisticRegression and MLPClassifier are known; TypeError for others, which `BlackBox` takes as they are,
    ValueError for what is not fitted. Inputs are in the units of the pipeline's own, and so are radii.

    >>> from sklearn.linear_model import LogisticRegression
    >>> rows, labels = np.eye(4), [0, 1, 1, 0]
    >>> network_from(LogisticRegression().fit(rows, labels))(torch.eye(4).double()).argmax(1)
    tensor([0, 1, 1, 0])
    """
    steps = [step for _, step in fitted.steps] if hasattr(fitted, "steps") else [fitted]
    layers: list[nn.Module] = []
    for step in steps:
        if step in (None, "passthrough"):
            continue
        name = type(step).__name__
        if name not in _KNOWN:
            raise TypeError(
                f"{name} has no network; there are {', '.join(_KNOWN)}. As a black box any model goes: "
                "BlackBox(model.predict_proba), which searches without gradients attack"
            )
        try:
            layers += _KNOWN[name](step)
        except AttributeError as error:
            raise ValueError(f"{name} is not fitted yet ({error}): call fit first") from None
    if not isinstance(layers[-1] if layers else None, TwoOfOne | nn.Linear):
        raise TypeError(f"the last step is a {type(steps[-1]).__name__}; expected a classifier, which gives logits")
    return nn.Sequential(*layers).double().eval()


class TwoOfOne(nn.Module):
    """The logit s (B, 1) of the second of two classes -> [0, s] (B, 2)."""

    def forward(self, s: Tensor) -> Tensor:
        return class_logits(s)


def _linear(weights: Any, bias: Any) -> nn.Linear:
    """weights (out, in)."""
    weight, added = (torch.as_tensor(np.asarray(part), dtype=torch.float64) for part in (weights, bias))
    layer = nn.Linear(weight.shape[1], weight.shape[0], dtype=torch.float64)
    layer.load_state_dict({"weight": weight, "bias": added})
    return layer


def _normalize(mean: Any, std: Any) -> Normalize:
    layer = Normalize(0.0, 1.0)
    layer.mean, layer.std = (torch.as_tensor(np.asarray(part), dtype=torch.float64) for part in (mean, std))
    return layer


def _standard_scaler(step: Any) -> list[nn.Module]:
    num = step.n_features_in_
    mean = step.mean_ if step.with_mean else np.zeros(num)
    return [_normalize(mean, step.scale_ if step.with_std else np.ones(num))]


def _min_max_scaler(step: Any) -> list[nn.Module]:
    if step.clip:
        raise TypeError("MinMaxScaler(clip=True) has no gradient where it clips; take clip=False, and a box")
    return [_normalize(-step.min_ / step.scale_, 1 / step.scale_)]  # x * scale_ + min_


def _logistic_regression(step: Any) -> list[nn.Module]:
    layer = _linear(step.coef_, step.intercept_)
    return [layer, TwoOfOne()] if len(step.classes_) == 2 else [layer]


def _mlp(step: Any) -> list[nn.Module]:
    weights = list(zip(step.coefs_, step.intercepts_, strict=True))
    layers: list[nn.Module] = []
    for number, (weight, bias) in enumerate(weights):
        layers.append(_linear(weight.T, bias))
        if number + 1 < len(weights):
            layers.append(ACTIVATIONS[step.activation]())
    if step.out_activation_ == "logistic" and weights[-1][1].shape[0] > 1:
        raise TypeError("an MLPClassifier of several labels at once: single-label classification is the scope")
    return [*layers, TwoOfOne()] if step.out_activation_ == "logistic" else layers


_KNOWN: dict[str, Callable[[Any], list[nn.Module]]] = {
    "StandardScaler": _standard_scaler, "MinMaxScaler": _min_max_scaler,
    "LogisticRegression": _logistic_regression, "MLPClassifier": _mlp,
}  # fmt: skip
