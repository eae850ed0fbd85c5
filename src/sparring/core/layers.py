"""The layers that reference networks are made of beside PyTorch's own; certificates have a rule for each of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class Normalize(nn.Module):
    """(x - mean) / std, with numbers for all of the input or one for each channel (axis 1).

    >>> Normalize(0.5, 0.25)(torch.tensor([[1.0]]))
    tensor([[2.]])
    """

    def __init__(self, mean: float | Sequence[float], std: float | Sequence[float]) -> None:
        super().__init__()
        mean_tensor, std_tensor = (torch.atleast_1d(torch.as_tensor(v, dtype=torch.float32)) for v in (mean, std))
        if not bool((std_tensor > 0).all()) or not bool(mean_tensor.isfinite().all()):
            raise ValueError(f"normalisation needs finite means and std > 0; got mean {mean}, std {std}")
        self.register_buffer("mean", mean_tensor)
        self.register_buffer("std", std_tensor)

    def forward(self, x: Tensor) -> Tensor:
        per_channel = (-1,) + (1,) * (x.ndim - 2)
        return (x - self.mean.view(per_channel)) / self.std.view(per_channel)  # type: ignore[operator]


class Block(nn.Module):
    """The residual block of He et al. 2016: two 3x3 convolutions; a 1x1 one where the shape changes."""

    def __init__(self, inside: int, outside: int, stride: int) -> None:
        super().__init__()
        self.main = nn.Sequential(
            nn.Conv2d(inside, outside, 3, stride, 1, bias=False), nn.BatchNorm2d(outside), nn.ReLU(),
            nn.Conv2d(outside, outside, 3, 1, 1, bias=False), nn.BatchNorm2d(outside),
        )  # fmt: skip
        same = inside == outside and stride == 1
        self.shortcut = nn.Identity() if same else nn.Sequential(
            nn.Conv2d(inside, outside, 1, stride, bias=False), nn.BatchNorm2d(outside)
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.main(x) + self.shortcut(x))


class GlobalMean(nn.Module):
    """(B, C, H, W) -> (B, C)."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean((2, 3))
