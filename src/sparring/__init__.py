"""Sparring: adversarial training that makes a network robust, measures it so that the number holds, and shows it.

The public names are those of `__init__.pyi`. Each is imported when it is first used, so that what needs no PyTorch (the
gate, `--help`) does not wait for it.
"""

import ast
import importlib
from pathlib import Path
from typing import Any

__version__ = "0.1.0"

_WHERE = {
    alias.asname or alias.name: (node.module or "", alias.name)
    for node in ast.parse(Path(__file__).with_suffix(".pyi").read_text(encoding="utf-8")).body
    if isinstance(node, ast.ImportFrom)
    for alias in node.names
}
__all__ = sorted(_WHERE)


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'sparring' has no attribute {name!r}")
    module, there = _WHERE[name]
    value = globals()[name] = getattr(importlib.import_module(module), there)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_WHERE})
