"""Rounds of found examples. Oracles: a threshold between points on a line, whose attacks are a closed form; trees."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.tree import DecisionTreeClassifier
from torch import Tensor, nn

from sparring import BlackBox, Linf, fgsm, pgd, square
from sparring.core.types import AttackResult, Cost
from sparring.training.found import train_on_found

X = torch.linspace(0.05, 0.95, 40)[:, None].repeat(1, 2)
Y = (X[:, 0] > 0.5).long()


class Middle(nn.Module):
    """The threshold in the middle between the classes, as the data say it is."""

    def __init__(self, x: Tensor, y: Tensor) -> None:
        super().__init__()
        self.at = nn.Buffer((x[y == 0, 0].max() + x[y == 1, 0].min()) / 2)

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([self.at - x[:, 0], x[:, 0] - self.at], 1)


def test_what_is_found_is_what_the_closed_form_says_and_nothing_else_is_added() -> None:
    fitted: list[Any] = []

    def fit(x: Tensor, y: Tensor) -> Middle:
        fitted.append((x.clone(), y.clone()))
        return Middle(x, y)

    own = Y == 1
    found = train_on_found(fit, X, Y, Linf(0.1), fgsm, num_rounds=2, num_tried=40, among=own)
    at = float(Middle(X, Y).at)
    turned = own & (X[:, 0] - 0.1 < at)  # and only of class 1, which the opponent owns
    assert found.found[0] == int(turned.sum()) > 0 and found.tried[0] == int(own.sum())
    x, y = fitted[1]
    assert torch.equal(x[:40], X) and torch.equal(y[:40], Y) and bool((y[40:] == 1).all())
    assert torch.allclose(x[40:, 0].sort().values, (X[turned][:, 0] - 0.1).sort().values, atol=1e-6)
    assert len(fitted) == 3 and len(found.y) == 40 + sum(found.found) and torch.equal(found.x, fitted[2][0])
    assert found.model.at < at  # the threshold moved away from what was found


def test_it_is_drawn_by_the_seed_alone_and_ends_where_nothing_falls() -> None:
    fit = Middle
    first, again, other = (
        train_on_found(fit, X, Y, Linf(0.1), pgd, num_rounds=1, num_tried=10, seed=seed) for seed in (0, 0, 1)
    )
    torch.manual_seed(99)
    assert torch.equal(first.x, again.x) and first.tried[0] <= 10 and not torch.equal(first.x[40:], other.x[40:])
    parts = train_on_found(fit, X, Y, Linf(0.1), pgd, num_rounds=1, num_tried=10, batch_size=3)
    assert torch.equal(parts.x, first.x)
    safe = train_on_found(fit, X, Y, Linf(0.001), pgd, num_rounds=5, num_tried=40)
    assert safe.found == (0,) and len(safe.y) == 40 and isinstance(safe.model, Middle)


def test_a_claim_that_does_not_hold_adds_nothing() -> None:
    def liar(threat: Any) -> Any:
        def attack(model: Any, x: Tensor, y: Tensor, *, noise: Any = None) -> AttackResult:
            z = torch.full_like(x, 5.0) * (1 - 2 * y[:, None])  # far outside
            return AttackResult(x + z, z, z.abs().amax(1), None, torch.ones_like(y, dtype=torch.bool), Cost())

        return attack

    assert train_on_found(Middle, X, Y, Linf(0.01), liar, num_rounds=1, num_tried=40).found == (0,)


def test_trees_learn_what_was_found() -> None:
    draw = np.random.default_rng(0)
    x = torch.from_numpy(draw.random((200, 3)))
    y = (x[:, 0] > 0.5).long()

    def fit(x: Tensor, y: Tensor) -> BlackBox:
        return BlackBox(DecisionTreeClassifier(random_state=0).fit(x.numpy(), y.numpy()))

    search = partial(square, num_queries=60)
    found = train_on_found(fit, x, y, Linf(0.05), search, num_rounds=2, num_tried=200)
    assert found.found[0] > 0 and all(len(part) == len(found.y) for part in (found.x,))
    assert bool((found.model(found.x).argmax(1) == found.y).float().mean() > 0.98)


def test_settings_that_make_no_round_are_told() -> None:
    for options in ({"num_rounds": 0}, {"num_tried": 0}):
        with pytest.raises(ValueError, match="expected at least one"):
            train_on_found(Middle, X, Y, Linf(0.1), pgd, **options)
