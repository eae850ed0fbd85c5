"""What there is, from the registries: the tables of `sparring list`."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from importlib import import_module

from sparring.app.settings import TrainingSettings, about
from sparring.attacks.plans import ATTACKS, PLANS
from sparring.core.registry import Builder, Option, options_of, text_of
from sparring.modalities import MODALITIES, find, known_data
from sparring.threats import THREATS
from sparring.training.named import RECIPES

GIVEN = ("threat", "data", "model", "shape", "num_classes")
"""What builders are handed, and no text says."""


def tables() -> dict[str, dict[str, str]]:
    """Title -> name -> a line with the options."""
    kinds = {name: find(name) for name in MODALITIES}

    def all_of(what: str) -> dict[str, Builder]:
        return {name: builder for kind in kinds.values() for name, builder in getattr(kind, what).items()}

    training = {name: about(TrainingSettings, name) for name in TrainingSettings.model_fields if name != "augment"}
    for kind in kinds.values():
        for name, option in kind.augment_options.items():
            training[name] = f"{training[name]} and {kind.name}" if name in training else (
                f"{_option(name, option)}, of {kind.name}"
            )  # fmt: skip
    return {
        "attacks": _lines({**ATTACKS, **all_of("attacks"), **PLANS, **all_of("plans")}),
        "recipes": _lines({**RECIPES, **all_of("recipes")}),
        "models": _lines(all_of("models"), facts=True),
        "threats": _lines({**THREATS, **all_of("threats")}),
        "data": known_data(),
        "modalities": {name: (import_module(MODALITIES[name]).__doc__ or "").splitlines()[0] for name in kinds},
        "settings": training,
    }  # fmt: skip


def _lines(builders: Mapping[str, Builder], facts: bool = False) -> dict[str, str]:
    """Name (with its VALUE) -> the first line of the docstring, and the options. facts: the data hand over what has no
    default."""
    found = {}
    for name, builder in builders.items():
        line = (inspect.getdoc(builder) or "").partition("\n")[0]
        options = options_of(builder, GIVEN)
        options = {k: o for k, o in options.items() if not facts or o.default is not inspect.Parameter.empty}
        needed = [key.upper() for key, o in options.items() if o.positional and o.default is inspect.Parameter.empty]
        told = ", ".join(_option(key, option) for key, option in options.items())
        found[":".join([name, *needed])] = f"{line} Options: {told}." if told else line
    return found


def _option(name: str, option: Option) -> str:
    """name=default, and the choices where there are some."""
    choices = f" ({', '.join(option.choices)})" if option.choices else ""
    if option.default is inspect.Parameter.empty:
        return f"{name}{choices}"
    named = next((key for key, value in option.choices.items() if value is option.default), None)
    return f"{name}={named or text_of(option.default)}{choices}"
