"""The rows of a batch that an attack still works on, and those that are done."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from sparring.core.types import take


def take_all(value: Any, index: Tensor) -> Any:
    """`take`, through tuples, too; a number of no example stays."""
    if isinstance(value, tuple):
        parts = [take_all(part, index) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
    return value if isinstance(value, Tensor) and value.ndim == 0 else take(value, index)


def put_rows(done: Any, rows: Tensor, part: Any) -> Any:
    """`done`, tuples of tensors (N, *X), with `part` (len(rows), *X) in these rows; `part` itself where it is None."""
    if done is None or part is None:
        return part
    if isinstance(done, tuple):
        parts = [put_rows(old, rows, new) for old, new in zip(done, part, strict=True)]
        return type(done)(*parts) if hasattr(done, "_fields") else tuple(parts)
    return done.index_copy(0, rows, part)
