"""What is left of the margin, who is still attacked, and what needs no attack: closed forms of linear models."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from contracts import BALLS, rand, seeded
from sparring.attacks.catalogue import bim, fgsm, pgd
from sparring.attacks.plans import Stage
from sparring.core.types import AttackResult, Cost, size, take
from sparring.evaluation.measure import measure
from sparring.results.statistics import wilson
from sparring.threats import L2, Linf

NUM, DIM = 40, 11
DUAL = {"Linf": 1, "L2": 2}
W, B = 2 * rand(DIM, seed=21) - 1, 0.1
X = 2 * rand(NUM, DIM, seed=22) - 1
SCORE = X @ W + B
Y = (SCORE > 0).long()
Y[::9] = 1 - Y[::9]  # some are wrong from the start
CORRECT = (SCORE > 0).long() == Y


def line(x: Tensor) -> Tensor:
    """Two classes, logits (0, w x + b): the margin at distance d from the line is d times the dual norm of w."""
    score = x @ W + B
    return torch.stack([torch.zeros_like(score), score], 1)


def distance(kind: str) -> Tensor:
    return SCORE.abs() / W.norm(p=DUAL[kind])


def cut(size: int, x: Tensor = X, y: Tensor = Y) -> list[tuple[Tensor, Tensor]]:
    return list(zip(x.split(size), y.split(size), strict=True))


def free(kind: str, radius: Any) -> Any:
    return BALLS[kind](radius, low=None, high=None)


def weak(threat: Any) -> Any:
    """One step of 0.3 times the radius in the best direction."""
    return bim(threat, num_steps=1, step=0.3)


# What is left of the margin --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", DUAL)
@pytest.mark.parametrize("batch", [7, NUM])
def test_the_margin_that_is_left(kind: str, batch: int) -> None:
    radius = 1.001 * float(distance(kind).median())
    found = measure(line, cut(batch), free(kind, radius), [weak, fgsm, weak], curve=())
    wanted = (1 - radius / distance(kind)).clamp(0, 1) * CORRECT
    torch.testing.assert_close(found.table["margin_left"], wanted, rtol=1e-9, atol=1e-12)
    once = measure(line, cut(batch), free(kind, radius), [weak], curve=()).table["margin_left"]
    torch.testing.assert_close(once, (1 - 0.3 * radius / distance(kind)).clamp(0, 1) * CORRECT, rtol=1e-9, atol=1e-12)
    assert bool(((found.table["margin_left"] == 0) == ~found.table["robust"]).all())


def result(threat: Any, x: Tensor, z: Tensor) -> AttackResult:
    return AttackResult(threat.realize(x, z), z, threat.size(x, z), None, None, Cost(size(x)))


@pytest.mark.parametrize("cheat", ["too far", "not a number", "nothing"])
def test_only_permitted_points_lower_the_margin(cheat: str) -> None:
    def make(threat: Any) -> Any:
        def attack(model: Any, x: Tensor, y: Tensor, *, noise: Any = None) -> AttackResult:
            way = -W.sign() * (2 * y[:, None] - 1)
            return result(threat, x, {"too far": 50 * threat.radius * way, "not a number": x / 0}.get(cheat, 0 * x))

        return attack

    left = measure(line, cut(7), free("Linf", 0.5 * float(distance("Linf").min())), [make]).table["margin_left"]
    torch.testing.assert_close(left, CORRECT.double(), rtol=0, atol=1e-9)  # the rows are shown in another batch


def test_a_margin_of_zero_counts_as_gone() -> None:
    def tied(x: Tensor) -> Tensor:
        return torch.zeros(len(x), 2).double() + 0 * x[:, :1]  # argmax takes class 0

    found = measure(tied, [(X, torch.zeros(NUM).long())], free("Linf", 0.1), [fgsm], curve=())
    assert found.robust.count == NUM and bool((found.table["margin_left"] == 0).all())


# Attacks that choose ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 7, NUM])
def test_an_attack_runs_only_where_the_margin_is_near_gone(batch: int) -> None:
    radius = 1.001 * float(distance("Linf").median())
    left = (1 - 0.3 * radius / distance("Linf")).clamp(0, 1)
    standing = CORRECT & (left > 0)
    found = measure(line, cut(batch), free("Linf", radius), [weak, Stage(fgsm, 0.6)], curve=())
    near = standing & (left <= 0.6)
    fell = near & (distance("Linf") < radius)
    first, second = found.attacks
    assert (first.skipped, second.ran_on) == (0, int(near.sum())) and second.ran_on > 0
    assert second.skipped == int((standing & ~near).sum()) > 0
    assert second.broke == int(fell.sum()) > 0
    assert torch.equal(found.table["robust"], standing & ~fell)
    assert second.standing_after == found.robust.count == second.ran_on + second.skipped - second.broke


@pytest.mark.parametrize(("near", "ran"), [(None, True), (1.0, True), (0.5, False)])
def test_the_first_attack_sees_whole_margins(near: float | None, ran: bool) -> None:
    found = measure(line, cut(7), free("Linf", 0.05), [Stage(fgsm, near)], curve=())
    (record,) = found.attacks
    right = int(CORRECT.sum())
    assert (record.ran_on, record.skipped) == ((right, 0) if ran else (0, right))


def test_on_the_curve_the_margin_counts_at_each_radius() -> None:
    radius = 1.001 * float(distance("Linf").median())
    attacks = [weak, Stage(fgsm, 0.6)]
    found = measure(line, cut(7), free("Linf", radius), attacks, curve=(0.5, 2.0))
    counts = {round(r / radius, 6): share.count for r, share in found.curve}

    def stand(factor: float, among: Tensor, left: Tensor) -> Tensor:
        """Who stands at a factor after both attacks; `left` is what was left before."""
        left = torch.minimum(left, (1 - 0.3 * factor * radius / distance("Linf")).clamp(0, 1))
        return among & (left > 0) & ~((left <= 0.6) & (distance("Linf") < factor * radius))

    whole = torch.ones(NUM, dtype=torch.float64)
    middle = stand(1.0, CORRECT, whole)
    assert counts[1.0] == int(middle.sum())
    assert counts[0.5] == int((middle | stand(0.5, CORRECT & ~middle, whole)).sum())
    assert counts[2.0] == int(stand(2.0, middle, found.table["margin_left"]).sum())


# What is certified -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Bound:
    """The exact lower bound of the margin of `line`, made looser by `slack`."""

    kind: str
    slack: float = 0.0

    def __call__(self, model: Any, x: Tensor, y: Tensor, threat: Any, *, noise: Any) -> Tensor:
        margin = model(x)[:, 1] * (2 * y - 1)
        return margin - torch.as_tensor(threat.radius).double() * W.norm(p=DUAL[self.kind]) - self.slack


@pytest.mark.parametrize("kind", DUAL)
@pytest.mark.parametrize("batch", [1, 7, NUM])
def test_certified_examples_need_no_attack(kind: str, batch: int) -> None:
    radius = 1.001 * float(distance(kind).median())
    plain = measure(line, cut(batch), free(kind, radius), [weak, fgsm])
    found = measure(line, cut(batch), free(kind, radius), [weak, fgsm], certify=Bound(kind, 0.3))
    sure = CORRECT & (distance(kind) - 0.3 / W.norm(p=DUAL[kind]) > radius)
    assert torch.equal(found.table["certified"], sure) and 0 < int(sure.sum()) < found.robust.count
    assert found.certified == wilson(int(sure.sum()), NUM) and plain.certified is None
    assert (found.clean, found.robust, found.curve) == (plain.clean, plain.robust, plain.curve)
    assert found.attacks[0].ran_on == plain.attacks[0].ran_on - int(sure.sum())
    assert found.attacks[1].standing_after == plain.attacks[1].standing_after
    wanted = torch.where(sure, 1.0, plain.table["margin_left"])  # others stand together in a batch: up to rounding
    torch.testing.assert_close(found.table["margin_left"], wanted, rtol=1e-9, atol=1e-12)
    assert found.cost.backwards < plain.cost.backwards
    assert found.certification == {"name": f"Bound(kind='{kind}', slack=0.3)", "settings": {
        "type": "Bound", "kind": kind, "slack": 0.3}}  # fmt: skip


def test_certified_with_radii_of_their_own() -> None:
    radius = torch.linspace(0.02, 0.4, NUM, dtype=torch.float64).flip(0)
    for batch in (1, 7, NUM):
        found = measure(line, cut(batch), free("Linf", radius), [pgd], certify=Bound("Linf"), curve=(0.5, 1.5))
        robust = CORRECT & (distance("Linf") > radius)
        assert torch.equal(found.table["robust"], robust) and torch.equal(found.table["certified"], robust)
        exact = [int((CORRECT & (distance("Linf") > f * radius)).sum()) for f in (0.5, 1, 1.5)]
        assert [share.count for _, share in found.curve[1:]] == exact
        assert found.attacks[0].broke == found.attacks[0].ran_on == int((CORRECT & ~robust).sum())


def test_what_is_wrong_or_no_number_is_not_certified() -> None:
    found = measure(line, cut(7), free("Linf", 0.1), [fgsm], curve=(), certify=lambda m, x, y, t, noise: y / 0.0 * 0)
    assert not found.table["certified"].any()
    everything = measure(line, cut(7), free("Linf", 9.0), [fgsm], curve=(), certify=lambda m, x, y, t, noise: 1.0 + y)
    assert torch.equal(everything.table["certified"], CORRECT) and everything.attacks[0].ran_on == 0
    assert everything.robust.count == everything.clean.count


@pytest.mark.parametrize("bound", [lambda m, x, y, t, noise: torch.ones(1), lambda m, x, y, t, noise: [1.0] * len(y)])
def test_a_bound_of_another_shape_is_refused(bound: Any) -> None:
    with pytest.raises(ValueError, match=r"certify returned .*expected a lower bound of the margin for each example"):
        measure(line, cut(NUM), free("Linf", 0.1), [fgsm], certify=bound)


def test_a_certificate_may_not_harm_model_or_inputs() -> None:
    model = nn.Sequential(nn.Linear(DIM, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).double().train()
    state = torch.get_rng_state()
    seen = []

    def harmful(m: Any, x: Tensor, y: Tensor, threat: Any, noise: Any) -> Tensor:
        seen.append((m.training, [p.requires_grad for p in m.parameters()]))
        x.zero_()
        y.zero_()
        torch.rand(3)
        return -torch.ones(len(y))

    before = [x.clone() for x, _ in cut(7)]
    measure(model, cut(7), free("Linf", 0.1), [fgsm], certify=harmful)
    assert {mode for mode, _ in seen} == {False} and model.training and all(p.requires_grad for p in model.parameters())
    assert all(torch.equal(a, b) for a, (b, _) in zip(before, cut(7), strict=True))
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("kind", [Linf, L2])
def test_no_attack_breaks_what_interval_bounds_certify(kind: Any) -> None:
    certificates = pytest.importorskip("sparring.certify")
    net = seeded(lambda: nn.Sequential(nn.Linear(DIM, 16), nn.ReLU(), nn.Linear(16, 3)).double().eval())
    x = rand(200, DIM, seed=4)
    with torch.no_grad():
        net[2].bias -= net(x).median(0).values  # so that its classes share the examples
        y = net(x).argmax(1)
    threat = kind({Linf: 0.01, L2: 0.03}[kind])
    attacks = [lambda t: pgd(t, num_steps=20, restarts=3), fgsm]
    plain = measure(net, cut(50, x, y), threat, attacks, curve=())
    found = measure(net, cut(50, x, y), threat, attacks, curve=(), certify=certificates.interval_margin)
    sure = found.table["certified"]
    assert 20 < int(sure.sum()) <= plain.robust.count < 200
    assert not (sure & ~plain.table["robust"]).any()
    assert torch.equal(found.table["robust"], plain.table["robust"])
    bound = certificates.interval_margin(net, x, y, threat)
    broken = plain.table["correct"] & ~plain.table["robust"]
    assert bool((bound[broken] <= 0).all()) and int(broken.sum()) > 0
    assert take(bound, sure.nonzero()[:, 0]).min() > 0
