"""More training examples from a file: other people's, or generated ones, with labels of any certainty."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from sparring.core.unpacking import read_npz
from sparring.modalities.base import Dataset
from sparring.threats.inputs import check_inputs


class Extra(NamedTuple):
    """x (N, *X) as stored, y int64 (N,) or probabilities float32 (N, K), and what the file says of its origin."""

    x: Tensor
    y: Tensor
    provenance: Any


def read_extra(path: Path, data: Dataset, threat: Any, *, unlabelled: bool = False) -> Extra:
    """The examples of an .npz that go with a data set: `x` of its shape, `y` its class numbers or probabilities (N, K).

    x: uint8 or floats, in the form of the data (N, C, H, W); images also (N, H, W) and (N, H, W, C). `provenance`, a
    string of JSON, is handed on. `unlabelled` takes a file without y: labels of -1. Raises FileNotFoundError, and
    ValueError for what does not fit, labels above all.
    """
    arrays, provenance = read_examples(path)
    if "y" not in arrays and not unlabelled:
        raise ValueError(
            f"{path} has no labels: expected y beside x, class numbers (N,) or probabilities (N, {data.num_classes}). "
            "Let a network that you trust label it, and keep its probabilities; or learn without, by the recipe vat"
        )
    if not isinstance(data.x_train, Tensor):
        raise ValueError(f"extra examples go with inputs of one tensor; those of {data.name} have names")
    x = _inputs(arrays["x"], data, path)
    y = _labels(arrays["y"], data.num_classes, path) if "y" in arrays else torch.full((len(x),), -1)
    if len(x) != len(y) or not len(y):
        raise ValueError(f"{path}: x has {len(x)} examples and y {len(y)} labels; expected one each, and some")
    for rows in torch.arange(len(y)).split(1000):
        check_inputs(data.prepare(x[rows]) if data.prepare else x[rows], threat)
    return Extra(x, y, provenance)


def read_examples(path: Path) -> tuple[dict[str, np.ndarray], Any]:
    """The arrays x and, where it is there, y of an .npz; and what its `provenance` tells, JSON or a text, or None.

    Raises FileNotFoundError, and ValueError for what is no such file.
    """
    if not path.is_file():
        raise FileNotFoundError(f"examples: there is no file {path}")
    try:
        arrays = read_npz(path)
    except ValueError as error:
        raise ValueError(f"{path}: cannot be read as .npz of plain arrays ({error})") from error
    if "x" not in arrays:
        raise ValueError(f"{path}: expected examples x, found {', '.join(arrays) or 'nothing'}")
    told = arrays.get("provenance")
    return {key: arrays[key] for key in ("x", "y") if key in arrays}, None if told is None else _json(str(told))


def channels_first(x: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Images (N, H, W) or (N, H, W, C) as (N, C, H, W), where each becomes of this shape so; others as they are."""
    if x.ndim == len(shape) and shape[0] == 1:
        return x[:, None]
    if x.ndim == 4 and (x.shape[3], *x.shape[1:3]) == shape != x.shape[1:]:
        return x.transpose(0, 3, 1, 2)
    return x


def _inputs(x: np.ndarray, data: Dataset, path: Path) -> Tensor:
    shape = tuple(data.shape)
    x = channels_first(x, shape)
    if x.shape[1:] != shape or not (x.dtype == np.uint8 or x.dtype.kind == "f"):
        raise ValueError(
            f"{path}: x is {x.dtype} and one of it {tuple(x.shape[1:])}; those of {data.name} are {shape}, in uint8 or "
            "floats"
        )
    if x.dtype == np.uint8 and data.prepare is None:
        raise ValueError(f"{path}: x is uint8; {data.name} has floats, which nothing makes of bytes: give x as floats")
    return torch.from_numpy(np.ascontiguousarray(x if x.dtype == np.uint8 else x.astype(np.float32)))


def _labels(y: np.ndarray, num_classes: int, path: Path) -> Tensor:
    if y.ndim == 1 and y.dtype.kind in "iu" and (not len(y) or 0 <= y.min() <= y.max() < num_classes):
        return torch.from_numpy(y.astype(np.int64))
    soft = y.ndim == 2 and y.shape[1] == num_classes and y.dtype.kind == "f"
    if soft and np.isfinite(y).all() and (y >= 0).all() and (np.abs(y.sum(1) - 1) < 1e-3).all():
        return torch.from_numpy(y.astype(np.float32))
    held = f" from {y.min()} to {y.max()}" if y.size and y.dtype.kind in "iuf" else ""
    raise ValueError(
        f"{path}: y is {y.dtype} {y.shape}{held}; expected class numbers (N,) from 0 to {num_classes - 1}, or rows of "
        f"{num_classes} probabilities with the sum 1"
    )


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text
