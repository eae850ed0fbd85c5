"""Randomised smoothing against classifiers whose smoothed version is known in closed form."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from scipy import optimize, stats
from torch import Tensor, nn

from contracts import SHAPE, rand, seeded, stream
from sparring.certify import Certificate, clopper_pearson_lower, smoothed_certificate, smoothed_predict, smoothed_votes
from sparring.core.types import Cost

SIGMA = 0.4


def linear(num: int = 6) -> tuple[nn.Module, Tensor, float]:
    """Two classes, the second where <w, x> + b > 0; w and b."""
    model = seeded(lambda: nn.Linear(num, 2)).double()
    row = (model.weight[1] - model.weight[0]).detach()
    return model, row, float((model.bias[1] - model.bias[0]).detach())


def at_distances(distances: Tensor, seed: int = 0) -> Tensor:
    """Points (B, 6) that lie so far (with sign) from the border of `linear`."""
    _, row, offset = linear()
    x = 3 * rand(len(distances), 6, seed=seed) - 1
    away = (x @ row + offset) / row.norm()
    return x + (distances.to(x) - away)[:, None] * row / row.norm()


@pytest.mark.parametrize("num", [1, 10, 100, 10_000])
@pytest.mark.parametrize("alpha", [0.001, 0.05, 0.5])
def test_the_lower_bound_is_clopper_and_pearsons(num: int, alpha: float) -> None:
    counts = sorted({0, 1, num // 2, num * 9 // 10, num - 1, num})
    for count, found in zip(counts, clopper_pearson_lower(torch.tensor(counts), num, alpha).tolist(), strict=True):
        interval = stats.binomtest(count, num, alternative="greater").proportion_ci(1 - alpha, method="exact")
        assert found == pytest.approx(interval.low, rel=1e-9, abs=1e-12)


def test_a_linear_classifier_is_certified_up_to_its_border() -> None:
    """Its smoothed version is itself, so the true radius is the distance to the border."""
    model, _, _ = linear()
    distance = torch.linspace(0.3, 3.0, 200).double() * SIGMA
    sign = torch.where(torch.arange(200) % 2 == 0, 1.0, -1.0).double()
    found = smoothed_certificate(model, at_distances(sign * distance), sigma=SIGMA, noise=stream(200))
    assert torch.equal(found.prediction, (sign > 0).long())
    assert bool((found.radius <= distance).all())
    assert bool((found.radius >= 0.8 * distance).all())
    assert found.cost == Cost(forwards=200 * 10_100)
    torch.testing.assert_close(found.radius, SIGMA * torch.from_numpy(stats.norm.ppf(found.p_lower.numpy())))
    # no attack smaller than the certificate changes the smoothed class: straight to the border is the shortest
    y, moved = (sign > 0).long(), at_distances(sign * (distance - found.radius))
    assert torch.equal(model(moved).argmax(1), y)


class Band(nn.Module):
    """Class 1 where 0 < x < width, else class 0: smoothing rounds it off."""

    def __init__(self, width: float) -> None:
        super().__init__()
        self.width = width

    def forward(self, x: Tensor) -> Tensor:
        inside = ((x > 0) & (x < self.width)).double()
        return torch.cat([1 - inside, inside], 1)


@pytest.mark.parametrize("width", [0.4, 1.0])
def test_no_attack_on_the_smoothed_classifier_is_smaller_than_the_certificate(width: float) -> None:
    """P(class 1 at x) is a difference of two normal distributions, and where it crosses 1/2 is found by bisection."""

    def probability(x: float) -> float:
        return float(stats.norm.cdf((width - x) / SIGMA) - stats.norm.cdf(-x / SIGMA))

    x = torch.linspace(-1, width + 1, 41).double()[:, None]
    votes = smoothed_votes(Band(width), x, 4000, sigma=SIGMA, noise=stream(41))
    p = torch.tensor([probability(v) for v in x[:, 0].tolist()]).double()
    assert bool(((votes[:, 1] - 4000 * p).abs() <= 5 * (4000 * p * (1 - p)).sqrt() + 1).all())
    found = smoothed_certificate(Band(width), x, sigma=SIGMA, num_estimate=4000, noise=stream(41))
    if probability(width / 2) < 0.5:
        assert not bool((found.prediction == 1).any()), "the band is too narrow for any smoothed class 1"
        return
    border = optimize.brentq(lambda v: probability(v) - 0.5, -1, width / 2)
    shortest = torch.minimum((x[:, 0] - border).abs(), (x[:, 0] - (width - border)).abs())
    smoothed = (p > 0.5).long()
    sure = found.prediction >= 0
    assert int(sure.sum()) > 30
    assert torch.equal(found.prediction[sure], smoothed[sure])
    assert bool((found.radius <= shortest).all())


def test_at_the_border_both_abstain_as_often_as_promised() -> None:
    """Each class has probability 1/2 there: to name one is the error that alpha limits, nearly sharply."""
    model, _, _ = linear()
    x = at_distances(torch.zeros(1500))
    named = smoothed_predict(model, x, sigma=SIGMA, num=400, alpha=0.1, noise=stream(1500)) >= 0
    exact = 2 * stats.binom.cdf(max(k for k in range(200) if 2 * stats.binom.cdf(k, 400, 0.5) <= 0.1), 400, 0.5)
    assert 0.07 < exact <= 0.1
    assert float(named.float().mean()) == pytest.approx(exact, abs=4 * math.sqrt(exact * (1 - exact) / 1500))
    found = smoothed_certificate(model, x, sigma=SIGMA, num_estimate=400, alpha=0.1, noise=stream(1500))
    named, abstains = found.prediction >= 0, found.prediction == -1
    assert 0.05 < float(named.float().mean()) < 0.125
    assert bool((named | abstains).all())
    assert bool((found.radius[abstains] == 0).all())
    assert bool((found.radius[named] > 0).all())


def test_the_lower_bound_fails_as_rarely_as_promised() -> None:
    """The rate follows exactly when the copies that chose the class do not also vouch for it."""
    model, _, _ = linear()
    num, alpha, p = 50, 0.2, float(stats.norm.cdf(0.05))
    x = at_distances(torch.full((3000,), 0.05 * SIGMA))
    found = smoothed_certificate(
        model, x, sigma=SIGMA, num_select=num, num_estimate=num, alpha=alpha, noise=stream(3000)
    )
    counts = torch.arange(num + 1)
    too_high = (clopper_pearson_lower(counts, num, alpha) > p).numpy()
    first = float(stats.binom.sf(num // 2, num, p))  # ties go to class 0
    exact = sum(
        chance * float(stats.binom.pmf(counts.numpy(), num, own)[too_high].sum())
        for chance, own in ((first, p), (1 - first, 1 - p))
    )
    assert 0.1 < exact < alpha
    wrong = float((found.p_lower > p).double().mean())
    assert wrong == pytest.approx(exact, abs=4 * math.sqrt(exact / 3000))


def test_predict_is_the_two_sided_test() -> None:
    model = seeded(lambda: nn.Linear(6, 4)).double()
    x = rand(40, 6)
    votes = smoothed_votes(model, x, 200, sigma=2.0, noise=stream(40))
    for alpha in (0.001, 0.3):
        found = smoothed_predict(model, x, sigma=2.0, num=200, alpha=alpha, noise=stream(40))
        for row, prediction in zip(votes, found.tolist(), strict=True):
            first, second = row.topk(2).values.tolist()
            sure = stats.binomtest(first, first + second, 0.5).pvalue <= alpha
            assert prediction == (int(row.argmax()) if sure else -1)
        assert 0 < int((found == -1).sum()) < 40


def test_votes_depend_on_the_example_and_its_noise_only() -> None:
    """Not on the batch, not on how many copies go at once; fewer copies are the first of more."""
    model, x = seeded(lambda: nn.Sequential(nn.Flatten(), nn.Linear(70, 4))).double(), rand(*SHAPE)
    votes_of = partial(smoothed_votes, model, sigma=1.0)
    votes = votes_of(x, 250, noise=stream(3))
    assert torch.equal(votes.sum(1), torch.full((3,), 250))
    assert bool((votes[:, -1] == 0).all())
    for size in (1, 7, 100, 150, 1000):
        assert torch.equal(votes_of(x, 250, noise=stream(3), batch_size=size), votes)
    some = torch.tensor([2, 0])
    assert torch.equal(votes_of(x[some], 250, noise=stream(3).take(some)), votes[some])
    assert bool((votes_of(x, 249, noise=stream(3)) <= votes).all())
    assert not torch.equal(votes_of(x, 250, noise=stream(3, seed=1)), votes)
    whole = smoothed_certificate(model, x, sigma=1.0, num_estimate=300, noise=stream(3))
    alone = smoothed_certificate(model, x[some], sigma=1.0, num_estimate=300, noise=stream(3).take(some), batch_size=30)
    for a, b in zip(whole[:3], alone[:3], strict=True):
        assert torch.equal(a[some], b)
    narrow = smoothed_certificate(model.float(), x.float(), sigma=1.0, num_estimate=300, noise=stream(3))
    assert torch.equal(narrow.prediction, whole.prediction)
    assert narrow.radius.dtype == torch.float64


def test_noise_is_sigma_wide_and_fresh_for_the_estimate() -> None:
    seen: list[Tensor] = []

    def spy(x: Tensor) -> Tensor:
        seen.append(x)
        return torch.cat([x[:, :1], 100 + x[:, :1]], 1)

    x = rand(2, 3)
    smoothed_certificate(spy, x, sigma=0.25, num_select=100, num_estimate=1000, noise=stream(2), batch_size=1000)
    copies = (torch.cat(seen).view(11, 2, 100, 3) - x[:, None]) / 0.25  # 100 copies at a time, each example in turn
    assert float(copies.mean()) == pytest.approx(0, abs=5 / math.sqrt(copies.numel()))
    assert float(copies.std()) == pytest.approx(1, abs=5 / math.sqrt(2 * copies.numel()))
    assert len(copies.flatten().unique()) > 0.999 * copies.numel(), "no copy is counted twice"


def test_labels_save_the_copies_of_what_is_lost() -> None:
    model, _, _ = linear()
    x = at_distances(SIGMA * torch.tensor([1.0, -1.0, 2.0, -2.0, 1.5]))
    y = torch.tensor([1, 1, 1, 0, 0])
    free = smoothed_certificate(model, x, sigma=SIGMA, num_estimate=500, noise=stream(5))
    bound = smoothed_certificate(model, x, y, sigma=SIGMA, num_estimate=500, noise=stream(5))
    right = torch.tensor([True, False, True, True, False])
    assert torch.equal(bound.radius, torch.where(right, free.radius, 0))
    assert torch.equal(bound.prediction, torch.tensor([1, 0, 1, 0, 1]))
    assert bound.cost == Cost(forwards=5 * 100 + 3 * 500)
    for radius in (0.0, 0.3, 0.6, torch.tensor([0.1, 0.1, 0.7, 0.7, 0.1])):
        assert torch.equal(bound.covers(y, radius), free.covers(y, radius))
    assert bound.covers(y, 0.0).tolist() == right.tolist()
    nobody = smoothed_certificate(model, x, 1 - free.prediction, sigma=SIGMA, num_estimate=500, noise=stream(5))
    assert nobody.cost == Cost(forwards=500)
    assert not bool(nobody.covers(1 - free.prediction, 0.0).any())


def test_certified_means_right_and_far_enough() -> None:
    found = Certificate(torch.tensor([1, 1, -1, 0]), torch.tensor([0.5, 0.2, 0.0, 0.9]), torch.zeros(4), Cost())
    y = torch.tensor([1, 1, 1, 1])
    assert found.covers(y, 0.0).tolist() == [True, True, False, False]
    assert found.covers(y, 0.5).tolist() == [True, False, False, False]
    assert found.covers(torch.tensor([1, 1, 1, 0]), torch.tensor([0.6, 0.1, 0.0, 0.9]).float()).tolist() == [
        False, True, False, True,
    ]  # fmt: skip


def test_copies_without_finite_logits_vote_for_no_class() -> None:
    def torn(x: Tensor) -> Tensor:
        logits = torch.cat([x[:, :1], 1 + x[:, :1]], 1)
        return torch.where(x[:, :1] > 0.2, math.nan, logits)

    x = torch.tensor([[0.0], [-9.0], [9.0]])
    votes = smoothed_votes(torn, x, 2000, sigma=SIGMA, noise=stream(3))
    assert votes[1:].tolist() == [[0, 2000, 0], [0, 0, 2000]]
    assert float(votes[0, 2]) == pytest.approx(2000 * stats.norm.sf(0.2 / SIGMA), abs=5 * math.sqrt(500))
    assert smoothed_predict(torn, x, sigma=SIGMA, noise=stream(3)).tolist() == [1, 1, -1]
    found = smoothed_certificate(torn, x, sigma=SIGMA, num_estimate=2000, noise=stream(3))
    assert found.prediction.tolist() == [1, 1, -1]
    assert float(found.p_lower[0]) < stats.norm.cdf(0.2 / SIGMA)


def test_the_model_is_judged_in_eval_mode_and_stays_as_it_was(
    stateful: nn.Module, snapshot: Callable[..., Any]
) -> None:
    before, x = snapshot(stateful), rand(*SHAPE)
    first = smoothed_votes(stateful, x, 120, sigma=0.3, noise=stream(3))
    found = smoothed_certificate(stateful, x, sigma=0.3, num_estimate=120, noise=stream(3))
    assert torch.equal(x, rand(*SHAPE))
    assert snapshot(stateful) == before
    assert torch.equal(first, smoothed_votes(stateful.eval(), x, 120, sigma=0.3, noise=stream(3), batch_size=50))
    assert not found.radius.requires_grad


def test_a_random_model_repeats_itself() -> None:
    class Random(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.randn(len(x), 3, dtype=x.dtype)

    state = torch.get_rng_state()
    votes = [smoothed_votes(Random(), rand(4, 2), 500, sigma=0.3, noise=stream(4)) for _ in range(2)]
    assert torch.equal(*votes)
    assert torch.equal(torch.get_rng_state(), state)
    assert len({tuple(row) for row in votes[0].tolist()}) == 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sigma": 0.0}, "sigma"),
        ({"sigma": math.nan}, "sigma"),
        ({"alpha": 0.0}, "alpha"),
        ({"alpha": 1.0}, "alpha"),
        ({"num_select": 0}, "at least one copy"),
        ({"num_estimate": 0}, "at least one copy"),
        ({"batch_size": 0}, "one at a time"),
        ({"x": torch.zeros(3, 4, dtype=torch.int64)}, "float type"),
        ({"model": nn.Flatten(0)}, "logits"),
    ],
)
def test_errors_say_what_is_wrong(change: dict[str, Any], message: str) -> None:
    given = {"model": nn.Linear(4, 3), "x": torch.rand(3, 4), "sigma": 0.5}
    with pytest.raises(ValueError, match=message):
        smoothed_certificate(**(given | change))
