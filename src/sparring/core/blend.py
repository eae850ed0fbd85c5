"""Batches of two sources in a fixed ratio, such as a data set and more examples of its kind.

Shapes: B batch, K classes, *X one input.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sparring.core.batches import Batches
from sparring.core.noise import Noise
from sparring.core.types import device_of, map_inputs


class Blended:
    """Batches whose last rows, a `share` of each, come from `extra` instead of `own`; both are `Batches`.

    An epoch has as many batches as one of `own`, each of its full size. Either source is gone through in an order that
    is shuffled anew whenever it is through, by (its seed, how often it was through) alone, and goes on from epoch to
    epoch; so a run can go on at any batch. Labels are int64 (B,) where both sources have class numbers, else
    probabilities (B, K). Raises ValueError for a share that leaves one of the two without a row.

    >>> own = Batches(torch.zeros(6, 2), torch.zeros(6, dtype=torch.int64), 4)
    >>> extra = Batches(torch.ones(9, 2), torch.ones(9, dtype=torch.int64), 4)
    >>> [y.tolist() for _, y in Blended(own, extra, share=0.25)]
    [[0, 0, 0, 1], [0, 0, 0, 1]]
    """

    def __init__(self, own: Batches, extra: Batches, share: float) -> None:
        size, num = own.batch_size, round(share * own.batch_size)
        if not 0 < num < size:
            raise ValueError(
                f"a share of {share:g} of batches of {size} gives {num} extra examples; expected at least one, and one "
                "of the data's own: choose a share between 0 and 1, or larger batches"
            )
        self.own, self.extra, self.share, self.epoch, self.counts = own, extra, share, 0, (size - num, num)
        soft = [batches.y.shape[1] for batches in (own, extra) if batches.y.ndim == 2]
        self.num_classes = soft[0] if soft else None

    def __len__(self) -> int:
        return len(self.own)

    def __iter__(self) -> Iterator[tuple[Any, Tensor]]:
        return self.epoch_from(0)

    def set_epoch(self, epoch: int) -> None:
        """From the next iteration on, the order and the draws are those of this epoch."""
        self.epoch = epoch

    def epoch_from(self, start_batch: int) -> Iterator[tuple[Any, Tensor]]:
        """The batches of the current epoch from that position on."""
        epoch, sources = self.epoch, tuple(zip((self.own, self.extra), self.counts, strict=True))
        rows = [self._rows(source, count, epoch) for source, count in sources]
        for number in range(start_batch, len(self)):
            (x, y), (x_extra, y_extra) = (
                self._part(source, some[number * count : (number + 1) * count], epoch)
                for (source, count), some in zip(sources, rows, strict=True)
            )
            yield map_inputs(lambda a, b: torch.cat([a, b]), x, x_extra), torch.cat([y, y_extra])

    def _rows(self, source: Batches, count: int, epoch: int) -> Tensor:
        """The rows of one source in that epoch, in their order."""
        total, num = len(source.y), len(self) * count
        rounds = range(epoch * num // total, ((epoch + 1) * num - 1) // total + 1)
        first = epoch * num - rounds[0] * total
        return torch.cat([_order(source.seed, number, total) for number in rounds])[first : first + num]

    def _part(self, source: Batches, rows: Tensor, epoch: int) -> tuple[Any, Tensor]:
        """Those rows of one source, prepared; labels in the blend's form."""
        y = source.y[rows.to(source.y.device)]
        if self.num_classes and y.ndim == 1:
            y = F.one_hot(y, self.num_classes).to(torch.float32)
        return source.inputs(rows.to(device_of(source.x)), epoch), y


def _order(seed: int, number: int, total: int) -> Tensor:
    key = Noise.make(seed, f"order of round {number}", torch.arange(1)).keys.item()
    return torch.randperm(total, generator=torch.Generator().manual_seed(int(key)))
