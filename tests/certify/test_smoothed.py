"""The smoothed classifier as a network, and its certificate for `measure`."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from contracts import rand, seeded
from sparring.attacks.catalogue import fgsm, pgd
from sparring.certify import SmoothedNet, SmoothingBound
from sparring.core.noise import Noise
from sparring.evaluation.measure import Evaluation, measure
from sparring.threats import L2, Linf

X = rand(40, 6, seed=3).float()


def linear() -> nn.Linear:
    return seeded(lambda: nn.Linear(6, 2))


def distance(model: nn.Linear, x: Tensor) -> Tensor:
    """(B,) to the boundary of a linear model with two classes, and so of its smoothed form."""
    w, b = model.weight[1] - model.weight[0], model.bias[1] - model.bias[0]
    return ((x @ w + b) / w.norm()).abs().detach()


def test_the_network_is_the_mean_over_its_noises() -> None:
    seen: list[Tensor] = []

    class Base(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(x)
            return x[:, :2]

    out = SmoothedNet(Base(), 0.5, num=7)(X)
    assert len(seen) == 7
    mean = torch.stack([x[:, :2].softmax(1) for x in seen]).mean(0)
    assert torch.allclose(out, mean.log())
    noises = torch.stack([x - X for x in seen])
    assert torch.allclose(noises, noises[:, :1].expand_as(noises), atol=1e-6), "the same noises for every input"
    assert 0.3 < noises[:, 0].std() < 0.7


def test_an_example_alone_gives_what_it_gave_in_the_batch() -> None:
    net = SmoothedNet(linear(), 0.5)
    assert torch.allclose(net(X)[5:6], net(X[5:6]))
    assert torch.equal(net(X), net(X))


def test_certificates_do_not_depend_on_the_batch() -> None:
    model, bound = linear(), SmoothingBound(linear(), 0.5, num_estimate=500)
    y, threat = model(X).argmax(1), L2(0.2)
    noise = Noise.make(7, "test", torch.arange(40))
    whole = bound(model, X, y, threat, noise=noise)
    rows = [torch.arange(i, min(i + 7, 40)) for i in range(0, 40, 7)]
    parts = torch.cat([bound(model, X[i], y[i], threat, noise=noise.take(i)) for i in rows])
    assert torch.equal(whole, parts)
    assert {-1.0, 1.0} == set(whole.tolist())
    assert torch.equal(bound(model, X, y, threat), bound(model, X, y, threat))


def test_the_seed_of_an_evaluation_reaches_the_certificate() -> None:
    model, seen = linear(), []
    bound, y = SmoothingBound(model, 0.5, num_select=8, num_estimate=60), model(X).argmax(1)

    def noting(*arguments: Any, noise: Noise) -> torch.Tensor:
        seen.append(noise.keys)
        return bound(*arguments, noise=noise)

    def judged_by(seed: int, size: int) -> list[bool]:
        cut = list(zip(X.split(size), y.split(size), strict=True))
        found = measure(model, cut, L2(0.2, low=None, high=None), [fgsm], curve=(), certify=noting, seed=seed)
        return found.table["certified"].tolist()

    assert judged_by(0, 40) == judged_by(0, 7) and torch.equal(seen[0], torch.cat(seen[1:]))
    assert judged_by(1, 40) != judged_by(0, 40), "another seed, other noise, and some near examples another verdict"


@pytest.mark.parametrize("radius", [0.05, 0.2, 0.5])
def test_nothing_is_certified_that_could_fall(radius: float) -> None:
    model = linear()
    y = model(X).argmax(1)
    sure = SmoothingBound(model, 0.5, num_estimate=2000)(model, X, y, L2(radius)) > 0
    assert not bool((sure & (distance(model, X) < radius)).any())
    assert not bool(SmoothingBound(model, 0.5)(model, X, 1 - y, L2(radius)).gt(0).any()), "wrong is never certified"


def judged(bound: SmoothingBound, net: nn.Module, y: Tensor) -> Evaluation:
    return measure(net, [(X, y)], L2(0.2, low=None, high=None), [pgd], curve=(), certify=bound)


def test_the_bracket_holds_and_nothing_is_spared() -> None:
    model = linear()
    y = model(X).argmax(1)
    found = judged(SmoothingBound(model, 0.5), SmoothedNet(model, 0.5), y)
    assert found.certified is not None
    assert 0 < found.certified.count <= found.robust.count
    assert found.attacks[0].ran_on == found.clean.count == 40
    assert [f for f in found.findings if f.name == "certificate contradicted"] == []


def test_a_stand_in_that_breaks_where_the_certificate_vouches_is_told() -> None:
    sure, weak = linear(), linear()
    with torch.no_grad():  # the same boundary moved to where it can be crossed
        weak.bias.add_(torch.tensor([0.0, -float((X @ (weak.weight[1] - weak.weight[0])).mean())]))
        sure.bias.copy_(torch.tensor([50.0, 0.0]))
    y = torch.zeros(40, dtype=torch.int64)
    found = judged(SmoothingBound(sure, 0.5), SmoothedNet(weak, 0.5), y)
    told = [f for f in found.findings if f.name == "certificate contradicted"]
    assert len(told) == 1 and told[0].level == "suspect"
    assert told[0].numbers["examples"] == found.clean.count - found.robust.count > 0
    assert found.certified is not None and found.certified.count == found.robust.count


def test_what_cannot_be_smoothed_says_so() -> None:
    with pytest.raises(ValueError, match="sigma > 0"):
        SmoothedNet(linear(), 0.0)
    with pytest.raises(ValueError, match="sigma > 0"):
        SmoothedNet(linear(), math.inf)
    with pytest.raises(ValueError, match="L2 balls"):
        SmoothingBound(linear(), 0.5)(linear(), X, torch.zeros(40, dtype=torch.int64), Linf(0.1))
