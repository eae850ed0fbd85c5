"""Keras 3 models on the torch backend: modules of PyTorch, but for how they are told what they are in."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from sparring.core.types import logits_of


class KerasClassifier(nn.Module):
    """A Keras model as a classifier of PyTorch's habits: inputs -> logits (B, K).

    The logits are those before the last softmax or sigmoid, which Keras keeps beside its result. Dropout and BatchNorm
    follow the mode of the module, which Keras itself does not heed. channels_first: inputs are (B, C, H, W), and the
    model takes (B, H, W, C), as Keras' convolutions do unless told otherwise. Its weights stay the model's own. Raises
    TypeError for what is no Keras model on the torch backend, ValueError for one that has no weights yet.
    """

    def __init__(self, model: Any, *, channels_first: bool = False) -> None:
        super().__init__()
        if not isinstance(model, nn.Module) or not is_keras(model):
            raise TypeError(
                f"got a {type(model).__module__}.{type(model).__name__}; expected a Keras 3 model on the torch "
                "backend: set the environment's KERAS_BACKEND=torch before keras is imported"
            )
        if not model.built:
            raise ValueError("the Keras model has no weights yet: call it on one batch, or begin with keras.Input")
        self.model, self.channels_first = model, channels_first

    def forward(self, x: Tensor) -> Tensor:
        x = x.movedim(1, -1) if self.channels_first and x.ndim > 2 else x
        return logits_of(self.model(x, training=self.training))


def is_keras(model: Any) -> bool:
    """Whether an object is a model of Keras, which is not imported for that."""
    return any(kind.__module__.startswith("keras.") and kind.__name__ == "Model" for kind in type(model).__mro__)
