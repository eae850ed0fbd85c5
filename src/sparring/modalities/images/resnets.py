"""Networks of pre-activation blocks, in which the literature compares adversarial training: PreActResNet, WideResNet.

Shapes: inputs (B, C, H, W), values in [0, 1], normalised inside; logits (B, K).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

from torch import Tensor, nn

from sparring.core.layers import GlobalMean

Activation = Literal["relu", "silu"]


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


def preact_network(
    channels: int, num_classes: int, normalize: nn.Module, activation: Activation, stem: int, widths: Sequence[int],
    num_blocks: int,
) -> nn.Module:  # fmt: skip
    """A first convolution of `stem` channels, `num_blocks` blocks of each width, halving the sides between them, and a
    last norm before the mean.

    Source: He 2016 (identity mappings), Zagoruyko 2016; the last norm as in Rice 2020's `preactresnet.py` and TRADES'
    `wideresnet.py`, the initial weights (He's, by what goes out) as in the latter; SiLU after Gowal 2020.
    """
    make = {"relu": nn.ReLU, "silu": nn.SiLU}[activation]
    blocks, inside = [], stem
    for stage, outside in enumerate(widths):
        for number in range(num_blocks):
            blocks.append(PreActBlock(inside, outside, 2 if stage and number == 0 else 1, make))
            inside = outside
    net = nn.Sequential(
        normalize, nn.Conv2d(channels, stem, 3, padding=1, bias=False), *blocks,
        nn.BatchNorm2d(inside), make(), GlobalMean(), nn.Linear(inside, num_classes),
    )  # fmt: skip
    for layer in net.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.normal_(layer.weight, std=math.sqrt(2 / (layer.kernel_size[0] ** 2 * layer.out_channels)))
    nn.init.zeros_(net[-1].bias)  # type: ignore[arg-type]
    return net
