"""A scikit-learn classifier that is trained against an opponent: in pipelines, in grid searches, on data frames.

Shapes: N rows, D columns, K classes.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.utils import check_random_state
from sklearn.utils.class_weight import compute_class_weight
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, validate_data
from torch import Tensor

from sparring.core.batches import Batches
from sparring.core.model_state import private_rng
from sparring.core.registry import named
from sparring.core.types import Inputs
from sparring.modalities.tables.cells import Chunk
from sparring.modalities.tables.models import table_mlp
from sparring.modalities.tables.read import facts_of, features_of
from sparring.modalities.tables.schema import Schema
from sparring.modalities.tables.threats import climbed_relaxed, columns
from sparring.threats import THREATS, Ball, make_threat
from sparring.threats.base import ThreatModel
from sparring.training.loop import train
from sparring.training.named import RECIPES
from sparring.training.schedules import SCHEDULES
from sparring.training.supervised import Supervised

DEFAULT_RECIPE = "mixed:num_steps=5,step=0.4"


class RobustClassifier(ClassifierMixin, BaseEstimator):
    """A network of fully connected layers, trained adversarially; everything of scikit-learn's contract.

    threat: text or object. Without a schema a norm ball without a box on standardised columns, so its radius is in
    standard deviations (default: Linf 0.1). With one (a TOML file or a `Schema`) `columns:RADIUS`, in units of the
    columns (default: `columns:1,norm=l2`): the opponent owns the rows of one of two classes, the one that the schema
    calls attacked, or else the class 1 (or True). X then has the schema's columns by name (a data frame, with labels
    not among them), or all columns as numbers in the order of `Schema.names`. recipe: text, or a function from a threat
    to a recipe. class_weight: None, "balanced", or a dictionary. hidden: width of the two layers.

    After `fit`: classes_, n_features_in_, model_ (a network on what `inputs` makes of X), order_ (which of classes_
    each number of the model's is), threat_, n_iter_ (epochs).
    There is no sample_weight: with a stochastic trainer it would not be what repeating rows is. Raises ValueError.

    >>> from sklearn.datasets import make_blobs
    >>> x, y = make_blobs(100, centers=2, random_state=0)
    >>> RobustClassifier(epochs=20, random_state=0).fit(x, y).predict(x[:3]).shape
    (3,)
    """

    def __init__(
        self, threat: Any = None, schema: Any = None, *, recipe: Any = DEFAULT_RECIPE, epochs: int = 30,
        batch_size: int = 64, learning_rate: float = 0.01, hidden: int = 64, class_weight: Any = None,
        random_state: Any = None,
    ) -> None:  # fmt: skip
        self.threat, self.schema, self.recipe, self.epochs = threat, schema, recipe, epochs
        self.batch_size, self.learning_rate, self.hidden = batch_size, learning_rate, hidden
        self.class_weight, self.random_state = class_weight, random_state

    def fit(self, X: Any, y: Any) -> RobustClassifier:
        """The classifier, trained on rows and their labels."""
        self.schema_ = self._schema()
        rows, y = self._rows(X, y)
        check_classification_targets(y)
        self.classes_, codes = np.unique(y, return_inverse=True)
        if len(self.classes_) < 2:
            raise ValueError(f"y has one class, {self.classes_[0]!r}; a classifier needs at least two")
        self.order_ = self._order()
        seed = int(check_random_state(self.random_state).randint(2**31 - 1))
        self.threat_ = self._threat()
        spread = rows.std(0)
        self.center_, self.scale_ = rows.mean(0), np.where(spread > 0, spread, 1.0)
        inputs, target = self._inputs(rows, codes)
        with private_rng(seed, torch.device("cpu")), torch.inference_mode(False):
            facts = self._facts(rows)
            self.model_ = table_mlp(**facts, num_classes=len(self.classes_), width=self.hidden).double()
            optimizer = torch.optim.AdamW(self.model_.parameters(), lr=self.learning_rate, weight_decay=5e-4)
            size = min(self.batch_size, len(codes))
            batches = Batches(inputs, target, size, seed=seed, shuffle=True, drop_last=True)
            result = train(
                self.model_, batches, self._recipe(y), optimizer, num_epochs=self.epochs, seed=seed,
                schedule=SCHEDULES["cosine"],
            )  # fmt: skip
        if result.stopped:
            raise ValueError(f"{result.stopped} Try a smaller learning_rate than {self.learning_rate}")
        self.model_.eval()
        self.n_iter_ = len(result.history)
        return self

    def predict_proba(self, X: Any) -> np.ndarray:
        """(N, K) probabilities, in the order of `classes_`."""
        proba = self._logits(X).softmax(1).numpy()
        return proba[:, np.argsort(self.order_)]

    def predict(self, X: Any) -> np.ndarray:
        """(N,) labels."""
        best = self._logits(X).argmax(1).numpy()
        return self.classes_[self.order_[best]]

    def inputs(self, X: Any, y: Any) -> tuple[Inputs, Tensor]:
        """What `model_` takes of rows, and the numbers of their classes: a batch for `sparring.evaluate`."""
        check_is_fitted(self, "model_")
        rows, y = self._rows(X, y, reset=False)
        codes = np.searchsorted(self.classes_, y)
        if not np.array_equal(self.classes_[codes.clip(max=len(self.classes_) - 1)], y):
            raise ValueError(f"y has labels that were not there in fit: {sorted({*y} - {*self.classes_})[:5]}")
        return self._inputs(rows, codes)

    def _logits(self, X: Any) -> Tensor:
        check_is_fitted(self, "model_")
        rows, _ = self._rows(X, reset=False)
        with torch.no_grad():
            logits: Tensor = self.model_(self._seen(rows))
        return logits

    def _rows(self, X: Any, y: Any = "no_validation", *, reset: bool = True) -> tuple[np.ndarray, Any]:
        """(N, D) float64 as the model gets them, and y; refused is what scikit-learn refuses."""
        if self.schema_ is not None and hasattr(X, "columns"):
            frame = X.drop(columns=[name for name in self.schema_.ignore if name in X.columns])
            names = [str(name) for name in frame.columns]
            if missing := [c.name for c in self.schema_.columns if c.name not in names]:
                raise ValueError(f"X lacks the column(s) {', '.join(map(repr, missing[:5]))} of the schema")
            cells = [[str(cell).strip() for cell in row] for row in frame.itertuples(index=False, name=None)]
            X = features_of("X", Chunk(names, list(range(len(cells))), cells), self.schema_)
        if isinstance(y, str):
            return validate_data(self, X, dtype=np.float64, reset=reset), None
        X, y = validate_data(self, X, y, dtype=np.float64, reset=reset)
        if self.schema_ is not None and X.shape[1] != len(self.schema_.names):
            raise ValueError(f"X has {X.shape[1]} columns, the schema {len(self.schema_.names)} as the model gets them")
        return X, y

    def _schema(self) -> Schema | None:
        return Schema.read(self.schema) if isinstance(self.schema, str | Path) else self.schema

    def _order(self) -> np.ndarray:
        """Which of `classes_` each number of the model's is: with a schema the opponent's is 1, as in all tables."""
        if self.schema_ is None:
            return np.arange(len(self.classes_))
        theirs = [k for k, label in enumerate(self.classes_) if self.schema_.is_attacked(str(label))]
        if len(self.classes_) == 2 and len(theirs) != 1 and [*self.classes_] in ([0, 1], [False, True]):
            theirs = [1]
        if len(self.classes_) != 2 or len(theirs) != 1:
            raise ValueError(
                f"y has the classes {self.classes_.tolist()[:8]}, of which the schema's attacked = "
                f"{list(self.schema_.attacked)} names not one of two; expected two classes, such as 0 and 1, "
                "where the opponent owns 1"
            )
        return np.array([1 - theirs[0], theirs[0]])

    def _facts(self, rows: np.ndarray) -> dict[str, Any]:
        """Of the columns: which are on a log scale, mean, spread."""
        if self.schema_ is not None:
            facts = facts_of(rows, self.schema_)
            return {name: facts[name] for name in ("log", "mean", "spread")}
        width = rows.shape[1]
        return {"log": [False] * width, "mean": [0.0] * width, "spread": [1.0] * width}

    def _threat(self) -> ThreatModel:
        threat: Any = self.threat or ("linf:0.1" if self.schema_ is None else "columns:1,norm=l2")
        if not isinstance(threat, ThreatModel):
            threat = make_threat(threat, SimpleNamespace(schema=self.schema_), None, {**THREATS, "columns": columns})
        if self.schema_ is None and isinstance(threat, Ball):
            return replace(threat, low=None, high=None)  # standardised columns have no box
        return threat

    def _recipe(self, y: np.ndarray) -> Any:
        threat = climbed_relaxed(self.threat_)
        made = named(self.recipe, RECIPES, "recipe")(threat) if isinstance(self.recipe, str) else self.recipe(threat)
        if self.class_weight is None:
            return made
        if not isinstance(made, Supervised):
            raise ValueError(
                f"the recipe {self.recipe} takes no class_weight; pgd-at, trades and others for single labels do"
            )
        weights = compute_class_weight(self.class_weight, classes=self.classes_, y=y)
        return replace(made, class_weights=tuple(weights))

    def _inputs(self, rows: np.ndarray, codes: np.ndarray) -> tuple[Inputs, Tensor]:
        x, target = self._seen(rows), torch.from_numpy(np.argsort(self.order_)[codes].astype(np.int64))
        return (x if self.schema_ is None else {"rows": x, "may_change": target == 1}), target

    def _seen(self, rows: np.ndarray) -> Tensor:
        """Rows in the units of the threat: standardised without a schema."""
        return torch.from_numpy(rows if self.schema_ is not None else (rows - self.center_) / self.scale_)
