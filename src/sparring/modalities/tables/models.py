"""A network for rows, and the bound for rows that nobody may change.

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


class TableMLP(nn.Module):
    """A network of fully connected layers on {"rows" (B, D)} or (B, D) in the table's own units -> logits (B, K).

    asinh of standardised columns (log(1 + value) first, where the schema counts so) tames heavy tails and keeps a
    gradient everywhere, which clamping would not. Mean and spread travel with the weights.

    >>> TableMLP([False], [0.0], [1.0], 2, (8,))({"rows": torch.zeros(3, 1)}).shape
    torch.Size([3, 2])
    """

    log: Tensor
    mean: Tensor
    spread: Tensor

    def __init__(
        self, log: list[bool], mean: list[float], spread: list[float], num_classes: int, widths: tuple[int, ...]
    ) -> None:
        super().__init__()
        self.register_buffer("log", torch.tensor(log))
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float64))
        self.register_buffer("spread", torch.tensor(spread, dtype=torch.float64))
        layers: list[nn.Module] = []
        for inside, outside in zip((len(log), *widths), widths, strict=False):
            layers += [nn.Linear(inside, outside), nn.ReLU()]
        self.layers = nn.Sequential(*layers, nn.Linear(widths[-1], num_classes))

    def forward(self, x: Any) -> Tensor:
        rows = x["rows"] if isinstance(x, Mapping) else x
        logs = torch.where(self.log, rows, 0.0).clamp_min(0).log1p()
        scaled = (torch.where(self.log, logs, rows) - self.mean) / self.spread
        return self.layers(scaled.asinh().to(next(self.layers.parameters()).dtype))


def table_mlp(
    log: list[bool], mean: list[float], spread: list[float], num_classes: int, *, width: int = 128, depth: int = 2
) -> nn.Module:
    """Fully connected layers on standardised columns."""
    return TableMLP(log, mean, spread, num_classes, (width,) * depth)


TABLE_MODELS = {"mlp": table_mlp}


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
