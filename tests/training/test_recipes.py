"""Recipes against loops written by hand."""

from __future__ import annotations

import copy
import inspect
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from contracts import (
    BALLS,
    NUM_CLASSES,
    NUM_WORDS,
    RECIPES,
    SHAPE,
    BagOfWords,
    quick,
    rand,
    seeded,
    sentences,
    stream,
    words,
)
from sparring.attacks.catalogue import pgd
from sparring.core.model_state import private_rng
from sparring.core.noise import Noise
from sparring.threats import L2, Linf
from sparring.threats.base import ThreatModel
from sparring.training.recipes import Mixed, Standard, mixed, pgd_at, standard, trades
from sparring.training.schedules import Ramped

LABELS = torch.tensor([2, 0, 3])
CRAFTING = [name for name in RECIPES if name not in ("ibp", "gaussian")]
"""Interval bounds attack nothing by default, and tell a figure: test_certified.py. Noise is drawn, not crafted."""
X5, Y5 = rand(5, *SHAPE[1:], seed=2), torch.tensor([2, 0, 3, 1, 1])


def climb(model: Any, x: Tensor, start: Tensor, radius: float, num_steps: int, score: Any, kind: str) -> Tensor:
    """Projected ascent from x + start, as one writes it without a toolkit."""
    v = (x + start).clamp(0, 1)
    for _ in range(num_steps):
        v = v.detach().requires_grad_()
        (grad,) = torch.autograd.grad(score(model(v)).sum(), v)
        if kind == "Linf":
            change = v.detach() + radius / 4 * grad.sign() - x
            change = change.clamp(-radius, radius)
        else:
            change = v.detach() + radius / 4 * grad / grad.flatten(1).norm(dim=1).view(-1, 1, 1, 1) - x
            change = change * (radius / change.flatten(1).norm(dim=1).view(-1, 1, 1, 1)).clamp_max(1)
        v = (x + change).clamp(0, 1)
    return v.detach()


def gradients(model: nn.Module, loss: Tensor) -> list[Tensor]:
    return [g.clone() for g in torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)]


def assert_same_step(model: nn.Module, ours: Tensor, theirs: Tensor) -> None:
    """The same loss and the same direction for the weights."""
    assert ours.ndim == 0
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)
    for a, b in zip(gradients(model, ours), gradients(model, theirs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-11)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_standard(network: nn.Module, images: Tensor, smoothing: float) -> None:
    theirs = F.cross_entropy(network(images), LABELS, label_smoothing=smoothing)
    assert_same_step(network, standard(Linf(0.1), label_smoothing=smoothing)(network, images, LABELS), theirs)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("kind", ["Linf", "L2"])
def test_pgd_at(network: nn.Module, images: Tensor, kind: str, smoothing: float) -> None:
    threat, noise = BALLS[kind](0.2), stream(3)
    start = threat.sample(images, noise)
    v = climb(network, images, start, 0.2, 5, lambda logits: F.cross_entropy(logits, LABELS, reduction="none"), kind)
    theirs = F.cross_entropy(network(v), LABELS, label_smoothing=smoothing)
    recipe = pgd_at(threat, num_steps=5, label_smoothing=smoothing)
    assert_same_step(network, recipe(network, images, LABELS, noise=noise), theirs)
    assert not torch.allclose(theirs, F.cross_entropy(network(images), LABELS, label_smoothing=smoothing))


def test_pgd_at_starts_uniformly(network: nn.Module, images: Tensor) -> None:
    noise = stream(3)
    want = (images + 0.2 * (2 * noise.uniform(images.shape[1:]).double() - 1)).clamp(0, 1)
    torch.testing.assert_close(pgd_at(Linf(0.2), num_steps=0).craft(network, images, LABELS, noise=noise), want)


@pytest.mark.parametrize("beta", [1.0, 6.0])
@pytest.mark.parametrize("kind", ["Linf", "L2"])
def test_trades(network: nn.Module, images: Tensor, kind: str, beta: float) -> None:
    """Against the authors' formulation: KLDivLoss of log-probabilities, summed to craft, batchmean in the loss."""
    noise, threat = stream(3), BALLS[kind](0.2)
    clean = network(images).softmax(1).detach()
    start = 0.001 * noise.normal(images.shape[1:]).double()
    if kind == "L2":
        start = threat.project(images, start)

    def divergence(logits: Tensor) -> Tensor:
        return F.kl_div(F.log_softmax(logits, 1), clean, reduction="none").sum(1)

    v = climb(network, images, start, 0.2, 5, divergence, kind)
    assert float((v - images).abs().max()) > 0.05
    disagreement = nn.KLDivLoss(reduction="batchmean")(F.log_softmax(network(v), 1), F.softmax(network(images), 1))
    theirs = F.cross_entropy(network(images), LABELS) + beta * disagreement
    ours = trades(threat, beta=beta, num_steps=5)(network, images, LABELS, noise=noise)
    assert_same_step(network, ours, theirs)
    frozen = F.kl_div(F.log_softmax(network(v), 1), clean, reduction="batchmean")
    cut = gradients(network, F.cross_entropy(network(images), LABELS) + beta * frozen)
    assert not torch.allclose(cut[0], gradients(network, theirs)[0]), (
        "the gradient goes through the clean prediction too"
    )


def test_trades_does_not_look_at_labels_while_crafting(network: nn.Module, images: Tensor) -> None:
    recipe, noise = trades(Linf(0.1), num_steps=2), stream(3)
    first, other = (recipe.craft(network, images, y, noise=noise) for y in (LABELS, LABELS.flip(0)))
    assert torch.equal(first, other)  # type: ignore[arg-type]


@pytest.mark.parametrize(("share", "attacked"), [(0.01, 1), (0.3, 2), (0.5, 2), (0.7, 4), (0.8, 4), (1.0, 5)])
def test_mixed_share(network: nn.Module, share: float, attacked: int) -> None:
    recipe, noise = mixed(Linf(0.1), share=share, num_steps=2), stream(5)
    crafted = recipe.craft(network, X5, Y5, noise=noise)
    changed = (crafted != X5).flatten(1).any(1)  # type: ignore[union-attr]
    assert changed.tolist() == [True] * attacked + [False] * (5 - attacked)
    whole = pgd_at(Linf(0.1), num_steps=2).craft(network, X5, Y5, noise=noise)
    torch.testing.assert_close(crafted[:attacked], whole[:attacked])  # type: ignore[index,call-overload]
    assert_same_step(network, recipe(network, X5, Y5, noise=noise), F.cross_entropy(network(crafted), Y5))


@pytest.mark.parametrize("share", [0.0, -0.5, 1.1, float("nan")])
def test_mixed_share_errors(share: float) -> None:
    with pytest.raises(ValueError, match=r"share must be in \(0, 1\]; got"):
        mixed(Linf(0.1), share=share)


def test_mixed_takes_its_part_of_what_is_per_example(network: nn.Module) -> None:
    """Masks and radii (B, ...) belong to the batch; the attacked share takes its own."""
    mask, noise = rand(*X5.shape, seed=4) < 0.5, stream(5)
    radius = torch.tensor([0.1, 0.2, 0.05, 0.1, 0.3])
    half = mixed(Linf(radius, mask=mask), share=0.6, num_steps=2).craft(network, X5, Y5, noise=noise)
    whole = pgd_at(Linf(radius, mask=mask), num_steps=2).craft(network, X5, Y5, noise=noise)
    torch.testing.assert_close(half[:3], whole[:3])  # type: ignore[index,call-overload]


def test_one_forward_sees_the_mixture(stateful: nn.Module) -> None:
    """BatchNorm must see clean and attacked inputs together, once."""
    sizes: list[int] = []
    crafted = mixed(Linf(0.1), share=0.5, num_steps=1)
    stateful.register_forward_hook(lambda module, x, out: sizes.append(len(out)) if module.training else None)
    crafted(stateful, X5, Y5)
    assert sizes == [5]


@pytest.mark.parametrize("name", CRAFTING)
@pytest.mark.parametrize("craft_mode", ["eval", "train", "keep"])
def test_craft_mode(stateful: nn.Module, snapshot: Any, images: Tensor, name: str, craft_mode: Any) -> None:
    """What the submodules do while crafting is what was asked for, and crafting leaves no trace."""
    if name in ("standard", "free"):
        pytest.skip("crafts nothing")
    recipe = quick(name, Linf(0.1), 2, craft_mode=craft_mode)
    found: list[list[bool]] = []
    handle = stateful.register_forward_pre_hook(lambda module, _: found.append([m.training for m in module.modules()]))
    own, before = [m.training for m in stateful.modules()], snapshot(stateful)
    with private_rng(0, torch.device("cpu")):
        recipe.craft(stateful, images, LABELS, noise=stream(3))
    handle.remove()
    want = {"eval": [False] * 8, "train": [True] * 8, "keep": own}[craft_mode]
    assert len(found) >= (1 if "fgsm" in name else 2)
    assert all(modes == want for modes in found)
    assert snapshot(stateful) == before


def test_craft_modes_find_different_examples(stateful: nn.Module, images: Tensor) -> None:
    stateful.train()
    found = {
        mode: pgd_at(Linf(0.1), num_steps=2, craft_mode=mode).craft(stateful, images, LABELS, noise=stream(3))
        for mode in ("eval", "train", "keep")
    }
    assert not torch.equal(found["eval"], found["train"])
    assert torch.equal(found["train"], found["keep"]), "in train mode they are the same, dropout masks included"


@pytest.mark.parametrize("name", CRAFTING)
def test_default_noise_comes_from_the_global_generator(stateful: nn.Module, images: Tensor, name: str) -> None:
    """So the ordinary way to repeat a training run, torch.manual_seed, repeats this one."""
    recipe = quick(name, Linf(0.1))

    def run(seed: int) -> Tensor:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return recipe(copy.deepcopy(stateful), images, LABELS).detach()

    assert torch.equal(run(1), run(1))
    assert not torch.equal(run(1), run(2))


@pytest.mark.parametrize("name", CRAFTING)
def test_a_given_noise_leaves_the_global_generator(network: nn.Module, images: Tensor, name: str) -> None:
    recipe = quick(name, Linf(0.1))
    before = torch.get_rng_state()
    first = recipe(network, images, LABELS, noise=stream(3))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(recipe(network, images, LABELS, noise=stream(3)), first)


@pytest.mark.parametrize("name", CRAFTING)
def test_the_loss_has_a_graph_to_every_weight_and_to_nothing_else(
    network: nn.Module, images: Tensor, name: str
) -> None:
    recipe = quick(name, Linf(0.1))
    x = images.clone()
    recipe(network, x, LABELS, noise=stream(3)).backward()
    assert all(p.grad is not None and bool((p.grad != 0).any()) for p in network.parameters())
    assert x.grad is None
    assert not x.requires_grad
    assert torch.equal(x, images)


@pytest.mark.parametrize("name", ["mixed", "pgd-at", "trades"])
def test_training_pays_for_no_extra_forward(network: nn.Module, images: Tensor, name: str) -> None:
    calls = 0

    def model(x: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return network(x)

    RECIPES[name](Linf(0.1), num_steps=4)(model, images, LABELS, noise=stream(3))
    assert calls == {"mixed": 5, "pgd-at": 5, "trades": 1 + 4 + 2}[name]


@pytest.mark.parametrize("name", ["standard", "mixed", "pgd-at", "trades", "mart", "fgsm-rs"])
@pytest.mark.parametrize("hard", [True, False], ids=["sentences", "mixtures"])
def test_words(name: str, hard: bool) -> None:
    """The same recipes on token ids: what is trained on are real sentences."""
    model, x = seeded(lambda: BagOfWords(NUM_WORDS, NUM_CLASSES)), sentences()
    threat, noise = words(hard=hard), stream(3)
    recipe: Any = quick(name, threat, 6)
    loss = recipe(model, x, LABELS, noise=noise)
    loss.backward()
    assert model.scores.weight.grad.abs().sum() > 0
    if name == "standard":
        assert_same_step(model, recipe(model, x, LABELS), F.cross_entropy(model(x), LABELS))
        return
    crafted = recipe.craft(model, x, LABELS, noise=noise)
    assert crafted["ids"].dtype == torch.int64
    assert bool(threat.valid(x, crafted).all())
    changed = (crafted["ids"] != x["ids"]).any(1)
    if name == "pgd-at":
        assert bool(changed.all())
        assert loss > F.cross_entropy(model(x), LABELS)
        torch.testing.assert_close(loss, F.cross_entropy(model(crafted), LABELS))
    if name == "mixed":
        assert changed.tolist() == [True, True, False]
    if name == "trades" and not hard:
        # from a real sentence the divergence is flat, so only the mixture has somewhere to climb
        assert bool(changed.any())


# Radii that grow ------------------------------------------------------------------------------------------------


def at_radius(recipe: Any, factor: float) -> Any:
    return Ramped(recipe, lambda progress: factor).at(0.3)


@pytest.mark.parametrize("name", ["mixed", "pgd-at", "trades"])
def test_at_radius(network: nn.Module, images: Tensor, name: str) -> None:
    recipe = RECIPES[name](Linf(0.2), num_steps=3)
    half = at_radius(recipe, 0.5)
    assert half == RECIPES[name](Linf(0.1), num_steps=3)
    assert at_radius(recipe, 1.0) is recipe
    assert recipe == RECIPES[name](Linf(0.2), num_steps=3)
    torch.testing.assert_close(
        half(network, images, LABELS, noise=stream(3)),
        RECIPES[name](Linf(0.1), num_steps=3)(network, images, LABELS, noise=stream(3)),
    )


def test_at_radius_of_radii_and_of_other_units() -> None:
    each: Any = at_radius(pgd_at(L2(torch.tensor([0.2, 0.4, 0.6]))), 0.5)
    torch.testing.assert_close(each.attack.threat.radius, torch.tensor([0.1, 0.2, 0.3]))
    words_at: Any = at_radius(pgd_at(words(2.0)), 0.5)
    assert words_at.attack.threat.radius == 1.0


def test_at_radius_zero_trains_on_clean_inputs(network: nn.Module, images: Tensor) -> None:
    """The first step of a warm-up."""
    loss = at_radius(pgd_at(Linf(0.2)), 0.0)(network, images, LABELS, noise=stream(3))
    assert_same_step(network, loss, F.cross_entropy(network(images), LABELS))


def test_at_radius_reaches_through_restarts(network: nn.Module, images: Tensor) -> None:
    recipe = Mixed(attack=pgd(Linf(0.2), num_steps=2, restarts=2))
    crafted = at_radius(recipe, 0.5).craft(network, images, LABELS, noise=stream(3))
    assert 0.05 < float((crafted - images).abs().max()) <= 0.1 + 1e-9


@dataclass(frozen=True)
class Growing:
    """A recipe with a business of its own over the run, and an attack."""

    attack: Any
    weight: float = 0.0

    def __call__(self, model: Any, x: Tensor, y: Tensor, *, noise: Noise | None = None) -> Tensor:
        return self.weight * F.cross_entropy(model(x), y)

    def at(self, progress: float) -> Growing:
        return replace(self, weight=progress)


def test_a_ramp_and_what_a_recipe_changes_itself_go_together() -> None:
    both = Ramped(Growing(pgd(Linf(0.2))), lambda progress: 2 * progress).at(0.25)
    assert both.weight == 0.25 and both.attack.threat.radius == 0.1


def test_a_ramp_alone_is_the_recipe_at_the_full_radius(network: nn.Module, images: Tensor) -> None:
    recipe, noise = pgd_at(Linf(0.2), num_steps=2), stream(3)
    whole = Ramped(recipe, lambda progress: 0.1)(network, images, LABELS, noise=noise)
    assert torch.equal(whole, recipe(network, images, LABELS, noise=noise))


# Named inputs, and what is trained on ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Offsets(ThreatModel):
    """Moves of embedded words, as a mapping with a name that clean sentences do not have; realized on a coarse grid."""

    radius: Any
    dim: int

    def null(self, x: Any) -> Tensor:
        return torch.zeros(*x["ids"].shape, self.dim, dtype=torch.float64)

    def sample(self, x: Any, noise: Noise) -> Tensor:
        return self.project(x, self.radius * (2 * noise.uniform((x["ids"].shape[1], self.dim)).double() - 1))

    def apply(self, x: Any, z: Tensor) -> Any:
        return {**x, "offset": z}

    def realize(self, x: Any, z: Tensor) -> Any:
        return {**x, "offset": (z * 20).round() / 20}

    def project(self, x: Any, z: Tensor) -> Tensor:
        return z.clamp(-self.radius, self.radius)

    def steepest(self, x: Any, grad: Tensor) -> Tensor:
        return grad.sign()

    def size(self, x: Any, z: Tensor) -> Tensor:
        return z.abs().flatten(1).amax(1)

    def valid(self, x: Any, adversarial: Any) -> Tensor:
        return torch.ones(len(x["ids"]), dtype=torch.bool)


class Reader(nn.Module):
    """Embeds ids, adds the offset where there is one, and counts what was missing."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.out, self.seen = nn.Embedding(7, 3), nn.Linear(3, NUM_CLASSES), []

    def forward(self, x: Any) -> Tensor:
        self.seen.append(x.get("offset"))
        return self.out((self.words(x["ids"]) + x.get("offset", 0)).tanh().mean(1))


@pytest.mark.parametrize("train_on", ["realized", "applied"])
@pytest.mark.parametrize("share", [0.3, 0.5, 1.0])
def test_mixed_of_named_inputs_that_get_another_name(share: float, train_on: Any) -> None:
    model = seeded(Reader).double()
    x, num = {"ids": torch.arange(20).view(5, 4) % 7}, {0.3: 2, 0.5: 2, 1.0: 5}[share]
    recipe = mixed(Offsets(0.33, 3), share=share, num_steps=3, train_on=train_on)
    crafted: Any = recipe.craft(model, x, Y5, noise=stream(5))
    assert torch.equal(crafted["ids"], x["ids"]) and crafted["offset"].shape == (5, 4, 3)
    assert crafted["offset"].flatten(1).any(1).tolist() == [True] * num + [False] * (5 - num)
    on_grid = torch.equal(crafted["offset"], (crafted["offset"] * 20).round() / 20)
    assert on_grid == (train_on == "realized")
    loss = recipe(model, x, Y5, noise=stream(5))
    assert torch.equal(loss, F.cross_entropy(model(crafted), Y5))
    loss.backward()
    assert model.words.weight.grad.abs().sum() > 0 and x.keys() == {"ids"}


def test_trades_may_train_on_what_was_applied() -> None:
    model, x = seeded(Reader).double(), {"ids": torch.arange(20).view(5, 4) % 7}
    for train_on, on_grid in (("realized", True), ("applied", False)):
        recipe: Any = trades(Offsets(0.33, 3), num_steps=3, train_on=train_on)  # type: ignore[arg-type]
        recipe(model, x, Y5, noise=stream(5)).backward()
        offset = model.seen[-1]
        assert torch.equal(offset, (offset * 20).round() / 20) == on_grid and float(offset.abs().max()) > 0.2


def test_for_balls_realized_and_applied_are_the_same(network: nn.Module, images: Tensor) -> None:
    for builder in (pgd_at, mixed, trades):
        losses = [
            builder(Linf(0.1), num_steps=2, train_on=on)(network, images, LABELS, noise=stream(3))  # type: ignore[operator]
            for on in ("realized", "applied")
        ]
        torch.testing.assert_close(*losses)


def test_what_cannot_be_trained_on() -> None:
    with pytest.raises(ValueError, match="train_on='soft'; expected one of realized, applied"):
        pgd_at(Linf(0.1), train_on="soft")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="needs an attack with a `threat`"):
        Mixed(attack=lambda *a, **b: None, train_on="applied")  # type: ignore[arg-type,return-value]


def test_a_slope_shows_pgd_at_the_units_that_are_off() -> None:
    def off(v: Any) -> Tensor:
        return torch.stack([v[:, 0], torch.relu(v[:, 0] + v[:, 1] - 1)], 1)

    x, y = torch.tensor([[0.2, 0.5]]), torch.tensor([0])
    found = [pgd_at(Linf(0.3), slope=slope).craft(off, x, y, noise=stream(1))[0, 1] for slope in (None, 10.0)]
    assert found[0] < 0.79 < found[1]


def test_options_are_written_out() -> None:
    """So that help, types and errors can be read from the signature."""
    for builder in RECIPES.values():
        kinds = {p.kind for p in inspect.signature(builder).parameters.values()}
        assert kinds == {inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY}


def test_recipes_are_frozen_records() -> None:
    assert pgd_at(Linf(0.1)) == pgd_at(Linf(0.1))
    assert Standard() == standard()
    with pytest.raises(AttributeError):
        pgd_at(Linf(0.1)).share = 0.5  # type: ignore[misc]


def test_defaults_are_those_of_the_papers() -> None:
    inner: Any = pgd_at(Linf(8 / 255)).attack
    assert (inner.num_steps, inner.rule.step_size, inner.keep) == (10, 0.25, "last")
    recipe: Any = trades(Linf(8 / 255))
    assert (recipe.beta, recipe.attack.num_steps, recipe.attack.start.scale) == (6.0, 10, 0.001)
    for builder in (pgd_at, mixed, trades):
        assert "Source:" in (builder.__doc__ or "")


def test_any_attacker_fits(network: nn.Module, images: Tensor) -> None:
    """A hand-written function with the call of an attack."""

    def flip(model: Any, x: Any, target: Tensor, *, noise: Noise | None = None) -> Any:
        return pgd(Linf(0.1), num_steps=1)(model, 1 - x, target, noise=noise)._replace(x_adv=1 - x)

    recipe = Mixed(attack=flip)
    assert_same_step(network, recipe(network, images, LABELS), F.cross_entropy(network(1 - images), LABELS))


# Weights of classes, and models of one logit


WEIGHTS = (1.0, 3.0, 0.5, 2.0)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_class_weights_are_those_of_pytorch(network: nn.Module, smoothing: float) -> None:
    """Without smoothing `CrossEntropyLoss(weight=...)`; with it the weighted mean of the smoothed losses."""
    ours = standard(class_weights=WEIGHTS, label_smoothing=smoothing)(network, X5, Y5)
    losses = F.cross_entropy(network(X5), Y5, reduction="none", label_smoothing=smoothing)
    weights = torch.tensor(WEIGHTS).double()
    assert_same_step(network, ours, (losses * weights[Y5]).sum() / weights[Y5].sum())
    if not smoothing:
        assert_same_step(network, ours, F.cross_entropy(network(X5), Y5, weight=weights))


@pytest.mark.parametrize("make", [standard, pgd_at, trades])
def test_a_whole_weight_is_so_many_copies(network: nn.Module, make: Any) -> None:
    """Each example as often as its class weighs, with the start of its original, is the same loss."""
    often = (1, 3, 2, 2)
    rows = torch.tensor([i for i, label in enumerate(Y5.tolist()) for _ in range(often[label])])
    noise = stream(5)
    ours = make(Linf(0.1), class_weights=often)(network, X5, Y5, noise=noise)
    assert_same_step(network, ours, make(Linf(0.1))(network, X5[rows], Y5[rows], noise=noise.take(rows)))


@pytest.mark.parametrize("shape", [(-1,), (-1, 1)])
@pytest.mark.parametrize("make", [standard, pgd_at, mixed, trades])
def test_one_logit_trains_as_two_whose_first_is_zero(network: nn.Module, make: Any, shape: tuple[int, ...]) -> None:
    class One(nn.Module):
        def __init__(self, two: bool) -> None:
            super().__init__()
            self.network, self.two = network, two

        def forward(self, x: Tensor) -> Tensor:
            s = self.network(x)[:, 0] - self.network(x)[:, 1]
            return torch.stack([0 * s, s], 1) if self.two else s.reshape(shape)

    y, noise = Y5 % 2, stream(5)
    ours, theirs = (make(Linf(0.1))(One(two), X5, y, noise=noise) for two in (False, True))
    assert_same_step(network, ours, theirs)
    if make is standard:
        logit = One(False)(X5).flatten()
        assert_same_step(network, ours, F.binary_cross_entropy_with_logits(logit, y.double()))


def test_weights_and_single_outputs_that_mean_nothing_are_refused(network: nn.Module) -> None:
    for wrong in ((), (1.0, 0.0), (1.0, float("nan")), (-1.0, 2.0)):
        with pytest.raises(ValueError, match="expected a number above 0 for each class"):
            pgd_at(Linf(0.1), class_weights=wrong)
    with pytest.raises(ValueError, match="has 2 numbers and the model 4 classes"):
        pgd_at(Linf(0.1), class_weights=(1, 2))(network, X5, Y5)
    for make in (standard, pgd_at, trades):
        with pytest.raises(ValueError, match="a probability; expected the logit: leave out its sigmoid"):
            make(Linf(0.1))(lambda x: (network(x)[:, 0] - network(x)[:, 0].mean()).sigmoid(), X5, Y5 % 2)
        with pytest.raises(ValueError, match="labels go from 0 to 3, but the model has 2 classes"):
            make(Linf(0.1))(lambda x: network(x)[:, :1], X5, Y5)
