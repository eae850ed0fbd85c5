"""FAB: steps onto planes against linear programs, sizes against exact distances and against another implementation."""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from scipy import optimize
from torch import Tensor, nn

from contracts import BALLS, BOXES, NUM_CLASSES, SHAPE, rand, seeded, sentences, stream, words
from sparring.attacks.fab import FAB, closest_plane, fab, fab_t, onto_plane, step_beyond
from sparring.core.geometry import per_example
from sparring.core.objectives import margin
from sparring.core.types import AttackResult, Cost, take
from sparring.evaluation.measure import measure
from sparring.threats import Ball, Linf, inside

NORMS: dict[str, float] = {"Linf": math.inf, "L2": 2, "L1": 1}
DUAL = {"Linf": 1, "L2": 2, "L1": math.inf}
LABELS = torch.tensor([2, 0, 3])
MASK = rand(*SHAPE, seed=6) < 0.6


# The smallest step onto a plane ----------------------------------------------------------------------------------


def smallest(norm: str, w: Tensor, gap: float, low: Tensor, high: Tensor) -> float:
    """The least norm of d (D,) with <w, d> = gap >= 0 in the box, by a general solver; infinite where there is none."""
    if float(torch.where(w > 0, w * high, w * low).nan_to_num(0).sum()) < gap:
        return math.inf
    num, row, box = len(w), w.tolist(), list(zip(low.tolist(), high.tolist(), strict=True))
    if norm == "L2":  # by the KKT conditions d = clip(s w), for the one s that meets the plane
        slope, least, most = w.numpy(), low.numpy(), high.numpy()
        s, step = 0.0, 1e9
        while step > 1e-12 * s + 1e-15:
            short = slope @ np.clip((s + step) * slope, least, most) < gap
            s, step = (s + step, step) if short else (s, step / 2)
        return float(np.linalg.norm(np.clip(s * slope, least, most)))
    if norm == "Linf":  # the least t with -t <= d_i <= t
        eye, ones = np.eye(num), np.ones((num, 1))
        rows = np.block([[eye, -ones], [-eye, -ones]])
        found = optimize.linprog([0.0] * num + [1.0], rows, [0.0] * 2 * num, [[*row, 0.0]], [gap], [*box, (0, None)])
    else:  # d = p - q with p, q >= 0
        bounds = [(0, most) for _, most in box] + [(0, -least) for least, _ in box]
        found = optimize.linprog([1.0] * 2 * num, A_eq=[row + [-v for v in row]], b_eq=[gap], bounds=bounds)
    assert found.status == 0, found.message
    return float(found.fun)


def planes(num: int, dims: int, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Awkward cases: zeros in w, planes on either side, out of reach or through 0, sides without room or end."""
    w, gap = 2 * rand(num, dims, seed=seed) - 1, 2 * rand(num, seed=seed + 1) - 1
    low, high = -rand(num, dims, seed=seed + 2), rand(num, dims, seed=seed + 3)
    kind = rand(4, num, dims, seed=seed + 4)
    w[kind[0] < 0.15] = 0
    high[kind[1] < 0.1], low[kind[2] < 0.1] = 0, 0
    high[kind[3] < 0.1], low[kind[3] > 0.9] = math.inf, -math.inf
    gap[:2] = 0
    return w, gap, low, high


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("dims", [1, 2, 5, 9])
def test_the_smallest_step_is_that_of_a_general_solver(norm: str, dims: int) -> None:
    w, gap, low, high = planes(50, dims, seed=dims)
    d = onto_plane(w, gap, NORMS[norm], low, high)
    assert bool(((low <= d) & (d <= high)).all())
    assert bool((d[w == 0] == 0).all())
    missed = 0
    for i in range(len(w)):
        sign = math.copysign(1, float(gap[i]))
        best = smallest(norm, sign * w[i], abs(float(gap[i])), low[i], high[i])
        if math.isinf(best):
            missed += 1
            ends = torch.where(sign * w[i] > 0, high[i], low[i]).where(w[i] != 0, torch.zeros(dims).double())
            torch.testing.assert_close(d[i], ends, rtol=1e-12, atol=0)
        else:
            assert float((w[i] * d[i]).sum()) == pytest.approx(float(gap[i]), rel=1e-9, abs=1e-12)
            assert float(torch.linalg.vector_norm(d[i], ord=NORMS[norm])) == pytest.approx(best, rel=1e-7, abs=1e-10)
    assert 0 < missed < 50, "both kinds of cases must be there"


def test_the_bisection_above_is_a_quadratic_program() -> None:
    w, gap, low, high = planes(20, 4, seed=50)
    compared = 0
    for i in range(2, 20):
        best = smallest("L2", w[i] * gap[i].sign(), abs(float(gap[i])), low[i], high[i])
        if math.isfinite(best):
            plane = {"type": "eq", "fun": lambda d, i=i: d @ w[i].numpy() - float(gap[i])}
            box = list(zip(low[i].tolist(), high[i].tolist(), strict=True))
            start = onto_plane(w[i : i + 1], gap[i : i + 1], 1, low[i], high[i])[0]  # feasible, elsewhere
            found = optimize.minimize(lambda d: d @ d, start, bounds=box, constraints=plane, tol=1e-12)
            assert math.sqrt(found.fun) == pytest.approx(best, rel=1e-4)
            compared += 1
    assert compared > 5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_without_a_box_the_step_is_the_closed_form(dtype: torch.dtype) -> None:
    w, gap = (rand(7, 300, seed=1) - 0.5).to(dtype), (rand(7, seed=2) - 0.5).to(dtype)
    g = gap[:, None]
    torch.testing.assert_close(onto_plane(w, gap, math.inf), g * w.sign() / w.abs().sum(1, keepdim=True))
    torch.testing.assert_close(onto_plane(w, gap, 2), g * w / (w * w).sum(1, keepdim=True))
    one = w.abs().argmax(1, keepdim=True)
    expected = torch.zeros_like(w).scatter(1, one, g / w.gather(1, one))
    torch.testing.assert_close(onto_plane(w, gap, 1), expected)


@pytest.mark.parametrize("norm", NORMS.values())
def test_each_row_by_itself_and_at_any_scale(norm: float) -> None:
    w, gap, low, high = planes(30, 6, seed=9)
    before = [t.clone() for t in (w, gap, low, high)]
    whole = onto_plane(w, gap, norm, low, high)
    assert all(torch.equal(t, b) for t, b in zip((w, gap, low, high), before, strict=True))
    alone = torch.cat([onto_plane(*(t[i : i + 1] for t in (w, gap)), norm, low[i], high[i]) for i in range(30)])
    torch.testing.assert_close(whole, alone, rtol=1e-10, atol=1e-12)
    small = onto_plane(*(t.float() for t in (1e-30 * w, 1e-30 * gap)), norm, low.float(), high.float())
    torch.testing.assert_close(small.double(), whole, rtol=1e-4, atol=1e-5)
    assert bool((onto_plane(0 * w, gap, norm, low, high) == 0).all())


@pytest.mark.parametrize("norm", NORMS.values())
def test_float32_steps_of_many_entries_meet_the_plane(norm: float) -> None:
    w, x = (rand(4, 3072, seed=3) - 0.5).float(), rand(4, 3072, seed=4).float()
    gap = torch.tensor([1e-4, 0.3, -20.0, 200.0])
    d = onto_plane(w, gap, norm, -x, 1 - x)
    torch.testing.assert_close((w.double() * d.double()).sum(1).float(), gap, rtol=1e-4, atol=0)


@pytest.mark.parametrize("norm", [math.inf, 2])
def test_float32_steps_that_end_where_an_entry_reaches_its_end(norm: float) -> None:
    """There the sums of what is used up and of what is left cancel; slopes span nine orders of magnitude."""
    w = (rand(400, 60, seed=1) * 10 ** (-9 * rand(400, 60, seed=2) * (rand(400, 60, seed=3) < 0.3))).float()
    room = rand(400, 60, seed=4).float()
    each = w if norm == 2 else torch.ones_like(w)
    level = (room / each).gather(1, (60 * rand(400, 1, seed=5)).long())
    gap = (w * torch.minimum(level * each, room)).sum(1)
    d = onto_plane(w, gap, norm, -room, room)
    assert bool(((d >= 0) & (d <= room)).all())
    torch.testing.assert_close((w.double() * d.double()).sum(1).float(), gap, rtol=1e-5, atol=0)


def test_only_three_norms() -> None:
    with pytest.raises(ValueError, match=r"norm=3; the smallest step"):
        onto_plane(torch.ones(1, 2), torch.ones(1), 3)


def test_the_closest_plane_and_the_step_beyond_it_by_hand() -> None:
    slopes = torch.tensor([[[3.0, 4.0], [0.0, 0.0], [1.0, 0.0]]])
    leads = torch.tensor([[-10.0, -0.1, -1.9]])
    distances = {math.inf: [10 / 7, 1.9], 2: [2.0, 1.9], 1: [2.5, 1.9]}
    for norm, (first, third) in distances.items():
        lead, _ = closest_plane(leads, slopes, norm)
        assert lead.tolist() == pytest.approx([-10.0 if first < third else -1.9])
        lead, _ = closest_plane(leads * torch.tensor([1.0, 0.0, 1.0]), slopes, norm)
        assert float(lead) != 0, "a class that always ties with the label leads nowhere"
    free = torch.full((1, 2), math.inf)
    # from z = (1, 0) the plane 3 a + 4 b = 5 is 2 / 5 away, from 0 it is 1 away: alpha = 2 / 7 is cut to 0.1
    z, slope = torch.tensor([[1.0, 0.0]]), torch.tensor([[3.0, 4.0]])
    near, far = torch.tensor([[0.24, 0.32]]), torch.tensor([[0.6, 0.8]])
    for most, alpha in ((0.1, 0.1), (0.5, 2 / 7)):
        moved = step_beyond(z, torch.tensor([-2.0]), slope, 2, -free, free, 1.05, most)
        torch.testing.assert_close(moved, (1 - alpha) * (z + 1.05 * near) + alpha * 1.05 * far)
    assert torch.equal(step_beyond(z, torch.tensor([math.nan]), slope, 2, -free, free, 1.05, 0.1), z)
    assert torch.equal(step_beyond(z, torch.tensor([-2.0]), 0 * slope, 2, -free, free, 1.05, 0.1), z)


# Linear models: the exact distance -------------------------------------------------------------------------------


def linear(classes: int, shape: tuple[int, ...] = SHAPE) -> nn.Module:
    return seeded(lambda: nn.Sequential(nn.Flatten(), nn.Linear(math.prod(shape[1:]), classes)).double(), seed=3)


def distances(norm: str, threat: Ball, model: Any, x: Tensor, y: Tensor) -> Tensor:
    """(B,) the exact size of the smallest change of the prediction: the least over the planes of all wrong classes."""
    logits, weight = model(x).detach(), model[1].weight.detach()
    low = (x - x - math.inf if threat.low is None else threat.low - x).flatten(1)
    high = (x - x + math.inf if threat.high is None else threat.high - x).flatten(1)
    mask = (torch.ones_like(x) if threat.mask is None else threat.mask.expand_as(x)).flatten(1)
    best = []
    for i, label in enumerate(y.tolist()):
        others = [k for k in range(logits.shape[1]) if k != label]
        gaps = [float(logits[i, label] - logits[i, k]) for k in others]
        slopes = [(weight[k] - weight[label]) * mask[i] for k in others]
        best.append(min(smallest(norm, w, g, low[i], high[i]) for w, g in zip(slopes, gaps, strict=True)))
    return torch.tensor(best, dtype=x.dtype)


def assert_smallest(make: Callable[[Ball], Any], norm: str, threat: Ball, classes: int) -> None:
    """Every example right at first is turned by a change at most 1 % larger than the smallest, and none smaller."""
    model, x = linear(classes), rand(*SHAPE, seed=8)
    y = model(x).argmax(1)
    exact = distances(norm, threat, model, x, y)
    result = make(threat)(model, x, y)
    assert bool((exact > 0).all())
    assert result.reached.all(), "not all were turned"
    assert bool((result.size >= exact * (1 - 1e-9)).all()), "smaller than the smallest"
    assert bool((result.size <= exact * 1.01).all()), f"{(result.size / exact).max():.4f} times the smallest"


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("box", BOXES)
@pytest.mark.parametrize("mask", [None, MASK, MASK[:1]], ids=["all", "masks", "one-mask"])
def test_linear_models_are_turned_by_the_smallest_change(norm: str, box: str, mask: Tensor | None) -> None:
    threat = BALLS[norm](math.inf, *BOXES[box], mask)
    assert_smallest(lambda t: fab(t, num_steps=20), norm, threat, 2)
    assert_smallest(lambda t: fab_t(t, num_steps=20), norm, threat, NUM_CLASSES)


@pytest.mark.parametrize("norm", NORMS)
def test_no_steps_fail_that_test(norm: str) -> None:
    with pytest.raises(AssertionError, match="not all were turned"):
        assert_smallest(lambda t: fab_t(t, num_steps=0), norm, BALLS[norm](math.inf), 2)
    with pytest.raises(AssertionError, match="times the smallest"):
        assert_smallest(lambda t: fab_t(t, num_steps=1), norm, BALLS[norm](math.inf), 2)


@pytest.mark.parametrize("norm", NORMS)
def test_untargeted_goes_to_the_closest_of_all_classes(norm: str) -> None:
    """Without a box the dual norm ranks the planes rightly."""
    threat = BALLS[norm](math.inf, None, None)
    model, x = linear(NUM_CLASSES), rand(*SHAPE, seed=8)
    logits, weight = model(x).detach(), model[1].weight.detach()
    y = logits.argmax(1)
    slopes = weight[None] - weight[y][:, None]
    ratio = (logits.gather(1, y[:, None]) - logits) / torch.linalg.vector_norm(slopes, ord=DUAL[norm], dim=2)
    exact = ratio.nan_to_num(math.inf).amin(1)
    torch.testing.assert_close(exact, distances(norm, threat, model, x, y), rtol=1e-6, atol=0)
    size = fab(threat, num_steps=20)(model, x, y).size
    assert bool(((size >= exact * (1 - 1e-9)) & (size <= exact * 1.01)).all())


# Another implementation ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def digits() -> tuple[nn.Module, Tensor, Tensor]:
    """A small network trained on digits, and 50 of them that it gets right."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(images).float() / 16, torch.tensor(labels)

    def train() -> nn.Module:
        net = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
        optimizer = torch.optim.Adam(net.parameters(), 0.02)
        for _ in range(40):
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(x), y).backward()
            optimizer.step()
        return net.eval()

    net = seeded(train)
    right = (net(x).argmax(1) == y).nonzero()[:50, 0]
    return net, x[right], y[right]


def reference(net: nn.Module, norm: str, radius: float, steps: int) -> Any:
    torchattacks = pytest.importorskip("torchattacks")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torchattacks.FAB(net, norm=norm, eps=radius, steps=steps, multi_targeted=True, n_classes=10)


@pytest.mark.parametrize("norm", NORMS)
def test_sizes_are_those_of_torchattacks(norm: str, digits: tuple[nn.Module, Tensor, Tensor]) -> None:
    net, x, y = digits
    best, theirs = torch.full((50,), math.inf), reference(net, norm, 1.0, 15)
    for number in range(2, 6):
        theirs.target_class = number
        found = theirs.attack_single_run_targeted(x, y)
        size = torch.linalg.vector_norm(found - x, ord=NORMS[norm], dim=1)
        best = torch.where(net(found).argmax(1) != y, size, math.inf).minimum(best)
    ours = fab_t(BALLS[norm](math.inf), num_steps=15, targets=4)(net, x, y)
    assert bool(best.isfinite().all() and ours.reached.all())  # type: ignore[union-attr]
    ratio = ours.size / best
    assert float(ratio.median()) <= 1.001
    assert float(ratio.max()) <= 1.02, "and none is much larger"


@pytest.mark.parametrize("norm,radius", [("Linf", 0.08), ("L2", 0.45)])  # in L1 its FAB stops with a NameError
def test_successes_are_those_of_torchattacks(
    norm: str, radius: float, digits: tuple[nn.Module, Tensor, Tensor]
) -> None:
    net, x, y = digits
    found = reference(net, norm, radius, 12)(x, y)
    size = torch.linalg.vector_norm(found - x, ord=NORMS[norm], dim=1)
    theirs = int(((net(found).argmax(1) != y) & (size <= radius)).sum())
    ours = fab_t(BALLS[norm](radius), num_steps=12)(net, x, y)
    assert 10 < theirs < 40, "the radius must leave both kinds"
    assert abs(int(ours.reached.sum()) - theirs) <= 1  # type: ignore[union-attr]


# What comes back -------------------------------------------------------------------------------------------------


THREATS = {
    f"{norm}-{box}-{mask}-{radius}": BALLS[norm](
        {"radii": scale * torch.tensor([0.5, 1.0, 2.0]).double(), "scalar": scale}[radius],
        *BOXES[box],
        {"all": None, "masks": MASK}[mask],
    )
    for (norm, scale), box, mask, radius in itertools.product(
        {"Linf": 0.05, "L2": 0.3, "L1": 1.0}.items(), BOXES, ("all", "masks"), ("radii", "scalar")
    )
}
MAKES: dict[str, Callable[[Ball], FAB]] = {
    "fab": lambda threat: fab(threat, num_steps=6, restarts=2),  # type: ignore[dict-item,return-value]
    "fab-t": lambda threat: fab_t(threat, num_steps=6, targets=2, restarts=2),  # type: ignore[dict-item,return-value]
}
FIELDS = ("x_adv", "z", "size", "loss", "reached")


def fields(result: AttackResult, rows: Any = slice(None)) -> dict[str, Any]:
    return {name: getattr(result, name)[rows] for name in FIELDS}


@pytest.mark.parametrize("make", MAKES)
@pytest.mark.parametrize("threat", THREATS.values(), ids=THREATS)
def test_the_result_is_in_the_set_and_says_what_it_is(network: nn.Module, make: str, threat: Ball) -> None:
    x = rand(*SHAPE, seed=1)
    y = network(x).argmax(1)
    result = MAKES[make](threat)(network, x, y)
    logits = network(result.x_adv)
    assert result.loss is not None and result.reached is not None
    torch.testing.assert_close(result.loss, margin.score(logits, y), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(result.size, threat.size(x, result.z))
    assert bool(inside(threat, x, result.z).all())
    assert bool(threat.valid(x, result.x_adv).all())  # type: ignore[arg-type]
    torch.testing.assert_close(result.x_adv, x + result.z)
    assert torch.equal(result.reached, (logits.argmax(1) != y) & (result.size <= torch.as_tensor(threat.radius)))
    assert not any(getattr(result, name).requires_grad for name in FIELDS)


def test_the_threats_above_leave_some_standing(network: nn.Module) -> None:
    x = rand(*SHAPE, seed=1)
    y = network(x).argmax(1)
    some = [threat for name, threat in THREATS.items() if name.endswith("unit-masks-radii")]
    for make in MAKES.values():
        reached = torch.cat([make(threat)(network, x, y).reached for threat in some])  # type: ignore[misc]
        assert 2 < int(reached.sum()) < 7 == len(reached) - 2


@pytest.mark.parametrize("make", MAKES)
@pytest.mark.parametrize("norm", NORMS)
def test_each_example_by_itself(network: nn.Module, make: str, norm: str) -> None:
    x, y = rand(5, *SHAPE[1:], seed=2), torch.tensor([2, 0, 3, 1, 1])
    scale = {"Linf": 0.05, "L2": 0.3, "L1": 1.0}[norm]
    threat = BALLS[norm](scale * torch.arange(1, 6).double(), mask=rand(5, *SHAPE[1:], seed=4) < 0.7)
    attack = MAKES[make](threat)
    whole = attack(network, x, y, noise=stream(5))
    for rows in (torch.tensor([4, 1]), *torch.arange(5).split(1)):
        alone = take(attack, rows)(network, x[rows], y[rows], noise=stream(5).take(rows))
        torch.testing.assert_close(fields(alone), fields(whole, rows), rtol=1e-9, atol=1e-9)


def bowl(x: Tensor, depth: float) -> Callable[[Tensor], Tensor]:
    """Class 1 gains with the distance from the very x, where its slope is 0, and leads from sqrt(depth) on."""

    def model(v: Tensor) -> Tensor:
        far = ((v - x[: len(v)]) ** 2).flatten(1).sum(1)
        return torch.stack([0 * far + depth, far], 1)

    return model


@pytest.mark.parametrize("make", MAKES)
def test_the_same_again_and_other_noise_other_starts(make: str) -> None:
    x, y = rand(*SHAPE, seed=1), torch.zeros(3, dtype=torch.int64)
    network, attack = bowl(x, 0.01), MAKES[make](Linf(0.1))
    first, again = (attack(network, x, y, noise=stream(3)) for _ in range(2))
    other = attack(network, x, y, noise=stream(3, seed=1))
    assert all(torch.equal(a, b) for a, b in zip(fields(first).values(), fields(again).values(), strict=True))
    assert not torch.equal(first.z, other.z)
    once = replace(attack, restarts=1)
    assert torch.equal(once(network, x, y, noise=stream(3)).z, once(network, x, y, noise=stream(3, seed=1)).z)


@pytest.mark.parametrize("make", MAKES)
def test_what_the_caller_gave_stays_as_it_was(
    stateful: nn.Module, snapshot: Callable[[nn.Module], Any], make: str
) -> None:
    x, y = rand(*SHAPE, seed=1), LABELS.clone()
    held, before = x.clone(), snapshot(stateful)
    MAKES[make](Linf(0.1))(stateful, x, y)
    with torch.inference_mode():
        MAKES[make](Linf(0.1))(stateful, x.clone(), y.clone())
    with pytest.raises(ValueError, match="labels are"):
        MAKES[make](Linf(0.1))(stateful, x, torch.zeros(3, 2, 2).long())  # type: ignore[arg-type]
    assert snapshot(stateful) == before
    assert torch.equal(x, held) and torch.equal(y, LABELS)


def test_what_is_wrong_already_needs_no_change(network: nn.Module) -> None:
    x = rand(*SHAPE, seed=1)
    right = network(x).argmax(1)
    y = torch.where(torch.tensor([True, False, True]), (right + 1) % NUM_CLASSES, right)
    for radius in (0.5, math.inf):
        result = fab_t(Linf(radius), num_steps=10)(network, x, y)
        assert result.size[[0, 2]].tolist() == [0, 0] and float(result.size[1]) > 0
        assert result.reached.all()  # type: ignore[union-attr]
    assert fab_t(Linf(0.1))(network, x, (right + 1) % NUM_CLASSES).cost == Cost(6, 0)


def test_labels_and_their_probabilities_are_alike(network: nn.Module) -> None:
    x, attack = rand(*SHAPE, seed=1), MAKES["fab"](Linf(0.1))
    soft = 0.7 * nn.functional.one_hot(LABELS, NUM_CLASSES).double() + 0.075
    assert torch.equal(attack(network, x, LABELS).z, attack(network, x, soft).z)


def test_a_minimum_norm_attack_finds_none_or_all(network: nn.Module) -> None:
    x = rand(*SHAPE, seed=1)
    y = network(x).argmax(1)
    none = fab_t(Linf(math.inf), num_steps=0, restarts=2)(network, x, y)
    assert not none.reached.any() and bool((none.z == 0).all())  # type: ignore[union-attr]
    flat = fab(Linf(math.inf), num_steps=3, restarts=3)(lambda v: network(x) + 0 * v.flatten(1)[:, :1], x, y)
    assert not flat.reached.any() and bool((flat.z == 0).all())  # type: ignore[union-attr]
    sizes = [fab_t(Linf(math.inf), num_steps=8, targets=n)(network, x, y).size for n in (1, 2, 3)]
    assert bool((sizes[2] <= sizes[1]).all() and (sizes[1] <= sizes[0]).all()), "all targets are run on all"


@pytest.mark.parametrize("norm", NORMS)
def test_restarts_help_where_the_clean_input_has_no_slope(norm: str) -> None:
    x, y = rand(*SHAPE, seed=1), torch.zeros(3, dtype=torch.int64)
    exact = {"Linf": 0.1 / math.sqrt(70), "L2": 0.1, "L1": 0.1}[norm]
    attack = FAB(BALLS[norm](2 * exact, None, None), num_steps=40)
    once, twice = (replace(attack, restarts=num)(bowl(x, 0.01), x, y) for num in (1, 2))
    assert not once.reached.any() and bool((once.z == 0).all())  # type: ignore[union-attr]
    assert twice.reached.all()  # type: ignore[union-attr]
    assert bool((twice.size >= exact * (1 - 1e-9)).all())


def test_what_is_found_too_far_out_is_cut_and_looked_at_again() -> None:
    """One step overshoots by 5 %: 0.105. Within 0.104 it is found by cutting, within 0.099 it does not exist."""
    x, y = torch.tensor([[0.7, 0.5]]).double(), torch.tensor([0])
    assert float(fab(Linf(math.inf), num_steps=1)(lambda v: 5 * v, x, y).size) == pytest.approx(0.105)
    near, none = (fab(Linf(radius), num_steps=1)(lambda v: 5 * v, x, y) for radius in (0.104, 0.099))
    assert near.reached.all() and float(near.size) == pytest.approx(0.104)  # type: ignore[union-attr]
    assert not none.reached.any() and float(none.size) == pytest.approx(0.099)  # type: ignore[union-attr]


# Classes, targets, restarts, cost --------------------------------------------------------------------------------


class Counting(nn.Module):
    """Counts the examples that go forwards and backwards, and remembers what came in."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net, self.forwards, self.backwards, self.seen = net, 0, 0, list[Tensor]()

    def forward(self, x: Tensor) -> Tensor:
        self.forwards += len(x)
        self.seen.append(x.detach().clone())
        x = x * 1
        if x.requires_grad:
            x.register_hook(self.count)
        return self.net(x)

    def count(self, grad: Tensor) -> None:
        self.backwards += len(grad)


@pytest.mark.parametrize("radius", [0.005, 0.05, math.inf])
@pytest.mark.parametrize("make", MAKES)
def test_cost_is_what_was_really_run(network: nn.Module, make: str, radius: float) -> None:
    x, counting = rand(*SHAPE, seed=1), Counting(network)
    result = MAKES[make](Linf(radius))(counting, x, network(x).argmax(1))
    assert result.cost == Cost(counting.forwards, counting.backwards)
    if radius == math.inf:
        runs, backwards = (2, NUM_CLASSES - 1) if make == "fab" else (4, 1)
        assert result.cost == Cost(6 + 2 * 3 * 6 * runs, 3 * 6 * runs * backwards)


def test_what_is_reached_within_the_radius_is_not_attacked_again(network: nn.Module) -> None:
    x = rand(*SHAPE, seed=1)
    y = network(x).argmax(1)
    size = fab_t(Linf(math.inf), num_steps=8, targets=1)(network, x, y).size
    radius = size * torch.tensor([2.0, 0.5, 2.0]).double()
    assert fab_t(Linf(radius), num_steps=8, targets=2)(network, x, y).cost == Cost(6 + 2 * 8 * (3 + 1), 8 * (3 + 1))


def test_targets_come_in_the_order_of_their_likelihood() -> None:
    """Each class has a coordinate of its own; the first step towards a class lowers the label's and raises its own."""
    x = torch.tensor([[0.9, 0.2, 0.4, 0.3]]).double()
    counting = Counting(nn.Identity())
    fab_t(Linf(math.inf), num_steps=1)(counting, x, torch.tensor([0]))
    stepped = counting.seen[2::2]
    assert [int((v[0] - x[0])[1:].argmax()) + 1 for v in stepped[:3]] == [2, 3, 1]


@pytest.mark.parametrize("norm", NORMS)
def test_restarts_start_within_half_of_what_is_known(network: nn.Module, norm: str) -> None:
    x, noise = rand(*SHAPE, seed=1), stream(3)
    y, kind = network(x).argmax(1), BALLS[norm]
    best = fab(kind(math.inf), num_steps=5)(network, x, y).size
    for radius in (0.2 * float(best.min()), math.inf):
        counting = Counting(network)
        fab(kind(radius), num_steps=5, restarts=2)(counting, x, y, noise=noise)
        looks = counting.seen[1 : 1 + 2 * 5 * 2]
        assert torch.equal(looks[0], x), "the first run starts at the clean input"
        expected = kind(best.clamp_max(radius) / 2).sample(x, noise.restart(1))
        torch.testing.assert_close(looks[10], x + expected)


def test_the_published_numbers() -> None:
    attack = fab_t(Linf(0.1))
    assert isinstance(attack, FAB)
    assert (attack.num_steps, attack.targets, attack.restarts) == (100, 9, 1)
    assert (attack.alpha_max, attack.eta, attack.beta) == (0.1, 1.05, 0.9)
    assert fab(Linf(0.1)) == replace(attack, targets=None)


def test_two_classes_and_more_targets_than_classes(network: nn.Module) -> None:
    x = rand(*SHAPE, seed=1)
    y = network(x).argmax(1)
    nine, three = (fab_t(Linf(0.05), num_steps=4, targets=n)(network, x, y) for n in (9, NUM_CLASSES - 1))
    assert torch.equal(nine.z, three.z) and nine.cost == three.cost
    two = linear(2)
    attacks = (fab_t(Linf(0.05), num_steps=4), fab(Linf(0.05), num_steps=4))
    targeted, free = (attack(two, x, two(x).argmax(1)) for attack in attacks)
    assert torch.equal(targeted.z, free.z) and targeted.cost == free.cost


@pytest.mark.parametrize("norm", NORMS)
def test_vectors_and_float32(norm: str) -> None:
    net = seeded(lambda: nn.Sequential(nn.Linear(11, 9), nn.Tanh(), nn.Linear(9, 3))).eval()
    x = rand(6, 11).float()
    y = net(x).argmax(1)
    threat = BALLS[norm](math.inf)
    single, double = fab_t(threat, num_steps=8)(net, x, y), fab_t(threat, num_steps=8)(net.double(), x.double(), y)
    assert single.z.dtype == single.size.dtype == torch.float32
    assert bool(single.reached.all())  # type: ignore[union-attr]
    torch.testing.assert_close(single.size.double(), double.size, rtol=1e-3, atol=0)


# Models that fail, arguments that are wrong ----------------------------------------------------------------------


def test_an_example_that_overflows_spoils_no_other(network: nn.Module) -> None:
    x = rand(*SHAPE, seed=1)
    y, ill = network(x).argmax(1), torch.tensor([False, True, False])

    def sometimes(v: Tensor) -> Tensor:
        hit = ill[: len(v)] if len(v) == 3 else torch.zeros(len(v)).bool()
        return network(v) * torch.where(hit, math.nan, 1.0)[:, None]

    result, well = (fab(Linf(math.inf), num_steps=6)(model, x, y) for model in (sometimes, network))
    assert result.reached.tolist() == [True, False, True]  # type: ignore[union-attr]
    assert bool(result.z.isfinite().all())
    torch.testing.assert_close(result.size[~ill], well.size[~ill])


def test_evaluate_believes_it(network: nn.Module) -> None:
    x = rand(20, *SHAPE[1:], seed=1)
    y = network(x).argmax(1)
    threat = Linf(0.02)
    found = fab_t(threat, num_steps=10)(network, x, y).reached
    result = measure(network, [(x, y)], threat, [lambda t: fab_t(t, num_steps=10)], curve=[])
    assert result.findings == [] or all("rejected" not in finding.name for finding in result.findings)
    assert torch.equal(result.table["robust"], ~found)  # type: ignore[operator]
    assert 0 < result.robust.value < 1


def test_errors(network: nn.Module) -> None:
    x = rand(*SHAPE, seed=1)
    with pytest.raises(TypeError, match=r"FAB knows Linf, L2 and L1 balls, not Words; try pgd there"):
        fab(words())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"Linf changes one tensor \(B, \*X\)"):
        fab(Linf(0.1))(network, sentences(), LABELS)
    for options in ({"num_steps": -1}, {"restarts": 0}, {"targets": 0}):
        with pytest.raises(ValueError, match=r"num_steps must be at least 0, restarts and targets at least 1; got FAB"):
            fab_t(Linf(0.1), **options)
    for shape in ((3, 2, 2), (4, 5)):
        with pytest.raises(ValueError, match=r"an attack needs logits \(B, K\), K at least 2"):
            fab(Linf(0.1))(lambda v, shape=shape: torch.zeros(shape), x, LABELS)
    for broken in (lambda v: network(v.detach()), lambda v: network(v.detach()) * nn.Parameter(torch.ones(()))):
        with pytest.raises(ValueError, match="no gradient reaches the input"):
            fab(Linf(0.1))(broken, x, network(x).argmax(1))
    with pytest.raises(ValueError, match=r"mask \(2, 5, 7\) must be"):
        fab(Linf(0.1, mask=MASK[0]))(network, x, LABELS)


def test_per_example_radii_travel_with_their_examples() -> None:
    attack = fab_t(Linf(torch.tensor([0.1, 0.2, 0.3])))
    part = take(attack, torch.tensor([2, 0]))
    assert part.threat.radius.tolist() == pytest.approx([0.3, 0.1])
    assert take(fab(Linf(0.1)), torch.tensor([2, 0])) == fab(Linf(0.1))
    assert per_example(part.threat.radius, rand(2, 3)).shape == (2, 1)
