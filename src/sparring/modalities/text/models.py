"""Reference networks for texts: bag of words, CNN, BiLSTM, a small transformer. What is padded never counts.

Shapes: B texts, L units, K substitutes, D numbers in a vector, H features, C classes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sparring.adapters.hugging_face import load_classifier
from sparring.core.registry import Builder
from sparring.modalities.text.tokens import PADDING, UNKNOWN

SPREAD = 0.3
"""Standard deviation of vectors that begin at random."""


class TextNet(nn.Module, ABC):
    """Word vectors, and what a subclass makes of them: `judge(vectors (B, L, D), mask (B, L)) -> logits (B, C)`.

    forward takes named tensors: `ids` (B, L) and `mask`; with `weights` (B, L, K), `ids` are (B, L, K) and a word is
    the weighted mean of their vectors; `offset` (B, L, D) is added. Numbers at or above the vocabulary are read as
    UNKNOWN. `token_norm` is the mean length of the vectors that training began with: the unit of embedding threats.
    """

    def __init__(self, vocabulary: int, size: int) -> None:
        super().__init__()
        self.words = nn.Embedding(vocabulary, size, padding_idx=PADDING)
        nn.init.normal_(self.words.weight, std=SPREAD)
        self.token_norm: Tensor
        self.register_buffer("token_norm", torch.ones(()))
        self.set_vectors(torch.tensor([PADDING, UNKNOWN]), torch.zeros(2, size))

    def set_vectors(self, numbers: Tensor, vectors: Tensor) -> None:
        """Gives some words (N,) these vectors (N, D), and measures `token_norm` anew."""
        with torch.no_grad():
            self.words.weight[numbers] = vectors.to(self.words.weight)
            self.token_norm.copy_(self.words.weight[2:].norm(dim=1).mean())

    def look_up(self, ids: Tensor) -> Tensor:
        """The vectors (*ids, D)."""
        return self.words(torch.where(ids < self.words.num_embeddings, ids, UNKNOWN))

    def embed(self, x: Mapping[str, Tensor]) -> Tensor:
        """(B, L, D)."""
        vectors = self.look_up(x["ids"])
        if "weights" in x:
            vectors = (vectors * x["weights"][..., None]).sum(2)
        return vectors + x["offset"] if "offset" in x else vectors

    @abstractmethod
    def judge(self, vectors: Tensor, mask: Tensor) -> Tensor:
        """Logits (B, C)."""

    def forward(self, x: Mapping[str, Tensor]) -> Tensor:
        return self.judge(self.embed(x), x["mask"])


class PooledNet(TextNet):
    """A linear layer and ReLU on each word, a convolution and ReLU if there is one, the mean, two linear layers.

    `certify` knows it: interval bounds start after the layer on each word.
    """

    def __init__(self, vocabulary: int, num_classes: int, size: int, hidden: int, window: int) -> None:
        super().__init__(vocabulary, size)
        self.each = nn.Linear(size, hidden)
        self.along = nn.Conv1d(hidden, hidden, window, padding=window // 2) if window else None
        self.head = nn.Sequential(nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, num_classes))

    def judge(self, vectors: Tensor, mask: Tensor) -> Tensor:
        there = mask[..., None].to(vectors)
        features = self.each(vectors).relu() * there
        if self.along is not None:
            features = self.along(features.transpose(1, 2)).transpose(1, 2).relu() * there
        return self.head(features.sum(1) / there.sum(1))


class Recurrent(TextNet):
    """One layer of LSTM in both directions, the mean of its outputs, a linear layer."""

    def __init__(self, vocabulary: int, num_classes: int, size: int, hidden: int) -> None:
        super().__init__(vocabulary, size)
        self.both = nn.LSTM(size, hidden, batch_first=True, bidirectional=True)
        self.head = nn.Linear(2 * hidden, num_classes)

    def judge(self, vectors: Tensor, mask: Tensor) -> Tensor:
        packed = nn.utils.rnn.pack_padded_sequence(vectors, mask.sum(1).cpu(), batch_first=True, enforce_sorted=False)
        # cuDNN refuses to differentiate recurrent layers in eval mode, in which attacks are crafted
        with torch.backends.cudnn.flags(enabled=self.training):
            features, _ = nn.utils.rnn.pad_packed_sequence(self.both(packed)[0], True, total_length=mask.shape[1])
        return self.head(features.sum(1) / mask.sum(1, keepdim=True))


class Attentive(TextNet):
    """Learned places, transformer layers that see no padding, the mean of their outputs, a linear layer."""

    def __init__(self, vocabulary: int, num_classes: int, size: int, hidden: int, layers: int, longest: int) -> None:
        super().__init__(vocabulary, size)
        self.into, self.places = nn.Linear(size, hidden), nn.Parameter(0.1 * torch.randn(longest, hidden))
        layer = nn.TransformerEncoderLayer(hidden, 4, 2 * hidden, dropout=0.1, batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.head = nn.Sequential(nn.LayerNorm(hidden), nn.Linear(hidden, num_classes))

    def judge(self, vectors: Tensor, mask: Tensor) -> Tensor:
        features = self.into(vectors) + self.places[: vectors.shape[1]]
        features = self.layers(features, src_key_padding_mask=~mask) * mask[..., None]
        return self.head(features.sum(1) / mask.sum(1, keepdim=True))


def bag(vocabulary: int, num_classes: int, vector_size: int | None, *, size: int = 50, hidden: int = 64) -> nn.Module:
    """Each word by itself, their mean, two linear layers; order plays no part."""
    return PooledNet(vocabulary, num_classes, vector_size or size, hidden, 0)


def cnn_text(
    vocabulary: int, num_classes: int, vector_size: int | None, *, size: int = 50, hidden: int = 64, window: int = 3
) -> nn.Module:
    """As the bag, with a convolution over neighbouring words (an odd window). Source: after Kim 2014, mean for max."""
    if window < 1 or window % 2 == 0:
        raise ValueError(f"window={window}; expected an odd number, so that a text keeps its length")
    return PooledNet(vocabulary, num_classes, vector_size or size, hidden, window)


def bilstm(
    vocabulary: int, num_classes: int, vector_size: int | None, *, size: int = 50, hidden: int = 64
) -> nn.Module:
    """One layer of LSTM in both directions, and the mean of its outputs."""
    return Recurrent(vocabulary, num_classes, vector_size or size, hidden)


def transformer_small(
    vocabulary: int, num_classes: int, shape: Any, vector_size: int | None, *, size: int = 50,
    hidden: int = 64, layers: int = 2,
) -> nn.Module:  # fmt: skip
    """Two transformer layers of four heads on learned places, and the mean of their outputs."""
    return Attentive(vocabulary, num_classes, vector_size or size, hidden, layers, int(shape["ids"][0]))


def transformers_classifier(folder: str, num_classes: int, unit: str, *, unlike: float = 0.01) -> nn.Module:
    """transformers:FOLDER, a sequence classifier of `transformers` saved there, read by its own WordPiece tokenizer.

    Its class k is the data's class k. unlike: the share of test texts that may be read otherwise than as strings.
    Raises what `load_classifier` does, and ValueError for other classes or units.
    """
    if unit not in ("words", "characters"):
        raise ValueError(f"transformers:{folder} cuts words by itself; read the data as words, not by tokens={unit}")
    model = load_classifier(folder, unlike)
    if (num := model.model.config.num_labels) != num_classes:
        raise ValueError(f"transformers:{folder} knows {num} classes; the data have {num_classes}")
    return model


TEXT_MODELS: dict[str, Builder] = {
    "bag": bag, "cnn-text": cnn_text, "bilstm": bilstm, "transformer-small": transformer_small,
    "transformers": transformers_classifier,
}  # fmt: skip
