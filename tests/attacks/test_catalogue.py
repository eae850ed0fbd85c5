"""Published attacks against their formulas and against other people's code."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from contracts import BALLS, NUM_CLASSES, SHAPE, rand, seeded
from sparring.attacks.attack import Attack, uniform
from sparring.attacks.catalogue import CATALOGUE, bim, fgsm, mi_fgsm, pgd
from sparring.attacks.combine import Restarts
from sparring.attacks.steps import Ascent
from sparring.attacks.text import STANDARD_ATTACKS, NamedAttack, options_of, parse_attacks
from sparring.objectives import kl, margin
from sparring.threats import L2, Linf

LABELS = torch.tensor([2, 0, 3])


def gradient(model: Any, x: Tensor, y: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    return torch.autograd.grad(nn.functional.cross_entropy(model(x), y, reduction="sum"), x)[0]


# Formulas --------------------------------------------------------------------------------------------------------


def test_fgsm_is_the_sign_step(network: nn.Module, images: Tensor) -> None:
    want = (images + 0.1 * gradient(network, images, LABELS).sign()).clamp(0, 1)
    result = fgsm(Linf(0.1), keep="last")(network, images, LABELS)
    torch.testing.assert_close(result.x_adv, want)
    wanted = torch.tensor([1, 1, 1])
    towards = (images - 0.1 * gradient(network, images, wanted).sign()).clamp(0, 1)
    torch.testing.assert_close(fgsm(Linf(0.1), wanted=1, keep="last")(network, images, LABELS).x_adv, towards)


def test_fast_gradient_in_l2(network: nn.Module, images: Tensor) -> None:
    grad = gradient(network, images, LABELS)
    want = (images + 0.5 * grad / grad.flatten(1).norm(dim=1).view(3, 1, 1, 1)).clamp(0, 1)
    torch.testing.assert_close(fgsm(L2(0.5), keep="last")(network, images, LABELS).x_adv, want)


def test_momentum_by_hand(network: nn.Module, images: Tensor) -> None:
    """Dong 2018, algorithm 1, with the sum of absolute values as in the paper: the sign does not see the scale."""
    v, velocity = images.clone(), torch.zeros_like(images)
    for _ in range(5):
        grad = gradient(network, v, LABELS)
        velocity = 0.7 * velocity + grad / grad.abs().sum((1, 2, 3), keepdim=True)
        v = (images + (v + 0.02 * velocity.sign() - images).clamp(-0.1, 0.1)).clamp(0, 1)
    result = mi_fgsm(Linf(0.1), num_steps=5, step=0.2, momentum=0.7, keep="last")(network, images, LABELS)
    torch.testing.assert_close(result.x_adv, v)
    without = mi_fgsm(Linf(0.1), num_steps=5, step=0.2, momentum=0.0, keep="last")(network, images, LABELS)
    torch.testing.assert_close(
        without.x_adv, bim(Linf(0.1), num_steps=5, step=0.2, keep="last")(network, images, LABELS).x_adv
    )
    assert not torch.allclose(without.x_adv, v)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", BALLS)
def test_steps_as_fractions_and_as_lengths(network: nn.Module, images: Tensor, kind: str) -> None:
    fraction = pgd(BALLS[kind](0.4), num_steps=3, step=0.25)(network, images, LABELS)
    length = pgd(BALLS[kind](0.4), num_steps=3, absolute_step=0.1)(network, images, LABELS)
    torch.testing.assert_close(fraction.x_adv, length.x_adv)


# Other people's code -----------------------------------------------------------------------------------------------


@pytest.fixture
def pair(network: nn.Module, images: Tensor) -> tuple[nn.Module, Tensor]:
    """In float32, as they have it; and away from the edges of the sign function."""
    return network.float(), images.float()


@pytest.fixture
def foolbox() -> Iterator[Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield pytest.importorskip("foolbox", exc_type=ImportError)


@pytest.fixture
def torchattacks() -> Iterator[Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield pytest.importorskip("torchattacks", exc_type=ImportError)


def disagreement(a: Any, b: Any) -> float:
    return float((a - b).abs().max())


@pytest.mark.parametrize("kind", ["Linf", "L2"])
@pytest.mark.parametrize("method", ["fgsm", "bim", "pgd"])
def test_foolbox(foolbox: Any, pair: tuple[nn.Module, Tensor], kind: str, method: str) -> None:
    net, x = pair
    radius = {"Linf": 0.1, "L2": 0.8}[kind]
    theirs, ours = {
        "fgsm": (
            getattr(foolbox.attacks, f"{kind}FastGradientAttack")(random_start=False),
            fgsm(BALLS[kind](radius), keep="last"),
        ),
        "bim": (
            getattr(foolbox.attacks, f"{kind}BasicIterativeAttack")(rel_stepsize=0.2, steps=7, random_start=False),
            bim(BALLS[kind](radius), num_steps=7, step=0.2, keep="last"),
        ),
        "pgd": (
            getattr(foolbox.attacks, {"Linf": "LinfPGD", "L2": "L2PGD"}[kind])(
                rel_stepsize=0.3, steps=9, random_start=False
            ),
            bim(BALLS[kind](radius), num_steps=9, step=0.3, keep="last"),
        ),
    }[method]
    model = foolbox.PyTorchModel(net, bounds=(0, 1), device="cpu")
    raw, _, _ = theirs(model, x, LABELS, epsilons=radius)
    result = ours(net, x, LABELS)
    assert disagreement(raw, x) > 0.05
    assert disagreement(raw, result.x_adv) < 1e-5
    targeted, _, _ = (
        theirs(model, x, foolbox.criteria.TargetedMisclassification(torch.tensor([1, 3, 0])), epsilons=radius)
        if method != "fgsm"
        else (None, None, None)
    )
    if targeted is not None:
        steps, step = (7, 0.2) if method == "bim" else (9, 0.3)
        same = bim(BALLS[kind](radius), num_steps=steps, step=step, wanted=torch.tensor([1, 3, 0]), keep="last")
        assert disagreement(targeted, same(net, x, LABELS).x_adv) < 1e-5


@pytest.mark.parametrize("method", ["FGSM", "BIM", "PGD", "PGDL2", "MIFGSM"])
def test_torchattacks(torchattacks: Any, pair: tuple[nn.Module, Tensor], method: str) -> None:
    net, x = pair
    theirs, ours = {
        "FGSM": ({"eps": 0.1}, fgsm(Linf(0.1), keep="last")),
        "BIM": ({"eps": 0.1, "alpha": 0.02, "steps": 7}, bim(Linf(0.1), num_steps=7, absolute_step=0.02, keep="last")),
        "PGD": (
            {"eps": 0.1, "alpha": 0.03, "steps": 7, "random_start": False},
            bim(Linf(0.1), num_steps=7, absolute_step=0.03, keep="last"),
        ),
        "PGDL2": (
            {"eps": 0.8, "alpha": 0.2, "steps": 7, "random_start": False},
            bim(L2(0.8), num_steps=7, absolute_step=0.2, keep="last"),
        ),
        "MIFGSM": (
            {"eps": 0.1, "alpha": 0.02, "steps": 7, "decay": 0.9},
            mi_fgsm(Linf(0.1), num_steps=7, absolute_step=0.02, momentum=0.9, keep="last"),
        ),
    }[method]
    raw = getattr(torchattacks, method)(net, **theirs)(x, LABELS)
    assert disagreement(raw, x) > 0.05
    assert disagreement(raw, ours(net, x, LABELS).x_adv) < 1e-5


# Composition -------------------------------------------------------------------------------------------------------


def test_entries_are_compositions() -> None:
    assert pgd(Linf(0.1), num_steps=20) == Attack(threat=Linf(0.1), rule=Ascent(0.125), num_steps=20, start=uniform)
    assert isinstance(pgd(Linf(0.1), restarts=3), Restarts)
    assert pgd(Linf(0.1), objective=margin).objective is margin  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", ["fgsm", "bim", "mi-fgsm", "gradient-ascent"])
def test_restarts_from_the_clean_input_are_refused(name: str) -> None:
    with pytest.raises(
        ValueError, match="restarts=2, but this attack starts at the clean input: every run would be the same"
    ):
        CATALOGUE[name](Linf(0.1), restarts=2)


@pytest.mark.parametrize("restarts", [0, -1])
def test_no_restart_at_all_is_refused(restarts: int) -> None:
    with pytest.raises(ValueError, match="restarts"):
        pgd(Linf(0.1), restarts=restarts)


def test_every_entry_names_its_source() -> None:
    for name, entry in CATALOGUE.items():
        assert "Source:" in (entry.__doc__ or ""), name


# Attacks as text ---------------------------------------------------------------------------------------------------

OPTIONS: dict[str, st.SearchStrategy[Any]] = {
    "num_steps": st.integers(1, 1000),
    "step": st.floats(1e-6, 10),
    "absolute_step": st.floats(1e-6, 10),
    "momentum": st.floats(0, 1),
    "objective": st.sampled_from(["ce", "margin", "kl"]),
    "wanted": st.integers(0, 9),
    "restarts": st.integers(1, 50),
}


@st.composite
def named_attacks(draw: Any) -> NamedAttack:
    name = draw(st.sampled_from(sorted(CATALOGUE)))
    keys = sorted(set(options_of(name)) - (set() if name == "pgd" else {"restarts"}))
    chosen = draw(st.lists(st.sampled_from(keys), unique=True))
    return NamedAttack(name, tuple((key, draw(OPTIONS[key])) for key in chosen))


@settings(max_examples=100, deadline=None)
@given(attacks=st.lists(named_attacks(), min_size=1, max_size=4))
def test_text_round_trip(attacks: list[NamedAttack]) -> None:
    assert parse_attacks(",".join(map(str, attacks))) == tuple(attacks)
    for attack in attacks:
        attack(L2(0.5))


def test_text_means_what_it_says() -> None:
    first, second = parse_attacks("fgsm, pgd:num_steps=20,restarts=2,objective=kl,wanted=3")
    assert first(Linf(0.1)) == fgsm(Linf(0.1))
    built = second(Linf(0.1))
    want = pgd(Linf(0.1), num_steps=20, restarts=2, objective=kl, wanted=3)
    assert repr(built) == repr(want)
    assert options_of("mi-fgsm")["momentum"] is float
    assert set(options_of("fgsm")) == {"restarts", "objective", "wanted"}
    assert second.but(num_steps=5)(Linf(0.1)).attack.num_steps == 5  # type: ignore[attr-defined]


def test_the_standard_attacks_run(network: nn.Module) -> None:
    network = seeded(lambda: nn.Sequential(nn.Flatten(), nn.Linear(70, NUM_CLASSES)).double())
    x, y = rand(*SHAPE), LABELS
    for named in STANDARD_ATTACKS:
        result = named.but(num_steps=2, restarts=2)(Linf(0.1))(network, x, y)
        assert result.loss is not None
    assert parse_attacks(",".join(map(str, STANDARD_ATTACKS))) == STANDARD_ATTACKS


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("pdg", "attack 'pdg' is unknown; there are gradient-ascent, fgsm, bim, pgd, mi-fgsm"),
        ("", "attack '' is unknown"),
        ("fgsm,", "attack '' is unknown"),
        ("num_steps=3", "begin with an option; write NAME:KEY=VALUE"),
        (
            "pgd:steps=3",
            r"attack 'pgd' has no option 'steps' \(in 'pgd:steps=3'\); it takes num_steps, step, absolute_step",
        ),
        ("fgsm:num_steps=3", "attack 'fgsm' has no option 'num_steps'"),
        ("pgd:num_steps=many", "num_steps='many' .* is not of type int"),
        ("pgd:num_steps=2.5", "is not of type int"),
        ("pgd:num_steps", "num_steps='' .* is not of type int"),
        ("pgd:objective=dlrr", "objective 'dlrr' is unknown .*there are ce, margin, kl"),
        ("bim:restarts=3", "every run would be the same"),
        ("pgd:restarts=0", "restarts"),
        ("pgd:num_steps=-3", "num_steps"),
    ],
)
def test_text_errors(text: str, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        parse_attacks(text)
