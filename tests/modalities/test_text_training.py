"""Training that stands replaced words, and its certificate. Oracles: all combinations, closed forms."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny_texts import learned, tiny
from torch import Tensor, nn

from sparring.attacks.loop import Problem, Seen
from sparring.core.noise import Noise
from sparring.core.objectives import margin
from sparring.modalities import find
from sparring.modalities.text.certify import find_words_bound, words_gaps, words_margin
from sparring.modalities.text.data import Texts
from sparring.modalities.text.models import TEXT_MODELS
from sparring.modalities.text.recipes import AnyMixture, HullAscent, SomeWords
from sparring.modalities.text.search import full_search
from sparring.threats import inside

KIND = find("text")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Texts:
    return tiny(tmp_path_factory.mktemp("tiny"))


def network(name: str, data: Texts, seed: int = 0, size: int = 8) -> Any:
    torch.manual_seed(seed)
    return TEXT_MODELS[name](data.facts["vocabulary"], 2, vector_size=None, size=size, hidden=8)


def batch(data: Texts, count: int = 32) -> tuple[dict[str, Tensor], Tensor]:
    return {name: tensor[:count] for name, tensor in data.x_train.items()}, data.y_train[:count]  # type: ignore[union-attr]


def worst_by_hand(model: Any, threat: Any, x: dict[str, Tensor], y: Tensor) -> Tensor:
    """(B,) the smallest margin over all combinations of substitutes."""
    worst = []
    for row in range(len(y)):
        choices = threat.choices({name: tensor[row : row + 1] for name, tensor in x.items()})[0]
        forms = torch.tensor(list(itertools.product(*(sorted(set(place.tolist())) for place in choices))))
        shown = {"ids": forms, "mask": x["mask"][row].expand(len(forms), -1)}
        worst.append(-margin.score(model(shown), y[row].expand(len(forms))).max())
    return torch.stack(worst).detach()


@pytest.mark.parametrize("name", ["bag", "cnn-text"])
def test_the_bound_lies_below_every_combination(name: str, data: Texts) -> None:
    threat, (x, y) = KIND.make_threat("words:1.0", data), batch(data, 12)
    for steps in (0, 15):
        model = learned(network(name, data), data, steps)
        bound, exact = words_margin(model, x, y, threat), worst_by_hand(model, threat, x, y)
        assert (bound <= exact).all()
        attacked = full_search(threat)(model, x, y)
        assert (bound <= -attacked.loss + 1e-6).all() and not bool(((bound > 0) & attacked.reached).any())  # type: ignore[operator]
        gaps = words_gaps(model, x, y, threat, 0.0)
        clean = model(x).gather(1, y[:, None]) - model(x)
        assert torch.allclose(gaps, clean, atol=1e-4) and (gaps <= clean).all()  # no box, no gap but rounding
        smaller = KIND.make_threat("words:0.5", data)
        assert torch.equal(words_margin(model, x, y, smaller), bound)  # whatever share may change


def test_the_bound_is_exact_for_a_linear_bag(data: Texts) -> None:
    """Where no unit of the layer on words is cut and the head is linear, the box is the set itself."""
    threat, (x, y) = KIND.make_threat("words:1.0", data), batch(data, 20)
    model = network("bag", data).double()
    with torch.no_grad():
        model.each.bias.add_(50.0)  # ReLU passes all
        model.head = nn.Sequential(nn.Linear(8, 2)).double()
        model.each.weight.zero_()
        model.each.weight[0, 0] = 1.0  # one number of a word decides, so that all extremes can be reached together
    model.eval()
    bound, exact = words_margin(model, x, y, threat), worst_by_hand(model, threat, x, y)
    assert torch.allclose(bound, exact, atol=1e-9) and (bound <= exact).all()
    assert (bound < -margin.score(model(x), y) - 1e-5).float().mean() > 0.7


def test_who_can_be_certified(data: Texts) -> None:
    words, ball = KIND.make_threat("words:1.0", data), KIND.make_threat("embedding:1", data, network("bag", data))
    assert find_words_bound(network("cnn-text", data), words) == (words_margin, "")
    assert "bag and cnn-text" in find_words_bound(network("bilstm", data), words)[1]
    assert "vectors that move" in find_words_bound(network("bag", data), ball)[1]
    with pytest.raises(ValueError, match="got a Recurrent"):
        words_margin(network("bilstm", data), *batch(data, 2), words)


def test_interval_training_certifies(data: Texts) -> None:
    threat, model = KIND.make_threat("words:1.0", data), network("bag", data)
    recipe = KIND.named_recipe("ibp:weight=0.5,ramp=0.0..0.5")(threat)
    optimizer = torch.optim.Adam(model.parameters(), 0.02)
    plain = words_margin(learned(network("bag", data), data, 60), data.x_test, data.y_test, threat)
    for step in range(40):
        now = recipe.at(step / 40)
        assert now.reach == pytest.approx(min(1.0, step / 20))
        found = now(model, data.x_train, data.y_train)
        loss = found[0] if isinstance(found, tuple) else found
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    after = words_margin(model.eval(), data.x_test, data.y_test, threat)
    assert (plain > 0).float().mean() < 0.6 < 0.9 < (after > 0).float().mean()
    loss, figures = recipe(model, *batch(data))
    gaps = words_gaps(model, *batch(data), threat)
    clean = F.cross_entropy(model(batch(data)[0]), batch(data)[1])
    assert torch.allclose(loss, 0.5 * clean + 0.5 * F.cross_entropy(-gaps, batch(data)[1]))
    assert float(figures["certified_in_box"]) == pytest.approx(
        (words_margin(model, *batch(data), threat) > 0).float().mean().item()
    )


def test_the_step_in_the_hull_is_the_gradient_in_logits(data: Texts) -> None:
    """The closed form against autograd through the softmax itself."""
    threat, (x, y) = KIND.make_threat("words:1.0", data), batch(data, 4)
    model, noise = network("bag", data).eval(), Noise.make(0, "test", torch.arange(4))
    z = AnyMixture()(threat, x, noise)
    assert bool(inside(threat, x, z).all()) and (z[threat.open(x)] > 0).all() and (z[~threat.open(x)] == 0).all()
    z = z.requires_grad_()
    loss = margin.score(model(threat.apply(x, z)), y)
    grad = torch.autograd.grad(loss.sum(), z)[0]
    z = z.detach()
    moved, _ = HullAscent(0.5).step(Problem(threat, x, 1, noise), z, Seen(loss, loss > 0, grad), None, 0)
    logits = torch.cat([(1 - z.sum(2, keepdim=True)), z], 2).clamp_min(1e-12).log().requires_grad_()
    closed = logits.where(F.pad(threat.open(x), (1, 0), value=True), -torch.inf).softmax(2)[..., 1:]
    slope = torch.autograd.grad(margin.score(model(threat.apply(x, closed)), y).sum(), logits)[0]
    unit = slope / slope.norm(dim=2, keepdim=True).clamp_min(1e-12)
    expected = (logits + 0.5 * unit).where(F.pad(threat.open(x), (1, 0), value=True), -torch.inf).softmax(2)[..., 1:]
    assert torch.allclose(moved, expected.detach(), atol=1e-4)
    assert (margin.score(model(threat.apply(x, moved)), y) >= loss - 1e-6).all()


def test_some_words_are_kept_by_chance(data: Texts) -> None:
    threat, (x, _) = KIND.make_threat("words:1.0", data), batch(data, 120)
    noise = Noise.make(0, "test", torch.arange(120))
    grad = torch.ones_like(threat.null(x))
    z, _ = SomeWords(0.75).step(Problem(threat, x, 1, noise), threat.null(x), Seen(grad, grad > 0, grad), None, 0)
    kept = float(z.sum() / threat.changeable(x).sum())
    assert kept == pytest.approx(0.75, abs=0.08) and bool(((z == 0) | (z == 1)).all())


@pytest.mark.parametrize(
    "recipe", ["substituted", "hull", "ibp", "fgm", "freelb", "pgd-at:num_steps=2", "trades:num_steps=1"]
)
def test_every_recipe_reaches_the_vectors_and_leaves_the_rest_alone(recipe: str, data: Texts) -> None:
    model, (x, y) = network("bag", data), batch(data)
    ball = recipe.startswith(("f", "pgd", "trades"))
    threat = KIND.make_threat("embedding:0.5" if ball else "words:1.0", data, model)
    state = torch.get_rng_state()
    found = KIND.named_recipe(recipe)(threat)(model, x, y, noise=Noise.make(0, "train", torch.arange(len(y))))
    loss = found[0] if isinstance(found, tuple) else found
    loss.backward()
    assert model.training and torch.equal(state, torch.get_rng_state())
    touched = (model.words.weight.grad.abs().sum(1) > 0).nonzero()[:, 0].tolist()
    known = set(x["ids"][x["mask"]].tolist()) & set(range(data.facts["vocabulary"]))
    assert len(known - set(touched)) <= 2 and 0 not in touched  # a unit may be cut for a word
    if recipe in ("hull", "ibp"):  # they look at all substitutes
        assert len(set(threat.table[x["ids"]][threat.open(x)].tolist()) - set(touched)) <= 2


def test_fgm_by_hand(data: Texts) -> None:
    model, (x, y) = network("bag", data), batch(data, 6)
    threat = KIND.make_threat("embedding:0.1", data, model)
    loss = KIND.named_recipe("fgm:weight=2")(threat)(model, x, y)
    vectors = model.embed(x).detach().requires_grad_()
    grad = torch.autograd.grad(F.cross_entropy(model.judge(vectors, x["mask"]), y, reduction="sum"), vectors)[0]
    grad = grad * x["mask"][..., None]
    offset = 0.1 * float(model.token_norm) * grad / grad.flatten(1).norm(dim=1)[:, None, None]
    by_hand = F.cross_entropy(model(x), y) + 2 * F.cross_entropy(model.judge(vectors + offset, x["mask"]), y)
    assert torch.allclose(loss, by_hand, atol=1e-5)


def test_freelb_is_the_mean_over_an_ascent_and_holds_dropout(data: Texts) -> None:
    model, (x, y), noise = network("bag", data), batch(data, 6), Noise.make(3, "test", torch.arange(6))
    model.head = nn.Sequential(nn.Dropout(0.5), *model.head)
    threat = KIND.make_threat("embedding:0.2", data, model)
    state = torch.get_rng_state()
    loss = KIND.named_recipe("freelb:num_steps=2,step=0.5")(threat)(model, x, y, noise=noise)
    assert torch.equal(state, torch.get_rng_state())

    def by_hand(z: Tensor) -> Tensor:
        with torch.random.fork_rng():
            torch.manual_seed(noise.seed)
            return F.cross_entropy(model({**x, "offset": z * x["mask"][..., None]}), y)

    z = threat.sample(x, noise).requires_grad_()
    first = by_hand(z)
    grad = torch.autograd.grad(first, z, retain_graph=True)[0] * x["mask"][..., None]
    z = z.detach() + 0.5 * 0.2 * threat.unit * grad / grad.flatten(1).norm(dim=1)[:, None, None]
    length = z.flatten(1).norm(dim=1)[:, None, None]
    z = z * (0.2 * threat.unit / length).clamp_max(1)
    assert torch.allclose(loss, (first + by_hand(z)) / 2, atol=1e-6)


@pytest.mark.parametrize("recipe", ["freelb", "ibp", "hull", "fgm"])
def test_a_class_that_weighs_three_is_one_whose_texts_come_three_times(recipe: str, data: Texts) -> None:
    model, (x, y), noise = network("bag", data), batch(data, 20), Noise.make(0, "test", torch.arange(20))
    threat = KIND.make_threat("embedding:0.2" if recipe.startswith("f") else "words:1.0", data, model)
    made = KIND.named_recipe(recipe)(threat)
    often = torch.cat([torch.arange(20), *2 * [(y == 1).nonzero()[:, 0]]])
    x_often = {name: tensor[often] for name, tensor in x.items()}
    found = [
        replace(made, class_weights=(1, 3))(model, x, y, noise=noise),
        made(model, x_often, y[often], noise=noise.take(often)),
        made(model, x, y, noise=noise),
    ]
    weighted, repeated, plain = (part[0] if isinstance(part, tuple) else part for part in found)
    torch.testing.assert_close(weighted, repeated)
    assert abs((weighted - plain).item()) > 1e-3


def test_recipes_for_words_refuse_other_threats(data: Texts) -> None:
    ball = KIND.make_threat("embedding:1", data, network("bag", data))
    for recipe in ("hull", "substituted", "ibp"):
        with pytest.raises(ValueError, match=rf"{recipe} replaces words; the threat is embedding:1"):
            KIND.named_recipe(recipe)(ball)
    for recipe in ("pgd-at", "mixed:share=0.3", "trades:beta=2"):
        with pytest.raises(ValueError, match=r"small steps.*--recipe hull"):
            KIND.named_recipe(recipe)(KIND.make_threat("words:1", data))


def test_hardened_training_holds_where_plain_training_fails(data: Texts) -> None:
    threat = KIND.make_threat("words:1.0", data)
    left = {}
    for recipe in ("standard", "hull", "substituted"):
        model = network("bag", data, seed=1)
        optimizer, make = torch.optim.Adam(model.parameters(), 0.04), KIND.named_recipe(recipe)(threat)
        for step in range(25):
            noise = Noise.make(step, "train", torch.arange(len(data.y_train)))
            optimizer.zero_grad()
            make(model, data.x_train, data.y_train, noise=noise).backward()
            optimizer.step()
        found = full_search(threat)(model.eval(), data.x_test, data.y_test)
        left[recipe] = float((~found.reached).float().mean())  # type: ignore[operator]
    assert left["standard"] < 0.6 < 0.9 < min(left["hull"], left["substituted"]), left
