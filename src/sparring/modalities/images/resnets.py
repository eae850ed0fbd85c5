"""The two networks in which the literature compares adversarial training: PreActResNet-18 and WideResNet-d-w.

Shapes: inputs (B, C, H, W), values in [0, 1], normalised inside; logits (B, K).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

from torch import Tensor, nn

from sparring.core.layers import GlobalMean

Activation = Literal["relu", "silu"]
UNITS: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "silu": nn.SiLU}


class PreActBlock(nn.Module):
    """x + conv(act(norm(conv(act(norm(x)))))); where the shape changes, a 1x1 convolution of act(norm(x)) for x."""

    def __init__(self, inside: int, outside: int, stride: int, activation: type[nn.Module]) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.BatchNorm2d(inside), activation())
        self.main = nn.Sequential(
            nn.Conv2d(inside, outside, 3, stride, 1, bias=False), nn.BatchNorm2d(outside), activation(),
            nn.Conv2d(outside, outside, 3, 1, 1, bias=False),
        )  # fmt: skip
        same = inside == outside and stride == 1
        self.shortcut = None if same else nn.Conv2d(inside, outside, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        begun = self.first(x)
        out: Tensor = self.main(begun) + (x if self.shortcut is None else self.shortcut(begun))
        return out


def preact_resnet(channels: int, num_classes: int, normalize: nn.Module, activation: Activation = "relu") -> nn.Module:
    """11.2 million weights. Source: He 2016 (identity mappings); a last norm as in Rice 2020's `preactresnet.py`."""
    return _network(channels, num_classes, normalize, activation, 64, (64, 128, 256, 512), 2)


def wide_net(
    channels: int, num_classes: int, normalize: nn.Module, depth: int, width: int, activation: Activation
) -> nn.Module:
    """WideResNet-depth-width without dropout; 28-10 has 36.5 million weights.

    Source: Zagoruyko 2016, as TRADES' `wideresnet.py` builds it; SiLU after Gowal 2020. ValueError for depths that are
    not 6 n + 4.
    """
    if depth < 10 or (depth - 4) % 6:
        raise ValueError(f"depth={depth}; a WideResNet has 6 n + 4 layers, such as 10, 16, 28, 34 or 70")
    return _network(
        channels, num_classes, normalize, activation, 16, (16 * width, 32 * width, 64 * width), (depth - 4) // 6
    )


def _network(
    channels: int, num_classes: int, normalize: nn.Module, activation: str, stem: int, widths: Sequence[int], num: int
) -> nn.Module:
    if activation not in UNITS:
        raise ValueError(f"activation={activation!r}; expected {' or '.join(UNITS)}")
    make, blocks, inside = UNITS[activation], [], stem
    for stage, outside in enumerate(widths):
        for number in range(num):
            blocks.append(PreActBlock(inside, outside, 2 if stage and number == 0 else 1, make))
            inside = outside
    net = nn.Sequential(
        normalize, nn.Conv2d(channels, stem, 3, padding=1, bias=False), *blocks,
        nn.BatchNorm2d(inside), make(), GlobalMean(), nn.Linear(inside, num_classes),
    )  # fmt: skip
    for layer in net.modules():
        if isinstance(layer, nn.Conv2d):  # He's, by what goes out, as in both sources
            nn.init.normal_(layer.weight, std=math.sqrt(2 / (layer.kernel_size[0] ** 2 * layer.out_channels)))
    nn.init.zeros_(net[-1].bias)  # type: ignore[arg-type]
    return net
