"""The L1 ball within a box: the nearest point, one steepest coordinate, its text, and what a short cut loses."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from contracts import SHAPE, THREATS, rand, stream
from sparring import L1, check_threat, make_threat
from sparring.threats import Ball, inside, threat_text

MASK = rand(1, *SHAPE[1:], seed=5) < 0.6
MASKS = rand(*SHAPE, seed=6) < 0.6
RADII = torch.tensor([0.5, 9.0, 2.0], dtype=torch.float64)
CASES: dict[str, L1] = {
    "box": L1(4.0),
    "no-box": L1(4.0, low=None, high=None),
    "wide": L1(7.0, low=-3.0, high=2.0),
    "mask": L1(3.0, mask=MASK),
    "masks-radii": L1(RADII, mask=MASKS),
    "tensor-box": L1(6.0, low=torch.zeros(7).double(), high=torch.ones(SHAPE[1:]).double()),
    "only-low": L1(6.0, high=None),
}
INPUTS = {"inner": rand(*SHAPE), "corners": rand(*SHAPE).round(), "flat": rand(*SHAPE).flatten(1)}


def nearest(threat: Any, x: Tensor, z: Tensor) -> Tensor:
    """The nearest point of the set by halving an interval around the threshold that the length is paid with."""
    low = torch.full_like(z, -math.inf) if threat.low is None else threat.low - x
    high = torch.full_like(z, math.inf) if threat.high is None else threat.high - x
    free = torch.ones_like(z, dtype=torch.bool) if threat.mask is None else threat.mask.expand_as(z)
    found = torch.zeros_like(z)
    for i, limit in enumerate(torch.as_tensor(threat.radius).double().expand(len(z)).tolist()):
        small, large = 0.0, float(z[i].abs().max())
        for step in range(100):
            threshold = 0.0 if step == 0 else (small + large) / 2
            shrunk = z[i].sign() * (z[i].abs() - threshold).clamp_min(0)
            found[i] = shrunk.clamp(low[i], high[i]) * free[i]
            if step == 0 and float(found[i].abs().sum()) <= limit:
                break
            small, large = (threshold, large) if float(found[i].abs().sum()) > limit else (small, threshold)
    return found


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("kind", ["inner", "corners"])
def test_project_is_the_nearest_point(name: str, kind: str) -> None:
    threat, x = CASES[name], INPUTS[kind]
    for scale in (0.02, 0.5, 5.0):
        z = scale * stream(3).normal(x.shape[1:]).double()
        found = threat.project(x, z)
        torch.testing.assert_close(found, nearest(threat, x, z), rtol=0, atol=1e-12)
        assert bool(threat.valid(x, threat.realize(x, found)).all())
        assert bool(inside(threat, x, found).all())


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("kind", ["inner", "corners"])
def test_contract(name: str, kind: str) -> None:
    check_threat(CASES[name], INPUTS[kind], num_directions=100)


def test_contract_of_rows_and_of_floats() -> None:
    check_threat(L1(1.5), INPUTS["flat"], num_directions=100)
    check_threat(L1(12.0), rand(3, 3, 32, 32).float(), num_directions=10)
    check_threat(L1(12.0, low=None, high=None), rand(3, 3, 32, 32).float(), num_directions=10)


def test_the_shared_tables_hold_it() -> None:
    assert sum(isinstance(case.threat, L1) for case in THREATS.values()) > 20


@dataclass(frozen=True)
class ShrinkThenClip(L1):
    """The short cut of most published L1 attacks."""

    def project(self, x: Tensor, z: Tensor) -> Tensor:
        return Ball.project(self, x, z)


def test_the_usual_short_cut_wastes_the_budget() -> None:
    """Pushed far along one direction, it keeps less than a third of the length that the exact projection keeps."""
    x, z = INPUTS["inner"], 50 * stream(3).normal(SHAPE[1:]).double()
    exact, short = L1(12.0), ShrinkThenClip(12.0)
    torch.testing.assert_close(exact.size(x, exact.project(x, z)), torch.full((3,), 12.0).double())
    assert bool((short.size(x, short.project(x, z)) < 4).all())
    with pytest.raises(AssertionError):
        torch.testing.assert_close(short.project(x, z), nearest(short, x, z), rtol=0, atol=1e-12)


def test_steepest_is_the_first_of_the_largest() -> None:
    x = rand(3, 2, 2)
    grad = torch.tensor([[[1.0, -3.0], [3.0, 2.0]], [[0.0, 0.0], [0.0, 0.0]], [[-1e-30, 0.0], [0.0, 0.0]]]).double()
    up = L1(5.0).steepest(x, grad)
    assert up.tolist() == [[[0, -1], [0, 0]], [[0, 0], [0, 0]], [[-1, 0], [0, 0]]]
    mask = torch.tensor([[[True, False], [True, True]]])
    assert L1(5.0, mask=mask).steepest(x, grad)[0].tolist() == [[0, 0], [1, 0]]
    assert L1(5.0, mask=mask[:, :, :] & False).steepest(x, grad).abs().sum() == 0


@pytest.mark.parametrize("name", CASES)
def test_steepest_climbs_most(name: str) -> None:
    threat, x, grad = CASES[name], INPUTS["inner"], stream(3).normal(SHAPE[1:]).double()
    gain = (threat.steepest(x, grad) * grad).flatten(1).sum(1)
    free = torch.ones_like(x) if threat.mask is None else threat.mask.expand_as(x).double()
    torch.testing.assert_close(gain, (grad * free).abs().flatten(1).amax(1))


def test_random_starts_fill_the_ball_of_the_mask() -> None:
    """Without a box they are the uniform draws: length / radius is u^(1/D), D the free coordinates."""
    many = L1(2.0, low=None, high=None, mask=torch.tensor([[True, False, True, True]]))
    x = torch.zeros(3000, 4, dtype=torch.float64)
    z = many.sample(x, stream(3000))
    cubed = (many.size(x, z) / 2) ** 3
    assert bool((z[:, 1] == 0).all())
    assert abs(float(cubed.mean()) - 0.5) < 0.02
    assert abs(float(cubed.std()) - 12**-0.5) < 0.02


def test_as_text() -> None:
    assert make_threat("l1:12") == L1(12.0)
    assert make_threat(" L1:0.5,box=-3..3") == L1(0.5, low=-3.0, high=3.0)
    assert repr(make_threat("l1:1,box=none")) == "L1(radius=1.0, low=None, high=None, mask=None)"
    for threat in (L1(12.0), L1(8 / 255), L1(0.1, low=None, high=None), L1(7.0, low=-3.0, high=2.0), L1(math.inf)):
        assert make_threat(threat_text(threat)) == threat
    assert threat_text(L1(12.0)) == "l1:12"
