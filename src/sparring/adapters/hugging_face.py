"""Hugging Face's Trainer with a recipe as its loss, for images and for texts. Transformers is not imported here.

Shapes: B examples, L tokens, D numbers of a word vector.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from sparring.core.batches import pair_in
from sparring.core.types import logits_of

SHIFT = "shift"
"""The named input (B, L, D) that is added to the word vectors."""


class ShiftedVectors(nn.Module):
    """A model of texts whose word vectors can be moved: tokenised texts with a `shift` (B, L, D) -> logits (B, K).

    `batch` makes its inputs. The threat is `Lens(L2(0.5, low=None, high=None), "shift")`: a ball around no shift at
    all. Gradients reach the word vectors' weights as in ordinary training.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model, self.training = model, model.training

    @property
    def vectors(self) -> nn.Module:
        """What makes vectors of tokens."""
        found: nn.Module = getattr(self.model, "module", self.model).get_input_embeddings()  # behind DataParallel
        return found

    def batch(self, texts: Mapping[str, Any]) -> dict[str, Tensor]:
        """The named inputs of tokenised texts, without labels, and with a shift of zero."""
        ids, weight = texts["input_ids"], next(self.vectors.parameters())
        named = {name: value for name, value in texts.items() if name != "labels" and isinstance(value, Tensor)}
        return {**named, SHIFT: torch.zeros(*ids.shape, weight.shape[1], dtype=weight.dtype, device=ids.device)}

    def forward(self, x: Mapping[str, Tensor]) -> Tensor:
        others = {name: value for name, value in x.items() if name not in ("input_ids", SHIFT)}
        return logits_of(self.model(inputs_embeds=self.vectors(x["input_ids"]) + x[SHIFT], **others))


class ReplacedWords(ShiftedVectors):
    """A model of texts whose words can be replaced: `ids` (B, L) and `mask` (B, L), as the threats of texts have them.

    With `weights` (B, L, K), `ids` are (B, L, K) and a word is the weighted mean of their vectors; `offset` (B, L, D)
    is added. `unknown` is the number by which those at or above the model's vocabulary are read. Other tensors of a
    batch (such as token types) reach the model as they are.
    """

    def __init__(self, model: Any, unknown: int = 1) -> None:
        super().__init__(model)
        self.unknown = unknown

    def batch(self, texts: Mapping[str, Any]) -> dict[str, Tensor]:
        """The named inputs of tokenised texts, without labels."""
        named = {name: value for name, value in texts.items() if name != "labels" and isinstance(value, Tensor)}
        ids = named.pop("input_ids")
        mask = named.pop("attention_mask", torch.ones_like(ids))
        return {**named, "ids": ids, "mask": mask.bool()}

    def forward(self, x: Mapping[str, Tensor]) -> Tensor:
        others = {name: value for name, value in x.items() if name not in ("ids", "mask", "weights", "offset")}
        size = next(self.vectors.parameters()).shape[0]
        vectors = self.vectors(torch.where(x["ids"] < size, x["ids"], self.unknown))
        if "weights" in x:
            vectors = (vectors * x["weights"][..., None]).sum(2)
        vectors = vectors + x["offset"] if "offset" in x else vectors
        return logits_of(self.model(inputs_embeds=vectors, attention_mask=x["mask"].long(), **others))


class RobustLoss:
    """A mixin for `transformers.Trainer`: its loss in training is that of `recipe`; evaluation stays as it is.

    `class Robust(RobustLoss, Trainer): recipe = pgd_at(Linf(8 / 255))`. Of texts the word vectors move, and the
    recipe's threat is a lens on "shift" (`ShiftedVectors`); with `texts = ReplacedWords` its threat is one of texts.
    """

    recipe: ClassVar[Any] = None
    texts: ClassVar[type[ShiftedVectors]] = ShiftedVectors

    def compute_loss(self, model: Any, inputs: Mapping[str, Any], return_outputs: bool = False, **more: Any) -> Any:
        """The recipe's loss. ValueError where there is no recipe, or the batch is neither of images nor of texts."""
        if not model.training or return_outputs:
            return super().compute_loss(model, inputs, return_outputs=return_outputs, **more)  # type: ignore[misc]
        recipe = type(self).recipe
        if recipe is None:
            raise ValueError(f"{type(self).__name__} has no recipe; set one, such as recipe = pgd_at(Linf(8 / 255))")
        if "input_ids" in inputs and "labels" in inputs:
            model = type(self).texts(model)
            pair: Any = model.batch(inputs), inputs["labels"]
        else:
            pair = pair_in(inputs)
        if pair is None:
            raise ValueError(f"a batch of {', '.join(inputs)}; expected input_ids or one input, and labels")
        found = recipe(model, *pair)
        return found[0] if isinstance(found, tuple) else found
