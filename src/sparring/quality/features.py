"""What images are compared by: the features of a classifier that was trained on the same data, normalised to length 1.

Shapes: B batch, N examples, C H W one image in [0, 1], F features, K classes.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparring.core.batches import Batches
from sparring.core.files import write_atomically
from sparring.core.model_state import private_rng
from sparring.training.loop import train
from sparring.training.recipes import Standard
from sparring.training.schedules import OneCycle


class FeatureNet(nn.Module):
    """Images (B, C, H, W) -> logits (B, K), by way of `features` (B, 176): three convolutions and a linear layer."""

    def __init__(self, shape: tuple[int, ...], num_classes: int) -> None:
        super().__init__()
        channels, first = (shape[0], 16, 32, 64), 1 if min(shape[1:]) < 16 else 2
        self.stages = nn.ModuleList(
            nn.Conv2d(inside, outside, 3, stride=stride, padding=1)
            for (inside, outside), stride in zip(itertools.pairwise(channels), (first, 2, 2), strict=True)
        )
        self.last = nn.Sequential(nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(1024, 64), nn.ReLU())
        self.head = nn.Linear(64, num_classes)

    def _seen(self, x: Tensor) -> tuple[list[Tensor], Tensor]:
        x, means = 2 * x - 1, []
        for stage in self.stages:
            x = stage(x).relu()
            means.append(x.mean((2, 3)))
        return means, self.last(x)

    def features(self, x: Tensor) -> Tensor:
        """The channel means of all stages and the last hidden layer, each of length 1: the last layer alone, which
        knows what tells the classes apart, takes noise on 8x8 pixels for a digit (precision 0.5 instead of 0.03)."""
        means, last = self._seen(x)
        return torch.cat([F.normalize(part, dim=1) for part in (*means, last)], 1)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self._seen(x)[1])
        return logits


@dataclass(frozen=True)
class Extractor:
    """How images are seen: embed (B, C, H, W) -> (B, F), classify -> (B,) or None, and what reports must tell of it.

    name: what it is; sha256: of its weights, or of its file; accuracy: on examples that it did not learn from.
    """

    name: str
    embed: Callable[[Tensor], Tensor]
    classify: Callable[[Tensor], Tensor] | None
    sha256: str
    accuracy: float | None

    def __call__(self, x: Tensor, batch_size: int = 500) -> Tensor:
        """Features (N, F) of length 1 of images (N, C, H, W). Raw ReLU features let noise pass for precise."""
        with torch.no_grad():
            found = torch.cat([self.embed(part).detach() for part in x.split(batch_size)])
        if found.ndim != 2 or not found.isfinite().all():
            raise ValueError(f"{self.name} gives features {tuple(found.shape)}; expected finite numbers (N, F)")
        return F.normalize(found.double(), dim=1)


def learn_features(x: Tensor, y: Tensor, num_classes: int, *, seed: int = 0) -> FeatureNet:
    """A `FeatureNet` trained on images (N, C, H, W) in [0, 1] and labels (N,): about 150,000 examples seen, at
    least two passes, at most twenty. The same bits for the same seed."""
    if x.ndim != 4 or min(x.shape[2:]) < 8:
        raise ValueError(f"features are learned from images (C, H, W) of 8x8 and more; got {tuple(x.shape[1:])}")
    with private_rng(seed, torch.device("cpu")):
        net = FeatureNet(x.shape[1:], num_classes)
    batches = Batches(x, y, min(64, len(y)), seed=seed, shuffle=True, drop_last=True)
    optimizer = torch.optim.AdamW(net.parameters(), lr=4e-3, weight_decay=1e-2)
    num_epochs = max(2, min(20, round(150_000 / len(y))))
    train(net, batches, Standard(), optimizer, num_epochs=num_epochs, schedule=OneCycle(0.3), seed=seed)
    return net.eval()


def extractor_of(net: FeatureNet, x_test: Tensor, y_test: Tensor) -> Extractor:
    """The network as an extractor, with its accuracy on x_test (N, C, H, W) in [0, 1], y_test (N,)."""

    def classify(x: Tensor) -> Tensor:
        with torch.no_grad():
            return torch.cat([net(part).argmax(1) for part in x.split(500)])

    net = net.eval()
    digest = hashlib.sha256(b"".join(t.numpy().tobytes() for t in net.state_dict().values())).hexdigest()
    accuracy = float((classify(x_test) == y_test).double().mean())
    return Extractor("classifier trained on the same data", net.features, classify, digest, accuracy)


def kept_features(path: Path, x: Tensor, y: Tensor, num_classes: int, *, seed: int) -> FeatureNet:
    """What `learn_features` gives, read from the file where it is there, else learned and written to it."""
    from safetensors.torch import load_file, save

    if path.exists():
        net = FeatureNet(x.shape[1:], num_classes)
        net.load_state_dict(load_file(path))
        return net.eval()
    net = learn_features(x, y, num_classes, seed=seed)
    write_atomically(path, lambda stream: stream.write(save(net.state_dict())))
    return net
