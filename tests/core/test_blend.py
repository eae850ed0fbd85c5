"""Two sources of batches in a fixed ratio: who is seen how often, and where a stopped run goes on."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from sparring.core.batches import Batches
from sparring.core.blend import Blended


def source(num: int, low: int, batch_size: int = 4, **options: Any) -> Batches:
    """Examples whose one value is their number, from `low` on."""
    x = torch.arange(low, low + num, dtype=torch.float32)[:, None]
    return Batches(x, x[:, 0].long() % 3, batch_size, **options)


def seen(batches: Blended, epochs: int) -> list[list[Tensor]]:
    found = []
    for epoch in range(epochs):
        batches.set_epoch(epoch)
        found.append([x[:, 0] for x, _ in batches])
    return found


@pytest.mark.parametrize("share", [0.25, 0.5, 0.75])
def test_every_example_comes_once_before_any_comes_twice(share: float) -> None:
    blend = Blended(source(10, 0, seed=1), source(7, 100, seed=2), share)
    num = round(4 * share)
    epochs = seen(blend, 9)
    assert all(len(batches) == 3 == len(blend) for batches in epochs)
    for part, total in ((slice(None, 4 - num), 10), (slice(4 - num, None), 7)):
        stream = torch.cat([batch[part] for batches in epochs for batch in batches])
        assert len(stream) == 27 * (4 - num if total == 10 else num)
        rounds = [stream[i : i + total] for i in range(0, len(stream), total)]
        assert all(len(one.unique()) == len(one) for one in rounds)
        assert len(rounds) > 2 and not torch.equal(rounds[0], rounds[1]), "each round has another order"
    assert all(bool((batch[: 4 - num] < 100).all()) and bool((batch[4 - num :] >= 100).all()) for batch in epochs[0])


def test_any_batch_of_any_epoch_is_the_same_when_begun_there() -> None:
    def blend() -> Blended:
        def shake(x: Tensor, index: Tensor, epoch: int, seed: int) -> Tensor:
            return x + 0.01 * epoch + 0.001 * index[:, None] + 0.0001 * seed

        return Blended(source(10, 0, seed=1, augment=shake), source(7, 100, seed=2, augment=shake), 0.5)

    whole = blend()
    for epoch in range(3):
        whole.set_epoch(epoch)
        batches = list(whole)
        for start in range(len(batches) + 1):
            other = blend()
            other.set_epoch(epoch)
            rest = list(other.epoch_from(start))
            assert len(rest) == len(batches) - start
            for (x, y), (x_there, y_there) in zip(rest, batches[start:], strict=True):
                assert torch.equal(x, x_there) and torch.equal(y, y_there)


def test_soft_labels_of_one_make_soft_labels_of_all() -> None:
    soft = torch.tensor([[0.5, 0.25, 0.25], [0.0, 1.0, 0.0]])
    blend = Blended(source(6, 0), Batches(torch.ones(2, 1), soft, 4), 0.5)
    for x, y in blend:
        assert y.dtype == torch.float32 and y.shape == (4, 3)
        assert torch.equal(y[:2].argmax(1), x[:2, 0].long() % 3) and bool((y[:2].amax(1) == 1).all())
        assert torch.equal(y[2:].sort(0).values, soft.sort(0).values)
    hard = next(iter(Blended(source(6, 0), source(3, 50), 0.5)))[1]
    assert hard.dtype == torch.int64 and hard.shape == (4,)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.9, 1.0, -1.0, 2.0])
def test_a_share_that_leaves_nothing_is_refused(share: float) -> None:
    with pytest.raises(ValueError, match="expected at least one, and one of the data's own"):
        Blended(source(6, 0), source(3, 50), share)


def test_named_inputs_are_blended_too() -> None:
    parts = [Batches({"ids": torch.full((5, 2), n)}, torch.zeros(5, dtype=torch.long), 4) for n in (1, 2)]
    for x, _ in Blended(parts[0], parts[1], 0.25):
        assert x["ids"][:, 0].tolist() == [1, 1, 1, 2]


def test_soft_labels_that_are_no_probabilities_are_no_labels() -> None:
    for y in (torch.rand(5), torch.rand(5, 1), torch.rand(4, 3)):
        with pytest.raises(ValueError, match="expected one whole number each, or one row of probabilities"):
            Batches(torch.rand(5, 2), y, 2)
    assert math.isclose(next(iter(Batches(torch.rand(5, 2), torch.full((5, 4), 0.25), 5)))[1].sum(), 5)
