"""Distances between two sets of feature vectors, and what share of one the other covers.

Shapes: N reference (real), M judged (generated), F features, K classes. All in float64, without randomness.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

NEIGHBOURS = 5
"""k of precision, recall, density and coverage (Naeem 2020, section 5)."""


def frechet_distance(real: Tensor, fake: Tensor) -> float:
    """|m - m'|^2 + tr(C + C' - 2 (C C')^(1/2)) of means and covariances: FID, in whatever features these are.

    real (N, F), fake (M, F). Source: Heusel 2017; the trace of the root from the eigenvalues of C^(1/2) C' C^(1/2).

    >>> x = torch.randn(50, 3, dtype=torch.float64)
    >>> abs(frechet_distance(x, x + 1) - 3) < 1e-6
    True
    """
    (mean_a, cov_a), (mean_b, cov_b) = ((v.mean(0), torch.cov(v.T)) for v in (real.double(), fake.double()))
    values, vectors = torch.linalg.eigh(cov_a)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    shared = torch.linalg.eigvalsh(root @ cov_b @ root).clamp(min=0).sqrt().sum()
    return float((mean_a - mean_b).square().sum() + cov_a.trace() + cov_b.trace() - 2 * shared)


def kernel_distance(real: Tensor, fake: Tensor) -> float:
    """The unbiased squared MMD with the kernel (a . b / F + 1)^3: KID. real (N, F), fake (M, F). Near 0, also below,
    for sets from one distribution. Source: Binkowski 2018, over all examples at once instead of over subsets."""
    a, b = real.double(), fake.double()

    def kernel(u: Tensor, v: Tensor) -> Tensor:
        return (u @ v.T / u.shape[1] + 1) ** 3

    within = [(k.sum() - k.trace()) / (len(k) * (len(k) - 1)) for k in (kernel(a, a), kernel(b, b))]
    return float(within[0] + within[1] - 2 * kernel(a, b).mean())


class Shares(NamedTuple):
    """precision: of the fakes, those in a ball of a real one; recall: of the real ones, those in a ball of a fake;
    density: balls of real ones that a fake lies in, over k; coverage: real ones with a fake in their ball."""

    precision: float
    recall: float
    density: float
    coverage: float


def neighbour_shares(real: Tensor, fake: Tensor, neighbours: int = NEIGHBOURS) -> Shares:
    """Each example's ball reaches to its k-th nearest neighbour in its own set. real (N, F), fake (M, F), N, M > k.

    Source: Kynkaanniemi 2019 (precision, recall), Naeem 2020 (density, coverage).
    """
    real, fake = real.double(), fake.double()
    if min(len(real), len(fake)) <= neighbours:
        raise ValueError(f"{len(real)} and {len(fake)} examples; expected more than {neighbours} of each, for balls")
    between = torch.cdist(real, fake)
    reach_real, reach_fake = (_reach(v, neighbours) for v in (real, fake))
    in_real = between < reach_real[:, None]
    return Shares(
        precision=float(in_real.any(0).double().mean()),
        recall=float((between < reach_fake).any(1).double().mean()),
        density=float(in_real.double().sum(0).mean() / neighbours),
        coverage=float((between.min(1).values < reach_real).double().mean()),
    )


def _reach(points: Tensor, neighbours: int) -> Tensor:
    """(N,) the distance to the k-th nearest other point."""
    return torch.cdist(points, points).kthvalue(neighbours + 1, dim=1).values


def nearest(x: Tensor, pool: Tensor, chunk: int = 500) -> tuple[Tensor, Tensor]:
    """The distance of each of x (M, *X) to the nearest of pool (N, *X), Euclidean, (M,), and which one that is (M,)."""
    x, pool = x.flatten(1).float(), pool.flatten(1).float()
    rows = [torch.cdist(part, pool).min(1) for part in x.split(chunk)]
    return torch.cat([row.values for row in rows]), torch.cat([row.indices for row in rows])


def class_entropy(shares: Tensor) -> float:
    """- sum p log p / log K of class shares (K,): 1 where all are alike, 0 where there is one.

    >>> class_entropy(torch.tensor([0.25, 0.25, 0.25, 0.25]))
    1.0
    """
    shares = shares.double()
    return float(-torch.xlogy(shares, shares).sum() / math.log(len(shares)))
