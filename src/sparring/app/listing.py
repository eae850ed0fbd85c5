"""What there is, from the registries: the tables of `sparring list`."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from importlib import import_module
from typing import Any

from sparring.app.settings import TrainingSettings, about
from sparring.attacks.plans import ATTACKS, PLANS
from sparring.core.registry import Builder, Option, options_of, text_of
from sparring.modalities import MODALITIES, find, known_data
from sparring.threats import THREATS
from sparring.training.recipes import RECIPES


def tables() -> dict[str, dict[str, str]]:
    """Title -> name -> a line with the options."""
    kinds = {name: find(name) for name in MODALITIES}

    def all_of(what: str) -> dict[str, Builder]:
        return {name: builder for kind in kinds.values() for name, builder in getattr(kind, what).items()}

    hidden = ("threat", "data", "model", "shape", "num_classes")
    training = {name: about(TrainingSettings, name) for name in TrainingSettings.model_fields if name != "augment"}
    for kind in kinds.values():
        if kind.augment:
            options = options_of(kind.augment, ())
            training |= {name: f"{_option(name, option)}, of {kind.name}" for name, option in options.items()}
    return {
        "attacks": _lines({**ATTACKS, **all_of("attacks")}, hidden) | _lines({**PLANS, **all_of("plans")}, None),
        "recipes": _lines({**RECIPES, **all_of("recipes")}, hidden),
        "models": _lines(all_of("models"), hidden),
        "threats": _lines({**THREATS, **all_of("threats")}, hidden),
        "data": known_data(),
        "modalities": {name: (import_module(MODALITIES[name]).__doc__ or "").splitlines()[0] for name in kinds},
        "settings": training,
    }  # fmt: skip


def _lines(builders: Mapping[str, Builder], given: tuple[str, ...] | None) -> dict[str, str]:
    """Name (with its VALUE) -> the first line of the docstring, and the options."""
    found = {}
    for name, builder in builders.items():
        line = (inspect.getdoc(builder) or "").partition("\n")[0]
        options = {} if given is None else options_of(builder, given)
        value = next((f":{key.upper()}" for key, o in options.items() if o.positional and o.default is o_empty), "")
        told = ", ".join(_option(key, option) for key, option in options.items())
        found[name + value] = f"{line} Options: {told}." if told else line
    return found


o_empty = inspect.Parameter.empty


def _option(name: str, option: Option) -> str:
    """name=default, and the choices where there are some."""
    default: Any = option.default
    choices = f" ({', '.join(option.choices)})" if option.choices else ""
    if default is o_empty:
        return f"{name}{choices}"
    named = next((key for key, value in option.choices.items() if value is default), None)
    return f"{name}={named or text_of(default)}{choices}"
