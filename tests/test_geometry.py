"""Norm balls: nearest points, steepest directions and uniform draws, against brute force."""

from __future__ import annotations

import math

import pytest
import torch
from scipy import optimize, stats

from contracts import FLAT, SHAPE, rand, stream
from sparring import geometry

NORMS = {"linf": (geometry.linf_norm, geometry.shrink_linf), "l2": (geometry.l2_norm, geometry.shrink_l2)}
RADII = {"number": 0.7, "per-example": torch.tensor([0.2, 0.9, 1.5], dtype=torch.float64)}


def test_norms() -> None:
    v = rand(*SHAPE) - 0.5
    for i, row in enumerate(v):
        assert float(geometry.l2_norm(v)[i]) == pytest.approx(math.sqrt(sum(a * a for a in row.flatten().tolist())))
        assert float(geometry.linf_norm(v)[i]) == max(abs(a) for a in row.flatten().tolist())


def test_per_example() -> None:
    assert geometry.per_example(0.5, rand(*SHAPE)) == 0.5
    assert geometry.per_example(torch.tensor([1, 2, 3]), rand(*SHAPE)).shape == (3, 1, 1, 1)
    assert geometry.per_example(torch.tensor([1, 2, 3]), rand(3)).shape == (3,)
    assert geometry.per_example(torch.tensor([1.0]), rand(1, 4)).dtype == torch.float64


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("radius", RADII)
@pytest.mark.parametrize("shape", [SHAPE, FLAT])
def test_shrink_gives_the_nearest_point(norm: str, radius: str, shape: tuple[int, ...]) -> None:
    length, shrink = NORMS[norm]
    limit = geometry.per_example(RADII[radius], rand(3))
    v = 3 * (rand(*shape) - 0.5)
    before = v.clone()
    p = shrink(v, RADII[radius])
    assert torch.equal(v, before), "the argument stays as it was"
    assert bool((length(p) <= limit * (1 + 1e-12)).all())
    torch.testing.assert_close(shrink(p, RADII[radius]), p, rtol=1e-12, atol=0)
    small = v * 1e-3
    assert torch.equal(shrink(small, RADII[radius]), small), "what is inside stays, to the bit"
    # p is the nearest point of a convex set exactly when no point q of it lies on v's side of p
    for seed in range(200):
        q = shrink(4 * (rand(*shape, seed=seed) - 0.5), RADII[radius])
        assert bool((((v - p) * (q - p)).flatten(1).sum(1) <= 1e-9).all())


@pytest.mark.parametrize("norm", NORMS)
def test_shrink_equals_a_general_solver(norm: str) -> None:
    _, shrink = NORMS[norm]
    v = 2 * (rand(3, 4) - 0.5)
    for row, nearest in zip(v, shrink(v, 0.5), strict=True):
        if norm == "l2":
            rule: dict[str, object] = {"constraints": {"type": "ineq", "fun": lambda p: 0.25 - (p**2).sum()}}
        else:
            rule = {"bounds": [(-0.5, 0.5)] * 4}
        target = row.numpy()
        found = optimize.minimize(
            lambda p, t=target: ((p - t) ** 2).sum(), [0.0] * 4, method="SLSQP", tol=1e-14, **rule
        )
        torch.testing.assert_close(nearest, torch.from_numpy(found.x), rtol=0, atol=1e-6)


@pytest.mark.parametrize("norm", NORMS)
def test_shrink_at_the_edges(norm: str) -> None:
    _, shrink = NORMS[norm]
    v = 1e6 * (rand(*SHAPE) - 0.5)
    assert torch.equal(shrink(v, math.inf), v)
    zero = torch.zeros(SHAPE)
    assert torch.equal(shrink(zero, 0.5), zero)
    assert torch.equal(shrink(zero, math.inf), zero)
    assert shrink(v.float(), torch.tensor([0.1, 0.2, 0.3], dtype=torch.float64)).dtype == torch.float32


def test_unit_l2() -> None:
    v = rand(*SHAPE) - 0.5
    torch.testing.assert_close(geometry.l2_norm(geometry.unit_l2(v)), torch.ones(3).double(), rtol=1e-14, atol=0)
    best = (geometry.unit_l2(v) * v).flatten(1).sum(1)
    for seed in range(500):
        other = geometry.unit_l2(rand(*SHAPE, seed=seed) - 0.5)
        assert bool(((other * v).flatten(1).sum(1) <= best).all())
    mixed = v.clone()
    mixed[1] = 0
    unit = geometry.unit_l2(mixed)
    assert bool((unit[1] == 0).all())
    assert torch.equal(unit[[0, 2]], geometry.unit_l2(v)[[0, 2]])


@pytest.mark.parametrize("scale", [1e-44, 1e-38, 1e-30, 1e-20, 1.0, 1e20, 1e38])
def test_unit_l2_neither_underflows_nor_overflows(scale: float) -> None:
    """Squares of 1e-30 are zero in float32: confident models would stop every L2 attack."""
    v = (rand(*SHAPE) - 0.5).float().mul(scale)
    assert v.dtype == torch.float32
    found = geometry.l2_norm(geometry.unit_l2(v))
    if scale > 1e-38:
        torch.testing.assert_close(found, torch.ones(3), rtol=1e-5, atol=0)
    assert bool(found.isfinite().all()), "subnormal gradients may give up, but never NaN"


def test_uniform_linf_fills_the_cube() -> None:
    draws = geometry.uniform_linf(stream(400), torch.zeros(400, 3, 5))
    assert stats.kstest((draws.flatten().numpy() + 1) / 2, "uniform").pvalue > 0.01


@pytest.mark.parametrize("masked", ["all", "one", "many"])
def test_uniform_l2_fills_the_ball(masked: str) -> None:
    """Uniform in a ball of dimension D: length ** D is uniform, and the direction has no favourite."""
    num = 2000
    like = torch.zeros(num, 2, 3, dtype=torch.float64)
    free = {
        "all": None,
        "one": torch.tensor([[[True, False, True], [True, False, False]]]),
        "many": torch.stack([torch.arange(6).view(2, 3) <= i % 6 for i in range(num)]),
    }[masked]
    v = geometry.uniform_l2(stream(num), like, free)
    assert v.dtype == torch.float64
    dims = torch.full((num,), 6.0) if free is None else free.flatten(1).sum(1).expand(num).double()
    length = geometry.l2_norm(v)
    assert stats.kstest((length**dims).numpy(), "uniform").pvalue > 0.01
    if free is not None:
        assert bool((v[~free.expand_as(v)] == 0).all())
    first = v[:, 0, 0][dims == dims.max()]
    assert abs(float(first.mean())) < 4 * float(first.std()) / math.sqrt(len(first))
    if masked == "all":  # the first of 6 coordinates of a unit vector: (1 + c) / 2 is Beta((D - 1) / 2, (D - 1) / 2)
        cosine = v[:, 0, 0] / length
        assert stats.kstest(((1 + cosine) / 2).numpy(), "beta", args=(2.5, 2.5)).pvalue > 0.01


def test_uniform_l2_with_nothing_free_or_nobody_there() -> None:
    assert bool((geometry.uniform_l2(stream(3), rand(3, 4), torch.zeros(1, 4, dtype=torch.bool)) == 0).all())
    assert geometry.uniform_l2(stream(0), rand(0, 4), None).shape == (0, 4)


def test_uniform_l2_draws_belong_to_the_example() -> None:
    """Where the batch size equals the last axis, a wrong broadcast of the lengths goes unnoticed by shapes."""
    like = rand(5, 2, 5)
    whole = geometry.uniform_l2(stream(5), like, None)
    order = torch.tensor([3, 1])
    torch.testing.assert_close(
        geometry.uniform_l2(stream(5).take(order), like[order], None), whole[order], rtol=1e-14, atol=0
    )
