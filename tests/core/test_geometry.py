"""Norm balls: nearest points, steepest directions and uniform draws, against brute force."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from scipy import optimize, stats
from torch import Tensor

from contracts import FLAT, SHAPE, rand, stream
from sparring.core import geometry

NORMS = {
    "linf": (geometry.linf_norm, geometry.shrink_linf),
    "l2": (geometry.l2_norm, geometry.shrink_l2),
    "l1": (geometry.l1_norm, geometry.shrink_l1),
}
RADII = {"number": 0.7, "per-example": torch.tensor([0.2, 0.9, 1.5], dtype=torch.float64)}


def test_norms() -> None:
    v = rand(*SHAPE) - 0.5
    for i, row in enumerate(v):
        assert float(geometry.l2_norm(v)[i]) == pytest.approx(math.sqrt(sum(a * a for a in row.flatten().tolist())))
        assert float(geometry.linf_norm(v)[i]) == max(abs(a) for a in row.flatten().tolist())
        assert float(geometry.l1_norm(v)[i]) == pytest.approx(sum(abs(a) for a in row.flatten().tolist()))


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


@pytest.mark.parametrize("norm", ["linf", "l2"])
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
    torch.testing.assert_close(geometry.l2_norm(geometry.unit_l2(v)), torch.ones(3).double(), rtol=1e-13, atol=0)
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
        geometry.uniform_l2(stream(5).take(order), like[order], None), whole[order], rtol=1e-6, atol=0
    )


@pytest.mark.parametrize("masked", ["all", "one", "many"])
def test_uniform_l1_fills_the_ball(masked: str) -> None:
    """Uniform in the L1 ball of dimension D: length ** D is uniform, each |z_i| is Beta(1, D), the signs are fair."""
    num = 2000
    like = torch.zeros(num, 2, 3, dtype=torch.float64)
    free = {
        "all": None,
        "one": torch.tensor([[[True, False, True], [True, False, False]]]),
        "many": torch.stack([torch.arange(6).view(2, 3) <= i % 6 for i in range(num)]),
    }[masked]
    v = geometry.uniform_l1(stream(num), like, free)
    assert v.dtype == torch.float64
    dims = torch.full((num,), 6.0) if free is None else free.flatten(1).sum(1).expand(num).double()
    assert stats.kstest((geometry.l1_norm(v) ** dims).numpy(), "uniform").pvalue > 0.01
    if free is not None:
        assert bool((v[~free.expand_as(v)] == 0).all())
    for entry in (v[:, 0, 0], v[:, 0, 2], v[:, 1, 0]):
        few = entry[(dims == dims.max()) & (entry != 0)]
        assert stats.kstest(few.abs().numpy(), "beta", args=(1, float(dims.max()))).pvalue > 0.01
        assert stats.binomtest(int((few > 0).sum()), len(few)).pvalue > 0.01


def test_uniform_l1_draws_belong_to_the_example() -> None:
    like, order = rand(5, 2, 5), torch.tensor([3, 1])
    whole = geometry.uniform_l1(stream(5), like, None)
    torch.testing.assert_close(
        geometry.uniform_l1(stream(5).take(order), like[order], None), whole[order], rtol=1e-6, atol=0
    )
    assert bool((geometry.uniform_l1(stream(3), rand(3, 4), torch.zeros(1, 4, dtype=torch.bool)) == 0).all())
    assert geometry.uniform_l1(stream(0), rand(0, 4), None).shape == (0, 4)


# The L1 ball within a box ----------------------------------------------------------------------------------------

Sides = tuple[Tensor | None, Tensor | None]


def by_bisection(v: Tensor, radius: Any, low: Tensor | None, high: Tensor | None) -> Tensor:
    """The nearest point by halving an interval around the threshold, in float64: no sort, no sums of breakpoints."""
    flat, limit = v.double().flatten(1), torch.as_tensor(radius, dtype=torch.float64).expand(len(v))
    low = torch.full_like(flat, -math.inf) if low is None else low.double().flatten(1)
    high = torch.full_like(flat, math.inf) if high is None else high.double().flatten(1)

    def at(threshold: Tensor) -> Tensor:
        return (flat.sign() * (flat.abs() - threshold[:, None]).clamp_min(0)).clamp(low, high)

    small, large = torch.zeros(len(v)).double(), flat.abs().amax(1)
    fits = at(small).abs().sum(1) <= limit
    for _ in range(60):
        middle = (small + large) / 2
        long = at(middle).abs().sum(1) > limit
        small, large = torch.where(long, middle, small), torch.where(long, large, middle)
    return at(torch.where(fits, torch.zeros_like(large), large)).view(v.shape)


def by_solver(v: Tensor, radius: float, low: Tensor, high: Tensor) -> Tensor:
    """The nearest point of one example by SLSQP, which knows nothing of thresholds: z = up - down, both positive."""
    n, aim = len(v), v.numpy()

    def distance(p: Any) -> Any:
        off = p[:n] - p[n:] - aim
        return (off**2).sum(), np.concatenate([2 * off, -2 * off])

    bounds = [(0, b) for b in [*high.tolist(), *(-low).tolist()]]
    budget = {"type": "ineq", "fun": lambda p: radius - p.sum(), "jac": lambda p: -np.ones(2 * n)}
    found = optimize.minimize(distance, np.zeros(2 * n), jac=True, bounds=bounds, constraints=budget, tol=1e-15)
    return torch.from_numpy(found.x[:n] - found.x[n:])


def boxed_cases(num: int, batch: int) -> Iterator[tuple[Tensor, Tensor, list[Sides]]]:
    """Points v, radii (B,) with 0 and infinity, and boxes: around inputs within [0, 1], at its corners, one-sided."""
    for seed in range(num):
        shape = (batch, 1 + seed % 9, 1 + seed % 2)
        x, v = rand(*shape, seed=seed), 4 * rand(*shape, seed=seed + 1000) - 2
        x[1::3] = x[1::3].round()
        if seed % 3 == 0:
            v = (2 * v).round() / 2  # ties
        radii = 0.6 * rand(batch, seed=seed + 2000) * v[0].numel()
        radii[2], radii[3] = 0, math.inf
        yield v, radii, [(-x, 1 - x), (-x, None), (None, 1 - x), (None, None), (0 * x, 0 * x)]


def test_project_l1_box_is_the_nearest_point() -> None:
    cut = 0
    for v, radii, boxes in boxed_cases(36, 7):
        for low, high in boxes:
            before = v.clone()
            found = geometry.project_l1_box(v, radii, low, high)
            assert torch.equal(v, before)
            torch.testing.assert_close(found, by_bisection(v, radii, low, high), rtol=0, atol=1e-13)
            assert bool((geometry.l1_norm(found) <= radii * (1 + 1e-13)).all())
            cut += int((geometry.l1_norm(found) >= radii * (1 - 1e-13)).sum())
            assert low is None or bool((found >= low).all())
            assert high is None or bool((found <= high).all())
            again = geometry.project_l1_box(found, radii, low, high)
            torch.testing.assert_close(again, found, rtol=1e-13, atol=1e-15)
            for number in (0.7, torch.tensor(0.7, dtype=torch.float64)):
                torch.testing.assert_close(
                    geometry.project_l1_box(v, number, low, high), by_bisection(v, 0.7, low, high), rtol=0, atol=1e-13
                )
    assert cut > 300, "the radius binds often enough for the test to mean something"


def test_project_l1_box_equals_a_general_solver() -> None:
    for seed in range(40):
        x, v = rand(2, 5, seed=seed), 3 * rand(2, 5, seed=seed + 50) - 1.5
        x[1] = x[1].round()
        radius = 0.2 + 1.5 * float(rand(1, seed=seed + 90))
        found = geometry.project_l1_box(v, radius, -x, 1 - x)
        for i in range(2):
            torch.testing.assert_close(found[i], by_solver(v[i], radius, -x[i], 1 - x[i]), rtol=0, atol=1e-6)


def test_clipping_after_the_shrink_is_not_the_nearest_point() -> None:
    """The comparison above would see the usual short cut: it ends up shorter than the radius, and further away."""
    x, v = rand(7, 9), 4 * rand(7, 9, seed=1) - 2
    short = geometry.shrink_l1(v, 2.0).clamp(-x, 1 - x)
    right = geometry.project_l1_box(v, 2.0, -x, 1 - x)
    assert bool((geometry.l1_norm(short) < 0.98 * geometry.l1_norm(right)).any())
    assert bool((geometry.l2_norm(v - right) < 0.999 * geometry.l2_norm(v - short)).any())


def test_project_l1_box_keeps_what_is_inside_to_the_bit() -> None:
    x, v = rand(*SHAPE), 2 * rand(*SHAPE, seed=1) - 1
    inside = v.clamp(-x, 1 - x)
    length = geometry.l1_norm(inside)
    for radius in (1.0001 * length, math.inf, torch.tensor(math.inf)):
        assert torch.equal(geometry.project_l1_box(inside, radius, -x, 1 - x), inside)
        assert torch.equal(geometry.project_l1_box(v, radius, -x, 1 - x), inside), "the box alone"
        assert geometry.project_l1_box(inside, radius, None, None).data_ptr() != inside.data_ptr()


def test_project_l1_box_acts_on_each_example_by_itself() -> None:
    x, v, radii = rand(*SHAPE), 3 * rand(*SHAPE, seed=1) - 1.5, torch.tensor([0.3, 8.0, 2.0]).double()
    whole = geometry.project_l1_box(v, radii, -x, 1 - x)
    for rows in (torch.tensor([2, 0]), torch.tensor([1])):
        alone = geometry.project_l1_box(v[rows], radii[rows], -x[rows], 1 - x[rows])
        torch.testing.assert_close(alone, whole[rows], rtol=1e-13, atol=1e-15)
    v[1, 0, 0, 0] = math.nan
    torch.testing.assert_close(geometry.project_l1_box(v, radii, -x, 1 - x)[[0, 2]], whole[[0, 2]], rtol=0, atol=0)


@pytest.mark.parametrize("shape", [(4, 3, 32, 32), (1, 3, 224, 224)])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_project_l1_box_in_single_precision(shape: tuple[int, ...], scale: float) -> None:
    """Sums of 150,528 floats: the length holds to 1e-5, and every entry to the rounding of the largest."""
    x = rand(*shape).float()
    v = scale * stream(shape[0]).normal(shape[1:])
    for radius in (0.5, 60.0):
        for low, high in ((-x, 1 - x), (None, None)):
            sides = (None if side is None else side.double() for side in (low, high))
            exact = geometry.project_l1_box(v.double(), radius, *sides)
            found = geometry.project_l1_box(v, radius, low, high)
            assert found.dtype == torch.float32
            exact_length = found.double().abs().flatten(1).sum(1)
            for length in (geometry.l1_norm(found), exact_length):
                assert bool((length <= radius * (1 + 1e-5) + 1e-6).all())
            error = (found - exact).abs().max()
            assert float(error) <= 4e-7 * float(v.abs().max())
            again = geometry.project_l1_box(found, radius, low, high)
            torch.testing.assert_close(again, found, rtol=1e-5, atol=1e-7)


def test_draws_take_the_layout_of_what_they_change() -> None:
    like = rand(3, 2, 5, 7).to(memory_format=torch.channels_last)
    for draw in (
        geometry.uniform_linf,
        lambda *a: geometry.uniform_l2(*a, None),
        lambda *a: geometry.uniform_l1(*a, None),
    ):
        found = draw(stream(3), like)
        assert found.stride() == like.stride()
        assert torch.equal(found, draw(stream(3), like.contiguous()))
    swapped = torch.empty(3, 7, 2).transpose(1, 2)
    assert geometry.laid_out(torch.rand(3, 2, 7), swapped).stride() == swapped.stride()
