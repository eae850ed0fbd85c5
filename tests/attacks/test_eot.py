"""The mean over looks: closed forms on stochastic linear models, and the plain attack on models that do not change."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from contracts import NUM_CLASSES, SHAPE, rand, seeded, sentences, stream, words
from sparring.attacks.around import Averaged, EachTarget, MeanOver, Restarts, SmoothBackward
from sparring.attacks.auto_pgd import ShrinkingRadius, apgd, apgd_t
from sparring.attacks.catalogue import bim, pgd
from sparring.attacks.fab import fab_t
from sparring.attacks.loop import Attack, Problem, Seen
from sparring.attacks.square import square
from sparring.attacks.starts import Null
from sparring.core.objectives import TargetedDLR, cross_entropy, dlr, kl, margin, targeted
from sparring.core.types import Cost, take
from sparring.threats import L1, L2, Linf, inside

LABELS = torch.tensor([2, 0, 3])


# The objective -----------------------------------------------------------------------------------------------------

LOOKS = 8 * rand(3, 5, NUM_CLASSES, seed=1) - 4  # (B, looks, K)
BASES = {
    "ce": cross_entropy,
    "margin": margin,
    "dlr": dlr,
    "kl": kl,
    "wanted": targeted(cross_entropy, torch.tensor([1, 3, 0])),
    "targeted dlr": TargetedDLR(torch.tensor([1, 3, 0])),
}


@pytest.mark.parametrize("name", BASES)
def test_the_score_is_the_mean_of_the_scores(name: str) -> None:
    base, goal = BASES[name], MeanOver(BASES[name], 5)
    want = sum(base.score(LOOKS[:, i], LABELS) for i in range(5)) / 5
    torch.testing.assert_close(goal.score(LOOKS.flatten(1), LABELS), want)
    rows = torch.tensor([2, 0])
    torch.testing.assert_close(take(goal, rows).score(LOOKS[rows].flatten(1), LABELS[rows]), want[rows])
    assert take(goal, rows).num == 5
    soft = rand(3, NUM_CLASSES, seed=2).softmax(1)
    again = sum(base.score(LOOKS[:, i], soft) for i in range(5)) / 5
    torch.testing.assert_close(goal.score(LOOKS.flatten(1), soft), again)


def test_reached_asks_the_mean_probability_and_not_the_mean_logit() -> None:
    """Once sure of class 1, twice mildly for class 0: logits would say 1, probabilities say 0; and neither a vote."""
    looks = torch.tensor([[0.0, 50.0, 2.0, 0.0, 2.0, 0.0], [0.0, 50.0, 0.1, 0.0, 0.1, 0.0]])
    assert looks.view(2, 3, 2).mean(1).argmax(1).tolist() == [1, 1]
    goal = MeanOver(margin, 3)
    assert goal.reached(looks, torch.tensor([0, 0])).tolist() == [False, True]
    assert goal.reached(looks, torch.tensor([1, 1])).tolist() == [True, False]
    wanted = MeanOver(targeted(margin, torch.tensor([1, 1])), 3)
    assert wanted.reached(looks, torch.tensor([0, 0])).tolist() == [False, True]


# Models that do not change ---------------------------------------------------------------------------------------


ATTACKS = {
    "pgd": (pgd(Linf(0.1), num_steps=4), Cost(15, 12)),
    "apgd-dlr": (apgd(L2(0.4), num_steps=6, objective=dlr), Cost(21, 18)),
    "wanted": (pgd(Linf(0.1), num_steps=4, wanted=torch.tensor([1, 3, 0])), Cost(15, 12)),
    "l1": (apgd(L1(1.0), num_steps=10), Cost(39, 30)),
    "smooth": (SmoothBackward(pgd(Linf(0.1), num_steps=4)), Cost(15, 12)),
}


@pytest.mark.parametrize("num", [1, 3, 4])
@pytest.mark.parametrize("name", ATTACKS)
def test_on_a_steady_model_it_is_the_plain_attack(network: nn.Module, images: Tensor, name: str, num: int) -> None:
    attack, cost = ATTACKS[name]
    plain = attack(network, images, LABELS)
    mean = Averaged(attack, num)(network, images, LABELS)
    for field_name in ("x_adv", "z", "size", "loss"):
        torch.testing.assert_close(getattr(mean, field_name), getattr(plain, field_name), rtol=1e-9, atol=1e-9)
    assert torch.equal(mean.reached, plain.reached)  # type: ignore[arg-type]
    assert plain.cost == cost and mean.cost == Cost(num * cost.forwards, num * cost.backwards)


def test_the_cost_is_what_the_model_sees(network: nn.Module, images: Tensor) -> None:
    seen = Cost()

    def model(x: Tensor) -> Tensor:
        nonlocal seen
        seen = seen.plus(Cost(len(x)))
        if x.requires_grad:
            x.register_hook(lambda grad: count(len(grad)))
        return network(x)

    def count(num: int) -> None:
        nonlocal seen
        seen = seen.plus(Cost(0, num))

    for attack in (
        Averaged(pgd(Linf(0.01), num_steps=2, restarts=3), 2),
        Restarts(Averaged(pgd(Linf(0.01), num_steps=2), 2), 3),
        EachTarget(Averaged(pgd(Linf(0.01), num_steps=2), 3), 2),
        apgd(L1(0.1), num_steps=10, eot=2, restarts=2),
    ):
        seen = Cost()
        assert attack(model, images, LABELS).cost == seen  # type: ignore[operator]


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode], ids=["no_grad", "inference"])
def test_modes_of_autograd_do_not_matter(network: nn.Module, images: Tensor, context: Any) -> None:
    attack = Averaged(apgd_l1(), 2)
    want = attack(network, images, LABELS)
    with context():
        found = attack(network, rand(*SHAPE) * 0 + images, LABELS.clone())
    torch.testing.assert_close(found.z, want.z)


def apgd_l1() -> Any:
    return apgd(L1(1.0), num_steps=10)


# Models that change --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Watch:
    """Stays where it is and notes the gradients."""

    grads: list[Tensor] = field(default_factory=list)
    losses: list[Tensor] = field(default_factory=list)
    needs_grad: ClassVar[bool] = True

    def init(self, problem: Problem, z: Tensor) -> None:
        return None

    def step(self, problem: Problem, z: Tensor, seen: Seen, state: None, t: int) -> tuple[Tensor, None]:
        assert seen.grad is not None
        self.grads.append(seen.grad)
        self.losses.append(seen.loss)
        return z, None


W = rand(70, seed=4) + 0.5


def dropping(x: Tensor) -> Tensor:
    """Logits (0, w (x * m)), m a coin for every number of every input."""
    kept = x.flatten(1) * (torch.rand(x.flatten(1).shape) < 0.5)
    return torch.stack([0 * kept.sum(1), kept @ W], 1)


def watched(num: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """(steps, B, D) gradients and (steps, B) losses of the margin towards class 1."""
    watch = Watch()
    attack = Attack(threat=Linf(0.1), rule=watch, num_steps=3, objective=margin, start=Null())
    Averaged(attack, num)(dropping, rand(*SHAPE), torch.zeros(3).long(), noise=stream(3, seed=seed))
    return torch.stack(watch.grads).flatten(2), torch.stack(watch.losses)


def test_the_gradient_is_the_mean_over_looks() -> None:
    """E grad = w / 2 with standard deviation w / (2 sqrt(num)); of one look every entry is 0 or w."""
    once, _ = watched(1)
    assert bool(((once == 0) | ((once - W).abs() < 1e-12)).all())
    assert 0.4 < float((once == 0).double().mean()) < 0.6
    four, _ = watched(4)
    quarters = (4 * four / W).round()
    torch.testing.assert_close(four, quarters * W / 4)
    assert set(quarters.flatten().tolist()) == {0.0, 1.0, 2.0, 3.0, 4.0}
    many, losses = watched(400)
    error = (many / W - 0.5) * 2 * 20
    assert float(error.abs().max()) < 4.5 and 0.9 < float(error.std()) < 1.1
    x = rand(*SHAPE).flatten(1)
    want, spread = x @ W / 2, ((x * W) ** 2).sum(1).sqrt() / 2 / 20
    assert bool(((losses - want).abs() < 4.5 * spread).all())


def test_looks_are_keyed_by_the_noise_and_leave_the_generator_alone() -> None:
    first, before = watched(2), torch.get_rng_state()
    assert torch.equal(watched(2)[0], first[0])
    assert torch.equal(torch.get_rng_state(), before)
    assert not torch.equal(watched(2, seed=1)[0], first[0])
    grads = first[0]
    assert not torch.equal(grads[0], grads[1]), "every step looks anew"


def test_averaging_finds_what_single_looks_do_not() -> None:
    """Half of the sign of single gradients is lost; a mean of 30 knows nearly every sign, and so one step will do."""
    x, y = 0.4 + 0.2 * rand(*SHAPE), torch.zeros(3).long()

    def gain(attack: Any) -> Tensor:
        return attack(dropping, x, y, noise=stream(3)).z.flatten(1) @ W / (0.1 * W.sum())

    step = Attack(threat=Linf(0.1), rule=bim(Linf(0.1), step=1.0).rule, num_steps=1, objective=margin,  # type: ignore[attr-defined]
                  start=Null(), keep="last")  # fmt: skip
    assert bool((gain(step) < 0.65).all())
    assert bool((gain(Averaged(step, 30)) > 0.999).all())


# Around and inside others --------------------------------------------------------------------------------------------


def test_around_restarts_radii_and_smoothing() -> None:
    net = seeded(lambda: nn.Linear(70, NUM_CLASSES).double())

    def noisy(v: Tensor) -> Tensor:
        return net(v.flatten(1) + 0.1 * torch.randn(v.flatten(1).shape, dtype=v.dtype))

    x, noise = rand(*SHAPE, seed=3), stream(3)
    single = Attack(threat=L1(2.0), rule=apgd_l1().attack.rule, num_steps=10)
    for attack in (
        Averaged(pgd(Linf(0.1), num_steps=3, restarts=2), 3),
        Averaged(Restarts(ShrinkingRadius(single), 2), 3),
        Averaged(ShrinkingRadius(single), 3),
        Averaged(Averaged(pgd(Linf(0.1), num_steps=3), 2), 2),
        apgd(L1(2.0), num_steps=10, eot=3, restarts=2),
        EachTarget(Averaged(pgd(Linf(0.1), num_steps=3), 3)),
    ):
        first, again = (attack(noisy, x, LABELS, noise=noise) for _ in range(2))  # type: ignore[operator]
        assert torch.equal(first.z, again.z) and float(first.z.abs().max()) > 0.05
        threat: Any = L1(2.0) if float(first.z.abs().max()) > 0.11 else Linf(0.1)
        assert bool(inside(threat, x, first.z).all())
    assert repr(apgd(L1(2.0), eot=20, restarts=5)).startswith("Restarts(attack=Averaged(attack=ShrinkingRadius(")


def test_per_example_parts_are_taken() -> None:
    net = seeded(lambda: nn.Linear(70, NUM_CLASSES).double())
    x, rows = rand(*SHAPE, seed=3), torch.tensor([2, 0])
    radii = torch.tensor([0.1, 0.2, 0.3], dtype=torch.float64)
    attack = Averaged(pgd(Linf(radii), num_steps=3, wanted=torch.tensor([1, 3, 0]), restarts=2), 2)

    def flat(v: Tensor) -> Tensor:
        return net(v.flatten(1))

    whole = attack(flat, x, LABELS, noise=stream(3))
    part = take(attack, rows)(flat, x[rows], LABELS[rows], noise=stream(3).take(rows))
    torch.testing.assert_close(part.z, whole.z[rows])


def test_averaged_over_sentences() -> None:
    """The looks go side by side for inputs of any kind."""
    from contracts import NUM_WORDS, BagOfWords

    model, x = seeded(lambda: BagOfWords(NUM_WORDS, NUM_CLASSES)), sentences()
    plain = pgd(words(), num_steps=3)
    torch.testing.assert_close(Averaged(plain, 2)(model, x, LABELS).z, plain(model, x, LABELS).z)


def test_the_callers_model_is_left_as_found(stateful: nn.Module, snapshot: Any, images: Tensor) -> None:
    before, held = snapshot(stateful), images.clone()
    Averaged(pgd(Linf(0.1), num_steps=2, restarts=2), 2)(stateful, images, LABELS)
    assert snapshot(stateful) == before and torch.equal(images, held)
    with pytest.raises(ValueError, match="labels are"):
        Averaged(pgd(Linf(0.1), num_steps=2), 2)(stateful, images, LABELS[:2])
    assert snapshot(stateful) == before


# Errors --------------------------------------------------------------------------------------------------------------


def test_errors() -> None:
    for num in (0, -3):
        with pytest.raises(ValueError, match=f"the number of looks must be at least 1; got {num}"):
            Averaged(pgd(Linf(0.1)), num)
        with pytest.raises(ValueError, match="the number of looks must be at least 1"):
            apgd(Linf(0.1), eot=num)
    attacks: list[tuple[Any, str]] = [
        (fab_t(Linf(0.1)), "FAB"), (square(Linf(0.1)), "Square"), (Restarts(square(Linf(0.1)), 2), "Restarts"),
        (lambda *a, **k: None, "function"),
    ]  # fmt: skip
    for attack, name in attacks:
        with pytest.raises(TypeError, match=f"looks are averaged in the objective, and a {name} has none"):
            Averaged(attack, 2)


def test_around_targets_it_says_to_go_inside() -> None:
    """Fixed: EachTarget replaced the mean by its own goal and read the looks side by side as classes."""
    for attack in (apgd_t(Linf(0.1)), Restarts(apgd_t(Linf(0.1)), 2)):
        with pytest.raises(TypeError, match=r"would replace the mean over looks by its own goal; average .* inside it"):
            Averaged(attack, 2)
