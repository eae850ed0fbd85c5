"""Records and functions as data that a results file can hold, and as keys that tell whether two are the same."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import math
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from sparring.core.registry import name_of


def describe(value: Any, *, exact: bool = False) -> Any:
    """A record as JSON-ready data: type name and fields, tensors by shape and range, functions by name.

    exact: tensors by their SHA-256, and functions with that of their code and of what they close over.
    """
    inner = functools.partial(describe, exact=exact)
    if isinstance(value, Tensor):
        if exact:
            return {"shape": list(value.shape), "sha256": digest(value)}
        return {"shape": list(value.shape), "min": inner(value.min().item()), "max": inner(value.max().item())}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: inner(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return {"type": type(value).__name__, **fields}
    if isinstance(value, functools.partial):
        given: dict[Any, Any] = {**dict(enumerate(value.args)), **value.keywords}
        return {"type": inner(value.func), **{str(name): inner(held) for name, held in given.items()}}
    if isinstance(value, FunctionType) and exact:
        return {"name": value.__name__, "sha256": _digest_of_function(value)}
    if isinstance(value, Mapping):
        return {str(name): inner(held) for name, held in value.items()}
    if isinstance(value, (list, tuple)):
        return [inner(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    return getattr(value, "__name__", type(value).__name__)


def digest(*values: Any) -> str:
    """SHA-256 (hex) of tensors, named tensors and texts: kinds, shapes and bits, on whatever device.

    >>> digest(torch.zeros(2)) == digest(torch.zeros(2, 1))
    False
    """
    state = hashlib.sha256()
    for value in values:
        if isinstance(value, Mapping):
            value = "|".join(f"{name} {digest(tensor)}" for name, tensor in value.items())
        if isinstance(value, Tensor):
            state.update(f"{value.dtype} {tuple(value.shape)}\n".encode())
            state.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        else:
            state.update(f"{value}\n".encode())
    return state.hexdigest()


def _digest_of_function(function: FunctionType, depth: int = 4) -> str:
    """SHA-256 of what a function does as far as it can be seen: its code, defaults, and plain values it closes over."""
    held = []
    for cell in function.__closure__ or ():
        with suppress(ValueError):  # an empty cell
            value = cell.cell_contents
            if isinstance(value, FunctionType) and depth:
                held.append(_digest_of_function(value, depth - 1))
            elif value is None or isinstance(value, (bool, int, float, str, Tensor)) or dataclasses.is_dataclass(value):
                held.append(str(describe(value, exact=True)))
    return digest(_digest_of_code(function.__code__), str(describe(function.__defaults__, exact=True)), *held)


def _digest_of_code(code: CodeType) -> str:
    consts = [_digest_of_code(c) if isinstance(c, CodeType) else repr(c) for c in code.co_consts]
    return digest(code.co_code.hex(), " ".join(code.co_names), *consts)


def digest_of_model(model: Any) -> str:
    """SHA-256 of a network's weights, buffers and printed form; what is no Module is known by its name alone."""
    if not isinstance(model, nn.Module):
        return f"no Module: {name_of(model)}"
    tensors = {name: value for name, value in model.state_dict().items() if isinstance(value, Tensor)}
    inner = getattr(model, "model", None)  # of a wrapper, which may be no Module itself
    return digest(str(model), tensors, *([name_of(inner)] if inner and not isinstance(inner, nn.Module) else []))


@functools.cache
def digest_of_package() -> str:
    """SHA-256 of Sparring's own source: the same version number may stand for other code in a checkout."""
    files = sorted(Path(__file__).parents[1].rglob("*.py"))
    return digest(*(file.read_text(encoding="utf-8") for file in files))
