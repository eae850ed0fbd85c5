"""The smoothed backward pass: outputs stay, gradients are those worked out by hand, and nothing leaks."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from contracts import BALLS, NUM_CLASSES, SHAPE, rand, seeded, stream
from sparring.attacks.around import Restarts, SmoothBackward, _SmoothBackward
from sparring.attacks.auto_pgd import APGD, apgd, smooth
from sparring.attacks.catalogue import pgd
from sparring.attacks.loop import Attack
from sparring.attacks.starts import Corner
from sparring.core.objectives import cross_entropy, dlr, margin
from sparring.core.types import Cost, take
from sparring.threats import L1, L2, Linf, inside

LABELS = torch.tensor([2, 0, 3])
V = (6 * rand(5, 9, seed=3) - 3).contiguous()
V[0, :3] = torch.tensor([0.0, -0.0, 1e-300], dtype=torch.float64)

RELUS: dict[str, Callable[[Tensor], Tensor]] = {
    "torch.relu": torch.relu,
    "torch.relu(input=)": lambda v: torch.relu(input=v),
    "torch.relu_": torch.relu_,
    "F.relu": F.relu,
    "F.relu(input=)": lambda v: F.relu(input=v),
    "F.relu(inplace=)": lambda v: F.relu(v, inplace=True),
    "F.relu(, True)": lambda v: F.relu(v, True),
    "F.relu_": F.relu_,  # type: ignore[attr-defined]
    "relu()": lambda v: v.relu(),
    "relu_()": lambda v: v.relu_(),
    "nn.ReLU": nn.ReLU(),
    "nn.ReLU(inplace)": nn.ReLU(inplace=True),
}
IN_PLACE = [name for name in RELUS if name.endswith("_") or "_()" in name or "inplace" in name or "True" in name]


def gradient(function: Callable[[Tensor], Tensor], v: Tensor, slope: float | None) -> tuple[Tensor, Tensor]:
    """What comes out, and d sum(out) / dv; smoothed unless the slope is None."""
    v = v.clone().requires_grad_()
    if slope is None:
        out = function(v * 1)
    else:
        with _SmoothBackward(slope):
            out = function(v * 1)
    return out.detach(), torch.autograd.grad(out.sum(), v)[0]


# One ReLU ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("slope", [1.0, 10.0])
@pytest.mark.parametrize("name", RELUS)
def test_output_bit_for_bit_and_derivative_sigmoid(name: str, slope: float) -> None:
    out, grad = gradient(RELUS[name], V, slope)
    plain, _ = gradient(RELUS[name], V, None)
    assert torch.equal(out.view(torch.int64), plain.view(torch.int64))
    torch.testing.assert_close(grad, 1 / (1 + torch.exp(-slope * V)), rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", RELUS)
def test_a_steep_sigmoid_is_the_derivative_of_relu(name: str) -> None:
    far = V.where(V.abs() > 0.01, 1.0)
    _, grad = gradient(RELUS[name], far, 1e5)
    _, want = gradient(RELUS[name], far, None)
    torch.testing.assert_close(grad, want)


def test_all_in_place_forms_are_tried() -> None:
    assert len(IN_PLACE) == 6


@pytest.mark.parametrize("name", IN_PLACE)
def test_in_place_forms_change_what_others_hold(name: str) -> None:
    """Fixed: a network that writes `v.relu_()` as a statement saw a ReLU that did nothing, so its outputs changed."""

    def statement(v: Tensor) -> Tensor:
        RELUS[name](v)
        return 2 * v

    out, grad = gradient(statement, V, 10.0)
    plain, _ = gradient(statement, V, None)
    assert torch.equal(out, plain)
    torch.testing.assert_close(grad, 2 * torch.sigmoid(10 * V))


def test_what_needs_no_gradient_and_other_functions_stay() -> None:
    v = V.clone()
    with _SmoothBackward(10.0):
        assert torch.relu(v).grad_fn is None and v.relu_() is v
        leaky = F.leaky_relu(V.clone().requires_grad_(), 0.1)
    assert leaky.grad_fn is not None and "LeakyRelu" in leaky.grad_fn.name()


def test_special_numbers_and_types() -> None:
    numbers = torch.tensor([math.nan, math.inf, -math.inf, -0.0, 5e-39, -1e38])
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        v = numbers.to(dtype).requires_grad_()
        with _SmoothBackward(10.0):
            out = torch.relu(v)
        assert out.dtype == dtype
        torch.testing.assert_close(out, torch.relu(v), equal_nan=True, rtol=0, atol=0)
        assert torch.equal(out.signbit(), torch.relu(v).signbit())


# Networks ------------------------------------------------------------------------------------------------------------


class Two(nn.Module):
    """relu(x A + a) B, with a ReLU of any form."""

    def __init__(self, relu: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(70, 9).double(), nn.Linear(9, NUM_CLASSES).double()
        self.relu = relu

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.relu(self.a(x.flatten(1))))


class Notes:
    """A model that notes what it was asked and what it said."""

    def __init__(self, net: nn.Module) -> None:
        self.net, self.asked, self.said = net, [], []  # type: ignore[var-annotated]

    def __call__(self, x: Tensor) -> Tensor:
        logits = self.net(x)
        self.asked.append(x.detach().clone())
        self.said.append(logits.detach().clone())
        return logits


@pytest.mark.parametrize("name", RELUS)
def test_two_layers_by_hand(name: str) -> None:
    """d margin / dx = A^T diag(sigmoid(slope v)) (b_k - b_y), seen as the one step that the attack takes."""
    net, x = seeded(lambda: Two(RELUS[name])), rand(*SHAPE, seed=1)
    with torch.no_grad():
        v = net.a(x.flatten(1))
        logits = net.b(v.clamp_min(0))
    rival = logits.scatter(1, LABELS[:, None], -math.inf).argmax(1)
    signal = net.b.weight[rival] - net.b.weight[LABELS]
    want = ((signal * torch.sigmoid(7.0 * v)) @ net.a.weight).detach()
    step = pgd(L2(0.01, low=None, high=None), num_steps=1, step=1.0, objective=margin, keep="last")
    from sparring.attacks.starts import Null

    attack = Attack(threat=step.threat, rule=step.rule, num_steps=1, objective=margin, start=Null(), keep="last")  # type: ignore[attr-defined]
    z = SmoothBackward(attack, 7.0)(net, x, LABELS).z.flatten(1)
    torch.testing.assert_close(z, 0.01 * want / want.norm(dim=1, keepdim=True), rtol=1e-9, atol=1e-12)
    plain = ((signal * (v > 0)) @ net.a.weight).detach()
    assert float(torch.cosine_similarity(want, plain).max()) < 0.99, "the two must differ here"


@pytest.mark.parametrize("name", ["F.relu", "relu_()", "nn.ReLU(inplace)"])
def test_outputs_are_those_of_the_model(name: str) -> None:
    net, x = seeded(lambda: Two(RELUS[name])), rand(*SHAPE, seed=1)
    notes = Notes(net)
    result = smooth(Linf(1e-4), num_steps=4, restarts=2)(notes, x, net(x).argmax(1))
    assert len(notes.asked) == 10
    for asked, said in zip(notes.asked, notes.said, strict=True):
        assert torch.equal(net(asked), said)
    assert result.cost == Cost(
        sum(map(len, notes.asked)), sum(map(len, notes.asked[:4])) + sum(map(len, notes.asked[5:9]))
    )


def dead() -> Callable[[Tensor], Tensor]:
    """Class 1 wins where relu(sum of x - 38) > 1 / 2: around the middle the unit is off, its gradient exactly 0."""
    return lambda x: torch.stack([0 * x.flatten(1).sum(1) + 1, 2 * torch.relu(x.flatten(1).sum(1) - 38)], 1)


def test_a_network_whose_units_are_off_falls_to_smoothing_alone() -> None:
    x, y = torch.full(SHAPE, 0.5).double(), torch.zeros(3).long()  # sum 35; at most 42 within 0.1
    seen = [apgd(Linf(0.1), num_steps=50, objective=objective, restarts=3)(dead(), x, y)
            for objective in (cross_entropy, margin, dlr)]  # fmt: skip
    assert not any(bool(result.reached.any()) for result in seen)  # type: ignore[union-attr]
    result = smooth(Linf(0.1), num_steps=5, restarts=1)(dead(), x, y)
    assert result.reached.tolist() == [True] * 3  # type: ignore[union-attr]
    torch.testing.assert_close(result.loss, torch.full((3,), 2 * 4.0 - 1).double())
    weak = smooth(Linf(0.02), num_steps=5, restarts=2)(dead(), x, y)
    assert not bool(weak.reached.any())  # type: ignore[union-attr]


def kinked() -> Callable[[Tensor], Tensor]:
    """Class 1 leads by 1 - sum of 3 relu(v) + relu(-v), v = x - 0.4: wins near the kinks; slope 5 ends at -0.22."""

    def model(x: Tensor) -> Tensor:
        v = x.flatten(1) - 0.4
        lead = 1 - (3 * torch.relu(v) + torch.relu(-v)).sum(1)
        return torch.stack([0 * lead, lead], 1)

    return model


def test_polish_reaches_the_kinks_that_a_smoothed_gradient_misses() -> None:
    x, y = torch.full(SHAPE, 0.5).double(), torch.zeros(3).long()
    coarse = smooth(Linf(0.4), slope=5, restarts=1)(kinked(), x, y)
    assert not bool(coarse.reached.any())  # type: ignore[union-attr]
    fine = smooth(Linf(0.4), slope=5, restarts=1, polish=60)(kinked(), x, y)
    assert fine.reached.tolist() == [True] * 3 and bool((fine.loss > coarse.loss).all())  # type: ignore[union-attr, operator]
    assert bool(inside(Linf(0.4), x, fine.z).all())
    shown = kinked()(fine.x_adv)
    torch.testing.assert_close(shown[:, 1] - shown[:, 0], fine.loss)


def test_polish_goes_on_only_where_something_stands_and_is_never_worse() -> None:
    net, x = seeded(lambda: Two(F.relu)), rand(*SHAPE, seed=1)
    y, weak = net(x).argmax(1), Linf(1e-4)
    plain, more = smooth(weak, num_steps=4, restarts=1), smooth(weak, num_steps=4, restarts=1, polish=3)
    first, second = plain(net, x, y), more(net, x, y)
    assert bool((second.loss >= first.loss).all())  # type: ignore[operator]
    assert second.cost == first.cost.plus(Cost(3 * 4, 3 * 3))
    wrong = (y + 1) % NUM_CLASSES  # fallen before the first step
    assert more(net, x, wrong).cost == plain(net, x, wrong).cost
    alone = torch.cat([take(more, torch.tensor([i]))(net, x[i : i + 1], y[i : i + 1], noise=stream(3).take(
        torch.tensor([i]))).z for i in range(3)])  # fmt: skip
    torch.testing.assert_close(alone, more(net, x, y, noise=stream(3)).z)


def test_polish_is_refused_where_it_does_nothing() -> None:
    with pytest.raises(ValueError, match="polish=5 takes dense steps"):
        smooth(L1(1.0), polish=5)
    with pytest.raises(ValueError, match="at least 1 step; got -1"):
        smooth(Linf(0.1), polish=-1)


def test_models_without_relu_see_no_difference(network: nn.Module, images: Tensor) -> None:
    plain = apgd(Linf(0.1), num_steps=6)
    want, found = plain(network, images, LABELS), SmoothBackward(plain)(network, images, LABELS)
    assert torch.equal(found.z, want.z) and torch.equal(found.loss, want.loss) and found.cost == want.cost  # type: ignore[arg-type]


def test_autocast() -> None:
    net, x = seeded(lambda: Two(F.relu)).float(), rand(*SHAPE, seed=1).float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = smooth(Linf(0.1), num_steps=3, restarts=2)(net, x, LABELS)
        held = result.z.dtype
    assert held == torch.float32 and bool((result.z != 0).any())
    assert bool(inside(Linf(0.1), x, result.z).all())


def test_scripted_models_run_unsmoothed() -> None:
    net, x = seeded(lambda: nn.Sequential(nn.Flatten(), nn.Linear(70, 9), nn.ReLU(), nn.Linear(9, 4))), rand(*SHAPE)
    attack = apgd(Linf(0.1), num_steps=3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scripted = torch.jit.script(net.double())
        found = SmoothBackward(attack)(scripted, x, LABELS).z
    torch.testing.assert_close(found, attack(net, x, LABELS).z)


# Nothing leaks -----------------------------------------------------------------------------------------------------


def grads(net: nn.Module, x: Tensor) -> tuple[Tensor, ...]:
    x = x.clone().requires_grad_()
    return torch.autograd.grad(net(x).square().sum(), [x, *net.parameters()])


def test_afterwards_gradients_are_what_they_were() -> None:
    net, x = seeded(lambda: Two(nn.ReLU(inplace=True))), rand(*SHAPE, seed=1)
    before = grads(net, x)
    smooth(Linf(0.1), num_steps=2, restarts=2)(net, x, LABELS)
    assert all(torch.equal(a, b) for a, b in zip(grads(net, x), before, strict=True))


@pytest.mark.parametrize("look", [0, 1, 3])
def test_afterwards_gradients_are_what_they_were_when_the_model_raises(
    stateful: nn.Module, snapshot: Any, images: Tensor, look: int
) -> None:
    before, looks = snapshot(stateful), 0

    def stop(*_: Any) -> None:
        nonlocal looks
        looks += 1
        if looks > look:
            raise KeyboardInterrupt

    handle = stateful[6].register_forward_hook(stop)  # type: ignore[index]
    with pytest.raises(KeyboardInterrupt):
        smooth(Linf(0.1), num_steps=3)(stateful, images, LABELS)
    handle.remove()
    assert snapshot(stateful) == before
    assert bool((gradient(torch.relu, V, None)[1] == (V > 0)).all())


def test_only_the_model_is_smoothed() -> None:
    """What the attack computes for itself, such as a threat model that uses relu, keeps its derivatives."""
    seen: list[Tensor] = []

    class Half(Linf):
        def apply(self, x: Tensor, z: Tensor) -> Tensor:
            if z.requires_grad:
                probe = torch.tensor([-1.0, 1.0], requires_grad=True)
                seen.append(torch.autograd.grad(torch.relu(probe).sum(), probe)[0])
            return x + z

    smooth(Half(0.1), num_steps=2, restarts=1)(seeded(lambda: Two(F.relu)), rand(*SHAPE, seed=1), LABELS)
    assert [grad.tolist() for grad in seen] == [[0, 1], [0, 1]]


# The start, and the whole ------------------------------------------------------------------------------------------


def test_corners_of_the_cube() -> None:
    x = 0.2 + 0.6 * rand(*SHAPE, seed=1)
    z = Corner()(Linf(0.1), x, stream(3))
    assert bool((z.abs() == 0.1).all())
    assert 0.4 < float((z > 0).double().mean()) < 0.6
    assert not torch.equal(z, Corner()(Linf(0.1), x, stream(3, seed=1)))
    near_edge = Corner()(Linf(0.9), x, stream(3))
    assert bool(((x + near_edge == 0) | (x + near_edge - 1).abs().le(1e-12)).all())


@pytest.mark.parametrize("threat", [L2(0.4), L2(0.4, low=None, high=None), L1(0.4), Linf(0.3, mask=rand(*SHAPE) < 0.5)])
def test_corners_of_other_sets(threat: Any) -> None:
    x = 0.45 + 0.1 * rand(*SHAPE, seed=1)
    z = Corner()(threat, x, stream(3))
    assert bool(inside(threat, x, z).all())
    torch.testing.assert_close(threat.size(x, z), torch.full((3,), float(threat.radius)).double())
    if isinstance(threat, L1):
        assert (z != 0).flatten(1).sum(1).tolist() == [1, 1, 1]
    rows = torch.tensor([2, 0])
    torch.testing.assert_close(Corner()(take(threat, rows), x[rows], stream(3).take(rows)), z[rows])


@pytest.mark.parametrize("kind", BALLS)
def test_each_example_alone(kind: str) -> None:
    net, x = seeded(lambda: Two(F.relu)), rand(*SHAPE, seed=1)
    radii = {"Linf": 0.03, "L2": 0.3, "L1": 1.0}[kind] * torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)
    attack, noise = smooth(BALLS[kind](radii), num_steps=6, restarts=2), stream(3)
    whole = attack(net, x, LABELS, noise=noise)
    assert bool(inside(BALLS[kind](radii), x, whole.z).all())
    for rows in (torch.tensor([2, 0]), *torch.arange(3).split(1)):
        alone = take(attack, rows)(net, x[rows], LABELS[rows], noise=noise.take(rows))
        torch.testing.assert_close(alone.z, whole.z[rows], rtol=1e-9, atol=1e-9)


def test_it_is_a_composition() -> None:
    base = Attack(threat=Linf(0.1), rule=APGD(), num_steps=20, objective=margin, start=Corner())
    assert smooth(Linf(0.1)) == Restarts(SmoothBackward(base, 10.0), 5)
    assert smooth(Linf(0.1), restarts=1, slope=5.0) == SmoothBackward(base, 5.0)
    sparse = apgd(L1(0.5), num_steps=20, objective=margin)
    assert smooth(L1(0.5)) == Restarts(SmoothBackward(sparse, 10.0), 5), "sparse steps, at 3, 2 and 1 times the radius"
    with pytest.raises(ValueError, match="restarts must be at least 1; got 0"):
        smooth(Linf(0.1), restarts=0)


@pytest.mark.parametrize("slope", [0.0, -1.0, math.nan, math.inf])
def test_slopes_that_are_none(slope: float) -> None:
    with pytest.raises(ValueError, match="slope must be above 0"):
        smooth(Linf(0.1), slope=slope)


def test_an_infinite_radius_is_refused() -> None:
    with pytest.raises(ValueError, match="the radius is infinite"):
        smooth(Linf(math.inf), num_steps=2)(seeded(lambda: Two(F.relu)), rand(*SHAPE, seed=1), LABELS)
