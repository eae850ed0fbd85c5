"""What every threat says of itself: at other radii, in words, how far z may move, and what it has against inputs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from contracts import BALLS, SHAPE, rand, seeded, sentences, words
from sparring import fgsm, pgd
from sparring.core.types import take
from sparring.evaluation.measure import measure
from sparring.threats import L1, L2, Lens, Linf, ThreatModel, check_threat, make_threat, threat_text


def test_at_another_radius() -> None:
    for threat in (Linf(0.2), L2(torch.tensor([0.1, 0.4]), low=None), words(2.0)):
        assert torch.equal(torch.as_tensor(threat.at(0.5).radius), 0.5 * torch.as_tensor(threat.radius))
        assert threat.at(1.0) is threat
    assert Lens(Linf(0.2), "probe").at(2.0) == Lens(Linf(0.4), "probe")


@dataclass(frozen=True)
class InTokens(Linf):
    """Its radius is no field: it follows from another unit."""

    percent: float = 1.0

    def at(self, factor: float) -> Any:
        return InTokens(self.percent * factor / 100, self.low, self.high, self.mask, self.percent * factor)


def test_a_radius_that_is_no_field_has_a_curve() -> None:
    model = seeded(lambda: nn.Linear(4, 3)).eval()
    x = torch.rand(24, 4, generator=torch.Generator().manual_seed(0))
    y = model(x).argmax(1)
    ours = measure(model, [(x, y)], InTokens(0.1, percent=10.0), [fgsm], curve=(0.5, 2.0))
    theirs = measure(model, [(x, y)], Linf(0.1), [fgsm], curve=(0.5, 2.0))
    assert ours.curve == theirs.curve and len(ours.curve) == 4


@pytest.mark.parametrize(
    ("threat", "sentence"),
    [
        (Linf(8 / 255), "entry may change by at most 8/255. Every value of the result is at least 0 and at most 1."),
        (L2(0.5, low=-3, high=None), "length of the change is at most 0.5. Every value of the result is at least -3."),
        (L1(12, None, None), "of all entries add up to at most 12. Every value of the result is allowed."),
        (Linf(math.inf), "The input may change without a bound. Every value"),
        (Linf(torch.tensor([0.1, 0.3]).double()), "by at most 0.1 to 0.3, each example its own."),
        (Linf(0.1, mask=torch.ones(1, 4) > 0), "at most 0.1, where the mask allows it."),
        (Linf(0.1, low=torch.zeros(4)), "The result stays in the box of valid values."),
        (Lens(Linf(0.1), "probe"), "In the input 'probe' alone: Every entry may change by at most 0.1."),
        (words(2.0), "within this threat model: Words"),
    ],
)  # fmt: skip
def test_in_words(threat: ThreatModel, sentence: str) -> None:
    assert sentence in threat.describe()


@pytest.mark.parametrize("kind", BALLS)
def test_room_is_where_the_projection_ends(kind: str) -> None:
    x, mask = rand(*SHAPE), rand(*SHAPE, seed=2) < 0.5
    for low, high in ((0.0, 1.0), (None, 1.0), (torch.zeros(7).double(), None)):
        for some in (None, mask, mask[:1]):
            threat = BALLS[kind](math.inf, low, high, some)
            room = threat.room(x)
            assert room is not None
            for side, end in zip(room, (-1e9, 1e9), strict=True):
                torch.testing.assert_close(side.clamp(-1e9, 1e9), threat.project(x, torch.full_like(x, end)))
    assert BALLS[kind](0.1, None, None).room(x) is None


@pytest.mark.parametrize(
    ("threat", "x", "sentence"),
    [
        (Linf(0.1), torch.tensor([[0.0, 255.0]]), "from 0 to 255, expected the box [0.0, 1.0]. The radius"),
        (Linf(0.1), torch.tensor([[0.0, 255.0]]), "They look like bytes, 0 to 255: divide by 255"),
        (Linf(0.1), torch.tensor([[-2.1, 2.0]]), "They look normalised: undo that, and put it into the model"),
        (Linf(0.1, -1, 1), torch.tensor([[-2.1, 2.0]]), "Scale the data, or give the threat model the box"),
        (Linf(0.1, low=torch.zeros(2)), torch.tensor([[-2.0, 0.5]]), "expected the box. The radius is counted in"),
        (Linf(0.1), torch.tensor([[0.5, 0.5], [math.nan, 0.0]]), "1 of 2 inputs hold NaN or infinity: fill or drop"),
    ],
)  # fmt: skip
def test_complaints(threat: ThreatModel, x: Tensor, sentence: str) -> None:
    (told,) = threat.complaints(x)
    assert sentence in told
    assert threat.complaints(torch.full((3, 2), 0.5)) == []


def test_complaints_about_named_inputs() -> None:
    assert words().complaints(sentences()) == []
    pair = {"gallery": torch.rand(3, 4), "probe": torch.rand(3, 4)}
    threat = Lens(Linf(0.1), "probe")
    assert threat.complaints(pair) == []
    assert "probe: 3 of 3 inputs lie outside" in threat.complaints({**pair, "probe": 5 + pair["probe"]})[0]
    assert threat.complaints({**pair, "gallery": 5 + pair["gallery"]}) == []  # the box is that of what may change
    assert "hold NaN" in threat.complaints({**pair, "gallery": pair["gallery"] * math.nan})[0]


# Lens --------------------------------------------------------------------------------------------------------------


class Pairs(nn.Module):
    """Same or different, from the distance of two linear embeddings."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(5, 3)

    def forward(self, x: Mapping[str, Tensor]) -> Tensor:
        gap = (self.embed(x["gallery"]) - self.embed(x["probe"])).square().sum(1) - 0.3
        return torch.stack([-gap, gap], 1)


@pytest.mark.parametrize("kind", BALLS)
def test_a_lens_is_the_threat_on_one_of_several(kind: str) -> None:
    pair = {"gallery": rand(4, 5).float(), "probe": rand(4, 5, seed=1).float()}
    radius = torch.tensor([0.1, 0.2, 0.3, 0.4])
    lens, alone = Lens(BALLS[kind](radius), "probe"), BALLS[kind](radius)
    check_threat(lens, pair, num_directions=30)
    model = seeded(Pairs)
    y = model(pair).argmax(1)
    for attack in (lambda t: pgd(t, num_steps=5, restarts=2), fgsm):
        ours = attack(lens)(model, pair, y)
        theirs = (
            attack(alone)(lambda v: model({**pair, "probe": v}) if len(v) == 4 else None, pair["probe"], y)
            if attack is fgsm
            else ours
        )
        assert torch.equal(ours.z, theirs.z)
        assert isinstance(ours.x_adv, dict) and torch.equal(ours.x_adv["gallery"], pair["gallery"])
    rows = torch.tensor([3, 1])
    assert take(lens, rows).radius.tolist() == radius[rows].tolist()
    with pytest.raises(ValueError, match="changes the input called 'probe' of several; got one tensor"):
        lens.null(pair["probe"])
    with pytest.raises(ValueError, match="got inputs called a"):
        lens.null({"a": pair["probe"]})
    other = {**pair, "gallery": pair["gallery"] + 0.1}
    assert not lens.valid(pair, other).any() and lens.valid(pair, pair).all()


def test_a_pair_is_evaluated_with_a_curve() -> None:
    pair = {"gallery": rand(16, 5).float(), "probe": rand(16, 5, seed=1).float()}
    model = seeded(Pairs).eval()
    y = model(pair).argmax(1)
    found = measure(model, [(pair, y)], Lens(Linf(0.2), "probe"), [fgsm, pgd], curve=(0.5, 2.0))
    assert found.robust.value < 1 == found.clean.value
    shares = [share.value for _, share in found.curve]
    assert shares == sorted(shares, reverse=True) and shares[0] > shares[-1]


# By name -----------------------------------------------------------------------------------------------------------

USER_FILE = """
from dataclasses import dataclass
from sparring import Linf

@dataclass(frozen=True)
class Own(Linf):
    scale: float = 1.0

def own(radius, *, scale: float = 1.0, data=None):
    if radius < 0:
        raise ValueError("what a radius!")
    return Own(radius * (1 if data is None else data), scale=scale)

def wrong(radius=1):
    return radius
"""


def test_a_threat_of_the_users_file(tmp_path: Path) -> None:
    path = tmp_path / "own.py"
    path.write_text(USER_FILE)
    threat = make_threat(f"{path}:own,radius=1/4,scale=2", data=2.0)
    assert (threat.radius, threat.scale, type(threat).__name__) == (0.5, 2.0, "Own")  # type: ignore[attr-defined]
    assert type(make_threat(f"{path}:own:0.5")) is type(threat)
    assert threat_text(threat) == repr(threat)
    with pytest.raises(ValueError, match=r"threat '.*own.py:own:-1': what a radius!"):
        make_threat(f"{path}:own:-1")
    with pytest.raises(TypeError, match="made a int; expected a subclass of ThreatModel"):
        make_threat(f"{path}:wrong")
    with pytest.raises(ValueError, match="threat 'linf' is unknown; there are mine, or"):
        make_threat("linf:0.1", table={"mine": Linf})


def test_what_is_no_threat_model_is_told() -> None:
    with pytest.raises(AssertionError, match=r"no subclass of sparring\.ThreatModel"):
        check_threat(object(), torch.rand(3, 2))  # type: ignore[arg-type]
