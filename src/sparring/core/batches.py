"""Batches in a keyed order, and the part of the training data that is held out.

Shapes: N examples, B batch, C H W one image, *X one input.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from sparring.core.noise import Noise
from sparring.modalities.images.data import scale


def hold_out(y: Tensor, fraction: float, seed: int) -> tuple[Tensor, Tensor]:
    """(train_index, held_out_index), sorted int64: part of the training data that checkpoints are chosen on (the test
    data must not choose), every class in its share where there are enough. ValueError when nothing can be held out.

    >>> [len(part) for part in hold_out(torch.arange(100) % 2, 0.1, seed=0)]
    [90, 10]
    """
    from sklearn.model_selection import train_test_split

    if not 0 < fraction < 1:
        raise ValueError(f"the share to hold out must lie between 0 and 1, such as 0.1; got {fraction}")
    classes, counts = np.unique(y.cpu().numpy(), return_counts=True)
    rare = counts.min() < 2 or round(fraction * len(y)) < len(classes)  # too few to give every class its share
    try:
        parts = train_test_split(
            np.arange(len(y)), test_size=fraction, stratify=None if rare else y.cpu().numpy(), random_state=seed
        )
    except ValueError as error:
        raise ValueError(f"cannot hold out {fraction:.3g} of {len(y)} examples: {error}") from error
    return torch.from_numpy(np.sort(parts[0])), torch.from_numpy(np.sort(parts[1]))


class Batches:
    """Batches (x float32 (B, *X), y int64 (B,)) of `x` (N, *X) and `y` (N,), in the current epoch's order.

    shuffle: a new order every epoch, from (seed, epoch) alone. crop: pad images by that many black pixels
    and cut at random; flip: mirror half of the images; their draws are keyed by (seed, epoch, example), so
    neither batch size nor starting point changes them. Call `set_epoch` before each epoch, as with
    DistributedSampler.

    >>> [len(y) for _, y in Batches(torch.rand(5, 2), torch.arange(5), batch_size=2)]
    [2, 2, 1]
    """

    def __init__(
        self, x: Tensor, y: Tensor, batch_size: int, *, seed: int = 0, shuffle: bool = False, crop: int = 0,
        flip: bool = False, drop_last: bool = False,
    ) -> None:  # fmt: skip
        if len(x) != len(y) or len(y) == 0 or y.ndim != 1 or y.is_floating_point():
            raise ValueError(
                f"x {tuple(x.shape)}, y {y.dtype} {tuple(y.shape)}; expected one whole number each, and some"
            )
        if batch_size < 1 or (drop_last and batch_size > len(x)):
            raise ValueError(f"batch_size {batch_size} with {len(x)} examples (drop_last={drop_last}) makes no batch")
        if crop < 0 or ((crop or flip) and x.ndim != 4):
            raise ValueError(f"crop={crop}, flip={flip} with inputs {tuple(x.shape[1:])}; they need images (C, H, W)")
        self.x, self.y, self.batch_size, self.seed, self.epoch = x, y.to(torch.int64), batch_size, seed, 0
        self.shuffle, self.crop, self.flip, self.drop_last = shuffle, crop, flip, drop_last

    def __len__(self) -> int:
        return len(self.y) // self.batch_size if self.drop_last else -(-len(self.y) // self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return self.epoch_from(0)

    def set_epoch(self, epoch: int) -> None:
        """From the next iteration on, the order and the draws are those of this epoch."""
        self.epoch = epoch

    def epoch_from(self, start_batch: int) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of the current epoch from that position on; the earlier ones are not computed."""
        if not 0 <= start_batch <= len(self):
            raise ValueError(f"cannot start at batch {start_batch}: an epoch has {len(self)} batches")
        order, epoch = self._order(), self.epoch
        chunks = order.split(self.batch_size)[start_batch : len(self)]
        return ((self._augment(scale(self.x[i]), i, epoch), self.y[i.to(self.y.device)]) for i in chunks)

    def _order(self) -> Tensor:
        if not self.shuffle:
            return torch.arange(len(self.y), device=self.x.device)
        key = Noise.make(self.seed, f"order of epoch {self.epoch}", torch.arange(1)).keys.item()
        return torch.randperm(len(self.y), generator=torch.Generator().manual_seed(int(key))).to(self.x.device)

    def _augment(self, x: Tensor, index: Tensor, epoch: int) -> Tensor:
        """Crop and mirror in one gather: rows (B, H) and columns (B, W) of the padded image."""
        if not self.crop and not self.flip:
            return x
        (num, _, height, width), device = x.shape, x.device
        noise = Noise.make(self.seed, f"crop and flip, epoch {epoch}", index)
        corner = (noise.uniform((2,)) * (2 * self.crop + 1)).long()
        rows = corner[:, :1] + torch.arange(height, device=device)
        columns = corner[:, 1:] + torch.arange(width, device=device)
        if self.flip:
            columns = torch.where(noise.uniform((1,), draw=1) < 0.5, columns.flip(1), columns)
        padded = F.pad(x, (self.crop,) * 4).movedim(1, 3)
        example = torch.arange(num, device=device)[:, None, None]
        return padded[example, rows[:, :, None], columns[:, None, :]].movedim(3, 1).contiguous()
