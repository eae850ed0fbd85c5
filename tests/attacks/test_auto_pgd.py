"""Auto-PGD against transcriptions of the published algorithms, example by example, and against exact optima."""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from scipy import optimize
from torch import Tensor, nn

from contracts import BALLS, NUM_CLASSES, SHAPE, rand, seeded, stream
from sparring.attacks.auto_pgd import APGD, ShrinkingRadius, SparseAPGD, apgd, apgd_t
from sparring.attacks.loop import Attack, Problem, Seen
from sparring.attacks.starts import Gaussian, Given, Null
from sparring.core.objectives import cross_entropy, dlr, margin
from sparring.core.types import Cost, take
from sparring.threats import L1, L2, Linf, inside

LABELS = torch.tensor([2, 0, 3])
LOSSES = {"ce": cross_entropy, "dlr": dlr}
Look = Callable[[np.ndarray], tuple[float, np.ndarray]]


def curved(seed: int) -> nn.Module:
    """So curved that steps overshoot: some raise the loss, some do not."""

    def make() -> nn.Module:
        net = nn.Sequential(nn.Flatten(), nn.Linear(70, 16), nn.Tanh(), nn.Linear(16, NUM_CLASSES)).double().eval()
        net[1].weight.data.mul_(8)
        return net

    return seeded(make, seed)


# The published algorithms, in loops --------------------------------------------------------------------------------


def naive_loss(logits: Tensor, label: int, name: str) -> Tensor:
    if name == "ce":
        return logits.logsumexp(0) - logits[label]
    ranked = sorted(logits, reverse=True)
    rival = ranked[1] if logits[label] == ranked[0] else ranked[0]
    return -(logits[label] - rival) / (ranked[0] - ranked[2] + 1e-12)


def look_at(net: nn.Module, label: int, name: str) -> Look:
    """Loss and gradient at one point (D,)."""

    def look(v: np.ndarray) -> tuple[float, np.ndarray]:
        point = torch.tensor(v.reshape(SHAPE[1:]), requires_grad=True)
        loss = naive_loss(net(point[None])[0], label, name)
        loss.backward()
        assert point.grad is not None
        return loss.item(), point.grad.numpy().ravel()

    return look


def cut(v: np.ndarray, x: np.ndarray, radius: float, norm: str) -> np.ndarray:
    """Into the ball around x, then into [0, 1]."""
    if norm == "Linf":
        return np.clip(np.clip(v, x - radius, x + radius), 0, 1)
    length = math.sqrt(sum((v - x) ** 2))
    return np.clip(x + (v - x) * min(1.0, radius / max(length, 1e-300)), 0, 1)


class Trace:
    """Where one search went."""

    def __init__(self) -> None:
        self.points: list[np.ndarray] = []
        self.losses: list[float] = []
        self.halved: list[bool] = []


def published(look: Look, x: np.ndarray, start: np.ndarray, radius: float, norm: str, num: int) -> Trace:
    """Algorithm 1 of Croce and Hein 2020 for one example; checkpoints as in the authors' code."""
    trace = Trace()
    period, decrease, least = (max(int(share * num), 1) for share in (0.22, 0.03, 0.06))
    eta, v, before = 2 * radius, start, start
    loss, grad = look(v)
    trace.points, trace.losses = [v], [loss]
    f_max, x_max, g_max = loss, v, grad
    since, f_then, halved_then = 0, f_max, True
    for k in range(num):
        length = np.abs(grad).max() if norm == "Linf" else math.sqrt(sum(grad**2))
        unit = np.sign(grad) if norm == "Linf" else grad / length
        ahead = cut(v + eta * unit, x, radius, norm)
        alpha = 0.75 if k > 0 else 1.0
        moved = cut(v + alpha * (ahead - v) + (1 - alpha) * (v - before), x, radius, norm)
        before, v = v, moved
        loss, grad = look(v)
        trace.points.append(v)
        trace.losses.append(loss)
        if loss > f_max:
            f_max, x_max, g_max = loss, v, grad
        since += 1
        if since == period:
            recent = trace.losses[-period - 1 :]
            rises = sum(b > a for a, b in itertools.pairwise(recent))
            halve = rises <= 0.75 * period or (not halved_then and f_then == f_max)
            if halve:
                eta, v, grad = eta / 2, x_max, g_max
            trace.halved.append(halve)
            since, f_then, halved_then, period = 0, f_max, halve, max(period - decrease, least)
    return trace


def traced(net: Any, attack: Any, x: Tensor, y: Tensor) -> tuple[Tensor, Any]:
    """(looks, B, D) where the attack looked at the model, and what it returned."""
    looks: list[Tensor] = []

    def model(v: Tensor) -> Tensor:
        looks.append(v.detach().clone())
        return net(v)

    result = attack(model, x, y)
    return torch.stack(looks).flatten(2), result


def rows(v: Tensor) -> list[np.ndarray]:
    return [row.detach().numpy().astype(float) for row in v.flatten(1)]


@pytest.mark.parametrize("num", [10, 37, 100])
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("norm,radius", [("Linf", 0.15), ("L2", 0.9)])
def test_apgd_is_the_published_algorithm(norm: str, radius: float, loss: str, num: int) -> None:
    net, x = curved(num), rand(*SHAPE, seed=num)
    start = BALLS[norm](radius).sample(x, stream(3, seed=num))
    attack = Attack(
        threat=BALLS[norm](radius), rule=APGD(), num_steps=num, objective=LOSSES[loss], start=Given(start),
        keep="highest_loss",
    )  # fmt: skip
    looks, result = traced(net, attack, x, LABELS)
    halved = []
    for i in range(3):
        look = look_at(net, int(LABELS[i]), loss)
        trace = published(look, rows(x)[i], rows(x + start)[i], radius, norm, num)
        np.testing.assert_allclose(looks[:, i], np.stack(trace.points), rtol=0, atol=1e-9)
        assert float(result.loss[i]) == pytest.approx(max(trace.losses), rel=1e-9, abs=1e-9)
        halved += trace.halved
    assert any(halved), "no step was halved, so the search never returned"
    assert num == 100 or not all(halved), "every step was halved"


def test_checkpoints_of_a_hundred_steps_are_those_of_the_paper() -> None:
    """Section 3: p_0 = 0, p_1 = 0.22, p_j+1 = p_j + max(p_j - p_j-1 - 0.03, 0.06), at ceil(p_j * 100)."""
    p = [0.0, 0.22]
    while p[-1] < 1:
        p.append(p[-1] + max(p[-1] - p[-2] - 0.03, 0.06))
    want = [math.ceil(v * 100 - 1e-9) for v in p[1:-1]]
    problem, x = Problem(Linf(0.1), torch.full((1, 3), 0.5), 100, stream(1)), torch.zeros(1, 3)
    state: Any = None
    found = []
    for t in range(100):
        # falling all the time: every checkpoint halves
        seen = Seen(torch.tensor([-float(t)]), torch.tensor([False]), torch.ones(1, 3))
        before = 2.0 if state is None else float(state.step)
        _, state = APGD().step(problem, x, seen, state, t)
        if float(state.step) < before:
            assert float(state.step) == before / 2
            found.append(t)
    assert found == want == [22, 41, 57, 70, 80, 87, 93, 99]


@pytest.mark.parametrize(
    "losses,halvings",
    [
        ([*range(16)], []),
        ([0, 9, *[1 + t % 2 for t in range(14)]], [1, 2, 3, 4]),  # the one step before the fifth rises
        ([0, 10, 11, 12, 13, *[13] * 11], [2, 3, 4, 5]),
        # all steps rise, but stay below the best: at every second checkpoint, since that was not halved before
        ([0, 10, 11, 12, 13, 5, 6, 7, 8, 9, 9.1, 9.2, 9.3, 9.4, 9.5, 9.6], [2, 4]),
        # and not at the first checkpoint, though all that was found is below the start
        ([9, 1, 2, 3, 4, 5, 6, 7, 8, 8.1, 8.2, 8.3, 8.4, 8.5, 8.6, 8.7], [2, 4]),
    ],
    ids=["rising", "swinging", "stuck", "below", "below the start"],
)
def test_when_steps_are_halved(losses: list[float], halvings: list[int]) -> None:
    """25 steps: checkpoints at 5, 9, 12, 14, 15, 16, ...; the numbers say which of the first ones halve, from 1."""
    checkpoints = [5, 9, 12, 14, 15]
    problem, z = Problem(Linf(0.1), torch.full((1, 3), 0.5), 25, stream(1)), torch.zeros(1, 3)
    state: Any = None
    steps = []
    for t in range(16):
        seen = Seen(torch.tensor([float(losses[t])]), torch.tensor([False]), torch.ones(1, 3))
        _, state = APGD().step(problem, z, seen, state, t)
        steps.append(float(state.step))
    found = [n for n, t in enumerate(checkpoints, 1) if steps[t] == steps[t - 1] / 2]
    assert found == halvings
    assert steps[0] == 2.0 and len(set(steps)) == 1 + len(found), "and nowhere else"


def test_rho_and_inertia_and_first_step_count() -> None:
    net, x = curved(1), rand(*SHAPE, seed=1)
    usual = Attack(threat=Linf(0.15), rule=APGD(), num_steps=20, start=Null(), keep="last")
    z = usual(net, x, LABELS).z
    for rule in (APGD(rho=0.0), APGD(inertia=0.0), APGD(first_step=0.5)):
        assert not torch.equal(replace(usual, rule=rule)(net, x, LABELS).z, z)
    plain = APGD(inertia=0.0, first_step=1.0)
    once = replace(usual, rule=plain, num_steps=1)(net, x, LABELS)
    grad = torch.autograd.grad(cross_entropy.score(net(x.requires_grad_()), LABELS).sum(), x)[0]
    torch.testing.assert_close(once.x_adv, (x + 0.15 * grad.sign()).clamp(0, 1))


# The same for L1 ---------------------------------------------------------------------------------------------------


def nearest(v: np.ndarray, x: np.ndarray, radius: float) -> np.ndarray:
    """Of the changes with x + change in [0, 1] and L1 length at most radius, the one nearest to v: by bisection."""

    def shrunk(by: float) -> np.ndarray:
        return np.clip(np.sign(v) * np.maximum(np.abs(v) - by, 0), -x, 1 - x)

    if np.abs(shrunk(0)).sum() <= radius:
        return shrunk(0)
    low, high = 0.0, float(np.abs(v).max())
    for _ in range(70):
        middle = (low + high) / 2
        low, high = (middle, high) if np.abs(shrunk(middle)).sum() > radius else (low, middle)
    return shrunk(high)


class SparseTrace(Trace):
    def __init__(self) -> None:
        super().__init__()
        self.shares: list[float] = []
        self.kept: tuple[float, np.ndarray] = (-math.inf, np.zeros(0))


def published_sparse(look: Look, x: np.ndarray, z: np.ndarray, radius: float, num: int) -> SparseTrace:
    """Algorithm 1 of Croce and Hein 2021 for one example from a known start z, as in the authors' code."""
    trace, size = SparseTrace(), len(x)
    eta, before = radius, int((z != 0).sum())
    share = before / size / 1.5
    loss, grad = look(x + z)
    trace.points, trace.losses = [x + z], [loss]
    best = (loss, z, grad)
    for t in range(1, num + 1):
        bar = np.sort(np.abs(grad))[min(max(int((1 - share) * size), 0), size - 1)]
        sign = np.where(np.abs(grad) >= bar, np.sign(grad), 0)
        z = nearest(z + eta * sign / np.abs(sign).sum(), x, radius)
        loss, grad = look(x + z)
        trace.points.append(x + z)
        trace.losses.append(loss)
        best = max(best, (loss, z, grad), key=lambda v: v[0])
        if t % max(int(0.04 * num), 1) == 0:
            entries = int((best[1] != 0).sum())
            sparser = entries / max(before, 1) < 0.95
            share, before = entries / size / 1.5, entries
            eta = radius if sparser else max(eta / 1.5, radius / 10)
            if sparser:
                _, z, grad = best
            trace.shares.append(share)
            trace.halved.append(sparser)
    trace.kept = best[:2]
    return trace


@pytest.mark.parametrize("num", [10, 37, 100])
@pytest.mark.parametrize("loss", LOSSES)
def test_sparse_apgd_is_the_published_algorithm(loss: str, num: int) -> None:
    net, x = curved(num), rand(*SHAPE, seed=num)
    start = L1(3.0).project(x, stream(3, seed=num).normal(SHAPE[1:]).double())
    attack = Attack(
        threat=L1(3.0), rule=SparseAPGD(), num_steps=num, objective=LOSSES[loss], start=Given(start),
        keep="highest_loss",
    )  # fmt: skip
    looks, result = traced(net, attack, x, LABELS)
    sparser, shares = [], set()
    for i in range(3):
        trace = published_sparse(look_at(net, int(LABELS[i]), loss), rows(x)[i], rows(start)[i], 3.0, num)
        np.testing.assert_allclose(looks[:, i], np.stack(trace.points), rtol=0, atol=1e-9)
        assert float(result.loss[i]) == pytest.approx(max(trace.losses), rel=1e-9, abs=1e-9)
        sparser += trace.halved
        shares |= set(trace.shares)
    assert any(sparser) and not all(sparser) and len(shares) > 3, "the share must adapt, both ways"


@pytest.mark.parametrize("num,parts", [(10, [3, 3, 4]), (37, [12, 12, 13]), (100, [30, 30, 40])])
def test_three_radii_are_the_published_schedule(num: int, parts: list[int]) -> None:
    net, x, radius = curved(num + 1), rand(*SHAPE, seed=num), 1.5
    attack = apgd(L1(radius), num_steps=num)
    looks, result = traced(net, attack, x, LABELS)
    assert result.cost == Cost(3 * (num + 3), 3 * num)
    sizes = (looks - x.flatten(1)).abs().sum(2).amax(1)
    ends = list(itertools.accumulate(part + 1 for part in parts))
    for factor, begin, end in zip((3, 2, 1), (0, *ends), ends, strict=False):
        assert radius * (factor - 1) < float(sizes[begin:end].max()) <= radius * factor * (1 + 1e-9)
    for i in range(3):
        look, points = look_at(net, int(LABELS[i]), "ce"), []
        noise = stream_of_attack(3).normal(SHAPE[1:]).double()
        z = rows(noise)[i]
        for factor, part in zip((3, 2, 1), parts, strict=True):
            trace = published_sparse(look, rows(x)[i], nearest(z, rows(x)[i], factor * radius), factor * radius, part)
            points += trace.points
            z = trace.kept[1]
        np.testing.assert_allclose(looks[:, i], np.stack(points), rtol=0, atol=1e-9)
    for keep in ("smallest_fooling", "last"):  # what is handed on is the highest loss, whatever is kept in the end
        other = replace(attack, attack=replace(attack.attack, keep=keep))  # type: ignore[attr-defined,type-var]
        same, _ = traced(net, other, x, LABELS)
        assert torch.equal(same, looks[: len(same)]) and len(looks) - len(same) == (keep == "last")


def stream_of_attack(num: int) -> Any:
    """The noise that an attack takes when given none."""
    from sparring.core.noise import Noise

    return Noise.make(0, "attack", torch.arange(num))


def test_the_share_starts_at_a_fifth_where_the_start_is_dense() -> None:
    x, grad = torch.full((2, 10), 0.5), torch.tensor([[1.0, -9, 2, 8, 3, 7, 4, 6, 5, 10]]).repeat(2, 1)
    z = torch.tensor([[0.01] * 10, [0.1, 0.1, 0.1, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0]])
    problem = Problem(L1(1.0), x, 50, stream(2))
    seen = Seen(torch.zeros(2), torch.zeros(2, dtype=torch.bool), grad)
    moved, state = SparseAPGD().step(problem, z, seen, None, 0)
    assert state.share.tolist() == pytest.approx([0.2, 3 / 10 / 1.5])
    expected = L1(1.0).project(x[:1], z[:1] + torch.tensor([[0, -0.5, 0, 0, 0, 0, 0, 0, 0, 0.5]]))
    torch.testing.assert_close(moved[:1], expected)


class Line(nn.Module):
    """Logits (0, w x)."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(stream(1, seed=4).normal(SHAPE[1:])[0].double())

    def forward(self, x: Tensor) -> Tensor:
        score = (x * self.w).flatten(1).sum(1)
        return torch.stack([0 * score, score], 1)


MASK = rand(1, *SHAPE[1:], seed=5) < 0.6
THREATS: dict[str, L1] = {
    "box": L1(4.0),
    "small": L1(0.6),
    "wide": L1(9.0, low=-1.0, high=2.0),
    "radii-mask": L1(torch.tensor([1.0, 3.5, 2.0], dtype=torch.float64), mask=MASK),
    "small-mask": L1(2.0, mask=rand(1, *SHAPE[1:], seed=6) < 0.15),
}


def optimum(threat: Any, x: Tensor, slope: Tensor) -> Tensor:
    """(B,) max <slope, z> over ball, box and mask, by linear programming: z = up - down."""
    free = torch.ones_like(x, dtype=torch.bool) if threat.mask is None else threat.mask.expand_as(x)
    best = []
    for i, radius in enumerate(torch.as_tensor(threat.radius).double().expand(len(x)).tolist()):
        up = torch.full_like(x[i], 9.0) if threat.high is None else threat.high - x[i]
        down = torch.full_like(x[i], 9.0) if threat.low is None else x[i] - threat.low
        bounds = [(0, most) for most in (torch.stack([up, down]) * free[i]).flatten().tolist()]
        gain = slope[i].flatten().numpy()
        found = optimize.linprog(np.concatenate([-gain, gain]), [[1.0] * 2 * len(gain)], [radius], bounds=bounds)
        best.append(-found.fun)
    return torch.tensor(best, dtype=torch.float64)


@pytest.mark.parametrize("name", THREATS)
def test_a_linear_model_in_l1_is_climbed_to_the_optimum(name: str) -> None:
    x, y, line, threat = rand(*SHAPE, seed=8), torch.tensor([0, 1, 0]), Line().eval(), THREATS[name]
    slope = (1 - 2 * y.double()).view(3, 1, 1, 1) * line.w.detach()
    best, clean = optimum(threat, x, slope), margin.score(line(x), y)

    def found(attack: Any) -> Tensor:
        result = attack(line, x, y)
        assert bool(inside(threat, x, result.z).all()) and bool(threat.valid(x, result.x_adv).all())
        share = (margin.score(line(result.x_adv), y) - clean).detach() / best
        assert bool((share <= 1 + 1e-9).all()), "more than the optimum"
        return share

    highest = Attack(threat=threat, rule=SparseAPGD(), num_steps=100, start=Gaussian(1.0), keep="highest_loss")
    assert bool((found(highest) >= 0.98).all())
    assert bool((found(ShrinkingRadius(highest)) >= 0.98).all())
    assert bool((found(replace(highest, num_steps=0)) < 0.9).all()), "the start does not reach it"


def test_without_a_gradient_a_sparse_step_stays() -> None:
    x, z = torch.full((2, 10), 0.5), torch.tensor([[0.1] * 10, [0.2] + [0.0] * 9])
    seen = Seen(torch.zeros(2), torch.zeros(2, dtype=torch.bool), torch.zeros(2, 10))
    moved, _ = SparseAPGD().step(Problem(L1(2.0), x, 50, stream(2)), z, seen, None, 0)
    torch.testing.assert_close(moved, z)


def test_the_step_goes_back_to_the_radius_where_the_best_point_got_sparser() -> None:
    x, problem = torch.full((2, 40), 0.5), Problem(L1(1.0), torch.full((2, 40), 0.5), 50, stream(2))
    z = torch.zeros(2, 40)
    z[:, :20] = 0.01
    state: Any = None
    steps = []
    for t in range(5):
        if t == 3:
            z = z.clone()
            z[0, 18:] = 0.0  # 10 % fewer, for one of the two
        seen = Seen(torch.full((2,), float(t)), torch.zeros(2, dtype=torch.bool), rand(2, 40, seed=t).float())
        _, state = SparseAPGD().step(problem, z, seen, state, t)
        steps.append(state.step.tolist())
    assert steps == [[1, 1], [1, 1], [pytest.approx(1 / 1.5)] * 2, [pytest.approx(1 / 1.5)] * 2,
                     [1, pytest.approx(1 / 1.5**2)]]  # fmt: skip
    assert state.share.tolist() == pytest.approx([18 / 40 / 1.5, 20 / 40 / 1.5])
    for t in range(5, 40):
        seen = Seen(torch.full((2,), float(t)), torch.zeros(2, dtype=torch.bool), rand(2, 40, seed=t).float())
        _, state = SparseAPGD().step(problem, z, seen, state, t)
    assert state.step.tolist() == [pytest.approx(0.1)] * 2, "and never below a tenth"
    assert x.shape == z.shape


# Promises ------------------------------------------------------------------------------------------------------------

MAKES: dict[str, Callable[[], Any]] = {
    "Linf": lambda: apgd(Linf(torch.tensor([0.05, 0.3, 0.1]).double()), num_steps=12),
    "L2-mask": lambda: apgd(L2(torch.tensor([0.1, 0.9, 0.4]).double(), mask=rand(*SHAPE, seed=4) < 0.5), num_steps=12),
    "L2-no-box": lambda: apgd(L2(0.4, low=None, high=None), num_steps=12, objective=dlr),
    "L1": lambda: apgd(L1(torch.tensor([0.5, 3.0, 1.0]).double()), num_steps=12),
    "L1-mask": lambda: apgd(L1(2.0, mask=rand(*SHAPE, seed=4) < 0.5), num_steps=12, objective=dlr, restarts=2),
    "L1-targets": lambda: apgd_t(L1(1.0, low=-1.0, high=2.0), num_steps=12, targets=2),
    "Linf-targets": lambda: apgd_t(Linf(0.05, mask=rand(*SHAPE, seed=4) < 0.5), num_steps=12),
    "Linf-eot": lambda: apgd(Linf(0.05), num_steps=5, eot=2, restarts=2),
}


def threat_of(attack: Any) -> Any:
    while not hasattr(attack, "threat"):
        attack = attack.attack
    return attack.threat


@pytest.mark.parametrize("name", MAKES)
def test_each_example_alone_and_inside_the_set(name: str) -> None:
    net, x, attack = curved(5), rand(*SHAPE, seed=2), MAKES[name]()
    held, threat, noise = x.clone(), threat_of(attack), stream(3)
    whole, again = (attack(net, x, LABELS, noise=noise) for _ in range(2))
    assert torch.equal(whole.z, again.z) and torch.equal(x, held)
    assert not torch.equal(whole.z, attack(net, x, LABELS, noise=stream(3, seed=1)).z)
    assert bool(inside(threat, x, whole.z).all()) and bool(threat.valid(x, whole.x_adv).all())
    logits = net(whole.x_adv)
    assert torch.equal(whole.reached, logits.argmax(1) != LABELS)
    for i in (torch.tensor([2, 0]), *torch.arange(3).split(1)):
        alone = take(attack, i)(net, x[i], LABELS[i], noise=noise.take(i))
        torch.testing.assert_close(alone.z, whole.z[i], rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(alone.loss, whole.loss[i], rtol=1e-9, atol=1e-9)
        assert torch.equal(alone.reached, whole.reached[i])


@pytest.mark.parametrize("name", MAKES)
def test_float32_and_no_example_at_all(name: str) -> None:
    net, x, attack = curved(5).float(), rand(*SHAPE, seed=2).float(), MAKES[name]()
    result = attack(net, x, LABELS)
    assert result.z.dtype == torch.float32 and bool(inside(threat_of(attack), x, result.z).all())
    none = torch.arange(0)
    nothing = take(attack, none)(net, x[none], LABELS[none])
    assert nothing.z.shape == (0, *SHAPE[1:]) and nothing.loss.shape == (0,)


@pytest.mark.parametrize("num", [0, 1, 2, 3])
@pytest.mark.parametrize("norm", BALLS)
def test_few_steps_and_no_radius(norm: str, num: int) -> None:
    net, x = curved(5), rand(*SHAPE, seed=2)
    result = apgd(BALLS[norm](0.3), num_steps=num)(net, x, LABELS)
    assert bool(inside(BALLS[norm](0.3), x, result.z).all())
    assert result.cost.backwards == 3 * num
    still = apgd(BALLS[norm](0.0), num_steps=num)(net, x, LABELS)
    assert bool((still.z == 0).all())


@pytest.mark.parametrize("norm", BALLS)
def test_flat_models_change_nothing_and_give_no_nan(norm: str) -> None:
    x = rand(*SHAPE, seed=2)
    result = apgd(BALLS[norm](0.3), num_steps=6)(lambda v: 0 * v.flatten(1)[:, :NUM_CLASSES], x, torch.zeros(3).long())
    assert bool(result.z.isfinite().all()) and not bool(result.reached.any())  # type: ignore[union-attr]


@pytest.mark.parametrize("norm", BALLS)
def test_an_infinite_radius_is_refused(norm: str) -> None:
    with pytest.raises(ValueError, match=r"finite radius|the radius is infinite, so a step cannot be a fraction of it"):
        apgd(BALLS[norm](math.inf), num_steps=2)(curved(5), rand(*SHAPE, seed=2), LABELS)
    attack = Attack(threat=BALLS[norm](math.inf), rule=APGD(), num_steps=2, start=Null())
    with pytest.raises(ValueError, match=r"the radius is infinite.*such as fab"):
        attack(curved(5), rand(*SHAPE, seed=2), LABELS)


def test_a_step_leaves_its_arguments() -> None:
    x, z, grad = rand(*SHAPE), rand(*SHAPE, seed=2) / 100, rand(*SHAPE, seed=3)
    rules: list[tuple[Any, Any]] = [(APGD(), Linf(0.5)), (SparseAPGD(), L1(2.0, mask=MASK))]
    for rule, threat in rules:
        problem, kept, state = Problem(threat, x, 10, stream(3)), (z.clone(), grad.clone()), None
        for t in range(5):
            seen = Seen(torch.full((3,), float(t % 2)), torch.zeros(3, dtype=torch.bool), grad)
            _, state = rule.step(problem, z, seen, state, t)
        assert torch.equal(z, kept[0]) and torch.equal(grad, kept[1])


# Another implementation ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def digits() -> tuple[nn.Module, Tensor, Tensor]:
    """A small network trained on digits, and 60 of them that it gets right."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(images).float().view(-1, 1, 8, 8) / 16, torch.tensor(labels)

    def train() -> nn.Module:
        net = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
        optimizer = torch.optim.Adam(net.parameters(), 0.02)
        for _ in range(60):
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(x), y).backward()
            optimizer.step()
        return net.eval()

    net = seeded(train)
    right = (net(x).argmax(1) == y).nonzero()[:60, 0]
    return net, x[right], y[right]


@pytest.fixture
def torchattacks() -> Iterator[Any]:
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")
        yield pytest.importorskip("torchattacks", exc_type=ImportError)


def fallen(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return net(x).argmax(1) != y


RADII = [("Linf", 0.08), ("L2", 0.45)]


@pytest.mark.parametrize("norm,radius", RADII)
@pytest.mark.parametrize("loss", LOSSES)
def test_the_same_fall_as_to_torchattacks_from_the_same_start(
    torchattacks: Any, digits: tuple[nn.Module, Tensor, Tensor], norm: str, radius: float, loss: str
) -> None:
    net, x, y = digits
    them = fallen(net, torchattacks.APGD(net, norm=norm, eps=radius, steps=20, loss=loss, seed=5)(x, y), y)
    torch.manual_seed(5)  # their start, in the fork of the fixture
    draw, power = (torch.randn(x.shape), 2.0) if norm == "L2" else (2 * torch.rand(x.shape) - 1, math.inf)
    edge = radius * draw / torch.linalg.vector_norm(draw.flatten(1), power, dim=1).view(-1, 1, 1, 1)
    attack = Attack(
        threat=BALLS[norm](radius), rule=APGD(), num_steps=20, objective=LOSSES[loss],
        start=Given((x + edge).clamp(0, 1) - x),
    )  # fmt: skip
    us = attack(net, x, y).reached
    assert 15 < int(them.sum()) < 45, "the radius must leave both kinds"
    assert int((us != them).sum()) <= 1


@pytest.mark.parametrize("norm,radius", RADII)
@pytest.mark.parametrize("loss", LOSSES)
def test_from_starts_of_our_own_as_many_fall_on_average(
    torchattacks: Any, digits: tuple[nn.Module, Tensor, Tensor], norm: str, radius: float, loss: str
) -> None:
    """Single runs differ by up to 3 of 60 between two seeds of either."""
    net, x, y = digits
    ours, us, them = apgd(BALLS[norm](radius), num_steps=20, objective=LOSSES[loss]), 0, 0
    for seed in range(6):
        theirs = torchattacks.APGD(net, norm=norm, eps=radius, steps=20, loss=loss, seed=seed)
        them += int(fallen(net, theirs(x, y), y).sum())
        us += int(ours(net, x, y, noise=stream(60, seed=seed)).reached.sum())  # type: ignore[union-attr]
    assert abs(us - them) <= 6


@pytest.mark.parametrize("norm,radius", RADII)
def test_as_many_fall_to_targets_as_to_those_of_torchattacks(
    torchattacks: Any, digits: tuple[nn.Module, Tensor, Tensor], norm: str, radius: float
) -> None:
    net, x, y = digits
    them = int(fallen(net, torchattacks.APGDT(net, norm=norm, eps=radius, steps=20)(x, y), y).sum())
    us = int(apgd_t(BALLS[norm](radius), num_steps=20)(net, x, y).reached.sum())  # type: ignore[union-attr]
    assert 15 < them < 45 and abs(us - them) <= 1
