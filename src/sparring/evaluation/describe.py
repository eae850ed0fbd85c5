"""Records and functions as data that a results file can hold."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

from torch import Tensor


def describe(value: Any) -> Any:
    """A record as JSON-ready data: type name and fields, tensors by shape and range."""
    if isinstance(value, Tensor):
        return {"shape": list(value.shape), "min": describe(value.min().item()), "max": describe(value.max().item())}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: describe(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return {"type": type(value).__name__, **fields}
    if isinstance(value, (list, tuple)):
        return [describe(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    return getattr(value, "__name__", type(value).__name__)


def name_of(make: Any) -> str:
    """What reports call an attack: its text form, the function's name, a partial with its options."""
    if isinstance(make, functools.partial):
        options = ",".join(f"{key}={value}" for key, value in make.keywords.items())
        return f"{name_of(make.func)}:{options}" if options else name_of(make.func)
    if dataclasses.is_dataclass(make):
        return str(make)
    return getattr(make, "__name__", type(make).__name__)
