"""Distances and shares between feature sets, against other people's code, closed forms and brute force."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm
from torch import Tensor

from sparring.quality.metrics import class_entropy, frechet_distance, kernel_distance, nearest, neighbour_shares


def points(num: int, dims: int, seed: int, shift: float = 0.0) -> Tensor:
    return torch.randn(num, dims, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + shift


A, B = points(60, 5, 0), 1.1 * points(45, 5, 1, 0.6)


def test_frechet_distance_is_the_formula_with_another_root_of_a_matrix() -> None:
    a, b = A.numpy(), B.numpy()
    covs = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root = sqrtm(covs[0] @ covs[1]).real
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(covs[0] + covs[1] - 2 * root)
    assert frechet_distance(A, B) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(A, A) == pytest.approx(0, abs=1e-9)
    few = points(3, 8, 2)  # a covariance without full rank
    assert frechet_distance(few, few + 2) == pytest.approx(8 * 4, rel=1e-6)  # roots of what is 0 but for rounding


def test_kernel_distance_is_the_mean_over_pairs_of_different_examples() -> None:
    def k(u: Tensor, v: Tensor) -> float:
        return (float(u @ v) / 5 + 1) ** 3

    within = [sum(k(u, v) for i, u in enumerate(s) for j, v in enumerate(s) if i != j) / (len(s) * (len(s) - 1))
              for s in (A, B)]  # fmt: skip
    across = sum(k(u, v) for u in A for v in B) / (len(A) * len(B))
    assert kernel_distance(A, B) == pytest.approx(within[0] + within[1] - 2 * across, rel=1e-9)


def test_shares_are_those_of_a_search_through_all_pairs() -> None:
    def ball(s: Tensor, i: int) -> float:
        return sorted(float((s[i] - v).norm()) for j, v in enumerate(s) if j != i)[4]

    a, b = [ball(A, i) for i in range(len(A))], [ball(B, i) for i in range(len(B))]
    inside_a = [[float((u - v).norm()) < a[i] for i, u in enumerate(A)] for v in B]
    inside_b = [[float((u - v).norm()) < b[j] for j, v in enumerate(B)] for u in A]
    nearest_b = [min(float((u - v).norm()) for v in B) for u in A]
    found = neighbour_shares(A, B)
    assert found.precision == pytest.approx(np.mean([any(row) for row in inside_a]))
    assert found.recall == pytest.approx(np.mean([any(row) for row in inside_b]))
    assert found.density == pytest.approx(np.mean([sum(row) for row in inside_a]) / 5)
    assert found.coverage == pytest.approx(np.mean([n < r for n, r in zip(nearest_b, a, strict=True)]))
    assert 0 < found.coverage < 1 and 0 < found.precision < 1
    with pytest.raises(ValueError, match="more than 5 of each"):
        neighbour_shares(A[:5], B)


def test_prdc_finds_the_same() -> None:
    theirs = pytest.importorskip("prdc").compute_prdc(A.numpy(), B.numpy(), nearest_k=5)
    assert neighbour_shares(A, B)._asdict() == pytest.approx(theirs)


class Seen(torch.nn.Module):
    """Features that are the numbers themselves, as these libraries take them."""

    num_features = 5

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1)


def test_torchmetrics_finds_the_same() -> None:
    image = pytest.importorskip("torchmetrics.image.fid")

    metric = image.FrechetInceptionDistance(feature=Seen(), normalize=True, input_img_size=(1, 1, 5))
    metric.set_dtype(torch.float64)
    for features, real in ((A, True), (B, False)):
        metric.update(features[:, None, None], real=real)
    assert frechet_distance(A, B) == pytest.approx(float(metric.compute()), rel=1e-6)


def test_torchmetrics_finds_the_same_kernel_distance() -> None:
    theirs = pytest.importorskip("torchmetrics.image.kid").poly_mmd(A[:45], B)
    assert kernel_distance(A[:45], B) == pytest.approx(float(theirs), rel=1e-9)


def test_nearest_is_the_nearest_whatever_the_chunks() -> None:
    x, pool = B.reshape(-1, 5, 1, 1), A.reshape(-1, 5, 1, 1)
    distance, which = nearest(x, pool, chunk=7)
    expected = torch.stack([(A - v).norm(dim=1).min() for v in B])
    torch.testing.assert_close(distance.double(), expected, rtol=1e-4, atol=1e-4)
    assert (which == torch.stack([(A - v).norm(dim=1).argmin() for v in B])).all()
    assert float(nearest(pool[:9], pool)[0].max()) < 1e-3


def test_entropy_of_classes() -> None:
    assert class_entropy(torch.tensor([0.0, 1.0, 0.0])) == 0
    assert class_entropy(torch.tensor([0.5, 0.5, 0.0, 0.0])) == pytest.approx(math.log(2) / math.log(4))
