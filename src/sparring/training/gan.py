"""Generators against discriminators: both players are one module, their game is one recipe of the training loop.

Shapes: B batch, C H W one image with values in [0, 1], Z numbers of noise, K classes, F features.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from sparring.core.model_state import private_rng
from sparring.core.noise import Noise
from sparring.core.types import size

GanLoss = Literal["ns-r1", "hinge", "r3"]
Nets = Literal["mlp", "conv"]


class Generator(nn.Module):
    """Noise (B, Z) and labels (B,) -> images (B, C, H, W) in [0, 1]; BatchNorm, as every loss here learns faster so."""

    def __init__(self, body: nn.Module, num_noise: int, num_classes: int) -> None:
        super().__init__()
        self.body, self.num_noise, self.num_classes = body, num_noise, num_classes

    def forward(self, z: Tensor, y: Tensor) -> Tensor:
        if self.num_classes:
            z = torch.cat([z, F.one_hot(y, self.num_classes).to(z.dtype)], 1)
        return (self.body(z).tanh() + 1) / 2


class Discriminator(nn.Module):
    """Images and labels (B,) -> how real they look (B,); no BatchNorm, since real and generated are shown apart.

    With classes: w . f(x) + b + v_y . f(x), the projection of Miyato and Koyama 2018 (eq. 4).
    """

    def __init__(self, body: nn.Module, num_features: int, num_classes: int) -> None:
        super().__init__()
        self.body, self.head = body, nn.Linear(num_features, 1)
        self.by_class = nn.Embedding(num_classes, num_features) if num_classes else None

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        features = self.body(2 * x - 1)
        real = self.head(features)[:, 0]
        return real if self.by_class is None else real + (self.by_class(y) * features).sum(1)


class Pair(nn.Module):
    """A generator `g` and a discriminator `d` as one module: checkpoint, average and resumption hold both."""

    def __init__(self, g: Generator, d: Discriminator) -> None:
        super().__init__()
        self.g, self.d = g, d

    def forward(self, z: Tensor, y: Tensor) -> Tensor:
        """The generator's images."""
        images: Tensor = self.g(z, y)
        return images


def build_pair(
    shape: tuple[int, ...],
    num_classes: int,
    *,
    seed: int,
    net: Nets = "mlp",
    spectral: bool = False,
    num_noise: int = 0,
) -> Pair:
    """The two networks for images (C, H, W), with first weights of that seed. num_classes 0: without labels.

    mlp: Z-256-512-CHW against CHW-256-128 (half as wide for up to 256 pixels). conv: three convolutions behind
    upsampling against two with stride 2, for sides that 4 divides. num_noise 0: 64, of small images 32. ValueError for
    shapes that the network cannot make.

    >>> build_pair((1, 8, 8), 10, seed=0)(torch.zeros(2, 32), torch.tensor([0, 1])).shape
    torch.Size([2, 1, 8, 8])
    """
    if len(shape) != 3:
        raise ValueError(f"a generator makes images (C, H, W); these inputs are {tuple(shape)}")
    if net == "conv" and (shape[1] % 4 or shape[2] % 4):
        raise ValueError(f"net=conv makes images whose sides 4 divides, not {shape[1]}x{shape[2]}; take net=mlp")
    small = math.prod(shape) <= 256
    num_noise = num_noise or (32 if small else 64)
    with private_rng(seed, torch.device("cpu")):
        build = _mlps if net == "mlp" else _convs
        body_g, body_d, num_features = build(shape, num_noise + num_classes, 128 if small else 256)
        pair = Pair(Generator(body_g, num_noise, num_classes), Discriminator(body_d, num_features, num_classes))
        if spectral:
            layers = [m for m in pair.d.modules() if isinstance(m, nn.Linear | nn.Conv2d | nn.Embedding)]
            for layer in layers:
                spectral_norm(layer)
    return pair


def _mlps(shape: tuple[int, ...], num_inputs: int, width: int) -> tuple[nn.Module, nn.Module, int]:
    num_pixels, layers = math.prod(shape), list[nn.Module]()
    for inside, outside in itertools.pairwise((num_inputs, width, 2 * width)):
        layers += [nn.Linear(inside, outside), nn.BatchNorm1d(outside), nn.ReLU()]
    body_d = nn.Sequential(
        nn.Flatten(), nn.Linear(num_pixels, 256), nn.LeakyReLU(0.2), nn.Linear(256, 128), nn.LeakyReLU(0.2)
    )
    return nn.Sequential(*layers, nn.Linear(2 * width, num_pixels), nn.Unflatten(1, shape)), body_d, 128


def _convs(shape: tuple[int, ...], num_inputs: int, width: int) -> tuple[nn.Module, nn.Module, int]:
    (channels, height, side), wide, narrow = shape, width // 4, width // 8
    start, num_start = (wide, height // 4, side // 4), wide * height * side // 16
    body_g = nn.Sequential(
        nn.Linear(num_inputs, num_start), nn.BatchNorm1d(num_start), nn.ReLU(), nn.Unflatten(1, start),
        nn.Upsample(scale_factor=2), nn.Conv2d(wide, narrow, 3, padding=1), nn.BatchNorm2d(narrow), nn.ReLU(),
        nn.Upsample(scale_factor=2), nn.Conv2d(narrow, narrow, 3, padding=1), nn.BatchNorm2d(narrow), nn.ReLU(),
        nn.Conv2d(narrow, channels, 3, padding=1),
    )  # fmt: skip
    body_d = nn.Sequential(
        nn.Conv2d(channels, narrow, 4, stride=2, padding=1), nn.LeakyReLU(0.2),
        nn.Conv2d(narrow, wide, 4, stride=2, padding=1), nn.LeakyReLU(0.2), nn.Flatten(),
    )  # fmt: skip
    return body_g, body_d, num_start


def _non_saturating(real: Tensor, fake: Tensor) -> tuple[Tensor, Tensor]:
    return (F.softplus(-real) + F.softplus(fake)).mean(), F.softplus(-fake).mean()


def _hinge(real: Tensor, fake: Tensor) -> tuple[Tensor, Tensor]:
    return (F.relu(1 - real) + F.relu(1 + fake)).mean(), -fake.mean()


def _relativistic(real: Tensor, fake: Tensor) -> tuple[Tensor, Tensor]:
    return F.softplus(fake - real).mean(), F.softplus(real - fake).mean()


GAMES: dict[str, Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]] = {
    "ns-r1": _non_saturating, "hinge": _hinge, "r3": _relativistic,
}  # fmt: skip
"""What d says of real and of generated images, (B,) each -> the losses of d and of g."""


@dataclass(frozen=True, kw_only=True)
class Gan:
    """One step of both players of a `Pair` at once, as one scalar whose gradients do not mix; one Adam moves both.

    The value is loss_d + gamma / 2 * mean |grad_x d(x)|^2 + loss_g; the discriminator's part does not reach g, and the
    generator's not d. A generated image has the label of the real one beside it. r3: the penalty on generated images,
    too. The noise is drawn from `noise`, so that a resumed run repeats it.

    Source: Goodfellow 2014 (non-saturating loss), Mescheder 2018 (R1), Miyato 2018 (hinge with spectral norm), Huang
    2024 (R3GAN: relativistic, R1 and R2). They take turns; here both move at once, from the same generated batch.

    >>> pair, x, y = build_pair((1, 8, 8), 3, seed=0), torch.rand(4, 1, 8, 8), torch.tensor([0, 1, 2, 0])
    >>> loss, figures = Gan()(pair, x, y)
    >>> sorted(figures)
    ['gap', 'loss_d', 'loss_g', 'penalty']
    """

    loss: GanLoss = "ns-r1"
    gamma: float = 1.0

    def __post_init__(self) -> None:
        if self.loss not in GAMES:
            raise ValueError(f"loss={self.loss!r}; expected one of {', '.join(GAMES)}")
        if not 0 <= self.gamma < math.inf:
            raise ValueError(f"gamma, the weight of the gradient penalty, must be at least 0; got {self.gamma}")

    def __call__(
        self, model: Pair, x: Tensor, y: Tensor, *, noise: Noise | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The scalar to call `backward` on; and loss_d, loss_g, the penalty, and the gap d(real) - d(generated)."""
        noise = Noise.from_torch(size(x)) if noise is None else noise
        images = model.g(noise.normal((model.g.num_noise,)).to(x.dtype), y)
        fake, real = images.detach().requires_grad_(), x.detach().requires_grad_()
        on_real, on_fake = model.d(real, y), model.d(fake, y)
        loss_d, loss_g = GAMES[self.loss](on_real, on_fake)
        # what the generator's loss asks of its images; handed on by hand, so that d gets no gradient of it
        (wanted,) = torch.autograd.grad(loss_g, fake, retain_graph=True)
        carrier = (images * wanted).sum()
        penalty = torch.zeros_like(loss_d)
        if self.gamma:
            penalty = _steepness(on_real, real) + (_steepness(on_fake, fake) if self.loss == "r3" else 0)
        figures = {"loss_d": loss_d, "loss_g": loss_g, "penalty": penalty, "gap": on_real.mean() - on_fake.mean()}
        value = loss_d + self.gamma / 2 * penalty + loss_g.detach() + carrier - carrier.detach()
        return value, {name: figure.detach() for name, figure in figures.items()}


def _steepness(on: Tensor, shown: Tensor) -> Tensor:
    """mean over the batch of |grad_x d(x)|^2, with a graph to the weights."""
    (gradient,) = torch.autograd.grad(on.sum(), shown, create_graph=True)
    return gradient.square().flatten(1).sum(1).mean()


def sample_images(pair: Pair, y: Tensor, noise: Noise, batch_size: int = 500) -> Tensor:
    """Images (N, C, H, W) of the generator, in the mode it is in, one for each label (N,) and stream of noise."""
    device = next(pair.g.parameters()).device
    made = []
    with torch.no_grad():
        for rows in torch.arange(len(y)).split(batch_size):
            z = noise.take(rows).to(device).normal((pair.g.num_noise,))
            made.append(pair.g(z, y[rows.to(y.device)].to(device)).cpu())
    return torch.cat(made)
