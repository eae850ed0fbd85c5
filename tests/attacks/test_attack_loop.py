"""The one loop: exact answers where they are known, and the promises it makes about everything else."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from contracts import (
    ATTACKS,
    BALLS,
    NAMED,
    NUM_CLASSES,
    NUM_WORDS,
    SHAPE,
    BagOfWords,
    rand,
    seeded,
    sentences,
    stream,
    words,
)  # fmt: skip
from sparring.attacks.auto_pgd import apgd, apgd_t
from sparring.attacks.catalogue import bim, fgsm, gradient_ascent, mi_fgsm, pgd
from sparring.attacks.fab import fab, fab_t
from sparring.attacks.loop import Attack, Problem, Seen
from sparring.attacks.square import square
from sparring.attacks.starts import Gaussian, Given, Null, null
from sparring.attacks.steps import Ascent, RawAscent
from sparring.core.model_state import Frozen
from sparring.core.noise import Noise
from sparring.core.objectives import cross_entropy, kl, margin, targeted
from sparring.core.types import Attacker, Cost, size, take
from sparring.evaluation.preflight import preflight
from sparring.threats import L2, Linf, inside
from sparring.training.recipes import pgd_at, trades

LABELS = torch.tensor([2, 0, 3])

# Closed form: two classes, linear logits ---------------------------------------------------------------------------


def linear(shape: tuple[int, ...] = SHAPE, classes: int = 2) -> nn.Module:
    return seeded(lambda: nn.Sequential(nn.Flatten(), nn.Linear(math.prod(shape[1:]), classes)).double())


def slope(model: Any, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """The margin of the wrong class at x (B,), and its gradient in x (B, *X), the same everywhere."""
    w, sign = model[1].weight, 1 - 2 * y.double()
    value = margin.score(model(x), y).detach()
    return value, sign.view(-1, *[1] * (x.ndim - 1)) * (w[1] - w[0]).detach().view(1, *x.shape[1:])


def most(threat: Any, x: Tensor, d: Tensor) -> Tensor:
    """(B,) max <d, z> over {||z|| <= radius, low <= x + z <= high, masked}, by the KKT conditions."""
    low = -torch.inf if threat.low is None else threat.low - x
    high = torch.inf if threat.high is None else threat.high - x
    d = d if threat.mask is None else d * threat.mask
    radius = torch.as_tensor(threat.radius, dtype=x.dtype).expand(len(x)).view(-1, *[1] * (x.ndim - 1))
    if isinstance(threat, Linf):
        return (d * torch.where(d > 0, radius.clamp_max(high), (-radius).clamp_min(low))).flatten(1).sum(1)

    def reply(scale: Tensor) -> Tensor:  # stationary for the multiplier 1 / scale
        return torch.clamp(scale * d, torch.as_tensor(low, dtype=x.dtype), torch.as_tensor(high, dtype=x.dtype))

    small, large = torch.zeros_like(radius), torch.full_like(radius, 1e9)
    for _ in range(200):
        middle = (small + large) / 2
        outside = reply(middle).flatten(1).norm(dim=1).view_as(radius) > radius
        small, large = torch.where(outside, small, middle), torch.where(outside, middle, large)
    return (d * reply(small)).flatten(1).sum(1)


def assert_strong(attack: Callable[[Any], Attacker], threat: Any, share: float = 1 - 1e-9) -> None:
    """The attack climbs at least `share` of the way to the exact maximum of a linear model, and never beyond it."""
    x, y, model = rand(*SHAPE, seed=8), torch.tensor([0, 1, 1]), linear()
    start, d = slope(model, x, y)
    best = most(threat, x, d)
    result = attack(threat)(model, x, y)
    found = margin.score(model(result.x_adv), y) - start
    assert bool((found <= best * (1 + 1e-9)).all()), "more than the maximum: the attack left the set"
    assert bool((found >= best * share).all()), f"found {found.tolist()} of {best.tolist()}"
    if result.loss is not None:
        torch.testing.assert_close(result.loss, cross_entropy.score(model(result.x_adv), y))


MASK = rand(1, *SHAPE[1:], seed=5) < 0.6
EXACT = {
    "Linf": (Linf(0.1, low=None, high=None), 1 - 1e-9),
    "Linf-box": (Linf(0.3), 1 - 1e-9),
    "Linf-radii-mask": (Linf(torch.tensor([0.1, 0.4, 0.2]), mask=MASK), 1 - 1e-9),
    "L2": (L2(0.7, low=None, high=None), 1 - 1e-9),
    "L2-radii-mask": (L2(torch.tensor([0.1, 0.4, 0.2]), low=None, high=None, mask=MASK), 1 - 1e-9),
    # the published projection (ball, then box) is not the nearest point, so one or two percent may be out of reach
    "L2-box": (L2(0.7), 0.98),
    "L2-box-radii-mask": (L2(torch.tensor([0.3, 1.5, 0.8]), mask=MASK), 0.98),
}
CLIMBERS: dict[str, Callable[[Any], Attacker]] = {
    "bim": lambda t: bim(t, num_steps=60),
    "pgd": lambda t: pgd(t, num_steps=300, keep="last"),
    "pgd-kept": lambda t: pgd(t, num_steps=300, keep="highest_loss"),
    "pgd-restarts": lambda t: pgd(t, num_steps=150, restarts=2, keep="highest_loss"),
    "mi-fgsm": lambda t: mi_fgsm(t, num_steps=60),
}


@pytest.mark.parametrize("name", EXACT)
@pytest.mark.parametrize("climber", CLIMBERS)
def test_worst_loss_of_a_linear_model(climber: str, name: str) -> None:
    assert_strong(CLIMBERS[climber], *EXACT[name])


def test_one_step_is_enough_where_the_steepest_direction_is_a_corner() -> None:
    for name in ("Linf", "Linf-box", "Linf-radii-mask", "L2", "L2-radii-mask"):
        assert_strong(fgsm, EXACT[name][0])


def test_raw_gradient_climbs_too() -> None:
    assert_strong(lambda t: gradient_ascent(t, num_steps=400, absolute_step=5.0), EXACT["L2"][0], 0.999)


@pytest.mark.parametrize("start", [null, Gaussian(0.001)])
@pytest.mark.parametrize("name", EXACT)
def test_an_attack_without_steps_fails_the_strength_test(name: str, start: Any) -> None:
    with pytest.raises(AssertionError, match="found"):
        assert_strong(lambda t: replace(pgd(t), num_steps=0, start=start), *EXACT[name])  # type: ignore[type-var]


@pytest.mark.parametrize("kind", BALLS)
def test_smallest_radius_that_turns_a_linear_model(kind: str) -> None:
    """The margin over the dual norm: a hair above it every example falls, a hair below none does."""
    x, model = rand(*SHAPE, seed=8), linear()
    y = model(x).argmax(1)
    value, d = slope(model, x, y)
    dual = d.flatten(1).norm(p={"Linf": 1, "L2": 2, "L1": math.inf}[kind], dim=1)
    smallest = -value / dual
    for factor, falls in ((1.001, True), (0.999, False)):
        attack = pgd(BALLS[kind](smallest * factor, low=None, high=None), num_steps=100)
        assert attack(model, x, y).reached.tolist() == [falls] * 3  # type: ignore[union-attr]
    near = pgd(BALLS[kind](10 * smallest, low=None, high=None), num_steps=400, step=0.001, keep="smallest_fooling")
    found = replace(near, start=null)(model, x, y)  # type: ignore[type-var]
    assert bool((found.size >= smallest * (1 - 1e-9)).all())
    assert bool((found.size <= smallest * 1.02).all())


def sentence_by_sentence(model: nn.Module, x: dict[str, Tensor], y: Tensor, threat: Any) -> Tensor:
    """(B,) the highest loss over every permitted sentence."""
    worst = []
    for i in range(size(x)):
        one = take(x, torch.tensor([i]))
        tokens = int(one["mask"].sum())
        options = threat._choices(one)[0, :tokens].tolist()
        radius = int(take(threat, torch.tensor([i])).radius)
        found = []
        for pick in itertools.product(*options):
            if sum(a != b for a, b in zip(pick, one["ids"][0].tolist(), strict=False)) <= radius:
                ids = one["ids"].clone()
                ids[0, :tokens] = torch.tensor(pick)
                found.append(ids)
        many = {"ids": torch.cat(found), "mask": one["mask"].expand(len(found), -1)}
        worst.append(cross_entropy.score(model(many), y[i].expand(len(found))).max())
    return torch.stack(worst)


@pytest.mark.parametrize("radius", [1.0, 2.0, torch.tensor([3.0, 1.0, 2.0])], ids=["1", "2", "each"])
def test_worst_sentence_equals_brute_force(radius: Any) -> None:
    """Text passes through the same loop: token ids in, real sentences out, and on a linear model the very worst."""
    model, x, y = seeded(lambda: BagOfWords(NUM_WORDS, 2)), sentences(), torch.tensor([0, 1, 1])
    threat = words(radius)
    with torch.no_grad():
        want = sentence_by_sentence(model, x, y, threat)
    for attack in (
        fgsm(threat),
        bim(threat, num_steps=10),
        pgd(threat, num_steps=20),
        pgd(threat, num_steps=9, restarts=3),
    ):
        result = attack(model, x, y)
        torch.testing.assert_close(result.loss, want)
        torch.testing.assert_close(cross_entropy.score(model(result.x_adv), y), want)
        assert result.x_adv["ids"].dtype == torch.int64  # type: ignore[call-overload]
        assert bool(threat.valid(x, result.x_adv).all())  # type: ignore[arg-type]
        assert bool(inside(threat, x, result.z).all())
    with pytest.raises(AssertionError):
        torch.testing.assert_close(replace(pgd(threat), num_steps=0)(model, x, y).loss, want)  # type: ignore[type-var]


# Relations -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", BALLS)
@pytest.mark.parametrize("keep", ["highest_loss", "fooled_first"])
def test_more_steps_and_restarts_never_lower_the_kept_loss(
    network: nn.Module, images: Tensor, kind: str, keep: Any
) -> None:
    before = torch.full((3,), -torch.inf).double()
    fallen = torch.zeros(3, dtype=torch.bool)
    for num_steps in (0, 1, 2, 4, 9):
        result = replace(pgd(BALLS[kind](0.2)), num_steps=num_steps, keep=keep)(network, images, LABELS)  # type: ignore[type-var]
        assert bool((result.reached >= fallen).all())
        assert bool(((result.loss >= before) | (result.reached & ~fallen)).all())
        before, fallen = result.loss, result.reached
    for restarts in (1, 2, 4):
        again = pgd(BALLS[kind](0.2), num_steps=9, restarts=restarts, keep=keep)(network, images, LABELS)
        assert bool((again.reached >= fallen).all())  # type: ignore[operator]
        assert bool(((again.loss >= before) | (again.reached & ~fallen)).all())  # type: ignore[operator]
        before, fallen = again.loss, again.reached  # type: ignore[assignment]


@pytest.mark.parametrize("kind", BALLS)
def test_keep_rules(network: nn.Module, images: Tensor, kind: str) -> None:
    y = network(images).argmax(1)
    results = {
        keep: pgd(BALLS[kind](0.5), num_steps=12, keep=keep)(network, images, y)
        for keep in ("fooled_first", "highest_loss", "smallest_fooling", "last")
    }
    first, highest, smallest = (results[k] for k in ("fooled_first", "highest_loss", "smallest_fooling"))
    assert bool(first.reached.any())
    assert bool((highest.loss >= first.loss).all())
    assert torch.equal(first.reached, smallest.reached)
    assert bool((smallest.size <= first.size)[first.reached].all())
    assert bool((smallest.size < first.size).any())
    for result in (first, highest, smallest):
        torch.testing.assert_close(cross_entropy.score(network(result.x_adv), y), result.loss)
        assert torch.equal(cross_entropy.reached(network(result.x_adv), y), result.reached)
        torch.testing.assert_close(BALLS[kind](0.5).size(images, result.z), result.size)
        assert not result.x_adv.requires_grad
        assert not result.z.requires_grad
        assert not result.loss.requires_grad
    assert results["last"].loss is None
    assert results["last"].reached is None


@pytest.mark.parametrize("name", ATTACKS)
def test_cost_counts_every_sample_pass(network: nn.Module, images: Tensor, name: str) -> None:
    forwards, backwards = 0, 0

    def model(x: Tensor) -> Tensor:
        nonlocal forwards
        forwards += len(x)
        if x.requires_grad:
            x.register_hook(count)
        return network(x)

    def count(grad: Tensor) -> None:
        nonlocal backwards
        backwards += len(grad)

    result = ATTACKS[name](Linf(0.1))(model, images, LABELS)
    assert result.cost == Cost(forwards, backwards)
    if name == "pgd-last":
        assert result.cost == Cost(9, 9), "no look at the last iterate"
    if name == "pgd-highest_loss":
        assert result.cost == Cost(12, 9)


# Per example -----------------------------------------------------------------------------------------------------


def assert_same(part: Any, whole: Any, rows: Tensor) -> None:
    for name in ("x_adv", "z", "size", "loss", "reached"):
        got, want = getattr(part, name), getattr(whole, name)
        if want is None:
            assert got is None
        elif isinstance(want, dict):
            for key in want:
                assert torch.equal(got[key], want[key][rows])
        else:
            torch.testing.assert_close(got, want[rows], rtol=1e-9, atol=1e-11)


def assert_alone_equals_together(attack: Attacker, model: Any, x: Any, y: Tensor) -> None:
    noise = stream(3)
    whole = attack(model, x, y, noise=noise)
    for rows in (torch.tensor([2, 0, 1]), torch.tensor([0]), torch.tensor([1]), torch.tensor([2, 1])):
        assert_same(take(attack, rows)(model, take(x, rows), y[rows], noise=noise.take(rows)), whole, rows)


@pytest.mark.parametrize("name", ATTACKS)
def test_a_batch_gives_what_its_examples_give(network: nn.Module, images: Tensor, name: str) -> None:
    kind = (Linf, L2)[len(name) % 2]
    assert_alone_equals_together(ATTACKS[name](kind(0.15)), network, images, LABELS)


@pytest.mark.parametrize("kind", BALLS)
def test_radii_and_masks_per_example(network: nn.Module, images: Tensor, kind: str) -> None:
    """As if each example had been attacked by itself under its own number."""
    radii, mask = torch.tensor([0.05, 0.3, 0.1], dtype=torch.float64), rand(*SHAPE, seed=4) < 0.4
    attack = pgd(BALLS[kind](radii, mask=mask), num_steps=5, restarts=2)
    assert_alone_equals_together(attack, network, images, LABELS)
    whole = attack(network, images, LABELS, noise=stream(3))
    for i, radius in enumerate(radii.tolist()):
        rows = torch.tensor([i])
        own = pgd(BALLS[kind](radius, mask=mask[rows]), num_steps=5, restarts=2)
        assert_same(own(network, images[rows], LABELS[rows], noise=stream(3).take(rows)), whole, rows)
    assert torch.equal(whole.x_adv[~mask], images[~mask])  # type: ignore[index,call-overload]
    assert bool((whole.size <= radii * (1 + 1e-9)).all())


def test_sentences_stand_alone() -> None:
    model, x, y = seeded(lambda: BagOfWords(NUM_WORDS, NUM_CLASSES)), sentences(), LABELS
    for threat in (words(), words(torch.tensor([3.0, 1.0, 2.0])), words(hard=False)):
        assert_alone_equals_together(pgd(threat, num_steps=4, restarts=3, objective=margin), model, x, y)


@pytest.mark.parametrize("start", [Null(), Gaussian(0.01), Given(0.05 - rand(*SHAPE, seed=3) / 10)])
def test_starts(network: nn.Module, images: Tensor, start: Any) -> None:
    attack = replace(pgd(Linf(0.1), num_steps=2), start=start)  # type: ignore[type-var]
    assert_alone_equals_together(attack, network, images, LABELS)
    still = replace(attack, num_steps=0)(network, images, LABELS)
    want = {Null: lambda: torch.zeros_like(images), Given: lambda: start.z.clamp(-0.1, 0.1)}.get(type(start))
    if want is not None:
        torch.testing.assert_close(still.z, (images + want()).clamp(0, 1) - images)
    else:
        assert 0.002 < float(still.z.std()) < 0.02


def test_the_target_may_be_probabilities(network: nn.Module, images: Tensor) -> None:
    hard = nn.functional.one_hot(LABELS, NUM_CLASSES).double()
    for objective in (cross_entropy, margin, kl):
        attack = pgd(Linf(0.1), num_steps=3, objective=objective)
        assert_same(attack(network, images, hard), attack(network, images, LABELS), torch.arange(3))
    clean = network(images).softmax(1).detach()
    away = pgd(Linf(0.1), num_steps=20, objective=kl, keep="highest_loss")(network, images, clean)
    assert bool((away.loss > 1e-4).all())  # type: ignore[operator]


def test_targeted_attacks_arrive(network: nn.Module, images: Tensor) -> None:
    wanted = torch.tensor([1, 3, 0])
    for kind, radius in ((Linf, 0.9), (L2, 6.0)):
        result = pgd(kind(radius, low=None, high=None), num_steps=40, wanted=wanted)(network, images, LABELS)
        assert torch.equal(network(result.x_adv).argmax(1), wanted)
        assert bool(result.reached.all())  # type: ignore[union-attr]


def test_unbounded_ascent_is_textbook_gradient_ascent(network: nn.Module, images: Tensor) -> None:
    v = images.clone()
    for _ in range(4):
        v = v.detach().requires_grad_()
        (grad,) = torch.autograd.grad(nn.functional.cross_entropy(network(v), LABELS, reduction="sum"), v)
        v = (v + 0.3 * grad).clamp(0, 1)
    attack = gradient_ascent(L2(math.inf), num_steps=4, absolute_step=0.3, keep="last")
    torch.testing.assert_close(attack(network, images, LABELS).x_adv, v.detach())
    with pytest.raises(
        ValueError, match="the radius is infinite, so a step cannot be a fraction of it; give absolute_step"
    ):
        bim(L2(math.inf))(network, images, LABELS)
    assert bim(L2(math.inf), absolute_step=0.5)(network, images, LABELS).size.min() > 0.4


# Where the inputs come from --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "context", [torch.no_grad, torch.inference_mode, nullcontext], ids=["no_grad", "inference", "grad"]
)
@pytest.mark.parametrize(
    "attack", [pgd(Linf(0.1), num_steps=3, restarts=2), bim(L2(0.4), num_steps=3, objective=kl, keep="last")]
)
def test_modes_of_autograd_do_not_matter(network: nn.Module, context: Any, attack: Attacker) -> None:
    y = torch.tensor([1, 1, 1])
    want = attack(network, rand(*SHAPE), y)
    with context():
        inside = attack(network, rand(*SHAPE), y.clone(), noise=Noise.make(0, "attack", torch.arange(3)))
        x, target = rand(*SHAPE), torch.nn.functional.one_hot(y, NUM_CLASSES).double()
    assert_same(inside, want, torch.arange(3))
    assert_same(attack(network, x, target), want, torch.arange(3))
    assert_same(attack(network, rand(*SHAPE).requires_grad_(), y), want, torch.arange(3))


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode], ids=["no_grad", "inference"])
def test_sentences_from_any_mode_of_autograd(context: Any) -> None:
    model, y = seeded(lambda: BagOfWords(NUM_WORDS, NUM_CLASSES)), LABELS
    with context():
        x = sentences()
        inside = pgd(words(), num_steps=3)(model, x, y.clone())
    assert_same(inside, pgd(words(), num_steps=3)(model, sentences(), y), torch.arange(3))
    assert_same(pgd(words(), num_steps=3)(model, x, y), inside, torch.arange(3))


def test_autocast(network: nn.Module, images: Tensor) -> None:
    net, x = network.float(), images.float()
    for objective in (cross_entropy, margin, kl):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            result = pgd(Linf(0.1), num_steps=3, objective=objective, restarts=2)(net, x, LABELS)
        assert result.x_adv.dtype == torch.float32  # type: ignore[union-attr]
        assert bool(inside(Linf(0.1), x, result.z).all())
        assert bool((result.z != 0).any())


def test_half_precision_models_keep_their_type(network: nn.Module, images: Tensor) -> None:
    result = pgd(Linf(0.1), num_steps=2)(network.bfloat16(), images.bfloat16(), LABELS)
    assert result.x_adv.dtype == torch.bfloat16  # type: ignore[union-attr]


# Not a number ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", ["fooled_first", "highest_loss", "smallest_fooling"])
@pytest.mark.parametrize("objective", [cross_entropy, margin, kl, targeted(cross_entropy, 1)])
def test_nan_logits_never_count_as_reached(images: Tensor, keep: Any, objective: Any) -> None:
    def broken(x: Tensor) -> Tensor:
        return x.flatten(1)[:, :NUM_CLASSES] * math.nan

    attack = pgd(Linf(0.1), num_steps=2, keep=keep)
    result = replace(attack, objective=objective)(broken, images, LABELS)  # type: ignore[type-var]
    assert not bool(result.reached.any())


def test_one_broken_look_does_not_hide_the_others(network: nn.Module, images: Tensor) -> None:
    """The first look gives NaN for an example; what is found later must still be kept."""
    looks = 0

    def stumbles(x: Tensor) -> Tensor:
        nonlocal looks
        looks += 1
        logits = network(x)
        if looks == 1:
            logits = torch.where(torch.tensor([[True], [False], [False]]), logits * math.nan, logits)
        return logits

    for keep in ("highest_loss", "fooled_first", "smallest_fooling"):
        looks = 0
        attack = Attack(threat=Linf(1e-3), rule=Wander(), num_steps=3, start=null, keep=keep)  # type: ignore[arg-type]
        result = attack(stumbles, images, network(images).argmax(1))
        assert bool(result.loss.isfinite().all()), keep  # type: ignore[union-attr]


@dataclass(frozen=True)
class Wander:
    """A rule that needs no gradient: random points, keyed like everything else."""

    needs_grad: ClassVar[bool] = False

    def init(self, problem: Problem, z: Tensor) -> None:
        return None

    def step(self, problem: Problem, z: Tensor, seen: Seen, state: None, t: int) -> tuple[Tensor, None]:
        assert seen.grad is None
        fresh = problem.noise.uniform(z.shape[1:], draw=10 + t).to(z) * 2 - 1
        return problem.threat.project(problem.x, problem.threat.radius * fresh), None


def test_rules_without_gradients_need_none(images: Tensor) -> None:
    """A model that autograd cannot see through, and no backward pass in the bill."""
    net = linear(SHAPE, NUM_CLASSES)

    def closed(x: Tensor) -> Tensor:
        return torch.from_numpy(net(x).detach().numpy())

    attack = Attack(threat=Linf(0.2), rule=Wander(), num_steps=4, keep="highest_loss")
    result = attack(closed, images, LABELS)
    assert result.cost == Cost(15, 0)
    assert bool((result.loss >= cross_entropy.score(closed(images), LABELS)).any())  # type: ignore[operator]
    assert_alone_equals_together(attack, closed, images, LABELS)


# The caller's objects ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ATTACKS)
def test_everything_is_left_as_found(stateful: nn.Module, snapshot: Any, images: Tensor, name: str) -> None:
    attack, before, arguments = ATTACKS[name](Linf(0.1)), snapshot(stateful), (images.clone(), LABELS.clone())
    attack(stateful, images, LABELS)
    assert snapshot(stateful) == before
    assert torch.equal(images, arguments[0])
    assert torch.equal(LABELS, arguments[1])


@pytest.mark.parametrize("look", [0, 1, 2])
def test_everything_is_left_as_found_when_the_attack_raises(
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
        pgd(Linf(0.1), num_steps=2)(stateful, images, LABELS)
    handle.remove()
    assert snapshot(stateful) == before


def test_the_model_is_crafted_against_in_eval_mode_without_weight_gradients(
    stateful: nn.Module, images: Tensor
) -> None:
    seen: list[tuple[bool, bool]] = []

    def watch(module: nn.Module, *_: Any) -> None:
        seen.append((module.training, any(p.requires_grad for p in module.parameters())))

    handles = [module.register_forward_hook(watch) for module in stateful.modules()]
    weights = [p for p in stateful.parameters() if p.requires_grad]
    hooks = [p.register_hook(lambda grad: pytest.fail("a weight gradient was computed")) for p in weights]
    pgd(Linf(0.1), num_steps=2, restarts=2)(stateful, images, LABELS)
    for handle in [*handles, *hooks]:
        handle.remove()
    assert set(seen) == {(False, False)}


def test_weight_gradients_are_not_computed_through_a_plain_function(network: nn.Module, images: Tensor) -> None:
    hooks = [p.register_hook(lambda grad: pytest.fail("a weight gradient was computed")) for p in network.parameters()]
    pgd(Linf(0.1), num_steps=2)(lambda x: network(x), images, LABELS)
    assert all(p.grad is None for p in network.parameters())
    assert len(hooks) == 4


def test_stochastic_models_repeat(images: Tensor) -> None:
    """Dropout that is always on, as in randomised defences: seeded from the noise, and the generator put back."""

    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.out = nn.Linear(70, NUM_CLASSES).double()

        def forward(self, x: Tensor) -> Tensor:
            return self.out(nn.functional.dropout(x.flatten(1), 0.5, training=True))

    model, attack = seeded(Noisy), pgd(Linf(0.1), num_steps=3, restarts=2, keep="highest_loss")
    first = attack(model, images, LABELS, noise=stream(3))
    torch.rand(5)
    assert torch.equal(attack(model, images, LABELS, noise=stream(3)).x_adv, first.x_adv)  # type: ignore[arg-type]
    other = replace(attack.attack, start=null)  # type: ignore[attr-defined]
    runs = [other(model, images, LABELS, noise=stream(3, seed)).loss for seed in (0, 1)]
    assert not torch.equal(*runs)


def test_noise_decides_and_nothing_else(network: nn.Module, images: Tensor) -> None:
    attack = pgd(Linf(0.1), num_steps=1)
    default = attack(network, images, LABELS)
    torch.rand(3)
    assert torch.equal(attack(network, images, LABELS).x_adv, default.x_adv)  # type: ignore[arg-type]
    assert torch.equal(
        attack(network, images, LABELS, noise=Noise.make(0, "attack", torch.arange(3))).x_adv,
        default.x_adv,  # type: ignore[arg-type]
    )
    assert not torch.equal(attack(network, images, LABELS, noise=stream(3)).x_adv, default.x_adv)  # type: ignore[arg-type]


# No waiting for the device ---------------------------------------------------------------------------------------

WAITS = ("item", "tolist", "numpy", "nonzero", "__bool__", "__int__", "__float__", "__index__", "cpu")


@contextmanager
def nothing_waits(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Whatever makes Python wait for the value of a tensor raises."""

    def refuse(name: str) -> Callable[..., Any]:
        def call(*_: Any, **__: Any) -> Any:
            raise AssertionError(f"Tensor.{name} waits for the device")

        return call

    real = Tensor.__getitem__

    def getitem(self: Tensor, index: Any) -> Any:
        parts = index if isinstance(index, tuple) else (index,)
        if any(isinstance(p, Tensor) and p.dtype in (torch.bool, torch.uint8) for p in parts):
            raise AssertionError("indexing by a bool tensor waits for the device")
        return real(self, index)

    with monkeypatch.context() as patch:
        for name in WAITS:
            patch.setattr(Tensor, name, refuse(name))
        patch.setattr(Tensor, "__getitem__", getitem)
        yield


def test_the_guard_sees_what_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    v = torch.ones(2)
    waiting: list[Callable[[], Any]] = [
        lambda: v.sum().item(), lambda: bool(v.all()), lambda: v.nonzero(), lambda: v[v > 0], lambda: float(v[0]),
    ]  # fmt: skip
    with nothing_waits(monkeypatch):
        for call in waiting:
            with pytest.raises(AssertionError, match="waits for the device"):
                call()
    assert bool(v.all())


# a wait per step, target or query saves the passes of what fell
ASKS_WHO_STANDS = ("pgd-drop_fooled", "apgd-t", "fab", "fab-t", "square")


@pytest.mark.parametrize("name", [n for n in ATTACKS if "restarts" not in n and n not in ASKS_WHO_STANDS])
def test_the_loop_never_waits_for_the_device(
    network: nn.Module, images: Tensor, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    threats = (Linf(0.1), L2(torch.tensor([0.1, 0.2, 0.3]), mask=MASK))
    attacks, found, noise = [ATTACKS[name](threat) for threat in threats], [], stream(3)
    # a direct call looks at the inputs first, where they lie on the CPU; recipes and evaluations freeze the model
    with nothing_waits(monkeypatch):
        for attack in attacks:
            found.append(attack(Frozen(network), images, LABELS, noise=noise))
    for threat, result in zip(threats, found, strict=True):
        assert result.z.shape == images.shape and bool(inside(threat, images, result.z).all()), "and it did its work"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("kind", BALLS)
def test_the_loop_never_waits_for_a_gpu(kind: str) -> None:
    device = torch.device("cuda")
    model, x, y = linear(SHAPE, NUM_CLASSES).to(device), rand(*SHAPE).to(device), LABELS.to(device)
    attack, noise = pgd(BALLS[kind](0.1), num_steps=3), stream(3).to(device)
    there = attack(model, x, y, noise=noise)
    try:
        torch.cuda.set_sync_debug_mode("error")
        attack(Frozen(model), x, y, noise=noise)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(there.x_adv.cpu(), attack(model.cpu(), x.cpu(), y.cpu(), noise=stream(3)).x_adv)  # type: ignore[union-attr]


# Clear errors ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (torch.tensor([1, 2]), r"labels are torch.int64 \(2,\); expected class numbers \(B,\) = \(3,\)"),
        (torch.tensor([0.0, 1.0, 2.0]), r"target has shape .* for 3 examples; expected integer labels \(B,\) or prob"),
        (torch.zeros(3, 2, 4), r"target has shape .* for 3 examples; expected integer labels \(B,\) or probabilities"),
        (torch.tensor(1), r"labels are torch.int64 \(\); expected class numbers"),
        (torch.zeros(3, 1, dtype=torch.int64), r"labels are .*: y\.squeeze\(1\)"),
        (torch.tensor([0, 4, 1]), "labels go from 0 to 4, but the model has 4 classes"),
        (torch.tensor([0, -100, 1]), "labels go from -100 to 1; .*such as -100.*are no classes"),
        (LABELS.numpy(), r"labels are a ndarray.*torch\.as_tensor\(y\)"),
    ],
    ids=["two", "floating labels", "3-D", "a number", "a column", "too large", "negative", "numpy"],
)
def test_wrong_targets(network: nn.Module, images: Tensor, target: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pgd(Linf(0.1))(network, images, target)
    with pytest.raises(ValueError, match=message):
        square(Linf(0.1), num_queries=2)(network, images, target)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32])
def test_labels_of_any_whole_type_are_taken(network: nn.Module, images: Tensor, dtype: torch.dtype) -> None:
    attack, labels = pgd(Linf(0.1), num_steps=2), torch.tensor([0, 2, 1])
    assert torch.equal(attack(network, images, labels.to(dtype)).z, attack(network, images, labels).z)


WRONG_INPUTS = {
    "outside": (lambda x: 4 * x - 2, "lie outside the valid domain of Linf.*into the model"),
    "bytes": (lambda x: (255 * x).to(torch.uint8), r"inputs are torch\.uint8; expected floats.*255"),
    "numpy": (lambda x: x.numpy(), r"inputs are a ndarray.*torch\.as_tensor\(x\)"),
    "NaN": (lambda x: x / 0, "inputs hold NaN"),
    "named": (lambda x: {"image": x, "age": x[:, 0]}, r"Linf changes one tensor.* image, age.*Lens\(Linf.*'image'\)"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG_INPUTS)
def test_a_direct_call_refuses_what_an_evaluation_refuses(network: nn.Module, images: Tensor, case: str) -> None:
    change, message = WRONG_INPUTS[case]
    x: Any = change(images)
    for model in (network, lambda v: network(v)):
        for make in (pgd, apgd, fab, partial(square, num_queries=2), partial(pgd, restarts=2), fab_t):
            with pytest.raises(ValueError, match=message):
                make(Linf(0.1))(model, x, LABELS)
    with pytest.raises(ValueError, match=message):
        pgd_at(Linf(0.1))(network, x, LABELS)
    with pytest.raises(ValueError, match=message):
        trades(Linf(0.1))(network, x, LABELS)


def test_a_recipe_looks_at_its_first_batch_and_every_hundredth(network: nn.Module, images: Tensor) -> None:
    recipe = pgd_at(Linf(0.1), num_steps=1)
    recipe(network, images, LABELS)
    for _ in range(99):
        recipe(network, images + 1, LABELS)
    with pytest.raises(ValueError, match="outside the valid domain"):
        recipe(network, images + 1, LABELS)


class InPlace(nn.Module):
    """A network that normalises what it is given, in place."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x.sub_(0.5).mul_(4))


def test_a_model_that_writes_into_its_input_changes_nothing_of_the_callers(network: nn.Module, images: Tensor) -> None:
    def out_of_place(v: Tensor) -> Tensor:
        return network((v - 0.5) * 4)

    mine, noise = images.clone(), stream(3)
    for make in (pgd, partial(square, num_queries=5), fab, apgd_t):
        found, want = (make(Linf(0.1))(model, mine, LABELS, noise=noise) for model in (InPlace(network), out_of_place))
        assert torch.equal(mine, images)
        torch.testing.assert_close(found.x_adv, want.x_adv)


class Output(dict[str, Any]):
    @property
    def logits(self) -> Tensor:
        return self["logits"]


def test_logits_are_taken_out_of_an_output(network: nn.Module, images: Tensor) -> None:
    want = pgd(Linf(0.1))(network, images, LABELS).x_adv
    for model in (lambda v: Output(logits=network(v)), lambda v: {"loss": None, "logits": network(v)}):
        torch.testing.assert_close(pgd(Linf(0.1))(model, images, LABELS).x_adv, want)
    for wrong, key in ((lambda v: (network(v), v), r"\[0\]"), (lambda v: {"scores": network(v)}, r"\['scores'\]")):
        with pytest.raises(TypeError, match=rf"returns a .*logits.*lambda x: model\(x\){key}"):
            pgd(Linf(0.1))(wrong, images, LABELS)


@pytest.mark.parametrize("threat", [0.1, "linf:0.1", None])
def test_what_is_no_threat_model_is_refused(threat: Any) -> None:
    with pytest.raises(TypeError, match=r"expected a threat model, such as Linf\(8 / 255\)"):
        pgd(threat)


def test_logits_of_another_rank(network: nn.Module, images: Tensor) -> None:
    with pytest.raises(ValueError, match=r"returned shape \(3, 4, 1\) for 3 examples; an attack needs logits \(B, K\)"):
        pgd(Linf(0.1))(lambda x: network(x)[..., None], images, LABELS)


def test_models_without_a_gradient_to_the_input(network: nn.Module, images: Tensor) -> None:
    """Whether or not autograd still leads to the weights."""

    class Detached(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = network

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x.detach())

    models: list[Any] = [Detached(), lambda x: network(x).detach(), lambda x: network(x.detach())]
    for model in models:
        with pytest.raises(ValueError, match="no gradient reaches the input"):
            pgd(Linf(0.1))(model, images, LABELS)


def test_typos() -> None:
    with pytest.raises(ValueError, match="keep='hihgest'; expected one of fooled_first, highest_loss, smallest_fool"):
        pgd(Linf(0.1), keep="hihgest")
    with pytest.raises(TypeError, match="unexpected keyword argument 'steps'"):
        pgd(Linf(0.1), steps=3)
    with pytest.raises(ValueError, match="num_steps"):
        Attack(threat=Linf(0.1), rule=Ascent(), num_steps=-1)


def test_records_are_frozen() -> None:
    attack = pgd(Linf(0.1))
    with pytest.raises(AttributeError):
        attack.num_steps = 3  # type: ignore[attr-defined]
    assert attack == pgd(Linf(0.1))
    assert attack != pgd(Linf(0.1), num_steps=3)


# Steps -----------------------------------------------------------------------------------------------------------


def test_a_step_leaves_its_arguments(images: Tensor) -> None:
    problem = Problem(L2(0.5), images, 3, stream(3))
    z, grad = rand(*SHAPE, seed=2) / 100, rand(*SHAPE, seed=3)
    for rule in (Ascent(), Ascent(0.1, momentum=0.9), RawAscent(0.1)):
        kept = z.clone(), grad.clone()
        state: Any = rule.init(problem, z)
        seen = Seen(torch.zeros(3), torch.zeros(3, dtype=torch.bool), grad)
        first, state = rule.step(problem, z, seen, state, 0)
        again, _ = rule.step(problem, z, seen, rule.init(problem, z), 0)
        assert torch.equal(first, again)
        assert torch.equal(z, kept[0])
        assert torch.equal(grad, kept[1])


@pytest.mark.parametrize(
    ("x", "sentence"),
    [
        (255 * torch.ones(3, 4), "3 of 3 inputs lie outside .* They look like bytes, 0 to 255: divide by 255"),
        (-2 * torch.ones(3, 4), "They look normalised: undo that, and put it into the model"),
        (torch.ones(3, 4) * torch.nan, "3 of 3 inputs hold NaN or infinity: fill or drop those examples"),
    ],
)
@pytest.mark.parametrize("name", NAMED)
def test_a_direct_call_refuses_inputs_in_the_words_of_an_evaluation(name: str, x: Tensor, sentence: str) -> None:
    model, y = linear((3, 4), NUM_CLASSES).float(), torch.tensor([0, 1, 2])
    with pytest.raises(ValueError, match=sentence) as direct:
        NAMED[name](Linf(0.1))(model, x, y)
    with pytest.raises(ValueError) as evaluated:
        preflight(model, x, y, Linf(0.1))
    assert str(direct.value) == str(evaluated.value)


@pytest.mark.parametrize("kind", BALLS)
@pytest.mark.parametrize("name", ["pgd", "mi-fgsm", "apgd", "smooth", "fab", "square"])
def test_channels_stay_last_in_all_that_the_model_sees(name: str, kind: str) -> None:
    model = seeded(lambda: nn.Sequential(nn.Conv2d(2, 3, 3), nn.Flatten(), nn.Linear(3 * 3 * 5, 4))).double()
    x, y = rand(*SHAPE), LABELS
    few: dict[str, Any] = {"num_queries": 3} if name == "square" else {"num_steps": 3}
    attack, shown = NAMED[name](BALLS[kind](0.3), **few), []

    def look(v: Tensor) -> Tensor:
        shown.append(v.is_contiguous(memory_format=torch.channels_last))
        return model(v)

    there = attack(look, x.to(memory_format=torch.channels_last), y)
    assert all(shown) and len(shown) >= 2
    torch.testing.assert_close(there.z, attack(model, x, y).z)


# What is fooled leaves ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [partial(pgd, num_steps=8), partial(mi_fgsm, num_steps=8)])
def test_what_is_fooled_leaves_the_batch_and_what_stands_climbs_as_before(make: Callable[..., Attack]) -> None:
    """Per example: the looks until one after the first that reaches the goal, and the better of these two."""
    model, y = seeded(lambda: nn.Sequential(nn.Flatten(), nn.Linear(12, 4))).double(), torch.arange(40) % 4
    x, threat = rand(40, 3, 2, 2, seed=3), Linf(torch.linspace(0, 0.4, 40))
    whole, early = (make(threat, keep=keep)(model, x, y) for keep in ("fooled_first", "drop_fooled"))
    assert whole.reached is not None and early.reached is not None and early.loss is not None
    assert 0 < int(whole.reached.sum()) < 40 and torch.equal(whole.reached, early.reached)
    stands = ~whole.reached
    torch.testing.assert_close(early.z[stands], whole.z[stands], rtol=0, atol=1e-12)
    looks = 0
    for row in range(40):
        part, noise = take(threat, torch.tensor([row])), Noise.make(0, "attack", torch.tensor([row]))
        reached = []
        for n in range(9):
            attack = replace(make(part), num_steps=n, keep="last")
            x_adv = attack(model, x[row : row + 1], y[row : row + 1], noise=noise).x_adv
            reached.append(bool(model(x_adv).argmax(1) != y[row]))
        looks += min(reached.index(True) + 2, 9) if True in reached else 9
    assert early.cost.forwards == looks < whole.cost.forwards
