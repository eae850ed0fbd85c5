"""One-step recipes, replayed batches, MART, perturbed weights and several threats, against the papers' plain loops."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from contracts import SHAPE, rand, seeded, stream
from sparring.core.batches import Batches
from sparring.threats import L2, Linf
from sparring.training.loop import train
from sparring.training.mart import mart
from sparring.training.named import RECIPES
from sparring.training.one_step import fgsm_rs, free, n_fgsm
from sparring.training.recipes import Standard, pgd_at, trades
from sparring.training.schedules import Ramp, Ramped
from sparring.training.several import multi_norm
from sparring.training.weights import awp

Y = torch.tensor([2, 0, 3])
NOISE = stream(3)


def gradients(model: nn.Module, loss: Tensor) -> list[Tensor]:
    return [g.clone() for g in torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)]


def assert_same_step(model: nn.Module, ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)
    for a, b in zip(gradients(model, ours), gradients(model, theirs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-11)


def slope(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    x = x.detach().requires_grad_()
    return torch.autograd.grad(F.cross_entropy(model(x), y), x)[0]


def clamp(v: Tensor, low: Any, high: Any) -> Tensor:
    """`utils.clamp` of the authors' code."""
    return torch.max(torch.min(v, torch.as_tensor(high, dtype=v.dtype)), torch.as_tensor(low, dtype=v.dtype))


def test_fgsm_rs_is_the_authors_step(network: nn.Module, images: Tensor) -> None:
    radius, alpha = 0.2, 0.25
    delta = radius * (2 * NOISE.uniform(images.shape[1:]).double() - 1)
    delta = clamp(delta, 0 - images, 1 - images)
    delta = clamp(delta + alpha * slope(network, images + delta, Y).sign(), -radius, radius)
    delta = clamp(delta, 0 - images, 1 - images)
    theirs = F.cross_entropy(network(images + delta), Y)
    assert_same_step(network, fgsm_rs(Linf(radius))(network, images, Y, noise=NOISE), theirs)


def test_n_fgsm_is_the_authors_step_and_leaves_the_ball(network: nn.Module, images: Tensor) -> None:
    radius = 0.05
    eta = 2 * radius * (2 * NOISE.uniform(images.shape[1:]).double() - 1)
    eta = clamp(eta, 0 - images, 1 - images)
    delta = clamp(eta + radius * slope(network, images + eta, Y).sign(), 0 - images, 1 - images)
    recipe = n_fgsm(Linf(radius))
    crafted = recipe.craft(network, images, Y, noise=NOISE)
    torch.testing.assert_close(crafted, images + delta, rtol=0, atol=1e-12)
    assert 2 * radius < float((crafted - images).abs().max()) <= 3 * radius + 1e-12  # type: ignore[operator]
    assert_same_step(network, recipe(network, images, Y, noise=NOISE), F.cross_entropy(network(images + delta), Y))


def small() -> nn.Module:
    return seeded(lambda: nn.Sequential(nn.Flatten(), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).double())


def test_free_is_the_authors_loop() -> None:
    """Weights after two epochs of three batches, the last one smaller, each replayed four times."""
    x, y, radius, replays = 0.8 * rand(10, 6, seed=1) + 0.1, torch.arange(10) % 3, 0.1, 4
    batches = [(x[i : i + 4], y[i : i + 4]) for i in (0, 4, 8)]
    ours = small()
    train(ours, batches, free(Linf(radius), replays=replays), torch.optim.SGD(ours.parameters(), 0.3), num_epochs=2)

    theirs = small()
    optimizer = torch.optim.SGD(theirs.parameters(), 0.3)
    delta = torch.zeros(4, 6, dtype=torch.float64)
    for _ in range(2):
        for inputs, labels in batches:
            num = len(inputs)
            delta[:num] = clamp(delta[:num], 0 - inputs, 1 - inputs)  # ours is clipped before it meets new inputs, too
            for _ in range(replays):
                part = delta[:num].clone().requires_grad_()
                loss = F.cross_entropy(theirs(inputs + part), labels)
                optimizer.zero_grad()
                loss.backward()
                assert part.grad is not None
                moved = clamp(part.detach() + radius * part.grad.sign(), -radius, radius)
                delta[:num] = clamp(moved, 0 - inputs, 1 - inputs)
                optimizer.step()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
    assert not torch.allclose(next(ours.parameters()), next(small().parameters()), atol=1e-3)


@pytest.mark.parametrize("source", ["batches", "list", "loader"])
def test_killed_between_replays_ends_in_the_same_bits(source: str) -> None:
    x, y = rand(10, 6, seed=1), torch.arange(10) % 3

    class Noisy(torch.utils.data.Dataset[Any]):
        def __len__(self) -> int:
            return 10

        def __getitem__(self, index: int) -> Any:
            return (x[index] + 0.05 * torch.rand(6).double()).clamp(0, 1), y[index]

    def run(**options: Any) -> Any:
        model = seeded(lambda: nn.Sequential(nn.Linear(6, 5), nn.Dropout(0.2), nn.Linear(5, 3)).double())
        sources: dict[str, Any] = {
            "batches": Batches(x, y, 4, seed=3, shuffle=True),
            "list": [(x[:4], y[:4]), (x[4:], y[4:])],
            "loader": torch.utils.data.DataLoader(Noisy(), batch_size=4, shuffle=True),
        }
        recipe = Ramped(free(Linf(0.1), replays=3), Ramp(0.5))
        optimizer = torch.optim.SGD(model.parameters(), 0.3, momentum=0.9)
        return train(model, sources[source], recipe, optimizer, num_epochs=2, **options)

    whole, states = seeded(run, 5), []
    seeded(lambda: run(observe=lambda state: states.append(state.to_dict())), 5)
    assert len(states) == 2 * 3 * (2 if source == "list" else 3)
    for state in states[:-1]:
        resumed = seeded(lambda state=state: run(resume=state), 9)
        assert all(torch.equal(resumed.last[n], v) for n, v in whole.last.items()), f"from step {state['step']}"


def test_mart_is_the_authors_loss(network: nn.Module, images: Tensor) -> None:
    """`mart_loss` of the authors' code, line by line, on the inputs that our attack finds."""
    recipe = mart(Linf(0.2), num_steps=4, beta=6.0)
    x_adv = recipe.craft(network, images, Y, noise=NOISE)
    logits, logits_adv = network(images), network(x_adv)
    adv_probs = F.softmax(logits_adv, dim=1)
    tmp1 = torch.argsort(adv_probs, dim=1)[:, -2:]
    new_y = torch.where(tmp1[:, -1] == Y, tmp1[:, -2], tmp1[:, -1])
    loss_adv = F.cross_entropy(logits_adv, Y) + F.nll_loss(torch.log(1.0001 - adv_probs + 1e-12), new_y)
    nat_probs = F.softmax(logits, dim=1)
    true_probs = torch.gather(nat_probs, 1, Y.unsqueeze(1)).squeeze()
    kl = nn.KLDivLoss(reduction="none")(torch.log(adv_probs + 1e-12), nat_probs).sum(1)
    theirs = loss_adv + 6.0 * (1.0 / 3) * torch.sum(kl * (1.0000001 - true_probs))
    assert_same_step(network, recipe(network, images, Y, noise=NOISE), theirs)


@pytest.mark.parametrize("builder", [pgd_at, trades, mart, fgsm_rs])
def test_awp_is_the_authors_step_around_any_recipe(stateful: nn.Module, images: Tensor, builder: Any) -> None:
    """A proxy takes a step up the loss; its move, rescaled layer by layer, is added, trained at, and taken off."""
    gamma, recipe = 0.02, builder(Linf(0.1))
    model = stateful.eval().requires_grad_()
    x_adv = recipe.craft(model, images, Y, noise=NOISE)
    proxy = copy.deepcopy(model)
    climb = torch.optim.SGD(proxy.parameters(), 0.01)
    (-recipe.loss_on(proxy, images, x_adv, Y)).backward()
    climb.step()
    moved, diffs = copy.deepcopy(model), {}
    for (name, old), new in zip(model.named_parameters(), proxy.parameters(), strict=True):
        if old.ndim > 1:
            diff = (new - old).detach()
            diffs[name] = gamma * old.detach().norm() / (diff.norm() + 1e-20) * diff
    with torch.no_grad():
        for name, weight in moved.named_parameters():
            weight += diffs.get(name, 0)
    loss = recipe.loss_on(moved, images, x_adv, Y)
    ours = awp(recipe, gamma=gamma)(model, images, Y, noise=NOISE)
    torch.testing.assert_close(ours, loss, rtol=1e-7, atol=1e-9)
    assert float(ours.detach()) > float(recipe.loss_on(model, images, x_adv, Y).detach())
    for a, b in zip(gradients(model, ours), gradients(moved, loss), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-8)


def test_awp_leaves_weights_alone_and_counts_one_batch_in_batchnorm(stateful: nn.Module, images: Tensor) -> None:
    plain, model = copy.deepcopy(stateful).train(), stateful.train()
    before = [p.detach().clone() for p in model.parameters()]
    awp(pgd_at(Linf(0.1), num_steps=1), gamma=0.0)(model, images, Y, noise=NOISE)
    pgd_at(Linf(0.1), num_steps=1)(plain, images, Y, noise=NOISE)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    for (name, a), b in zip(model.named_buffers(), plain.buffers(), strict=True):
        if "num_batches" in name:
            assert torch.equal(a, b), name


def test_awp_needs_a_recipe_in_two_parts_and_waits_for_its_start() -> None:
    for recipe in (Standard(), free(Linf(0.1)), Ramped(free(Linf(0.1)), Ramp(0.5))):
        with pytest.raises(ValueError, match="between crafting inputs and training on them"):
            awp(recipe)
    inner = pgd_at(Linf(0.2))
    assert awp(inner, start=0.5).at(0.4) is inner
    half = awp(Ramped(inner, Ramp(1.0)), gamma=0.1).at(0.5)
    assert half.gamma == 0.1 and half.recipe.attack.threat.radius == 0.1
    with pytest.raises(ValueError, match=r"gamma.*must be in \[0, 1\)"):
        awp(inner, gamma=1.0)


def test_worst_threat_takes_the_higher_loss_of_each_example(network: nn.Module, images: Tensor) -> None:
    one, two = (pgd_at(threat, num_steps=3) for threat in (Linf(0.05), L2(0.6)))
    recipe = multi_norm(Linf(0.05), "l2:0.6", num_steps=3)
    found = recipe.attack(network, images, Y, noise=NOISE)
    singles = [attack(network, images, Y, noise=NOISE) for attack in recipe.attack.attacks]  # type: ignore[attr-defined]
    losses = torch.stack([F.cross_entropy(network(s.x_adv), Y, reduction="none") for s in singles])
    torch.testing.assert_close(F.cross_entropy(network(found.x_adv), Y, reduction="none"), losses.amax(0))
    assert found.cost.forwards == 2 * 3 * 4
    for row, winner in enumerate(losses.argmax(0).tolist()):
        assert torch.equal(found.x_adv[row], singles[winner].x_adv[row])
    assert_same_step(network, recipe(network, images, Y, noise=NOISE), F.cross_entropy(network(found.x_adv), Y))
    assert one.attack != two.attack


def test_mean_threat_is_the_mean_of_the_losses(network: nn.Module, images: Tensor) -> None:
    recipe = multi_norm(Linf(0.05), "l2:0.6,l1:3", how="mean", num_steps=3)
    attacks = recipe.attack.attacks  # type: ignore[attr-defined]
    found = [attack(network, images, Y, noise=NOISE).x_adv for attack in attacks]
    theirs = torch.stack([F.cross_entropy(network(x), Y) for x in found]).mean()
    assert len(attacks) == 3 and recipe.craft(network, images, Y, noise=NOISE).shape == (9, *SHAPE[1:])  # type: ignore[union-attr]
    assert_same_step(network, recipe(network, images, Y, noise=NOISE), theirs)


def test_a_ramp_scales_every_threat() -> None:
    half: Any = Ramped(multi_norm(Linf(0.2), "l2:1.0"), Ramp(1.0)).at(0.5)
    assert [attack.threat.radius for attack in half.attack.attacks] == [0.1, 0.5]
    with pytest.raises(ValueError, match=r"'linf:0\.2' adds nothing"):
        multi_norm(Linf(0.2), "linf:0.2")
    wide: Any = Ramped(n_fgsm(Linf(0.1)), Ramp(1.0)).at(0.5)
    assert wide.attack.threat.radius == pytest.approx(0.15)


def test_defaults_are_those_of_the_authors_code() -> None:
    rs: Any = fgsm_rs(Linf(8 / 255))
    assert (rs.attack.rule.step_size * 8, rs.attack.num_steps) == (10, 1)
    assert free(Linf(0.1)).replays == 8 and mart(Linf(0.1)).beta == 5.0
    for name in RECIPES:
        assert name == "standard" or "Source:" in (RECIPES[name].__doc__ or "")
    for wrong in ({"replays": 0}, {"noise": 0.0}, {"beta": -1.0}):
        builder = {"replays": free, "noise": n_fgsm, "beta": mart}[next(iter(wrong))]
        with pytest.raises(ValueError, match="got"):
            builder(Linf(0.1), **wrong)  # type: ignore[operator]
