"""Sparse steps: the exact optimum of a linear model within ball and box, another implementation, and a step by hand."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from scipy import optimize
from torch import Tensor, nn

from contracts import NUM_CLASSES, SHAPE, WANTED, rand, seeded, stream
from sparring import L1, L2, Linf, Noise, pgd
from sparring.attacks.around import Restarts
from sparring.attacks.catalogue import bim, slide
from sparring.attacks.loop import Attack, Problem, Seen
from sparring.attacks.starts import Null, uniform
from sparring.attacks.steps import SparseAscent
from sparring.core.objectives import margin
from sparring.core.types import Attacker, take
from sparring.threats import inside

LABELS = torch.tensor([2, 0, 3])

# Closed form: two classes, linear logits ---------------------------------------------------------------------------


class Line(nn.Module):
    """Logits (0, w x): the margin of class 1 is linear in the input."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(stream(1, seed=4).normal(SHAPE[1:])[0].double())

    def forward(self, x: Tensor) -> Tensor:
        score = (x * self.w).flatten(1).sum(1)
        return torch.stack([0 * score, score], 1)


LINE, X, Y = Line().eval(), rand(*SHAPE, seed=8), torch.tensor([0, 1, 0])
SLOPE = (1 - 2 * Y.double()).view(3, 1, 1, 1) * LINE.w.detach()


def knapsack(threat: Any, x: Tensor, d: Tensor) -> Tensor:
    """(B,) max <d, z> over the set: fill the coordinates to the edge of the box, the steepest first."""
    low = -math.inf if threat.low is None else threat.low - x
    high = math.inf if threat.high is None else threat.high - x
    room = torch.where(d > 0, torch.as_tensor(high).expand_as(x), -torch.as_tensor(low).expand_as(x))
    gain = (d if threat.mask is None else d * threat.mask).abs().flatten(1)
    best = []
    for i, radius in enumerate(torch.as_tensor(threat.radius).double().expand(len(x)).tolist()):
        total, left = 0.0, radius
        for j in gain[i].argsort(descending=True).tolist():
            part = min(left, float(room[i].flatten()[j]))
            total, left = total + part * float(gain[i, j]), left - part
        best.append(total)
    return torch.tensor(best, dtype=torch.float64)


MASK = rand(1, *SHAPE[1:], seed=5) < 0.6
THREATS: dict[str, L1] = {
    "box": L1(4.0),
    "small": L1(0.6),
    "no-box": L1(4.0, low=None, high=None),
    "wide": L1(9.0, low=-1.0, high=2.0),
    "radii-mask": L1(torch.tensor([1.0, 3.5, 2.0], dtype=torch.float64), mask=MASK),
}
CLIMBERS: dict[str, Callable[[Any], Attacker]] = {
    "slide": lambda t: slide(t, num_steps=200, share=0.03, keep="highest_loss"),
    "short-steps": lambda t: slide(t, num_steps=400, step=0.05, share=0.03, keep="highest_loss"),
    "last": lambda t: slide(t, num_steps=300, step=0.1, share=0.03, keep="last"),
    "restarts": lambda t: slide(t, num_steps=200, share=0.03, restarts=2, keep="highest_loss"),
    "absolute": lambda t: slide(t, num_steps=400, absolute_step=0.2, share=0.03, keep="highest_loss"),
}


def share_of_the_optimum(attack: Callable[[Any], Attacker], threat: Any) -> Tensor:
    """(B,) how much of the largest possible growth of the margin the attack found; never more than all of it."""
    result = attack(threat)(LINE, X, Y)
    start = margin.score(LINE(X), Y)
    found = (margin.score(LINE(result.x_adv), Y) - start).detach() / knapsack(threat, X, SLOPE)
    assert bool(inside(threat, X, result.z).all()) and bool(threat.valid(X, result.x_adv).all())
    assert bool((found <= 1 + 1e-9).all()), "more than the maximum: the attack left the set"
    return found


@pytest.mark.parametrize("name", THREATS)
def test_the_optimum_is_that_of_linear_programming(name: str) -> None:
    threat: Any = THREATS[name]
    free = torch.ones_like(X, dtype=torch.bool) if threat.mask is None else threat.mask.expand_as(X)
    for i, best in enumerate(knapsack(threat, X, SLOPE).tolist()):
        up = torch.full_like(X[i], math.inf) if threat.high is None else threat.high - X[i]
        down = torch.full_like(X[i], math.inf) if threat.low is None else X[i] - threat.low
        bounds = [(0, b) for b in (torch.stack([up, down]) * 1.0).where(free[i], 0.0).flatten().tolist()]
        cost = torch.cat([-SLOPE[i].flatten(), SLOPE[i].flatten()]).numpy()
        radius = float(torch.as_tensor(threat.radius).double().expand(3)[i])
        found = optimize.linprog(cost, A_ub=[[1.0] * len(cost)], b_ub=[radius], bounds=bounds)
        assert -found.fun == pytest.approx(best, rel=1e-9)


@pytest.mark.parametrize("name", THREATS)
@pytest.mark.parametrize("climber", CLIMBERS)
def test_climbs_to_the_best_filling_of_the_box(climber: str, name: str) -> None:
    found = share_of_the_optimum(CLIMBERS[climber], THREATS[name])
    assert bool((found >= 0.98).all()), found


@pytest.mark.parametrize("name", THREATS)
def test_without_steps_or_without_sparsity_it_does_not(name: str) -> None:
    """The bar is out of reach for the start, for steps over everything, and (in a box) for one coordinate a step."""
    threat = THREATS[name]
    assert bool((share_of_the_optimum(lambda t: slide(t, num_steps=0), threat) < 0.5).all())
    dense = share_of_the_optimum(lambda t: slide(t, num_steps=200, share=1.0, keep="highest_loss"), threat)
    assert bool((dense < 0.98).all())
    if name in ("box", "wide"):
        stuck = share_of_the_optimum(lambda t: pgd(t, num_steps=200, keep="highest_loss"), threat)
        assert bool((stuck < 0.6).all())


# Other people's code -----------------------------------------------------------------------------------------------


@pytest.fixture
def foolbox() -> Iterator[Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield pytest.importorskip("foolbox", exc_type=ImportError)


def test_foolbox(foolbox: Any, network: nn.Module, images: Tensor) -> None:
    """Its steps are ours where neither ball nor box cuts; its projection leaves the ball (see `SparseAscent`).

    One share for both: 7 of 70 coordinates.
    """
    net, x = network.float(), images.float()
    theirs = foolbox.attacks.SparseL1DescentAttack(quantile=62.5 / 69, rel_stepsize=0.11, steps=9, random_start=False)
    model = foolbox.PyTorchModel(net, bounds=(-20, 20), device="cpu")
    raw, _, _ = theirs(model, x, LABELS, epsilons=5.0)
    built: Any = slide(L1(5.0, low=-20.0, high=20.0), num_steps=9, step=0.11, share=0.1, keep="last")
    result = replace(built, start=Null())(net, x, LABELS)
    assert float((raw - x).abs().max()) > 0.3
    torch.testing.assert_close(result.x_adv, raw, rtol=0, atol=2e-5)


# A step by hand ----------------------------------------------------------------------------------------------------


def one_step(rule: SparseAscent, threat: Any, x: Tensor, z: Tensor, grad: Tensor) -> Tensor:
    noise = Noise.make(0, "test", torch.arange(len(x)))
    seen = Seen(torch.zeros(len(x)), torch.zeros(len(x), dtype=torch.bool), grad)
    before = [v.nan_to_num() for v in (x, z, grad)]
    found, state = rule.step(Problem(threat, x, 10, noise), z, seen, rule.init(Problem(threat, x, 10, noise), z), 0)
    assert state is None
    for old, now in zip(before, (x, z, grad), strict=True):
        assert torch.equal(old, now.nan_to_num()), "arguments stay as they were"
    return found


GRAD = torch.tensor([[4.0, -3.0, 2.0, 1.0, 0.5, 0.0]], dtype=torch.float64)


@pytest.mark.parametrize(
    ("x", "z", "options", "want"),
    [
        ([0.5] * 6, [0.0] * 6, {}, [0.1, -0.1, 0, 0, 0, 0]),
        ([1.0, 0.5, 0.5, 0.5, 0.5, 0.5], [0.0] * 6, {}, [0, -0.1, 0.1, 0, 0, 0]),  # the first is full already
        ([0.6, 0.5, 0.5, 0.5, 0.5, 0.5], [0.4, 0, 0, 0, 0, 0], {}, [0.4, -0.1, 0.1, 0, 0, 0]),  # full because of z
        ([1.0, 0.0, 1.0, 1.0, 1.0, 0.5], [0.0] * 6, {}, [0] * 6),  # nowhere to go
        ([1.0, 0.0, 1.0, 1.0, 0.5, 0.5], [0.0] * 6, {}, [0, 0, 0, 0, 0.2, 0]),  # one alone takes the whole length
        ([0.0, 1.0, 0.5, 0.5, 0.5, 0.5], [0.0] * 6, {}, [0.1, -0.1, 0, 0, 0, 0]),  # at the edge, but the way leads in
        ([0.5] * 6, [0.0] * 6, {"low": None, "high": None, "share": 1e-9}, [0.2, 0, 0, 0, 0, 0]),
        ([0.5] * 6, [0.0] * 6, {"share": 1.0}, [0.04, -0.04, 0.04, 0.04, 0.04, 0]),  # no gradient, no move
        ([0.5] * 6, [0.0] * 6, {"mask": [[False, True, False, True, True, True]]}, [0, -0.1, 0, 0.1, 0, 0]),
        ([0.5] * 6, [0.0] * 6, {"radius": 0.0}, [0] * 6),
        ([0.5] * 6, [0.0] * 6, {"radius": math.inf, "absolute_step": 0.6}, [0.3, -0.3, 0, 0, 0, 0]),
        ([1.0, 0.5, 0.5, 0.5, 0.5, 0.5], [0.0] * 6, {"high": 2.0}, [0.1, -0.1, 0, 0, 0, 0]),
    ],
)
def test_a_step(x: list[float], z: list[float], options: dict[str, Any], want: list[float]) -> None:
    options = {"radius": 1.0, "share": 1 / 3, **options}
    if "mask" in options:
        options["mask"] = torch.tensor(options["mask"])
    rule = SparseAscent(0.2, share=options.pop("share"), absolute_step=options.pop("absolute_step", None))
    found = one_step(rule, L1(**options), *torch.tensor([[x], [z]], dtype=torch.float64), GRAD)
    torch.testing.assert_close(found, torch.tensor([want], dtype=torch.float64), rtol=0, atol=1e-12)


def test_ties_move_together() -> None:
    grad = torch.tensor([[1.0, -1.0, 1.0, 0.5], [1.0, 0.9, 0.8, 0.7]], dtype=torch.float64)
    x = torch.full((2, 4), 0.5, dtype=torch.float64)
    found = one_step(SparseAscent(0.3, share=0.25), L1(1.0), x, 0 * x, grad)
    want = torch.tensor([[0.1, -0.1, 0.1, 0], [0.3, 0, 0, 0]], dtype=torch.float64)
    torch.testing.assert_close(found, want, rtol=0, atol=1e-12)


def test_a_gradient_that_is_not_a_number_moves_nothing() -> None:
    grad = GRAD.repeat(2, 1)
    grad[0, 3] = math.nan
    x = torch.full((2, 6), 0.5, dtype=torch.float64)
    found = one_step(SparseAscent(0.2, share=1 / 3), L1(1.0), x, 0 * x, grad)
    assert bool((found[0] == 0).all())
    assert float(found[1].abs().sum()) == pytest.approx(0.2)


def test_rounding_at_the_edge_is_no_room() -> None:
    """A projection may leave a coordinate one rounding short of the box; the place goes to the next all the same."""
    x = torch.full((1, 6), 0.5)
    z = torch.tensor([[0.5 * (1 - 1e-7), 0, 0, 0, 0, 0]])
    found = one_step(SparseAscent(0.2, share=1 / 6), L1(1.0), x, z, GRAD.float())
    assert float(found[0, 1]) == pytest.approx(-0.2)


def test_all_coordinates_in_linf_is_the_sign_step(network: nn.Module, images: Tensor) -> None:
    """`size` is the threat's, so with everything moving the rule is BIM's."""
    threat = Linf(0.1, low=None, high=None)
    rule = SparseAscent(0.2, share=1.0)
    want = bim(threat, num_steps=7, step=0.2, keep="last")(network, images, LABELS)
    found = replace(bim(threat, num_steps=7, keep="last"), rule=rule)(network, images, LABELS)  # type: ignore[type-var]
    torch.testing.assert_close(found.x_adv, want.x_adv)
    step = one_step(SparseAscent(0.2, share=0.1), L2(1.0), images, 0 * images, 0.5 - images)
    torch.testing.assert_close(step.flatten(1).norm(dim=1), torch.full((3,), 0.2).double())


# The promises of every attack ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("wanted", WANTED)
@pytest.mark.parametrize("restarts", [1, 2])
def test_examples_stand_alone(network: nn.Module, images: Tensor, wanted: str, restarts: int) -> None:
    radii, masks = torch.tensor([0.5, 3.0, 1.0], dtype=torch.float64), rand(*SHAPE, seed=4) < 0.4
    attack = slide(L1(radii, mask=masks), num_steps=6, restarts=restarts, wanted=WANTED[wanted])
    noise = stream(3)
    whole = attack(network, images, LABELS, noise=noise)
    for rows in (torch.tensor([2, 0, 1]), torch.tensor([0]), torch.tensor([1]), torch.tensor([2, 1])):
        part = take(attack, rows)(network, images[rows], LABELS[rows], noise=noise.take(rows))
        torch.testing.assert_close(part.z, whole.z[rows])
        assert torch.equal(part.reached, whole.reached[rows])  # type: ignore[index,arg-type]
    assert torch.equal(attack(network, images, LABELS, noise=noise).z, whole.z), "the same noise, the same bits"
    assert bool((whole.z[~masks] == 0).all())
    assert bool((whole.size <= radii * (1 + 1e-9)).all())


def test_the_model_and_the_inputs_stay_as_they_were(stateful: nn.Module, images: Tensor, snapshot: Any) -> None:
    before, copies = snapshot(stateful), (images.clone(), LABELS.clone())
    slide(L1(2.0), num_steps=3)(stateful, images, LABELS)
    assert snapshot(stateful) == before
    assert torch.equal(images, copies[0]) and torch.equal(LABELS, copies[1])


def test_single_precision_stays_in_the_set() -> None:
    x = rand(4, 3, 32, 32).float().round()
    net = seeded(lambda: nn.Sequential(nn.Flatten(), nn.Linear(3072, 64), nn.ReLU(), nn.Linear(64, NUM_CLASSES)))
    result = slide(L1(12.0), num_steps=10)(net, x, torch.tensor([0, 1, 2, 3]))
    assert result.x_adv.dtype == torch.float32  # type: ignore[union-attr]
    assert bool(inside(L1(12.0), x, result.z).all()) and bool(L1(12.0).valid(x, result.x_adv).all())  # type: ignore[arg-type]
    assert bool((result.size > 11.9).all()), "the whole budget is spent"


def test_composition() -> None:
    want = Attack(threat=L1(2.0), rule=SparseAscent(0.25, 0.01), num_steps=40, start=uniform)
    assert slide(L1(2.0)) == want
    assert isinstance(slide(L1(2.0), restarts=3), Restarts)
    assert slide(L1(2.0), objective=margin, absolute_step=0.1, share=0.2) == replace(
        want, objective=margin, rule=SparseAscent(0.25, 0.2, 0.1)
    )


@pytest.mark.parametrize("share", [0.0, -0.1, 1.1, math.nan])
def test_wrong_shares(share: float) -> None:
    with pytest.raises(ValueError, match=f"share={share}; expected the share of the coordinates that move, above 0"):
        slide(L1(2.0), share=share)


def test_an_infinite_radius_needs_a_length(network: nn.Module, images: Tensor) -> None:
    attack: Any = replace(slide(L1(math.inf), num_steps=2), start=Null())  # type: ignore[type-var]
    with pytest.raises(ValueError, match="give absolute_step"):
        attack(network, images, LABELS)
