"""The examples in the docstrings run."""

from __future__ import annotations

import doctest
import importlib
from pathlib import Path

import pytest
import torch
from torch import nn

import sparring

SOURCE = Path(sparring.__file__).parent
OPTIONAL = {"pyarrow", "PIL", "huggingface_hub"}


def module_names() -> list[str]:
    paths = (p.relative_to(SOURCE.parent).with_suffix("") for p in SOURCE.rglob("*.py"))
    return sorted(".".join(p.parts).removesuffix(".__init__") for p in paths if p.name != "__main__")


@pytest.mark.parametrize("name", module_names())
def test_examples(name: str) -> None:
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as missing:
        if missing.name and missing.name.split(".")[0] in OPTIONAL:
            pytest.skip(f"{missing.name} is not installed")
        raise
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        result = doctest.testmod(module, extraglobs={"torch": torch, "nn": nn}, optionflags=doctest.ELLIPSIS)
    assert result.failed == 0, f"{result.failed} of {result.attempted} examples in {name}; see the output above"
