"""Is this the same person? Similarity of two embeddings against a threshold, around any embedder.

Shapes: B batch, C H W one picture, d numbers of an embedding.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparring.core.batches import Batches
from sparring.core.layers import Normalize
from sparring.core.machine import Machine
from sparring.core.model_state import attack_mode
from sparring.modalities.base import Dataset
from sparring.modalities.faces.metrics import equal_error

SHARPNESS = 4.0
"""Logits per unit of similarity; few, so that float32 tells the probabilities of all similarities apart."""


class Verifier(nn.Module):
    """An embedder x (B, C, H, W) -> (B, d) that answers for pairs, and for single pictures while it is trained.

    Of a pair {"reference", "probe"}: logits (B, 2), [-v, v] with v = SHARPNESS / 2 * (cosine similarity - threshold);
    class 1 is the same person. Of {"probe"} alone: sharpness * cosine to each trained person, (B, num_subjects); no
    pair needs those weights. `threshold` travels with the weights; `set_threshold` sets it.

    >>> model = Verifier(nn.Flatten(), width=4, num_subjects=3)
    >>> _ = model.threshold.fill_(0.5)
    >>> picture = torch.ones(1, 1, 2, 2)
    >>> model({"reference": picture, "probe": picture})
    tensor([[-1.,  1.]])
    """

    threshold: Tensor

    def __init__(self, embedder: nn.Module, width: int, num_subjects: int, sharpness: float = 16.0) -> None:
        super().__init__()
        self.embedder, self.sharpness = embedder, sharpness
        self.persons = nn.Parameter(torch.randn(num_subjects, width))
        self.register_buffer("threshold", torch.tensor(torch.nan))

    def similarity(self, pair: Mapping[str, Tensor]) -> Tensor:
        """(B,) cosines in [-1, 1]."""
        return F.cosine_similarity(self.embedder(pair["reference"]), self.embedder(pair["probe"]))

    def forward(self, x: Mapping[str, Tensor]) -> Tensor:
        if "reference" not in x:
            return self.sharpness * F.normalize(self.embedder(x["probe"])) @ F.normalize(self.persons).T
        if self.threshold.device.type == "cpu" and self.threshold.isnan():  # elsewhere asking means waiting
            raise ValueError("this verifier has no threshold; expected one from pairs of other persons: set_threshold")
        beyond = SHARPNESS / 2 * (self.similarity(x) - self.threshold)
        return torch.stack([-beyond, beyond], 1)


def face_net(shape: tuple[int, ...], num_subjects: int, *, width: int = 64, sharpness: float = 16.0) -> nn.Module:
    """Three strided convolutions to an embedding of `width` numbers, trained by a softmax of cosines."""
    channels, height, width_in = shape[0], *(-(-side // 8) for side in shape[1:])
    embedder = nn.Sequential(
        Normalize(0.5, 0.25),
        nn.Conv2d(channels, 16, 5, 2, 2), nn.ReLU(), nn.Conv2d(16, 32, 3, 2, 1), nn.ReLU(),
        nn.Conv2d(32, 64, 3, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(64 * height * width_in, width),
    )  # fmt: skip
    return Verifier(embedder, width, num_subjects, sharpness)


FACE_MODELS: dict[str, Callable[..., nn.Module]] = {"face-net": face_net}


def as_verifier(module: nn.Module, given: Mapping[str, Any]) -> nn.Module:
    """The module itself if it is a verifier, else one around it. ValueError for what embeds no pictures."""
    if isinstance(module, Verifier):
        return module
    shape, hint = tuple(given["shape"]), "expected embeddings, a row of d numbers for each picture: (2, d)"
    try:
        with attack_mode(module) as embed, torch.no_grad():
            found: Any = embed(torch.full((2, *shape), 0.5))
    except Exception as error:
        raise ValueError(f"the embedder fails on two pictures {(2, *shape)} ({error}); {hint}") from error
    if not isinstance(found, Tensor) or found.ndim != 2 or len(found) != 2 or not found.is_floating_point():
        got = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise ValueError(f"the embedder returned {got} for two pictures; {hint}: wrap it in a module that does so")
    return Verifier(module, found.shape[1], given["num_subjects"])


@torch.no_grad()
def set_threshold(model: nn.Module, data: Dataset) -> None:
    """Sets a verifier's threshold where both errors are equally frequent on the validation pairs: no test person's.
    Raises ValueError where no threshold can tell: for similarities that are NaN, or all the same."""
    if not isinstance(model, Verifier) or data.validation is None:
        got = f"a {type(model).__name__} and validation pairs {type(data.validation).__name__}"
        raise ValueError(f"got {got}; a threshold is set for a Verifier, on pairs (x, y) of persons not in the test")
    (x, y), place = data.validation, Machine(model.persons.device).place
    pairs = Batches(place(x), place(y), 500, prepare=data.prepare)
    with attack_mode(model):
        s = torch.cat([model.similarity(some) for some, _ in pairs]).cpu().numpy()
    if not s.min() < s.max():  # NaN is no less
        got = "NaN as a similarity" if s.min() != s.max() else f"the similarity {s[0]:.4g} to all"
        told = f"the embedder gives {got} of {len(s)} validation pairs; expected numbers that differ, or no threshold"
        raise ValueError(f"{told} can tell persons apart: are its weights loaded? Train at a smaller rate")
    model.threshold.fill_(equal_error(s, y.cpu().numpy() == 1)[1])
