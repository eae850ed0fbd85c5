"""A training run as one frozen record: its settings, their defaults, and its text forms."""

from __future__ import annotations

import dataclasses
import inspect
import json
import math
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sparring.core.files import read_json
from sparring.threats import make_threat
from sparring.training.recipes import RECIPES, Recipe
from sparring.training.schedules import SCHEDULES


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """Everything that decides a training run. None means: a default for the data at hand (see `DEFAULTS`).

    held_out: how many training examples choose the best epoch (at most a tenth of them). radius_ramp: the share of the
    run in which the radius grows from 0. averaging: decay of a weight average. recipe_options: see the recipe.
    """

    data: str = "digits"
    threat: str = "linf:0.2"
    model: str | None = None
    weights: str | None = None
    recipe: str = "pgd-at"
    recipe_options: dict[str, Any] = field(default_factory=dict)
    epochs: int | None = None
    batch_size: int | None = None
    optimizer: str | None = None
    learning_rate: float | None = None
    weight_decay: float | None = None
    schedule: str | None = None
    radius_ramp: float | None = None
    averaging: float | None = None
    crop: int | None = None
    flip: bool | None = None
    held_out: int = 1000
    seed: int = 0
    device: str = "auto"

    def __post_init__(self) -> None:
        if not math.isfinite(make_threat(self.threat).radius):
            raise ValueError(f"threat {self.threat!r}: training needs a finite radius, not an infinite one")
        _one_of("recipe", self.recipe, RECIPES)
        _one_of("optimizer", self.optimizer, (None, "adamw", "sgd"))
        _one_of("schedule", self.schedule, (None, *SCHEDULES))
        _one_of("device", self.device, ("auto", "cpu", "cuda", "mps"))
        for name, low, high in (
            ("epochs", 1, 1e6), ("batch_size", 1, 1e9), ("learning_rate", 1e-12, 1e3), ("weight_decay", 0, 1e3),
            ("radius_ramp", 0, 1), ("averaging", 0, 0.999999), ("crop", 0, 1e3), ("held_out", 1, 1e9),
            ("seed", 0, 2**31),
        ):  # fmt: skip
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                raise ValueError(f"{name} must be between {low:g} and {high:g}; got {value}")
        self.build_recipe()

    def build_recipe(self) -> Recipe:
        """The recipe with its options; raises ValueError for options it does not take."""
        allowed = recipe_options(self.recipe)
        for name in self.recipe_options:
            if name not in allowed:
                raise ValueError(f"recipe {self.recipe!r} has no option {name!r}; it takes {', '.join(allowed)}")
            _typed(name, self.recipe_options[name], allowed[name])
        return RECIPES[self.recipe](make_threat(self.threat), **self.recipe_options)

    def completed(self, preset: Mapping[str, Any]) -> Experiment:
        """The record with every None replaced by what suits the data, or else by the general default."""
        values = {**DEFAULTS, **preset}
        return dataclasses.replace(self, **{k: v for k, v in values.items() if getattr(self, k) is None})


DEFAULTS: dict[str, Any] = {
    "epochs": 50, "batch_size": 128, "optimizer": "adamw", "learning_rate": 2e-3, "weight_decay": 1e-4,
    "schedule": "one-cycle", "radius_ramp": 0.3, "crop": 0, "flip": False,
}  # fmt: skip
"""Training settings where the data has no other. A radius that grows from 0 gets MNIST at 0.3 off its plateau."""


def recipe_options(name: str) -> dict[str, str]:
    """The options that a recipe takes, beside the threat, with the names of their types."""
    own = inspect.signature(RECIPES[name]).parameters.values()
    kinds = {p.name: str(p.annotation) for p in own if p.kind is p.KEYWORD_ONLY}
    return {key: "str" if kind in ("CraftMode", "TrainOn") else kind for key, kind in kinds.items()}


def read_settings(
    path: Path | None, pairs: tuple[str, ...], flags: Mapping[str, Any], recipe: str = "pgd-at"
) -> dict[str, Any]:
    """Settings from a file (TOML or JSON), then KEY=VALUE pairs, then flags that are not None; later ones win.

    Keys are fields of `Experiment`, or options of the recipe. Raises ValueError for anything else.
    """
    found: dict[str, Any] = {}
    if path:
        found |= _from_file(path)
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if not equals:
            raise ValueError(f"--set takes KEY=VALUE; got {pair!r}, write for example --set learning_rate=0.01")
        found[key.strip().replace("-", "_")] = _value(text.strip())
    found |= {key: value for key, value in flags.items() if value is not None}
    return settle(found, recipe)


def settle(found: Mapping[str, Any], recipe: str = "pgd-at") -> dict[str, Any]:
    """Arguments for `Experiment` from flat settings: options of the recipe go to their place, types are checked."""
    kinds = {f.name: str(f.type) for f in dataclasses.fields(Experiment)}
    options = dict(found.get("recipe_options", {}))
    settings: dict[str, Any] = {}
    _one_of("recipe", found.get("recipe", recipe), RECIPES)
    allowed = recipe_options(found.get("recipe", recipe))
    for key, value in found.items():
        if key in kinds:
            settings[key] = _typed(key, value, kinds[key])
        elif key in allowed:
            options[key] = value
        else:
            known = ", ".join(sorted({*kinds, *allowed} - {"recipe_options"}))
            raise ValueError(f"setting {key!r} is unknown; there are {known}")
    return settings | {"recipe_options": options}


def _from_file(path: Path) -> dict[str, Any]:
    if path.suffix == ".json":
        found = read_json(path, "settings")
    else:
        try:
            found = tomllib.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise ValueError(f"the settings file {path} is not there") from None
        except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
            raise ValueError(f"{path} is not valid TOML ({error}); name it .json if it is JSON") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path} should hold settings by name, like epochs = 10; got a {type(found).__name__}")
    return found


def _typed(key: str, value: Any, kind: str) -> Any:
    """The value when it fits the field's declared type; whole numbers pass as floats."""
    if value is None and "None" in kind:
        return None
    if isinstance(value, int) and not isinstance(value, bool) and "float" in kind:
        return float(value)
    fits = {"str": str, "int": int, "float": float, "bool": bool, "dict[str, Any]": dict}[kind.removesuffix(" | None")]
    if not isinstance(value, fits) or (isinstance(value, bool) and fits is not bool):
        raise ValueError(f"setting {key} must be of type {kind}; got {value!r}")
    return value


def _value(text: str) -> Any:
    """Numbers, true, false and null as JSON has them; anything else is text."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def _one_of(name: str, value: Any, allowed: Any) -> None:
    if value not in allowed:
        raise ValueError(
            f"{name} {value!r} is unknown; there are {', '.join(str(v) for v in allowed if v is not None)}"
        )
