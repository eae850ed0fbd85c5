"""What attacks, recipes and evaluations refuse in the same words: inputs, labels and outputs that would mean nothing.

Shapes: B examples, K classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from sparring.core.batches import LABELS, pair_in
from sparring.core.types import Inputs, logits_of, size
from sparring.threats.base import ThreatModel


class PreflightError(ValueError):
    """The model or the data cannot be attacked in a way that would mean anything."""


def check_kind(x: Any) -> None:
    """Raises PreflightError for what is no batch."""
    if not isinstance(x, (Tensor, Mapping)):
        hint = ": torch.as_tensor(x)" if hasattr(x, "__array__") else ""
        raise PreflightError(f"inputs are a {type(x).__name__}; expected a tensor (B, *X), or named tensors{hint}")
    if isinstance(x, Tensor) and x.layout != torch.strided:
        raise PreflightError(f"inputs are {x.layout}; expected a dense tensor (B, *X): x.to_dense()")
    if isinstance(x, Tensor) and x.ndim < 2:
        raise PreflightError(f"inputs are {tuple(x.shape)}; expected a batch (B, *X): x[None] makes one of one example")


def check_inputs(x: Inputs, threat: ThreatModel) -> None:
    """Raises PreflightError for inputs that cannot be attacked under the threat, in its words."""
    check_kind(x)
    if complaints := threat.complaints(x):
        raise PreflightError(complaints[0])


def check_labels(y: Any, num: int, num_classes: int | None = None, *, values: bool = True) -> None:
    """Raises PreflightError for what are no class numbers of `num` examples.

    num_classes: where that is known. values: whether to look at the numbers, too, which waits for a GPU.
    """
    upto = "K - 1" if num_classes is None else str(num_classes - 1)
    expected = f"expected class numbers (B,) = ({num},), int64, from 0 to {upto}"
    if not isinstance(y, Tensor):
        raise PreflightError(f"labels are a {type(y).__name__}; {expected}, in a tensor: torch.as_tensor(y)")
    got = f"labels are {y.dtype} {tuple(y.shape)}; {expected}"
    if y.ndim == 2 and y.shape[1] > 1:
        one_hot = bool(((y == 0) | (y == 1)).all()) and bool((y.sum(1) == 1).all())
        raise PreflightError(got + (": y.argmax(1)" if one_hot else ". Multi-label and soft targets are out of scope"))
    if y.ndim != 1 or len(y) != num:
        raise PreflightError(got + (": y.squeeze(1)" if y.shape == (num, 1) else ""))
    if y.dtype != torch.int64:
        whole = not y.is_floating_point() or bool((y == y.floor()).all())
        raise PreflightError(got + (": y.long()" if whole else ". Regression targets are out of scope"))
    low, high = (int(y.min()), int(y.max())) if num and values else (0, 0)
    if low < 0 or (num_classes is not None and high >= num_classes):
        hint = ". They seem to count from 1: give y - 1" if low >= 1 and high == num_classes else ""
        hint = ". Negative labels, such as -100 for what is to be left out, are no classes" if low < 0 else hint
        classes = "" if num_classes is None else f", but the model has {num_classes} classes"
        raise PreflightError(f"labels go from {low} to {high}{classes}; {expected}{hint}")


def check_target(y: Any, num: int, num_classes: int | None = None) -> None:
    """`check_labels`, where labels may also be probabilities (B, K): of a float type, none negative, each row of 1."""
    if not isinstance(y, Tensor) or y.ndim != 2 or not y.is_floating_point():
        check_labels(y, num, num_classes)
        return
    fits = len(y) == num and y.shape[1] == (num_classes or y.shape[1])
    if not fits or bool((y < 0).any()) or bool(((y.sum(1) - 1).abs() > 1e-3).any()):
        raise PreflightError(
            f"soft labels are {y.dtype} {tuple(y.shape)}; expected probabilities (B, K) = ({num}, "
            f"{num_classes or 'K'}), none below 0, each row with the sum 1: take the softmax of logits"
        )


def check_output(out: Any, num: int) -> Tensor:
    """The logits (B, K) of what a model returned for `num` inputs, or one number for each, (B,).

    Raises PreflightError for anything else, and where they are not finite.
    """
    try:
        out = logits_of(out)
    except TypeError as error:
        raise PreflightError(str(error)) from None
    shape = tuple(out.shape)
    if out.ndim > 2:
        raise PreflightError(
            f"the model returns {shape}, expected logits (B, K) = ({num}, K). Segmentation and detection are out of "
            "scope: one label for each input is what an attack takes away"
        )
    one_number = shape in ((num,), (num, 1)) and out.is_floating_point()
    out = out.reshape(num, 1) if one_number else out
    if out.ndim != 2 or len(out) != num or not out.is_floating_point():
        raise PreflightError(
            f"the model returns {out.dtype} {shape} for {num} inputs, expected float logits (B, K) = ({num}, K): one "
            "row for each input, before any argmax"
        )
    if not bool(out.isfinite().all()):
        bad = int((~out.isfinite()).any(1).sum())
        raise PreflightError(
            f"the model returns NaN or infinite logits for {bad} of {num} inputs; nothing can be judged"
        )
    return out[:, 0] if one_number else out


def is_probability(one: Tensor) -> bool:
    """Numbers (B,) in [0, 1] on both sides of a half: no logits, which would all be of one class there."""
    return bool(((one >= 0) & (one <= 1)).all()) and bool((one < 0.5).any()) and bool((one > 0.5).any())


def check_one_logit(out: Any) -> None:
    """Raises PreflightError where a model returns one number for each input, and that is a probability."""
    one = logits_of(out)
    if (one.ndim == 1 or one.shape[1:] == (1,)) and is_probability(one.detach().flatten()):
        raise PreflightError(
            "the model returns one number in [0, 1] for each input, a probability; expected the logit: leave out its "
            "sigmoid, or let `preflight` make two logits of it"
        )


def pair_of(batch: Any) -> tuple[Inputs, Tensor]:
    """Inputs and labels of a batch: a pair (x, y), or named parts with one label and one input (`pair_in`).

    Raises PreflightError for anything else.
    """
    pair = pair_in(batch)
    if pair is None:
        got = f"a {type(batch).__name__}"
        if isinstance(batch, tuple | list | Mapping):
            names = map(str, batch) if isinstance(batch, Mapping) else (type(part).__name__ for part in batch)
            got += f" of {len(batch)} parts: {', '.join(names)}"
        hint = "take two of them, ((b[0], b[1]) for b in batches), or let the loader's collate_fn do it"
        if isinstance(batch, Mapping):
            label = next((key for key in batch if str(key).lower() in LABELS), "LABEL")
            named = ", ".join(f"{key!r}: b[{key!r}]" for key in batch if key != label)
            hint = f"say which is what, (({{{named}}}, b[{label!r}]) for b in batches), or one input b[NAME] alone"
        raise PreflightError(
            "batches must be (x, y) pairs of inputs and labels; got "
            f"{got}: {'[(x, y)] is one batch' if isinstance(batch, Tensor) else hint}"
        )
    check_kind(pair[0])
    if not isinstance(pair[1], Tensor) or pair[1].ndim == 0:
        check_labels(pair[1], size(pair[0]))
    return pair
