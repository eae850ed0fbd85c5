"""Models that are known by their answers alone: scikit-learn, XGBoost, LightGBM, a function, a service over HTTP.

Shapes: B examples, *X one input, K classes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sparring.core.types import Inputs, device_of

SMALLEST = float(np.finfo(np.float32).tiny)
"""What stands for a probability of 0, whose logarithm is none."""
SUM_MAY_MISS = 1e-3
"""By how much probabilities may miss the sum 1."""


class BlackBox(nn.Module):
    """An estimator or a function on NumPy arrays as a model: logits (B, K) float32, the logarithms of probabilities.

    subject: an object with `predict_proba` (or only `predict`), or a function. An estimator is given one row for each
    example, a function arrays as the data hold them; of named inputs the one that has more than a number for each
    example, or, where several do, all by name. What comes back may be probabilities (B, K), the probability of class 1
    (B,), or labels (B,): class numbers, or texts that are among `class_names`. Labels become logits 1 and -1: a search
    sees no margin then, and evaluations say so. logits: what comes back are logits (B, K). Classes stand in the order
    of the subject's `classes_`, where it has some; texts among them are put into that of `class_names`.

    There is no gradient, so only attacks without gradients run. Raises ValueError for answers that are none of these.

    >>> box = BlackBox(lambda x: x.mean(1), num_classes=2)
    >>> box(torch.tensor([[0.25, 0.25], [0.5, 1.0]])).softmax(1)
    tensor([[0.7500, 0.2500],
            [0.2500, 0.7500]])
    """

    def __init__(
        self, subject: Any, *, num_classes: int | None = None, class_names: Sequence[str] = (), logits: bool = False
    ) -> None:
        super().__init__()
        self.model, self.logits = subject, logits
        self.class_names = tuple(map(str, class_names))
        self._flat = not callable(subject)
        self._answer = _answer_of(subject)
        self.order = _order(getattr(getattr(subject, "__self__", subject), "classes_", None), self.class_names)
        known = len(self.order) if self.order else None
        self.num_classes = num_classes or known or len(self.class_names) or None
        self.eval()

    def extra_repr(self) -> str:
        return f"{self.model!r}, logits={self.logits}"

    def forward(self, x: Inputs) -> Tensor:
        out = np.asarray(self._answer(self._arrays(x)))
        num = len(next(iter(x.values())) if isinstance(x, Mapping) else x)
        if out.shape[:1] != (num,) or out.ndim > 2:
            raise ValueError(
                f"the black box answers {out.shape} to {num} examples; expected probabilities ({num}, K), the "
                f"probability of class 1 ({num},), or labels ({num},)"
            )
        return torch.from_numpy(self._as_logits(out)).to(device_of(x))

    def _arrays(self, x: Inputs) -> Any:
        """What the subject is asked."""
        parts = dict(x) if isinstance(x, Mapping) else {"": x}
        arrays = {name: tensor.detach().cpu().numpy() for name, tensor in parts.items()}
        if self._flat:
            arrays = {name: a.reshape(len(a), -1) if a.ndim > 2 else a for name, a in arrays.items()}
        features = {name: array for name, array in arrays.items() if array.ndim > 1} or arrays
        return next(iter(features.values())) if len(features) == 1 else features

    def _as_logits(self, out: np.ndarray) -> np.ndarray:
        """(B, K) float32."""
        if out.ndim == 2 and out.shape[1] == 1:
            out = out[:, 0]
        if self.logits:
            return out.astype(np.float32)
        if out.ndim == 1:
            if not _probable(out):
                return self._of_labels(out)
            out = np.stack([1 - out.astype(np.float64), out], 1)
        bad = ~((out >= -SUM_MAY_MISS).all(1) & (np.abs(out.sum(1) - 1) <= SUM_MAY_MISS))
        if bad.any():
            row = int(bad.argmax())
            raise ValueError(
                f"the black box answers {np.round(out[row], 4).tolist()[:5]} to example {row}; expected probabilities, "
                "which sum to 1. If these are logits, say BlackBox(..., logits=True)"
            )
        if self.order:
            out = out[:, self.order]
        return np.log(np.maximum(out.astype(np.float64), SMALLEST)).astype(np.float32)

    def _of_labels(self, labels: np.ndarray) -> np.ndarray:
        """(B, K): 1 at the label, -1 elsewhere."""
        if labels.dtype.kind in "US" or (labels.dtype == object and isinstance(labels[0], str)):
            at = {name: k for k, name in enumerate(self.class_names)}
            if unknown := {str(label) for label in labels} - at.keys():
                raise ValueError(
                    f"the black box answers the label {min(unknown)!r}; the classes are {', '.join(at) or 'not named'}"
                )
            labels = np.array([at[str(label)] for label in labels])
        if self.num_classes is None:
            raise ValueError("the black box answers with labels; say how many classes there are: num_classes=K")
        whole = labels.astype(np.float64)
        if not ((whole == np.rint(whole)) & (whole >= 0) & (whole < self.num_classes)).all():
            raise ValueError(
                f"the black box answers labels such as {labels[:3].tolist()}; expected whole numbers from 0 to "
                f"{self.num_classes - 1}, or probabilities"
            )
        return 2 * np.eye(self.num_classes, dtype=np.float32)[whole.astype(np.int64)] - 1


def as_module(subject: Any, **options: Any) -> Any:
    """A network as it is; an estimator, or a function that is one's method, as a `BlackBox`; what else can be called as
    it is.

    >>> from sklearn.dummy import DummyClassifier
    >>> as_module(DummyClassifier()).num_classes, as_module(len) is len
    (None, True)
    """
    known = getattr(subject, "__name__", "") in ("predict_proba", "predict") or not callable(subject)
    if isinstance(subject, type) or not known or not (callable(subject) or hasattr(subject, "predict")):
        return subject
    return BlackBox(subject, **options)


def _answer_of(subject: Any) -> Callable[[Any], Any]:
    if callable(subject):
        return subject
    for name in ("predict_proba", "predict"):
        if hasattr(subject, name):
            found: Callable[[Any], Any] = getattr(subject, name)
            return found
    raise TypeError(
        f"a {type(subject).__name__} has neither predict_proba nor predict, and cannot be called; expected an "
        "estimator or a function from arrays to probabilities"
    )


def _order(classes: Any, names: tuple[str, ...]) -> list[int]:
    """The column of each of our classes in what an estimator answers; [] where the columns stand as they are."""
    theirs = [] if classes is None else np.asarray(classes).tolist()
    if theirs == list(range(len(theirs))):
        return list(range(len(theirs)))
    if {*map(str, theirs)} == {*names}:
        return [[*map(str, theirs)].index(name) for name in names]
    ours = f"{', '.join(map(repr, names[:8]))}" if names else "class_names= with these in order"
    raise ValueError(
        f"the estimator knows the classes {', '.join(map(repr, theirs[:8]))}; expected the numbers 0 to K - 1"
        f", or {ours}: which of its columns is which class decides about every number"
    )


def _probable(out: np.ndarray) -> bool:
    """Whether numbers (B,) are probabilities and not labels."""
    return out.dtype.kind == "f" and bool(((out >= 0) & (out <= 1)).all())
