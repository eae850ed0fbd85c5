"""Batches in a keyed order, and the part of the training data that is held out.

Shapes: N examples, B batch, *X one input.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sparring.core.noise import Noise
from sparring.core.types import Inputs, device_of, size, take

Augment = Callable[[Any, Tensor, int, int], Any]
"""(x (B, *X), index (B,), epoch, seed) -> x: draws are keyed by these three, so that a resumed run repeats them."""


LABELS = ("label", "labels", "y", "target", "targets")
INPUTS = ("pixel_values", "image", "images", "img", "x", "input", "inputs")
"""What the parts of a batch are called where they have names."""


def pair_in(batch: Any) -> tuple[Any, Any] | None:
    """(x, y) of a pair, or of named parts with one label and one input, as Hugging Face has them; None for others.

    >>> pair_in({"pixel_values": 1, "labels": 2, "path": 3}), pair_in((1, 2, 3))
    ((1, 2), None)
    """
    if isinstance(batch, tuple | list):
        return (batch[0], batch[1]) if len(batch) == 2 else None
    if not isinstance(batch, Mapping):
        return None
    labels = [key for key in batch if str(key).lower() in LABELS]
    others = [key for key in batch if key not in labels]
    inputs = [key for key in others if str(key).lower() in INPUTS] or others
    return (batch[inputs[0]], batch[labels[0]]) if len(labels) == len(inputs) == 1 else None


def draw(y: Tensor, count: int, seed: int, *, balanced: bool = False) -> Tensor:
    """(min(count, N),) sorted rows, drawn by seed and row; of fewer, those are among them.

    balanced: equally many of each class, as long as there are any.

    >>> y = torch.tensor([0] * 90 + [1] * 10)
    >>> y[draw(y, 10, seed=0, balanced=True)].bincount().tolist()
    [5, 5]
    """
    order = Noise.make(seed, "examples", torch.arange(len(y))).uniform((1,))[:, 0].argsort(stable=True)
    if balanced:
        drawn = y.cpu()[order]
        places = torch.zeros(len(y), dtype=torch.int64)
        for label in drawn.unique():
            own = (drawn == label).nonzero()[:, 0]
            places[own] = torch.arange(len(own))  # the how-manieth of its class
        order = order[places.argsort(stable=True)]
    return order[:count].sort().values


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
    """Batches (x (B, *X), y int64 (B,)) of `x` (N, *X) or named tensors, and `y` (N,), in the current epoch's order.

    For training, `y` may also be probabilities (N, K) of a float type.

    shuffle: a new order every epoch, from (seed, epoch) alone. prepare: makes model inputs of stored examples, such as
    bytes into floats. augment: changes them at random, see `Augment`; neither batch size nor starting point changes its
    draws. Call `set_epoch` before each epoch, as with DistributedSampler.

    >>> [len(y) for _, y in Batches(torch.rand(5, 2), torch.arange(5), batch_size=2)]
    [2, 2, 1]
    """

    def __init__(
        self, x: Inputs, y: Tensor, batch_size: int, *, seed: int = 0, shuffle: bool = False, drop_last: bool = False,
        prepare: Callable[[Any], Any] | None = None, augment: Augment | None = None,
    ) -> None:  # fmt: skip
        soft = y.ndim == 2 and y.shape[1] > 1 and y.is_floating_point()
        if size(x) != len(y) or len(y) == 0 or not (soft or (y.ndim == 1 and not y.is_floating_point())):
            raise ValueError(
                f"x of {size(x)} examples, y {y.dtype} {tuple(y.shape)}; expected one whole number each, or one row of "
                "probabilities (N, K), and some"
            )
        if batch_size < 1 or (drop_last and batch_size > len(y)):
            raise ValueError(f"batch_size {batch_size} with {len(y)} examples (drop_last={drop_last}) makes no batch")
        self.x, self.y = x, y if soft else y.to(torch.int64)
        self.batch_size, self.seed, self.epoch = batch_size, seed, 0
        self.shuffle, self.drop_last, self.prepare, self.augment = shuffle, drop_last, prepare, augment

    def __len__(self) -> int:
        return len(self.y) // self.batch_size if self.drop_last else -(-len(self.y) // self.batch_size)

    def __iter__(self) -> Iterator[tuple[Any, Tensor]]:
        return self.epoch_from(0)

    def set_epoch(self, epoch: int) -> None:
        """From the next iteration on, the order and the draws are those of this epoch."""
        self.epoch = epoch

    def epoch_from(self, start_batch: int) -> Iterator[tuple[Any, Tensor]]:
        """The batches of the current epoch from that position on; the earlier ones are not computed."""
        if not 0 <= start_batch <= len(self):
            raise ValueError(f"cannot start at batch {start_batch}: an epoch has {len(self)} batches")
        order, epoch = self._order(), self.epoch
        chunks = order.split(self.batch_size)[start_batch : len(self)]
        return ((self.inputs(index, epoch), self.y[index.to(self.y.device)]) for index in chunks)

    def inputs(self, index: Tensor, epoch: int) -> Any:
        """The inputs of these rows, prepared and augmented as in that epoch."""
        x = take(self.x, index)
        x = self.prepare(x) if self.prepare else x
        return self.augment(x, index, epoch, self.seed) if self.augment else x

    def _order(self) -> Tensor:
        if not self.shuffle:
            return torch.arange(len(self.y), device=device_of(self.x))
        key = Noise.make(self.seed, f"order of epoch {self.epoch}", torch.arange(1)).keys.item()
        return torch.randperm(len(self.y), generator=torch.Generator().manual_seed(int(key))).to(device_of(self.x))
