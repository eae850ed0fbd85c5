"""The battery speaks where a number is wrong, is silent where it is right, and leaves no trace."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from contracts import NUM_WORDS, BagOfWords, rand, seeded, sentences, words
from sparring.attacks.around import Averaged
from sparring.attacks.auto_pgd import apgd
from sparring.attacks.catalogue import bim, gradient_ascent, pgd
from sparring.attacks.loop import Attack
from sparring.checks import soft_backward, surrogate
from sparring.checks.battery import CHECKS, examine, sample
from sparring.checks.soft_backward import straight_through
from sparring.core.objectives import margin
from sparring.core.types import AttackResult, Cost
from sparring.evaluation.measure import Evaluation, measure
from sparring.evaluation.one_batch import AttackRecord
from sparring.results.findings import Finding, verdict
from sparring.results.statistics import wilson
from sparring.threats import L1, L2, Linf
from sparring.threats.lens import Lens

K, NUM = 3, 60
X = torch.rand(NUM, 1, 4, 4, generator=torch.Generator().manual_seed(0)).mul(255).round().div(255)
LINEAR = seeded(lambda: nn.Sequential(nn.Flatten(), nn.Linear(16, K))).eval()
MLP = seeded(lambda: nn.Sequential(nn.Flatten(), nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, K))).eval()
BY_MARGIN = partial(pgd, num_steps=20, objective=margin)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """The surrogates learn shorter: sixteen inputs are soon learned."""
    monkeypatch.setattr(surrogate, "LEARNING_STEPS", 60)


class Then(nn.Module):
    """A function before a network and one after it."""

    def __init__(self, before: Any = None, after: Any = None, network: nn.Module = LINEAR) -> None:
        super().__init__()
        self.network, self.before, self.after = network, before, after

    def forward(self, x: Tensor) -> Tensor:
        out = self.network(self.before(x) if self.before else x)
        return self.after(out) if self.after else out


def labels(model: Any, x: Any = X) -> Tensor:
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(0)
        return model(x).argmax(1)


def judged(model: Any, threat: Any, attacks: Any = (BY_MARGIN,), x: Any = X, y: Tensor | None = None) -> Evaluation:
    return measure(model, [(x, labels(model, x) if y is None else y)], threat, attacks, curve=(0.5, 2.0))


def checked(model: Any, threat: Any, attacks: Any = (BY_MARGIN,), x: Any = X, **options: Any) -> dict[str, Finding]:
    """Findings by name, of labels that the model gets right."""
    y = labels(model, x)
    return {f.name: f for f in examine(model, x, y, threat, judged(model, threat, attacks, x, y), **options)}


def loud(found: dict[str, Finding]) -> dict[str, str]:
    return {name: f.level for name, f in found.items() if f.level != "note"}


# Silence ---------------------------------------------------------------------------------------------------------

HONEST: dict[str, tuple[Any, Any, Any]] = {
    "linear, Linf": (LINEAR, Linf(0.05), X),
    "mlp, Linf": (MLP, Linf(0.02), X),
    "mlp, L2": (MLP, L2(0.1), X),
    "mlp, L1": (MLP, L1(0.3), X),
    "vectors, no box": (MLP, L2(0.1, low=None, high=None), 4 * X.flatten(1) - 2),
    "float64": (seeded(lambda: nn.Sequential(nn.Flatten(), nn.Linear(16, K)).double()), Linf(0.05), X.double()),
    "a radius each": (MLP, Linf(torch.linspace(0.01, 0.03, NUM)), X),
    "a mask": (MLP, Linf(0.05, mask=rand(1, 1, 4, 4, seed=1) < 0.5), X),
    "log-probabilities": (Then(after=lambda z: z.log_softmax(1)), Linf(0.05), X),
    "large logits, margin climbed": (Then(after=lambda z: 1000 * z), Linf(0.05), X),
    "dropout and BatchNorm at rest": (
        seeded(lambda: nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5), nn.Flatten(),
                                     nn.Linear(16, K))).eval(), Linf(0.02), X),
}  # fmt: skip


@pytest.mark.parametrize("name", HONEST)
def test_honest_models_are_trusted(name: str) -> None:
    model, threat, x = HONEST[name]
    attack = partial(apgd, num_steps=20, objective=margin)  # for L1, too
    y = labels(model, x)
    found = judged(model, threat, [attack], x, y)
    assert 0 < found.robust.count < NUM  # something fell and something stands: the checks have work
    assert verdict(examine(model, x, y, threat, found)) == "TRUSTED"


def test_a_number_of_zero_cannot_be_too_high() -> None:
    found = checked(Then(noisy), Linf(0.9))
    assert "randomness" in found and loud(found) == {}


# Each check speaks -----------------------------------------------------------------------------------------------


class Wrong(torch.autograd.Function):
    """The identity, with its gradient turned round where the input is not a whole number of 255ths."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, everywhere: bool) -> Tensor:
        ctx.right = ((x * 255 - (x * 255).round()).abs() < 1e-3) & (not everywhere)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return torch.where(ctx.right, grad, -grad), None


def rounded(x: Tensor) -> Tensor:
    return (x * 8).round() / 8


def noisy(x: Tensor) -> Tensor:
    return x + 0.05 * torch.randn_like(x)


def unruly(x: Tensor) -> Tensor:
    """Draws from a generator that torch's seed does not reach."""
    return x + torch.tensor([random.gauss(0, 0.1) for _ in range(x.numel())]).view_as(x)


def ripples(x: Tensor) -> Tensor:
    """The second class wins between the 255ths."""
    waves = (torch.pi * 255 * x).sin().square().flatten(1).mean(1)
    return torch.stack([0.2 + 0 * waves, waves], 1)


SPEAK: dict[str, tuple[Any, Any, Any, str]] = {
    "probability_output": (Then(after=lambda z: (500 * z).softmax(1)), Linf(0.02), [BY_MARGIN], "suspect"),
    "randomness": (Then(noisy), Linf(0.02), [BY_MARGIN], "suspect"),
    "batch_dependence": (Then(lambda x: x - x.mean(0)), Linf(0.02), [BY_MARGIN], "invalid"),
    "vanishing_gradients": (Then(rounded), Linf(0.1), [BY_MARGIN], "invalid"),
    "misleading_gradients": (Then(lambda x: Wrong.apply(x, True)), Linf(0.1), [BY_MARGIN], "suspect"),
    "single_step_wins": (Then(lambda x: Wrong.apply(x, False)), Linf(0.1), [BY_MARGIN], "suspect"),
    "undone_by_rounding": (ripples, Linf(0.002), [BY_MARGIN], "note"),
    "black_box_wins": (Then(rounded), Linf(0.3), [BY_MARGIN], "invalid"),
    "transfer_wins": (Then(rounded), Linf(0.3), [BY_MARGIN], "invalid"),
    "straight_through_wins": (Then(rounded), Linf(0.3), [BY_MARGIN], "invalid"),
    "effort_still_helps": (MLP, Linf(0.3), [partial(pgd, num_steps=0)], "invalid"),
    "number_too_high": (MLP, Linf(0.3), [partial(pgd, num_steps=0)], "invalid"),
    "short_reach": (MLP, Linf(0.3), [partial(bim, num_steps=3)], "suspect"),
    "huge_radius_survived": (Then(lambda x: Wrong.apply(x, True)), Linf(0.1), [BY_MARGIN], "invalid"),
}  # fmt: skip


@pytest.mark.parametrize("name", SPEAK)
def test_a_check_speaks(name: str) -> None:
    model, threat, attacks, level = SPEAK[name]
    found = checked(model, threat, attacks)
    assert found[name].level == level
    assert found[name].next_step and all(isinstance(v, (int, float)) for v in found[name].numbers.values())


def test_every_check_is_shown_to_speak_and_to_keep_silent() -> None:
    elsewhere = {
        "not_repeatable",
        "one_answer",
        "autograd_in_forward",
        "reduced_precision",
        "black_box_won",
        "curve_shape",
        "no_search",
        "stopped_early",
    }
    assert {c.name for c in CHECKS} == set(SPEAK) | elsewhere
    assert len({c.question for c in CHECKS}) == len(CHECKS) and all(c.question.endswith("?") for c in CHECKS)


def test_a_model_that_always_says_the_same_is_told_and_one_class_alone_is_none() -> None:
    model, threat, y = Then(after=lambda z: 0 * z + torch.eye(K)[1]), Linf(0.05), torch.arange(NUM) % K
    found = judged(model, threat, y=y)
    told = {f.name: f for f in examine(model, X, y, threat, found)}["one_answer"]
    assert told.level == "suspect" and told.numbers["share"] == found.clean.value == found.robust.value == 1 / K
    same = torch.ones_like(y)
    assert "one_answer" not in {f.name for f in examine(model, X, same, threat, judged(model, threat, y=same))}


def test_other_weights_or_other_labels_are_noticed() -> None:
    y, threat = labels(LINEAR), Linf(0.05)
    found = judged(LINEAR, threat, y=y)
    assert next(f.name for f in examine(MLP, X, y, threat, found) if f.level == "invalid") == "not_repeatable"
    with pytest.raises(ValueError, match="in the same order"):
        examine(LINEAR, X, y.roll(1), threat, found)
    with pytest.raises(ValueError, match="59 inputs"):
        examine(LINEAR, X[1:], y[1:], threat, found)


def test_randomness_that_was_averaged_over_is_a_note_and_without_a_seed_invalid() -> None:
    def averaged(threat: Any) -> Averaged:
        return Averaged(pgd(threat, num_steps=3), 4)

    assert checked(Then(noisy), Linf(0.02), [averaged])["randomness"].level == "note"
    random.seed(0)
    assert checked(Then(unruly), Linf(0.02))["randomness"].level == "invalid"


def _inside(how: str) -> Callable[[Tensor], Tensor]:
    def before(x: Tensor) -> Tensor:
        with torch.enable_grad():
            v = x.detach().requires_grad_()
            if how == "func":
                step = torch.func.grad(lambda u: LINEAR(u).square().sum())(v)
            elif how == "backward":
                LINEAR(v).square().sum().backward()
                step = v.grad
            else:
                step = torch.autograd.grad(LINEAR(v).square().sum(), v)[0]
        assert step is not None
        return x + 1e-3 * step.detach()

    return before


@pytest.mark.parametrize("how", ["grad", "backward", "func"])
def test_gradients_taken_inside_the_forward_pass_are_seen(how: str) -> None:
    untouched = torch.autograd.grad, torch.autograd.backward, Tensor.backward
    assert checked(Then(_inside(how)), Linf(0.02))["autograd_in_forward"].level == "suspect"
    assert (torch.autograd.grad, torch.autograd.backward, Tensor.backward) == untouched


def test_half_precision_and_what_bf16_changes() -> None:
    half = Then(
        lambda x: x.bfloat16(), network=seeded(lambda: nn.Sequential(nn.Flatten(), nn.Linear(16, K)).bfloat16())
    )
    assert checked(half, Linf(0.02))["reduced_precision"].level == "suspect"
    far = seeded(lambda: nn.Sequential(nn.Flatten(), nn.Linear(16, K)))
    with torch.no_grad():
        far[1].bias += 300.0
    assert checked(far, Linf(0.02))["reduced_precision"].level == "note"


def test_batch_norm_without_running_statistics_is_counted() -> None:
    layers = [nn.Flatten(), nn.BatchNorm1d(16, track_running_stats=False), nn.Linear(16, K)]
    found = checked(seeded(lambda: nn.Sequential(*layers).eval()), Linf(0.02))
    assert found["batch_dependence"].numbers["batch_norms"] == 1


def test_a_saturated_loss_matters_only_where_nothing_else_was_climbed() -> None:
    model, threat = Then(after=lambda z: 1e5 * z), Linf(0.05)
    alone = checked(model, threat, [partial(pgd, num_steps=20)])
    assert alone["vanishing_gradients"].level == "invalid" and alone["effort_still_helps"].level != "note"
    assert loud(checked(model, threat, [partial(pgd, num_steps=20), BY_MARGIN])) == {}


def test_a_gradient_free_attack_softens_the_verdict_on_gradients() -> None:
    model, threat = Then(rounded), Linf(0.1)
    y = labels(model)
    found = judged(model, threat, y=y)
    searched = SimpleNamespace(
        name="square", settings={}, broke=0, ran_on=20, skipped=0, cost=Cost(100, 0), standing_after=20
    )
    found.attacks.append(searched)  # type: ignore[arg-type]
    assert {f.name: f.level for f in examine(model, X, y, threat, found)}["vanishing_gradients"] == "suspect"


@pytest.mark.parametrize("broke, speaks", [(1, False), (20, True)])
def test_a_search_that_broke_much_after_gradient_attacks_is_told(broke: int, speaks: bool) -> None:
    y, threat = labels(LINEAR), Linf(0.05)
    found = judged(LINEAR, threat, y=y)
    searched = SimpleNamespace(
        name="square", settings={}, broke=broke, ran_on=40, skipped=2, cost=Cost(100, 0), standing_after=20
    )
    found.attacks.append(searched)  # type: ignore[arg-type]
    assert ("black_box_won" in [f.name for f in examine(LINEAR, X, y, threat, found)]) == speaks
    found.attacks.reverse()  # a search that ran first says nothing of gradients
    assert "black_box_won" not in [f.name for f in examine(LINEAR, X, y, threat, found)]


@pytest.mark.parametrize(("broke", "skipped", "speaks"), [(7, 30, True), (3, 30, False), (2, 30, False), (7, 0, False)])
def test_a_last_attack_that_breaks_most_of_what_it_is_given_is_told(broke: int, skipped: int, speaks: bool) -> None:
    """Nothing was spared where it had all that stood; three of seven are less than half; two may be luck."""
    y, threat = labels(LINEAR), Linf(0.05)
    found = judged(LINEAR, threat, y=y)
    tried = 3 if broke == 2 else 7
    last = AttackRecord("square", ran_on=tried, broke=broke, skipped=skipped, cost=Cost(100, 0), standing_after=30)
    found.attacks += [last, AttackRecord("apgd", skipped=30)]
    told = {f.name: f for f in examine(LINEAR, X, y, threat, found)}.get("stopped_early")
    assert (told is not None) == speaks
    if told:
        assert told.level == "suspect" and "broke 7 of the 7 examples" in told.sentence and "30 more" in told.sentence


CURVES: dict[str, tuple[list[tuple[float, float]], bool]] = {
    "falls on": ([(0.0, 1.0), (0.05, 0.6), (0.1, 0.1)], False),
    "stops": ([(0.0, 1.0), (0.05, 0.6), (0.1, 0.58)], True),
    "rises": ([(0.0, 1.0), (0.025, 0.5), (0.05, 0.6), (0.1, 0.0)], True),
    "hardly falls at all": ([(0.0, 1.0), (0.05, 0.98), (0.1, 0.97)], False),
    "nothing left to fall": ([(0.0, 1.0), (0.05, 0.01), (0.1, 0.01)], False),
    "no curve": ([], False),
}


@pytest.mark.parametrize("name", CURVES)
def test_the_curve_must_fall_and_go_on_falling(name: str) -> None:
    points, speaks = CURVES[name]
    y, threat = labels(LINEAR), Linf(0.05)
    found = dataclasses.replace(
        judged(LINEAR, threat, y=y), curve=[(radius, wilson(round(100 * v), 100)) for radius, v in points]
    )
    assert ("curve_shape" in [f.name for f in examine(LINEAR, X, y, threat, found)]) == speaks


# The sample, the cost, and no trace ------------------------------------------------------------------------------


def test_the_sample_is_right_mostly_standing_and_drawn_by_its_seed() -> None:
    correct, robust = torch.arange(1000) % 5 != 0, torch.arange(1000) % 5 > 2
    table = {"correct": correct, "robust": robust, "certified": torch.zeros_like(robust)}
    rows = sample(table, 100, seed=0)
    assert len(rows) == 100 and bool(correct[rows].all()) and int(robust[rows].sum()) == 75
    assert rows.tolist() == sorted(set(rows.tolist())) and rows.max() > 900
    assert torch.equal(rows, sample(table, 100, 0)) and not torch.equal(rows, sample(table, 100, 1))
    few = {"correct": correct, "robust": torch.arange(1000) == 3, "certified": torch.zeros_like(robust)}
    assert len(sample(few, 100, 0)) == 100 and 3 in sample(few, 100, 0)
    all_stand = {"correct": correct, "robust": correct, "certified": torch.zeros_like(robust)}
    assert len(sample(all_stand, 100, 0)) == 100
    assert len(sample(all_stand | {"certified": correct}, 100, 0)) == 0


def test_certified_examples_are_left_alone() -> None:
    y, threat = labels(LINEAR), Linf(0.05)
    found = measure(
        LINEAR, [(X, y)], threat, [BY_MARGIN], curve=(), certify=lambda m, x, y, t, noise: torch.ones(len(y))
    )
    assert [f.name for f in examine(LINEAR, X, y, threat, found)] == ["nothing_to_probe"]


class Counting(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.cost = model.eval(), Cost()
        self.training = False

    def forward(self, x: Tensor) -> Tensor:
        out = self.model(x)
        self.cost = self.cost.plus(Cost(forwards=len(x)))
        if out.requires_grad:
            out.register_hook(self._back)
        return out

    def _back(self, grad: Tensor) -> None:
        self.cost = self.cost.plus(Cost(backwards=len(grad)))


@pytest.mark.parametrize(
    "name, radius, most", [("all stand", 1e-4, 310), ("mixture", 0.06, 250), ("random", 1e-4, 400)]
)
def test_the_cost_is_what_the_docstring_says(name: str, radius: float, most: int) -> None:
    counting = Counting(Then(noisy) if name == "random" else LINEAR)
    y, threat = labels(counting), Linf(radius)
    found = judged(counting, threat, y=y)
    counting.cost = Cost()
    examine(counting, X, y, threat, found, num=40)
    passes = (counting.cost.forwards + 2 * counting.cost.backwards) / len(sample(found.table, 40, 0))
    assert 0.75 * most < passes <= most


class Odd(nn.Module):
    """Writes into a buffer at every look, in whatever mode."""

    def __init__(self, fails_after: float = float("inf")) -> None:
        super().__init__()
        self.flat = nn.Flatten()
        self.line = nn.Linear(16, K)
        self.drop = nn.Dropout(0.5)
        self.norm = nn.BatchNorm1d(16)
        self.register_buffer("looks", torch.zeros(()))
        self.fails_after = fails_after

    def forward(self, x: Tensor) -> Tensor:
        self.looks += 1
        if self.looks > self.fails_after:
            raise RuntimeError("enough")
        return self.line(self.drop(self.norm(self.flat(x))))


@pytest.mark.parametrize("fails_after", [float("inf"), 30.0])
def test_no_trace_is_left(snapshot: Callable[[nn.Module], dict[str, object]], fails_after: float) -> None:
    model = seeded(Odd)
    model.norm.eval()
    model.line.bias.requires_grad_(False)
    model.line.weight.grad = torch.ones_like(model.line.weight)
    x, threat = X.clone(), Linf(0.02)
    y = labels(seeded(Odd).eval())
    found = judged(model, threat, y=y)
    with torch.no_grad():
        model.looks.zero_()
    model.fails_after = fails_after
    before, state = snapshot(model), torch.random.get_rng_state()
    if fails_after < 1e9:
        with pytest.raises(RuntimeError, match="enough"):
            examine(model, x, y, threat, found)
    else:
        examine(model, x, y, threat, found)
    assert snapshot(model) == before
    assert torch.equal(torch.random.get_rng_state(), state) and torch.equal(x, X)


def test_the_same_seed_gives_the_same_findings() -> None:
    model, threat = Then(rounded), Linf(0.1)
    first, again = checked(model, threat, seed=3), checked(model, threat, seed=3)
    assert first == again
    other = checked(model, threat, seed=4, num=30)
    assert {n: f.numbers for n, f in other.items()} != {n: f.numbers for n, f in first.items()}


def test_it_works_in_any_gradient_mode_and_for_plain_functions() -> None:
    y, threat = labels(MLP), Linf(0.1)
    found = judged(lambda x: MLP(x), threat, [partial(pgd, num_steps=1, step=0.01)], y=y)
    expected = examine(lambda x: MLP(x), X, y, threat, found)
    with torch.no_grad():
        assert examine(lambda x: MLP(x), X, y, threat, found) == expected
    with torch.inference_mode():
        assert examine(lambda x: MLP(x), X.clone(), y.clone(), threat, found) == expected
    assert expected


def test_threats_that_are_no_ball_and_radii_without_end_are_checked_as_far_as_they_go() -> None:
    model, x, threat = seeded(lambda: BagOfWords(NUM_WORDS, 4)), sentences(), words(radius=1.0)
    y = labels(model, x)
    examine(model, x, y, threat, measure(model, [(x, y)], threat, [BY_MARGIN], curve=()))
    endless = Linf(float("inf"))
    y = labels(LINEAR)
    climb = partial(gradient_ascent, absolute_step=0.01)
    assert loud({f.name: f for f in examine(LINEAR, X, y, endless, judged(LINEAR, endless, [climb], y=y))}) == {}


# Another backward pass -------------------------------------------------------------------------------------------

HARD: dict[str, tuple[Callable[[Tensor], Tensor], float]] = {
    "round": (torch.round, 1.0),
    "sign": (lambda v: v.sign(), 1.0),
    "clamp": (lambda v: v.clamp(5, 6), 1.0),
    "detach": (lambda v: 2 * v.detach(), 2.0),
    "no_grad": (lambda v: _quietly(v), 3.0),
    "relu that is off": (torch.relu, float(torch.sigmoid(torch.tensor(soft_backward.SLOPE * -0.3)))),
    "relu in place": (lambda v: nn.ReLU(inplace=True)(1 * v), float(torch.sigmoid(torch.tensor(-3.0)))),
    "saturated tanh": (lambda v: (100 * v).tanh(), 100 / 31.0**2),
    "comparison": (lambda v: (v > -0.3).float(), 2.5),
    "where": (lambda v: torch.where(v < -0.3, 1.0, 4.0), 7.5),
}


def _quietly(v: Tensor) -> Tensor:
    with torch.no_grad():
        return 3 * v


@pytest.mark.parametrize("name", HARD)
def test_hard_functions_pass_a_gradient_and_keep_their_value(name: str) -> None:
    function, slope = HARD[name]
    v = torch.full((2, 3), -0.3, requires_grad=True)
    out = straight_through(function)(v)
    assert torch.equal(out.detach(), function(v.detach()))
    assert torch.allclose(torch.autograd.grad(out.sum(), v)[0], torch.full((2, 3), slope), rtol=1e-4)
    assert torch.is_grad_enabled()
    with torch.no_grad():
        assert not straight_through(function)(v.detach()).requires_grad


def test_a_smooth_network_keeps_its_gradient() -> None:
    network = seeded(lambda: nn.Sequential(nn.Linear(4, 5), nn.GELU(), nn.Linear(5, 2)))
    x = torch.rand(3, 4, requires_grad=True)
    soft, plain = (torch.autograd.grad(f(x).square().sum(), x)[0] for f in (straight_through(network), network))
    assert torch.equal(soft, plain)


def test_softmax_that_has_saturated_gets_a_slope() -> None:
    v = torch.tensor([[900.0, 0.0]], requires_grad=True)
    assert not torch.autograd.grad(v.softmax(1)[0, 0], v)[0].any()
    out = straight_through(lambda u: u.softmax(1))(v)
    assert out.tolist() == [[1.0, 0.0]] and bool((torch.autograd.grad(out[0, 0], v)[0] != 0).all())


def test_a_check_that_cannot_soften_a_model_stays_silent() -> None:
    model = Then(lambda x: rounded(x) + 0 * x[x > 2].sum())  # a soft comparison is no index
    assert "straight_through_wins" not in checked(model, Linf(0.1))


def test_the_record_of_an_attack_is_enough_to_know_what_it_climbed() -> None:
    from sparring.checks.by_gradient import _climbs_only_loss
    from sparring.evaluation.one_batch import Step

    def settings(make: Any) -> Any:
        return Step.of(0, make, Linf(0.1)).record.settings

    assert _climbs_only_loss(settings(partial(pgd, restarts=3))) and _climbs_only_loss(settings(pgd))
    assert not _climbs_only_loss(settings(BY_MARGIN))
    assert isinstance(pgd(Linf(0.1)), Attack) and not _climbs_only_loss({"type": "EachTarget"})


# Any model, any threat -------------------------------------------------------------------------------------------


def test_a_model_that_was_evaluated_is_not_looked_at_by_preflight_again(monkeypatch: pytest.MonkeyPatch) -> None:
    for model in (LINEAR, Then(after=lambda z: z.softmax(1)), lambda x: MLP(x)):
        y, threat = labels(model), Linf(0.05)
        found = judged(model, threat, y=y)
        expected = examine(model, X, y, threat, found)
        with monkeypatch.context() as patch:
            patch.setattr("sparring.checks.battery.preflight", lambda *a, **k: pytest.fail("looked again"))
            assert examine(model, X, y, threat, found) == expected
            assert examine(found.model, X, y, threat, found) == expected
            with pytest.raises(pytest.fail.Exception, match="looked again"):
                examine(nn.Sequential(nn.Identity(), MLP), X, y, threat, found)


def test_a_black_box_is_checked_without_gradients() -> None:
    """What needs a gradient is left out; a search still breaks what a search of two queries left standing."""
    from sparring.attacks.square import square

    def closed(x: Tensor) -> Tensor:
        return torch.as_tensor(MLP(x.detach()).detach().numpy())

    y, threat = labels(closed), Linf(0.3)
    found = judged(closed, threat, [partial(square, num_queries=2)], y=y)
    assert {f.name: f.level for f in found.findings} == {"no_gradient": "suspect"}
    levels = {f.name: f.level for f in examine(closed, X, y, threat, found)}
    assert levels["black_box_wins"] == "invalid" and "number_too_high" in levels
    assert not levels.keys() & {"vanishing_gradients", "huge_radius_survived", "effort_still_helps"}
    other = examine(lambda x: closed(x), X, y, threat, found)  # looked at anew, and not refused
    assert {f.name: f.level for f in other} == levels


@dataclasses.dataclass(frozen=True)
class Jumps(Linf):
    """A ball whose judged inputs are whole tenths."""

    discrete = True

    def realize(self, x: Tensor, z: Tensor) -> Tensor:
        return torch.where(z == 0, x, ((x + z) * 10).round() / 10)


def searched(threat: Any, idle: bool = False) -> Any:
    """A random draw, without a gradient; idle: no change at all."""

    def attack(model: Any, x: Any, y: Tensor, *, noise: Any = None) -> AttackResult:
        z = threat.null(x) if idle else threat.sample(x, noise)
        x_adv = threat.realize(x, z)
        fooled = model(x_adv).argmax(1) != y
        return AttackResult(x_adv, z, threat.size(x, z), None, fooled, Cost(len(y), 0))

    attack.needs_grad = False  # type: ignore[attr-defined]
    return attack


def test_inputs_that_move_in_jumps_need_a_search_without_gradients() -> None:
    x = X.mul(10).round().div(10)
    for threat, attacks, level in (
        (Jumps(0.1), [BY_MARGIN], "suspect"),
        (Jumps(0.1), [BY_MARGIN, searched], None),
        (Linf(0.1), [BY_MARGIN], None),
    ):
        found = checked(LINEAR, threat, attacks, x)
        assert (found["no_search"].level if "no_search" in found else None) == level
    y = labels(LINEAR, x)
    nothing_left = judged(LINEAR, Jumps(1.0), [BY_MARGIN], x, y)
    assert nothing_left.robust.count < 2
    assert loud({f.name: f for f in examine(LINEAR, x, y, Jumps(1.0), nothing_left)}) == {}


def test_random_draws_search_in_threats_that_are_no_ball() -> None:
    """Sentences whose words may be exchanged, after an attack that does nothing."""
    model, x, threat = seeded(lambda: BagOfWords(NUM_WORDS, 4)), sentences(), words(radius=2.0)
    x = {name: tensor.repeat(20, 1) for name, tensor in x.items()}
    y = labels(model, x)
    found = measure(model, [(x, y)], threat, [partial(searched, idle=True)], curve=())
    assert found.robust.value == 1
    told = {f.name: f for f in examine(model, x, y, threat, found)}
    assert told["black_box_wins"].level != "note" and "100 random draws" in told["black_box_wins"].sentence
    assert "Square" not in told["black_box_wins"].next_step


def test_a_threat_on_one_of_several_inputs_is_checked() -> None:
    class Pair(nn.Module):
        def forward(self, x: Any) -> Tensor:
            return LINEAR(x["probe"]) + 0 * LINEAR(x["gallery"])

    x, threat = {"gallery": X.flip(0), "probe": X}, Lens(Linf(0.05), "probe")
    y = labels(Pair(), x)
    assert verdict(examine(Pair(), x, y, threat, judged(Pair(), threat, x=x, y=y))) == "TRUSTED"
    weak = judged(Pair(), Lens(Linf(0.3), "probe"), [partial(pgd, num_steps=0)], x, y)
    told = {f.name for f in examine(Pair(), x, y, Lens(Linf(0.3), "probe"), weak) if f.level == "invalid"}
    assert {"effort_still_helps", "number_too_high"} <= told
