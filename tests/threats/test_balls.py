"""Balls: the whole table keeps the contract, and what is promised beyond it."""

from __future__ import annotations

import math
from typing import Any

import numpy
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from contracts import BALLS, SHAPE, THREATS, rand, stream
from sparring.core.noise import Noise
from sparring.core.types import take
from sparring.threats import L1, L2, Ball, Linf, check_threat, inside, make_threat, threat_text


@pytest.mark.parametrize("name", THREATS)
def test_contract(name: str) -> None:
    threat, x = THREATS[name]
    check_threat(threat, x, num_directions=60)


@pytest.mark.parametrize("name", [n for n in THREATS if n != "words"])
def test_the_set_is_what_the_docstring_says(name: str) -> None:
    """Random points, half of them far outside: bound, box and mask hold, and no argument is written to."""
    threat, x = THREATS[name]
    assert torch.equal(threat.realize(x, threat.null(x)), x)
    assert torch.equal(threat.apply(x, threat.null(x)), x)
    z = (stream(3).normal(x.shape[1:], draw=3).to(x)) * torch.tensor([0.05, 1, 20]).to(x).view(3, *[1] * (x.ndim - 1))
    arguments = [x.clone(), z.clone()]
    start, near, up = threat.sample(x, stream(3)), threat.project(x, z), threat.steepest(x, z)
    adversarial = threat.realize(x, near)
    assert torch.equal(x, arguments[0])
    assert torch.equal(z, arguments[1])
    for v in (start, near, up, adversarial):
        assert v.dtype == x.dtype
        assert v.shape == x.shape
        assert v.data_ptr() not in (x.data_ptr(), z.data_ptr())
    for v in (start, near):
        assert bool(inside(threat, x, v).all())
        if threat.low is not None:
            assert bool((x + v >= torch.as_tensor(threat.low) - 1e-6).all())
        if threat.high is not None:
            assert bool((x + v <= torch.as_tensor(threat.high) + 1e-6).all())
        if threat.mask is not None:
            assert bool((v[~threat.mask.expand_as(v)] == 0).all())
    if threat.low is not None:
        assert bool((adversarial >= torch.as_tensor(threat.low)).all()), "realized inputs lie in the box to the bit"
    assert bool(threat.valid(x, adversarial).all())
    assert not bool((start == 0).all())


@pytest.mark.parametrize("name", [n for n in THREATS if n != "words"])
def test_valid_sees_what_is_not(name: str) -> None:
    threat, x = THREATS[name]
    spoilt = x.clone()
    spoilt[1].view(-1)[4] = math.nan
    assert threat.valid(x, spoilt).tolist() == [True, False, True]
    if threat.high is not None:
        spoilt = x.clone()
        spoilt[2].view(-1)[0] = 2.5
        assert threat.valid(x, spoilt).tolist() == [True, True, False]
    if threat.mask is not None:
        shut = (~threat.mask.expand_as(x)[0]).flatten().nonzero()[0]
        spoilt = x.clone()
        spoilt[0].view(-1)[shut] = 0.5 * (spoilt[0].view(-1)[shut] + 0.01)
        assert threat.valid(x, spoilt).tolist() == [False, True, True]


@pytest.mark.parametrize("kind", BALLS)
def test_numbers_and_tensors_bound_alike(kind: str) -> None:
    """The box may mix a number with a tensor."""
    x = rand(*SHAPE)
    plain = BALLS[kind](0.4, low=0.0, high=1.0)
    mixed = BALLS[kind](0.4, low=torch.zeros(7).double(), high=1.0)
    z = 2 * (rand(*SHAPE, seed=3) - 0.5)
    assert torch.equal(mixed.project(x, z), plain.project(x, z))


@pytest.mark.parametrize("kind", BALLS)
def test_take(kind: str) -> None:
    order = torch.tensor([2, 0])
    radius, mask = torch.tensor([0.1, 0.2, 0.3]), rand(*SHAPE) < 0.5
    part = take(BALLS[kind](radius, mask=mask), order)
    assert isinstance(part.radius, Tensor)
    assert part.radius.tolist() == radius[order].tolist()
    assert part.mask is not None
    assert torch.equal(part.mask, mask[order])
    shared: Ball = BALLS[kind](0.1, mask=mask[:1])
    assert take(shared, order) is shared
    scalar: Ball = BALLS[kind](torch.tensor(0.1))
    assert take(scalar, order) is scalar


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"radius": -1}, "radius must not be negative, in input units such as 8/255; got -1"),
        ({"radius": math.nan}, "got nan"),
        ({"radius": torch.tensor([0.5, -0.5])}, "got -0.5"),
        ({"radius": torch.tensor([0.5, math.nan])}, "got nan"),
        ({"radius": torch.ones(3, 1)}, r"\(B,\); got shape \(3, 1\)"),
        ({"radius": 1.0, "mask": torch.ones(1, 4)}, "mask must be bool"),
    ],
)
def test_errors(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        Linf(**options)


def test_unbounded() -> None:
    x = rand(*SHAPE)
    for kind in BALLS.values():
        threat = kind(math.inf)
        z = 1e3 * (rand(*SHAPE, seed=2) - 0.5)
        torch.testing.assert_close(threat.project(x, z), (x + z).clamp(0, 1) - x)
        assert torch.equal(kind(math.inf, low=None, high=None).project(x, z), z)
        with pytest.raises(ValueError, match="random start needs a finite radius; start an unbounded attack at `null`"):
            threat.sample(x, stream(3))


@pytest.mark.parametrize("kind", BALLS)
def test_radius_zero_leaves_nothing_to_change(kind: str) -> None:
    """The first point of a security curve, and a warm-up's first epoch."""
    x, none = rand(*SHAPE), BALLS[kind](torch.tensor([0.0, 0.3, 0.0]))
    z = none.project(x, rand(*SHAPE, seed=2) - 0.5)
    assert none.size(x, z).gt(0).tolist() == [False, True, False]
    assert none.sample(x, stream(3)).flatten(1).abs().amax(1).gt(0).tolist() == [False, True, False]
    assert torch.equal(BALLS[kind](0.0).project(x, z + 1), torch.zeros_like(x))


def test_an_empty_batch() -> None:
    x = rand(0, 2, 5)
    for kind in BALLS.values():
        threat = kind(0.1)
        assert threat.project(x, x).shape == x.shape
        assert threat.sample(x, Noise.make(0, "t", torch.arange(0))).shape == x.shape
        assert threat.size(x, x).shape == (0,)


# Threats as text -------------------------------------------------------------------------------------------------

numbers = st.one_of(
    st.floats(1e-6, 1e6, allow_nan=False),
    st.integers(1, 300).map(lambda n: n / 255),
    st.sampled_from([0.5, 0.3, 1.0, 3, 1e-8, 1e7, math.inf]),
)
bounds = st.one_of(
    st.just((None, None)),
    st.just((0.0, 1.0)),
    st.tuples(st.floats(-1e3, 1e3), st.floats(-1e3, 1e3)).filter(lambda b: b[0] < b[1]),
)


@settings(max_examples=200, deadline=None)
@given(kind=st.sampled_from([Linf, L2]), radius=numbers, box=bounds)
def test_text_round_trip(kind: type[Ball], radius: float, box: tuple[float | None, float | None]) -> None:
    assume(kind is not Linf or box[0] is None or box[1] is None or radius < box[1] - box[0])
    threat = kind(radius, low=box[0], high=box[1])
    assert make_threat(threat_text(threat)) == threat


def test_format_is_what_people_write() -> None:
    assert threat_text(Linf(8 / 255)) == "linf:8/255"
    assert threat_text(L2(0.5)) == "l2:0.5"
    assert threat_text(Linf(0.1, low=None, high=None)) == "linf:0.1,box=none"
    assert threat_text(L2(1, low=-3, high=3)) == "l2:1,box=-3..3"
    assert make_threat("  LINF:8/255 ") == Linf(8 / 255)
    assert make_threat("l2:1,box=-3..3") == L2(1.0, low=-3.0, high=3.0)


@pytest.mark.parametrize(
    "threat",
    [
        Linf(0.1, low=None, high=1.0),
        Linf(0.1, low=0.0, high=None),
        Linf(torch.tensor([0.1, 0.2])),
        L2(0.1, mask=torch.ones(1, 3, dtype=torch.bool)),
    ],
)
def test_what_has_no_text_is_never_shown_as_another_threat(threat: Ball) -> None:
    text = threat_text(threat)
    try:
        read = make_threat(text)
    except ValueError:
        return
    assert (read.low, read.high) == (threat.low, threat.high)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("l7:0.5", "threat 'l7' is unknown; there are linf, l2, l1, or FILE.py:FUNCTION"),
        ("linf", "threat 'linf' lacks its radius, a number such as 0.3 or 8/255; write linf:RADIUS"),
        ("linf:", "radius='' is not a number such as 0.3 or 8/255"),
        ("", "threat '' is unknown; there are linf, l2, l1"),
        ("linf:eight", "threat 'linf:eight': radius='eight' is not a number such as 0.3 or 8/255"),
        ("linf:8/0", "'8/0' is not a number"),
        ("linf:0", "the radius must be above 0"),
        ("linf:-8/255", "the radius must be above 0"),
        ("linf:nan", "the radius must be above 0"),
        ("linf:0.1,box=3", "box='3' is not LOW..HIGH or none"),
        ("linf:0.1,box=1..0", "the box is empty, 1 is not below 0"),
        ("linf:0.1,box=", "box='' is not LOW..HIGH or none"),
        ("linf:0.1,low=0", "has no option 'low'; it takes radius, box"),
        ("linf:0.1,box=..1", "box='..1' is not LOW..HIGH or none"),
        ("linf:8", "threat 'linf:8': with this radius every input may become any other; did you mean linf:8/255"),
        ("linf:300/255", "with this radius every input may become any other$"),
        ("linf:6,box=-3..3", "with this radius every input may become any other; did you mean linf:6/255"),
        ("linf:0.1,linf:0.2", "names several things"),
    ],
)
def test_text_errors(text: str, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        make_threat(text)


@pytest.mark.parametrize("make", [Linf, L2, L1])
def test_limits_of_another_type_give_the_same_and_lists_are_taken(make: Any) -> None:
    x, z = rand(4, 6).float(), (2 * rand(4, 6, seed=3) - 1).float()
    want = make(0.5, low=0.1, high=0.9)
    for low, high in (
        (torch.full((6,), 0.1, dtype=torch.float64), torch.full((6,), 0.9, dtype=torch.float64)),
        ([0.1] * 6, [0.9] * 6),
        (numpy.full(6, 0.1), numpy.full(6, 0.9)),
    ):
        threat, x = make(0.5, low=low, high=high), x.clamp(0.1, 0.9)
        for found, expected in (
            (threat.project(x, z), want.project(x, z)),
            (threat.realize(x, z), want.realize(x, z)),
            (threat.room(x)[0], want.room(x)[0]),
        ):
            assert found.dtype == torch.float32
            torch.testing.assert_close(found, expected)


def test_a_radius_as_wide_as_the_box_allows_everything() -> None:
    assert Linf(1.0).allows_everything and Linf(8).allows_everything and Linf(2.0, low=-1.0).allows_everything
    for threat in (Linf(0.99), Linf(math.inf), Linf(8, low=None), Linf(1.0, mask=torch.ones(1, 2, dtype=torch.bool))):
        assert not threat.allows_everything
