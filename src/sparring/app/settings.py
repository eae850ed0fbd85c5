"""The settings of a training run and of an evaluation: one definition each.

The command line's options, their help, checks and errors, files of settings and `sparring list settings` come from it.
No PyTorch here.
"""

from __future__ import annotations

import functools
import inspect
import json
import tomllib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import typer
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from sparring.core.files import read_json

DATA = "[KIND:]PATH,KEY=VALUE...: a name from 'sparring list data', a folder or a file; or FILE.py:FUNCTION"
THREAT = "what may be changed: linf:8/255, l2:0.5, l1:12, linf:0.1,box=none, or FILE.py:FUNCTION"
MODEL = "a name from 'sparring list models', or FILE.py:FUNCTION; normalize=MEAN/STD or cifar10 goes with each"
MAX_DROP = "exit 1 if either accuracy falls further below --baseline, such as 0.01; NAME=VALUE for another metric"
DEVICE = "auto (the fastest there is), cpu, cuda, cuda:1 or mps"
Seed = Annotated[int, Field(ge=0, le=2**31, description="of every random choice")]


def _unset(description: str, **limits: float) -> Any:
    return Field(default=None, description=description, **limits)  # type: ignore[call-overload]


class Settings(BaseModel):
    """Values by name, checked; ValueError in one line. `but` gives other ones, checked too."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise ValueError(_sentence(type(self), error.errors()[0])) from None

    def but(self, **changes: Any) -> Self:
        """The same with other values."""
        return type(self)(**{**self.model_dump(), **changes})


class TrainingSettings(Settings):
    """Everything that decides a training run. None means: what suits the data, or else the default of `GENERAL`."""

    data: str = Field(default="digits", description=DATA)
    threat: str = Field(default="linf:0.2", description=THREAT)
    model: str | None = _unset(MODEL)
    weights: str | None = _unset("weights to start from (.safetensors, or a state dict)")
    recipe: str = Field(
        default="pgd-at", description="from 'sparring list recipes', with options: trades:beta=3; or FILE.py:FUNCTION"
    )
    extra: str | None = _unset("an .npz of more training examples: x, and y as class numbers or probabilities")
    extra_share: float = Field(default=0.5, ge=0.01, le=0.99, description="share of each batch that is extra")
    class_weights: str | None = _unset("balanced (all classes count alike), or one number for each: 1..5..2")
    epochs: int | None = _unset("passes over the data, each validated", ge=1, le=10**6)
    passes: int | None = _unset("passes over the data in an epoch", ge=1, le=10**6)
    minutes: float | None = _unset("end after the epoch in which they are over", ge=0.01, le=1e6)
    batch_size: int | None = _unset("examples per step", ge=1, le=10**9)
    optimizer: Literal["adamw", "sgd"] | None = _unset("how weights learn; sgd has momentum 0.9")
    learning_rate: float | None = _unset("the highest of the schedule", ge=1e-12, le=1e3)
    weight_decay: float | None = _unset("decay of all weights", ge=0, le=1e3)
    schedule: Literal["constant", "cosine", "one-cycle", "piecewise"] | None = _unset(
        "of the learning rate over the run"
    )
    radius_ramp: float | None = _unset("share of the run in which the radius grows from 0", ge=0, le=1)
    awp: float = Field(
        default=0.0, ge=0, le=0.5, description="weights move against each step by this share of them, such as 0.005"
    )
    guard: str = Field(
        default="none",
        description="watch goes back when training collapses, and reacts: watch:every=50,catastrophic=stop; or none",
    )
    averaging: float | None = _unset("decay of a weight average, if there is to be one", ge=0, le=0.999999)
    augment: dict[str, Any] | None = _unset("random changes of training examples")
    held_out: int = Field(
        default=1000, ge=1, le=10**9, description="training examples that choose the best epoch, at most a tenth"
    )
    seed: Seed = 0
    device: str = Field(default="auto", description=DEVICE)
    speed: Literal["plain", "auto"] = Field(
        default="plain", description="auto: tries on the first batch what makes steps faster here, such as bfloat16"
    )


GENERAL: dict[str, Any] = {
    "epochs": 50, "passes": 1, "batch_size": 128, "optimizer": "adamw", "learning_rate": 2e-3, "weight_decay": 1e-4,
    "schedule": "one-cycle", "radius_ramp": 0.3,
}  # fmt: skip
"""Training settings where the data has no other. A radius that grows from 0 gets MNIST at 0.3 off its plateau."""
SUITED = {*GENERAL, "model", "augment", "averaging"}
"""Training settings that the data may choose."""


class EvaluationSettings(Settings):
    """Everything that decides an evaluation, beside the model."""

    data: str = Field(description=DATA)
    threat: str = Field(description=THREAT)
    split: Literal["test", "train"] = Field(default="test", description="which examples")
    attacks: str = Field(default="fast", description="a plan or a list of attacks, such as fgsm,pgd:num_steps=100")
    num_examples: int = Field(default=1000, ge=1, description="how many of the split; the seed draws them")
    balanced: bool = Field(default=False, description="equally many of each class, as long as there are any")
    batch_size: int = Field(default=250, ge=1, description="examples at once; what is done is kept after each batch")
    seed: Seed = 0
    device: str = Field(default="auto", description=DEVICE)
    certify: Literal["auto", "interval", "none"] = Field(
        default="auto", description="the certified lower bound; interval: an error where there is none"
    )
    smooth: float | None = _unset("judge it under Gaussian noise of this size, certified in L2", gt=0)
    checks: bool = Field(default=True, description="look for signs that the number is too high")
    keep_examples: bool = Field(default=False, description="write all examples that were turned, adversarial.npz")
    name: str | None = _unset("what the report calls this model")


class GateSettings(Settings):
    """What is asked of a result as it is typed; see `results.gate.Demands`."""

    min_robust: float | None = _unset("exit 1 below this robust accuracy, such as 0.45")
    min_clean: float | None = _unset("exit 1 below this clean accuracy, such as 0.8")
    min: list[str] = Field(default=[], description="NAME=VALUE: exit 1 below; any metric; repeatable")
    max: list[str] = Field(default=[], description="NAME=VALUE: exit 1 above; any metric; repeatable")
    max_drop: list[str] = Field(default=[], description=MAX_DROP)
    baseline: Path | None = _unset("results to compare with: file, evaluation folder or run folder")
    require_verdict: str | None = _unset("TRUSTED, or SUSPECT for at least that; a file without a verdict fails")
    allow_suspect: bool = Field(default=False, description="let the verdict SUSPECT pass")
    confident: bool = Field(
        default=False, description="hold the lower end of the 95 % interval against the minima and maxima"
    )


def with_options(kind: type[Settings], *names: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """A decorator: those fields, or all, become options of a command, whose `**` gets what was given."""

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(command)
        def called(**given: Any) -> Any:
            return command(**{key: value for key, value in given.items() if value is not None})

        signature = inspect.signature(command, eval_str=True)
        own = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
        parameters = [p.replace(kind=p.KEYWORD_ONLY) for p in own]
        for name in names or kind.model_fields:
            facts = _facts(kind)[name]
            flags = [f"--{name.replace('_', '-')}"] if facts.get("default") is False else []  # one that has no opposite
            option = typer.Option(*flags, help=about(kind, name), show_default=False)
            hint = Annotated[_TYPES[facts.get("format", facts["type"])] | None, option]  # type: ignore[valid-type]
            parameters.append(inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=hint))
        called.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
        called.__annotations__ = {p.name: p.annotation for p in parameters}
        return called

    return decorate


def about(kind: type[Settings], name: str) -> str:
    """The line on a setting: meaning, choices, range, default.

    >>> about(EvaluationSettings, "split")
    'which examples: test or train (default test)'
    """
    facts = _facts(kind)[name]
    default, notes = facts.get("default"), [_range(facts)]
    if name in SUITED and default is None:
        notes.append("default: by the data")
    elif default not in (None, []) and default is not False:
        notes.append(f"default {json.dumps(default).strip(chr(34))}")
    choices, note = " or ".join(facts.get("enum", ())), "; ".join(filter(None, notes))
    return facts["description"] + (f": {choices}" if choices else "") + (f" ({note})" if note else "")


def read_settings(path: Path | None, pairs: Sequence[str], flags: Mapping[str, Any]) -> dict[str, Any]:
    """Settings by name: flags and KEY=VALUE pairs over a TOML or JSON file. ValueError for what cannot be read."""
    found = _from_file(path) if path else {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key:
            raise ValueError(f"--set {pair!r} is not KEY=VALUE, for example --set learning_rate=0.01")
        if key.strip() in flags:  # one of the two would be lost, and nobody would look at what it says
            option = f"--{key.strip().replace('_', '-')} {flags[key.strip()]}"
            raise ValueError(f"{key.strip()} is given twice, by {option} and by --set {pair}; give one of them")
        found[key.strip()] = _value(value)
    return {**found, **flags}


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
    if str(found.get("schema", "")).startswith("sparring.run/") and isinstance(found.get("settings"), dict):
        return found["settings"]  # the config.json of a run
    return found


def _value(text: str) -> Any:
    """Numbers, true, false and null as JSON has them; anything else is text."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def _sentence(kind: type[Settings], error: Any) -> str:
    """What pydantic found, in one line: what was got, what was expected."""
    name, got, facts = str(error["loc"][0]), error["input"], _facts(kind)
    if error["type"] == "missing":
        return f"setting {name} is missing: {facts[name]['description']}"
    if error["type"] == "extra_forbidden":
        return f"setting {name!r} is unknown; there are {', '.join(sorted(facts))}"
    if error["type"] == "literal_error":
        return f"{name} {got!r} is unknown; there are {', '.join(facts[name]['enum'])}"
    if error["type"] in ("greater_than_equal", "less_than_equal", "greater_than"):
        return f"{name} must be {_range(facts[name])}; got {got}"
    return f"setting {name} must be of type {error['type'].partition('_')[0]}; got {got!r}"


def _range(facts: Mapping[str, Any]) -> str:
    if "maximum" in facts:
        return f"between {facts['minimum']} and {facts['maximum']}"
    if "minimum" in facts:
        return f"at least {facts['minimum']}"
    return f"above {facts['exclusiveMinimum']}" if "exclusiveMinimum" in facts else ""


@functools.cache
def _facts(kind: type[Settings]) -> dict[str, dict[str, Any]]:
    """Of each field what its JSON schema says: description, default, type, choices, limits."""
    fields = kind.model_json_schema()["properties"]
    return {name: {**field, **field.get("anyOf", [{}])[0]} for name, field in fields.items()}


_TYPES = {"string": str, "integer": int, "number": float, "boolean": bool, "array": list[str], "path": Path}
"""What a command line reads; choices are checked with all the rest, in the same words as in a file."""
