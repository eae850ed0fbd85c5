"""What a kind of input brings with it: one record, `Modality`; and a data set in memory, whatever its kind."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from markupsafe import Markup
from torch import Tensor, nn

from sparring.adapters.black_box import BlackBox
from sparring.adapters.normalize import build_normalized, load_into
from sparring.attacks.plans import ATTACKS, DEFAULT_PLAN, PLANS, Stage, make_plan
from sparring.core.batches import Batches
from sparring.core.registry import Builder, Named, Option, named, options_of
from sparring.core.types import Inputs, take
from sparring.threats import THREATS, ThreatModel, make_threat
from sparring.training.named import RECIPES


@dataclass(frozen=True, eq=False)
class Dataset:
    """Examples as stored: tensors (N, *X) or named tensors of N rows, and labels int64 (N,).

    kind: the name of the modality. facts: plain values that models and threats may ask for by name beside `shape` and
    `num_classes`, such as the size of a vocabulary. prepare: makes model inputs of stored examples. validation: stored
    examples and labels that choose the best epoch; without them training examples are held out for it. kept: what was
    learned from the training examples and must stay with a run, as option of `load` -> the text of a file: a run folder
    holds OPTION.txt, and data that are read for the run get its path. start: puts what the data know into a new
    network, such as word vectors.
    """

    name: str
    kind: str
    x_train: Inputs
    y_train: Tensor
    x_test: Inputs
    y_test: Tensor
    class_names: tuple[str, ...]
    facts: Mapping[str, Any] = field(default_factory=dict)
    prepare: Callable[[Any], Any] | None = None
    validation: tuple[Inputs, Tensor] | None = None
    kept: Mapping[str, str] = field(default_factory=dict)
    start: Callable[[Any], None] | None = None

    @property
    def shape(self) -> Any:
        """The shape of one input; of named tensors the shapes by name."""
        if isinstance(self.x_train, Tensor):
            return tuple(self.x_train.shape[1:])
        return {name: tuple(tensor.shape[1:]) for name, tensor in self.x_train.items()}

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @property
    def given(self) -> dict[str, Any]:
        """What a builder of models may ask for by name: `shape`, `num_classes` and the facts."""
        return {"shape": self.shape, "num_classes": self.num_classes, **self.facts}

    def batches(
        self, split: str = "test", batch_size: int = 250, count: int | None = None, *, rows: Tensor | None = None
    ) -> Batches:
        """Prepared batches of the first `count` examples of `test` or `train`, or of these rows, in their order."""
        if split not in ("test", "train"):
            raise ValueError(f"split {split!r} is unknown; there are test, train")
        x, y = (getattr(self, f"{side}_{split}") for side in "xy")
        if not len(y):
            raise ValueError(
                f"{self.name} has no {split} examples; give it some: return (train, test) where it is made"
            )
        rows = torch.arange(len(y))[:count] if rows is None else rows
        return Batches(take(x, rows), y[rows], batch_size, prepare=self.prepare)


class Shown(NamedTuple):
    """What a person sees of an evaluation, as HTML: a card for each example of the gallery, in its order (none, or as
    many), and what stands before and after them. Text that comes from files must be escaped."""

    cards: Sequence[Markup] = ()
    before: Markup = Markup()
    after: Markup = Markup()


@dataclass(frozen=True, kw_only=True)
class Task:
    """What the builder of a recipe returns when something else than a classifier is trained: it needs no threat, and
    brings what a run otherwise takes from data, threat and model.

    recipe: the loss. settings: data -> training settings that suit it. model: (`Dataset.given`, seed) -> the module.
    optimizer: (module, learning rate) -> its optimizer. judge: (data, (x, y) trained on as stored, run folder, seed) ->
    the validation and a guard or None. score: the figure of the validation that chooses the best epoch, the higher the
    better. after_epoch: (run folder, module, number of epochs) writes what a person may look at. advice: what to do
    with the run folder next, with {run} for it.
    """

    recipe: Any
    settings: Callable[[Dataset], Mapping[str, Any]]
    model: Callable[[Mapping[str, Any], int], nn.Module]
    optimizer: Callable[[nn.Module, float], torch.optim.Optimizer]
    judge: Callable[[Dataset, tuple[Inputs, Tensor], Path, int], tuple[Callable[[Any], Mapping[str, float]], Any]]
    score: str
    after_epoch: Callable[[Path, nn.Module, int], None]
    advice: str


@dataclass(frozen=True, kw_only=True)
class Modality:
    """One kind of input: everything that is its own. A new one is a folder, and a line in `MODALITIES`.

    load: (path, *, options) -> Dataset; its signature says what `--data KIND:PATH,KEY=VALUE` takes. known: names of
    data sets, and forms of paths in capitals, with a line on each. reads: whether a file or folder looks like its own.
    threats, attacks, plans, recipes, models: builders by name, beside the shared ones (an equal name goes first).
    complete: (module, given) -> the model that is trained and evaluated, where somebody's module is only a part of it.
    calibrate: (model, data) sets in place what no gradient sets, such as a threshold, from the training part; called
    before each validation, and on what was completed. validation: the attack that chooses the best epoch. augment:
    options -> `Augment`, or None. presets: training settings for a data set, `model` among them. certify: (model,
    threat) -> a lower bound of margins (see `measure`) or None, and why there is none. metrics: see `measure`. show:
    (stored evaluation) -> `Shown`, such as some attacked examples. caption: (data, gallery, split, threat) -> further
    arrays for a gallery, of what only the data know (the strings behind numbers), for `show`. write: (folder, x, x_adv,
    names, threat) writes a file NAME for each example and returns the x_adv that these files hold, read again. collect:
    (name, train or None, test) -> Dataset, of a user's own examples as arrays (`adapters.own_data.Part`). formats:
    of `sparring attack` beside .npz: suffix -> (arrays, data) -> the text of the file. tools: what commands of this
    kind alone do (`sparring schema`), by name.
    """

    name: str
    load: Builder
    known: Mapping[str, str]
    reads: Callable[[Path], bool]
    presets: Callable[[Dataset], dict[str, Any]]
    models: Mapping[str, Builder]
    threats: Mapping[str, Builder] = field(default_factory=dict)
    attacks: Mapping[str, Builder] = field(default_factory=dict)
    plans: Mapping[str, Builder] = field(default_factory=dict)
    recipes: Mapping[str, Builder] = field(default_factory=dict)
    complete: Callable[[nn.Module, Mapping[str, Any]], nn.Module] = lambda module, given: module
    calibrate: Callable[[nn.Module, Dataset], None] = lambda model, data: None
    validation: str = "pgd:num_steps=10,step=0.25"
    augment: Builder | None = None
    certify: Callable[[Any, Any], tuple[Any, str]] = lambda model, threat: (None, "this kind of input has none yet")
    metrics: Callable[..., Any] | None = None
    show: Callable[..., Shown] | None = None
    caption: Callable[..., Mapping[str, Any]] | None = None
    write: Callable[..., Tensor] | None = None
    formats: Mapping[str, Callable[..., str]] = field(default_factory=dict)
    tools: Mapping[str, Callable[..., Any]] = field(default_factory=dict)
    collect: Callable[..., Dataset] | None = None

    @property
    def augment_options(self) -> dict[str, Option]:
        """What `augment` takes, by name."""
        return options_of(self.augment, ()) if self.augment else {}

    def make_threat(self, text: str, data: Dataset | None = None, model: Any = None) -> ThreatModel:
        """The threat that a text names, from the own and the shared ones."""
        return make_threat(text, data, model, {**THREATS, **self.threats})

    def make_model(
        self, text: str, seed: int, given: Mapping[str, Any], weights: Path | None = None, data: Dataset | None = None
    ) -> nn.Module:
        """The network that a text names, with the weights of a file; one of somebody else completed, and calibrated."""
        built = build_normalized(text, self.models, seed, given)
        if weights:
            load_into(built, weights)
        model = self.complete(built, given)
        if model is not built and data is not None:
            self.calibrate(model, data)
        return model

    def make_plan(self, text: str, threat: ThreatModel, model: Any = None) -> tuple[Stage, ...]:
        """The stages that a text names, from the own and the shared attacks and plans; the default plan becomes
        `queries` for a `BlackBox`."""
        text = "queries" if text == DEFAULT_PLAN and isinstance(model, BlackBox) else text
        return make_plan(text, threat, {**ATTACKS, **self.attacks}, {**PLANS, **self.plans})

    def named_recipe(self, text: str) -> Named:
        """The training recipe that a text names, waiting for a threat."""
        return named(text, {**RECIPES, **self.recipes}, "recipe")

    def task(self, text: str) -> Task | None:
        """What the recipe that a text names brings, if it trains something else than a classifier under a threat."""
        recipe = self.named_recipe(text)
        if "threat" in inspect.signature(recipe.builder).parameters:
            return None
        made = recipe()
        return made if isinstance(made, Task) else None
