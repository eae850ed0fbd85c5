"""The CIFAR-10 networks of the evaluation bench: at most 10 MFLOP per image, so that two cores finish in an hour.

Named on the command line as `--model benchmarks/networks.py:cifar_plain`.
"""

from __future__ import annotations

from torch import nn

from sparring.modalities.images import Normalize, resnet_small


def cifar_plain(num_classes: int = 10) -> nn.Module:
    """Two strided convolutions and two linear layers: 3.5 M multiply-adds, 7.1 MFLOP."""
    return nn.Sequential(
        Normalize((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
        nn.Conv2d(3, 32, 4, stride=2, padding=1), nn.ReLU(),
        nn.Conv2d(32, 64, 4, stride=2, padding=1), nn.ReLU(),
        nn.Flatten(), nn.Linear(64 * 8 * 8, 256), nn.ReLU(), nn.Linear(256, num_classes),
    )  # fmt: skip


def cifar_three() -> nn.Module:
    """`cifar_plain` for three classes."""
    return cifar_plain(3)


def cifar_residual() -> nn.Module:
    """A ResNet-8 of width 8 with BatchNorm: 3.2 M multiply-adds, 6.4 MFLOP."""
    return resnet_small((3, 32, 32), 10, width=8)
