"""Published attacks against their formulas and against other people's code."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from contracts import BALLS, NUM_CLASSES, SHAPE, rand, seeded
from sparring.attacks.around import Restarts, needs_grad
from sparring.attacks.catalogue import CATALOGUE, bim, fgsm, mi_fgsm, pgd
from sparring.attacks.loop import Attack
from sparring.attacks.plans import ATTACKS, DEFAULT_PLAN, PLANS, Stage, make_plan
from sparring.attacks.square import square
from sparring.attacks.starts import uniform
from sparring.attacks.steps import Ascent
from sparring.core.objectives import dlr, kl, margin
from sparring.core.registry import Named, named, options_of, text_of
from sparring.threats import L1, L2, Lens, Linf

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
def test_attacks_from_the_clean_input_take_no_restarts(name: str) -> None:
    """Every run would be the same."""
    with pytest.raises(TypeError, match="restarts"):
        CATALOGUE[name](Linf(0.1), restarts=2)


@pytest.mark.parametrize("restarts", [0, -1])
def test_no_restart_at_all_is_refused(restarts: int) -> None:
    with pytest.raises(ValueError, match="restarts"):
        pgd(Linf(0.1), restarts=restarts)


def test_every_entry_names_its_source() -> None:
    for name, entry in ATTACKS.items():
        assert "Source:" in (entry.__doc__ or "") or name == "smooth", name
    assert "Ours" in (ATTACKS["smooth"].__doc__ or "")


# Attacks as text ---------------------------------------------------------------------------------------------------

OPTIONS: dict[str, st.SearchStrategy[Any]] = {
    "num_steps": st.integers(1, 1000),
    "step": st.floats(1e-6, 10),
    "absolute_step": st.floats(1e-6, 10),
    "momentum": st.floats(0, 1),
    "objective": st.sampled_from(["ce", "margin", "dlr", "kl"]),
    "wanted": st.integers(0, 9),
    "restarts": st.integers(1, 50),
    "near": st.floats(1e-6, 1),
    "rho": st.floats(0, 1),
    "eot": st.integers(1, 50),
    "targets": st.integers(1, 50),
    "slope": st.floats(0.1, 100),
    "polish": st.integers(0, 50),
    "share": st.floats(1e-6, 1),
    "num_queries": st.integers(1, 10_000),
    "p": st.floats(1e-6, 1),
    "rescale": st.booleans(),
    "nearest": st.booleans(),
    "keep": st.sampled_from(["fooled_first", "drop_fooled", "highest_loss", "smallest_fooling", "last"]),
}


def attack_of(name: str, **options: Any) -> Named:
    return named(name, ATTACKS, "attack").but(**options)


@st.composite
def stages(draw: Any) -> Stage:
    name = draw(st.sampled_from(sorted(ATTACKS)))
    chosen = draw(st.lists(st.sampled_from(sorted(options_of(ATTACKS[name]))), unique=True))
    options = {key: draw(OPTIONS[key]) for key in chosen}
    return Stage(attack_of(name, **options), draw(st.none() | st.floats(1e-6, 1)))


@settings(max_examples=100, deadline=None)
@given(plan=st.lists(stages(), min_size=1, max_size=4))
def test_text_round_trip(plan: list[Stage]) -> None:
    assert make_plan(",".join(map(str, plan)), L2(0.5)) == tuple(plan)


def test_every_option_of_every_attack_is_tried_above_and_changes_something() -> None:
    other = {"num_steps": 3, "step": 0.3, "absolute_step": 0.3, "momentum": 0.3, "objective": "dlr", "wanted": 3,
             "restarts": 3, "rho": 0.3, "eot": 3, "targets": 3, "slope": 3.0, "polish": 3, "share": 0.3,
             "num_queries": 3, "p": 0.3, "rescale": True, "nearest": True, "keep": "last"}  # fmt: skip
    for name in ATTACKS:
        plain = attack_of(name)
        options = options_of(ATTACKS[name])
        assert set(options) <= set(OPTIONS)
        for key, option in options.items():
            assert repr(plain.but(**{key: other[key]})(Linf(0.1))) != repr(plain(Linf(0.1))), (name, key)
            assert option.read(text_of(other[key])) == other[key]
        near = Stage(plain, 0.3)
        assert near.margin_at_most == 0.3 and Stage(plain).margin_at_most is None
        assert repr(near(Linf(0.1))) == repr(plain(Linf(0.1)))


def test_stages_of_functions() -> None:
    assert str(Stage(pgd)) == "pgd" and Stage(pgd)(Linf(0.1)) == pgd(Linf(0.1))
    assert str(Stage(partial(pgd, num_steps=3), 0.5)) == "pgd:num_steps=3,margin_at_most=0.5"
    with pytest.raises(TypeError, match="a stage runs a function from a threat model to an attack; got 'pgd'"):
        Stage("pgd")  # type: ignore[arg-type]
    for share in (0, -0.5, 1.5, math.nan):
        with pytest.raises(ValueError, match=f"margin_at_most={share:g}; expected a share of the clean margin"):
            Stage(pgd, share)


def test_attacks_say_whether_they_need_gradients() -> None:
    for name in ATTACKS:
        assert needs_grad(ATTACKS[name](Linf(0.1))) == (name != "square"), name
    assert not needs_grad(square(Linf(0.1), restarts=3))
    assert needs_grad(lambda model, x, y, noise=None: None)


def test_a_plan_of_ones_own(tmp_path: Path) -> None:
    own = {"mine": partial(pgd, num_steps=3)}
    plans: Any = {"all": lambda threat: "mine,fgsm,square:num_queries=9", "one": lambda threat: (Stage(fgsm, 0.5),)}
    found = make_plan("all,one", Linf(0.1), ATTACKS | own, plans)
    assert [str(stage) for stage in found] == ["mine", "fgsm", "square:num_queries=9", "fgsm:margin_at_most=0.5"]
    path = tmp_path / "own.py"
    path.write_text("from sparring import pgd\ndef mine(threat, *, k=3):\n    return pgd(threat, num_steps=k)\n")
    (stage,) = make_plan(f"{path}:mine,k=5,margin_at_most=0.5", Linf(0.1))
    assert (stage(Linf(0.1)).num_steps, stage.margin_at_most) == (5, 0.5)  # type: ignore[attr-defined]
    assert make_plan(str(stage), Linf(0.1)) == (stage,)


def test_a_ball_on_one_of_several_inputs_gets_the_fast_plan_without_square() -> None:
    for ball in (Linf(0.1), L2(0.5), L1(12.0)):
        plan, ours = make_plan("fast", ball), make_plan("fast", Lens(ball, "probe"))
        searches = plan[len(ours) :]
        assert plan[: len(ours)] == ours and searches and all(str(stage).startswith("square") for stage in searches)


def test_text_means_what_it_says() -> None:
    first, second = make_plan("fgsm, pgd:num_steps=20,restarts=2,objective=kl,wanted=3", Linf(0.1))
    assert first(Linf(0.1)) == fgsm(Linf(0.1))
    built = second(Linf(0.1))
    want = pgd(Linf(0.1), num_steps=20, restarts=2, objective=kl, wanted=3)
    assert repr(built) == repr(want)
    assert options_of(ATTACKS["mi-fgsm"])["momentum"].default == 1.0
    assert set(options_of(ATTACKS["fgsm"])) == {"objective", "wanted", "keep"}
    assert second.attack.but(num_steps=5)(Linf(0.1)).attack.num_steps == 5  # type: ignore[attr-defined]


def test_protocols_are_spelled_out_for_the_threat() -> None:
    for name, protocol in PLANS.items():
        for threat in (Linf(0.1), L2(0.5), L1(12.0)):
            assert make_plan(name, threat) == make_plan(str(protocol(threat)), threat)
    assert make_plan("autoattack", L1(12.0))[0] == Stage(attack_of("apgd", restarts=5))
    assert make_plan("autoattack", Linf(0.1)) != make_plan("autoattack", L1(12.0))
    mixed = [str(a) for a in make_plan("fgsm, autoattack-rand ,pgd:num_steps=3,margin_at_most=0.5", Linf(0.1))]
    assert mixed == ["fgsm", "apgd:eot=20", "apgd:eot=20,objective=dlr", "pgd:num_steps=3,margin_at_most=0.5"]
    assert DEFAULT_PLAN in PLANS


def test_attacks_as_text_are_the_functions() -> None:
    text = "apgd:num_steps=3,rho=0.5,eot=2,objective=dlr,apgd-t:targets=2,fab:restarts=2,fab-t,square:p=0.5,smooth"
    want = [
        ATTACKS["apgd"](L2(0.5), num_steps=3, rho=0.5, eot=2, objective=dlr), ATTACKS["apgd-t"](L2(0.5), targets=2),
        ATTACKS["fab"](L2(0.5), restarts=2), ATTACKS["fab-t"](L2(0.5)), ATTACKS["square"](L2(0.5), p=0.5),
        ATTACKS["smooth"](L2(0.5)),
    ]  # fmt: skip
    assert [repr(make(L2(0.5))) for make in make_plan(text, L2(0.5))] == [repr(attack) for attack in want]


@pytest.mark.parametrize("kind", BALLS)
def test_every_named_attack_runs(kind: str) -> None:
    network = seeded(lambda: nn.Sequential(nn.Flatten(), nn.Linear(70, 9), nn.ReLU(), nn.Linear(9, NUM_CLASSES)))
    x, y, threat = rand(*SHAPE), LABELS, BALLS[kind](0.1)
    for name in ATTACKS:
        few = {"num_queries": 2} if name == "square" else {} if name == "fgsm" else {"num_steps": 2}
        result = attack_of(name, **few)(threat)(network.double(), x, y)
        assert result.loss is not None and result.z.shape == x.shape, name


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (
            "pdg",
            "attack 'pdg' is unknown; there are fast, fast-plus, queries, autoattack, autoattack-plus, "
            "autoattack-rand, gradient-ascent, fgsm, bim, pgd, mi-fgsm, slide, frank-wolfe, apgd, apgd-t, fab, fab-t, "
            "square, smooth, or FILE.py:FUNCTION; did you mean pgd",
        ),
        ("autoatack", "attack 'autoatack' is unknown; .*did you mean autoattack"),
        ("autoattack:num_steps=3", r"'autoattack' is a plan and takes no options \(in '.*'\); name its attacks"),
        ("fgsm,fast,num_queries=9", "'fast' is a plan and takes no options"),  # fixed: went to the last member
        ("autoattack,margin_at_most=0.5,pgd", "'autoattack' is a plan and takes no options"),
        ("", "attack '' is unknown"),
        ("fgsm,", "attack '' is unknown"),
        ("num_steps=3", "begins with an option; write NAME:KEY=VALUE"),
        ("pgd:steps=3", "attack 'pgd:steps=3' has no option 'steps'; it takes num_steps, step, absolute_step"),
        ("fgsm:num_steps=3", "'fgsm:num_steps=3' has no option 'num_steps'"),
        ("pgd:num_steps=many", "num_steps='many' is not a whole number"),
        ("pgd:num_steps=2.5", "num_steps='2.5' is not a whole number"),
        ("pgd:num_steps", "pgd takes options KEY=VALUE alone: num_steps"),
        ("pgd:num_steps=", "num_steps='' is not a whole number"),
        ("pgd:objective=dlrr", "objective='dlrr' is not one of ce, margin, dlr, kl"),
        ("apgd-t:objective=ce", "has no option 'objective'; it takes num_steps, rho, targets"),
        ("square:num_steps=3", "has no option 'num_steps'; it takes num_queries, p, restarts, rescale"),
        ("square:rescale=yes", "rescale='yes' is not true or false"),
        ("square:p=0", "p <= 1"),
        ("apgd:eot=0", "the number of looks must be at least 1; got 0"),
        ("apgd-t:targets=0", "targets must be at least 1; got 0"),
        ("fab-t:targets=0", "targets at least 1"),
        ("smooth:slope=0", "slope must be above 0"),
        ("pgd:margin_at_most=0", "margin_at_most=0; expected a share of the clean margin, above 0, at most 1"),
        ("pgd:margin_at_most=-0.5", "margin_at_most=-0.5; expected a share"),
        ("pgd:margin_at_most=1.5", "margin_at_most=1.5; expected a share"),
        ("pgd:margin_at_most=nan", "margin_at_most=nan; expected a share"),
        ("pgd:margin_at_most=half", "attack 'pgd:margin_at_most=half': margin_at_most='half' is not a number"),
        ("bim:restarts=3", "has no option 'restarts'"),
        ("pgd:restarts=0", "restarts"),
        ("pgd:num_steps=-3", "num_steps"),
    ],
)
def test_text_errors(text: str, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        make_plan(text, Linf(0.1))
