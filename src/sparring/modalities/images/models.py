"""Reference networks for images and feature vectors: small, plain, with the normalisation inside.

Shapes: inputs (B, *X) with X = (C, H, W) or (D,), values in [0, 1]; logits (B, K).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

from torch import nn

from sparring.adapters.files import build_model
from sparring.core.layers import Block, GlobalMean, Normalize
from sparring.modalities.images.resnets import Activation, preact_network

Shape = Sequence[int]


def _default_normalize(shape: Shape) -> Normalize:
    """CIFAR-10's statistics for colour, [-1, 1] for other images, the identity for feature vectors."""
    if len(shape) != 3:
        return Normalize(0.0, 1.0)
    if shape[0] == 3:
        return Normalize((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))
    return Normalize(0.5, 0.5)


def mlp(
    shape: Shape, num_classes: int, hidden: Sequence[int] = (128, 128), *, normalize: nn.Module | None = None
) -> nn.Module:
    """A fully connected ReLU network for inputs of any shape."""
    widths = [math.prod(shape), *hidden]
    layers: list[nn.Module] = [normalize or _default_normalize(shape), nn.Flatten()]
    for inside, outside in itertools.pairwise(widths):
        layers += [nn.Linear(inside, outside), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(widths[-1], num_classes))


def cnn_small(shape: Shape, num_classes: int, *, normalize: nn.Module | None = None) -> nn.Module:
    """Three convolutions and a linear layer, for images of 8x8 pixels and more."""
    channels, height, width = _image(shape, "cnn-small", 8)
    left = [-(-side // 4) for side in (height, width)]  # two strides of 2, rounded up
    window = [side // 2 for side in left]
    features = 64 * (left[0] // window[0]) * (left[1] // window[1])
    return nn.Sequential(
        normalize or _default_normalize(shape),
        nn.Conv2d(channels, 32, 3, padding=1), nn.ReLU(),
        nn.Conv2d(32, 64, 3, stride=2, padding=1), nn.ReLU(),
        nn.Conv2d(64, 64, 3, stride=2, padding=1), nn.ReLU(),
        nn.AvgPool2d((window[0], window[1])), nn.Flatten(), nn.Linear(features, num_classes),
    )  # fmt: skip


def cnn_mnist(
    shape: Shape, num_classes: int, widths: Sequence[int] = (16, 32, 100), *, normalize: nn.Module | None = None
) -> nn.Module:
    """Two convolutions (16, 32) and two linear layers (100, K) for 28x28 pixels, taken as they are.

    Source: Wong, Rice and Kolter 2020, "Fast is better than free"; the net of the authors' MNIST code.
    """
    channels, height, width = _image(shape, "cnn-mnist", 28)
    if (height, width) != (28, 28):
        raise ValueError(f"cnn-mnist takes images of 28x28 pixels, got {height}x{width}; use {default_for(shape)}")
    first, second, hidden = widths
    return nn.Sequential(
        normalize or Normalize(0.0, 1.0),
        nn.Conv2d(channels, first, 4, stride=2, padding=1), nn.ReLU(),
        nn.Conv2d(first, second, 4, stride=2, padding=1), nn.ReLU(),
        nn.Flatten(), nn.Linear(second * 7 * 7, hidden), nn.ReLU(), nn.Linear(hidden, num_classes),
    )  # fmt: skip


def cnn_mnist_wide(shape: Shape, num_classes: int, *, normalize: nn.Module | None = None) -> nn.Module:
    """`cnn_mnist` with widths 32, 64 and 256."""
    return cnn_mnist(shape, num_classes, (32, 64, 256), normalize=normalize)


def cnn_ibp(
    shape: Shape, num_classes: int, width: int = 16, hidden: int = 100, *, normalize: nn.Module | None = None
) -> nn.Module:
    """Two 4x4 convolutions, of stride 2 and 1, and two linear layers: interval bounds stay tight on it.

    Source: Gowal 2018, the network `small` of the authors' code (width 16, hidden 100).
    """
    channels, *sides = _image(shape, "cnn-ibp", 10)
    left = [(side - 4) // 2 + 1 - 3 for side in sides]
    return nn.Sequential(
        normalize or Normalize(0.0, 1.0),
        nn.Conv2d(channels, width, 4, stride=2), nn.ReLU(), nn.Conv2d(width, 2 * width, 4), nn.ReLU(), nn.Flatten(),
        nn.Linear(2 * width * left[0] * left[1], hidden), nn.ReLU(), nn.Linear(hidden, num_classes),
    )  # fmt: skip


def resnet_small(
    shape: Shape, num_classes: int, width: int = 16, num_blocks: int = 1, *, normalize: nn.Module | None = None
) -> nn.Module:
    """A CIFAR ResNet of depth 6 * num_blocks + 2; by default 12.5 M multiply-adds at 3x32x32."""
    channels, _, _ = _image(shape, "resnet-small", 8)
    blocks, inside = [], width
    for stage, outside in enumerate((width, 2 * width, 4 * width)):
        for number in range(num_blocks):
            blocks.append(Block(inside, outside, stride=2 if stage and number == 0 else 1))
            inside = outside
    stem = (nn.Conv2d(channels, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
    return nn.Sequential(
        normalize or _default_normalize(shape), *stem, *blocks, GlobalMean(), nn.Linear(inside, num_classes)
    )


def cnn_patches(
    shape: Shape, num_classes: int, patch: int = 2, width: int = 64, num_blocks: int = 2, *,
    normalize: nn.Module | None = None,
) -> nn.Module:  # fmt: skip
    """Residual blocks on patches of `patch` x `patch` pixels, all of one width: few large steps, as CPUs like them.

    By default 38 M multiply-adds at 3x32x32; a patch of 4 pixels takes a quarter of them.
    """
    channels, _, _ = _image(shape, "cnn-patches", 2 * patch)
    normalize = normalize or _default_normalize(shape)
    stem = (nn.Conv2d(channels, width, patch, stride=patch, bias=False), nn.BatchNorm2d(width), nn.ReLU())
    blocks = [Block(width, width, stride=1) for _ in range(num_blocks)]
    return nn.Sequential(normalize, *stem, *blocks, GlobalMean(), nn.Linear(width, num_classes))


def preact_resnet18(
    shape: Shape, num_classes: int, activation: Activation = "relu", *, normalize: nn.Module | None = None
) -> nn.Module:
    """The network of most papers on adversarial training, 11.2 million weights; activation relu or silu."""
    channels, _, _ = _image(shape, "preact-resnet18", 8)
    normalize = normalize or _default_normalize(shape)
    return preact_network(channels, num_classes, normalize, activation, 64, (64, 128, 256, 512), 2)


def wide_resnet(
    shape: Shape, num_classes: int, depth: int = 28, width: int = 10, activation: Activation = "relu", *,
    normalize: nn.Module | None = None,
) -> nn.Module:  # fmt: skip
    """WideResNet-28-10 (36.5 million weights, no dropout) and its kin, such as `wide-resnet:depth=34,width=10`.

    ValueError for depths that are not 6 n + 4.
    """
    if depth < 10 or (depth - 4) % 6:
        raise ValueError(f"depth={depth}; a WideResNet has 6 n + 4 layers, such as 10, 16, 28, 34 or 70")
    channels, _, _ = _image(shape, "wide-resnet", 8)
    widths, normalize = (16 * width, 32 * width, 64 * width), normalize or _default_normalize(shape)
    return preact_network(channels, num_classes, normalize, activation, 16, widths, (depth - 4) // 6)


MODELS: dict[str, Callable[..., nn.Module]] = {
    "mlp": mlp, "cnn-small": cnn_small, "cnn-mnist": cnn_mnist, "cnn-mnist-wide": cnn_mnist_wide,
    "cnn-ibp": cnn_ibp, "resnet-small": resnet_small, "cnn-patches": cnn_patches,
    "preact-resnet18": preact_resnet18, "wide-resnet": wide_resnet,
}  # fmt: skip


def build(name: str, shape: Shape, num_classes: int, seed: int) -> nn.Module:
    """The network of that name with the initial weights of that seed; the global generator stays as it was.

    Raises ValueError for an unknown name, or a shape that the network cannot take.

    >>> build("mlp", (20,), 3, seed=0)(torch.zeros(2, 20)).shape
    torch.Size([2, 3])
    """
    return build_model(name, MODELS, seed, {"shape": shape, "num_classes": num_classes})


def default_for(shape: Shape) -> str:
    """The name of the network that suits inputs of this shape.

    >>> default_for((1, 28, 28)), default_for((41,))
    ('cnn-mnist', 'mlp')
    """
    if len(shape) != 3:
        return "mlp"
    return {(28, 28): "cnn-mnist", (32, 32): "resnet-small"}.get((shape[1], shape[2]), "cnn-small")


def _image(shape: Shape, name: str, smallest: int) -> tuple[int, int, int]:
    """(C, H, W), or ValueError."""
    if len(shape) != 3 or min(shape[1:]) < smallest:
        raise ValueError(
            f"{name} takes images (C, H, W) of {smallest}x{smallest} pixels and more, got inputs "
            f"{tuple(shape)}; use mlp for feature vectors and smaller images"
        )
    return shape[0], shape[1], shape[2]
