"""Networks for rows, and the bound for rows that nobody may change.

Shapes: B rows, D columns, K classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sparring.core.noise import Noise
from sparring.core.objectives import margin
from sparring.core.types import Model
from sparring.modalities.tables.threats import Columns


class TableNetwork(nn.Module):
    """Layers on {"rows" (B, D)} or (B, D) in the table's own units -> logits (B, K).

    asinh of standardised columns (log(1 + value) first, where the schema counts so) tames heavy tails and keeps a
    gradient everywhere, which clamping would not. Mean and spread travel with the weights.

    >>> TableNetwork([False], [0.0], [1.0], nn.Linear(1, 2))({"rows": torch.zeros(3, 1)}).shape
    torch.Size([3, 2])
    """

    log: Tensor
    mean: Tensor
    spread: Tensor

    def __init__(self, log: list[bool], mean: list[float], spread: list[float], layers: nn.Module) -> None:
        super().__init__()
        self.register_buffer("log", torch.tensor(log))
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float64))
        self.register_buffer("spread", torch.tensor(spread, dtype=torch.float64))
        self.layers = layers

    def forward(self, x: Any) -> Tensor:
        rows = x["rows"] if isinstance(x, Mapping) else x
        logs = torch.where(self.log, rows, 0.0).clamp_min(0).log1p()
        scaled = (torch.where(self.log, logs, rows) - self.mean) / self.spread
        return self.layers(scaled.asinh().to(next(self.layers.parameters()).dtype))


class Residual(nn.Sequential):
    """x + layers(x)."""

    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


def table_mlp(
    log: list[bool], mean: list[float], spread: list[float], num_classes: int, *, width: int = 128, depth: int = 2
) -> nn.Module:
    """Fully connected layers on standardised columns."""
    layers: list[nn.Module] = []
    for i in range(depth):
        layers += [nn.Linear(width if i else len(log), width), nn.ReLU()]
    return TableNetwork(log, mean, spread, nn.Sequential(*layers, nn.Linear(width, num_classes)))


def table_resnet(
    log: list[bool], mean: list[float], spread: list[float], num_classes: int, *, width: int = 128, depth: int = 2,
    dropout: float = 0.0,
) -> nn.Module:  # fmt: skip
    """Blocks of two layers around which the input goes too, on standardised columns (Gorishniy 2021, section 3.2)."""

    def block() -> nn.Module:
        inner = [nn.Linear(width, 2 * width), nn.ReLU(), nn.Dropout(dropout), nn.Linear(2 * width, width)]
        return Residual(nn.BatchNorm1d(width), *inner, nn.Dropout(dropout))

    blocks, last = [block() for _ in range(depth)], [nn.BatchNorm1d(width), nn.ReLU(), nn.Linear(width, num_classes)]
    return TableNetwork(log, mean, spread, nn.Sequential(nn.Linear(len(log), width), *blocks, *last))


TABLE_MODELS = {"mlp": table_mlp, "resnet": table_resnet}


@dataclass(frozen=True)
class Untouched:
    """The exact bound for rows that are not the opponent's: their clean margin; below 0 for all others."""

    def __call__(self, model: Model, x: Any, y: Tensor, threat: Columns, *, noise: Noise) -> Tensor:
        """(B,) lower bounds of the margins."""
        own = -margin.score(model(x), y)
        return torch.where(x["may_change"], -torch.ones_like(own), own)


def certify_untouched(model: Any, threat: Any) -> tuple[Any, str]:
    """The bound for rows that nobody may change, so that they are not attacked."""
    return (Untouched(), "") if isinstance(threat, Columns) else (None, "only `columns` says whose rows may change")
