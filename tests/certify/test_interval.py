"""Interval bounds: exact where they can be, and below every point that can be found where they cannot."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

from contracts import FLAT, SHAPE, rand, seeded, stream, words_case
from sparring import pgd
from sparring.certify import RULES, Channelwise, Composed, interval_gaps, interval_margin, propagate, supported
from sparring.core.layers import Block, GlobalMean, Normalize
from sparring.core.objectives import margin
from sparring.core.types import take
from sparring.modalities.images import mlp
from sparring.threats import L1, L2, Ball, Linf, inside

NORMS: dict[str, tuple[type[Ball], float]] = {"linf": (Linf, 0.02), "l2": (L2, 0.15), "l1": (L1, 0.6)}
DUAL = {"linf": 1.0, "l2": 2.0, "l1": math.inf}
LABELS = torch.tensor([2, 0, 3])


def wake(model: nn.Module) -> nn.Module:
    """Statistics and weights that BatchNorm does not have before it has seen data."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            module.running_mean.uniform_(-0.5, 0.5)
            module.running_var.uniform_(0.3, 2)
            if module.affine:
                nn.init.uniform_(module.weight, -1.5, 1.5)
                nn.init.uniform_(module.bias, -0.5, 0.5)
    return model


def _mlp() -> nn.Module:
    return mlp(SHAPE[1:], 4, (12, 9), normalize=Normalize([0.4, 0.6], [0.3, 0.2]))


def _conv() -> nn.Module:
    return nn.Sequential(
        Normalize(0.5, 0.25), nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 3, 3, stride=2), nn.LeakyReLU(0.2),
        nn.Flatten(), nn.Linear(18, 7), nn.Tanh(), nn.Linear(7, 4), nn.Identity(),
    )  # fmt: skip


def _residual() -> nn.Module:
    return nn.Sequential(
        nn.BatchNorm2d(2), nn.Conv2d(2, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4, affine=False), nn.ReLU(),
        Block(4, 4, 1), Block(4, 6, 2), GlobalMean(), nn.Linear(6, 4),
    )  # fmt: skip


def _pools() -> nn.Module:
    return nn.Sequential(
        nn.Sequential(nn.Identity(), nn.Conv2d(2, 4, 2, groups=2), nn.Sigmoid()), nn.MaxPool2d(2), nn.AvgPool2d((1, 2)),
        nn.Flatten(), nn.Dropout(0.5), nn.Linear(8, 6, bias=False), nn.BatchNorm1d(6), nn.LeakyReLU(-0.5),
        nn.Linear(6, 4, bias=False), nn.Dropout(0.5),
    )  # fmt: skip


def _circular() -> nn.Module:
    conv = nn.Conv2d(2, 3, 3, padding=(2, 3), padding_mode="circular")
    return nn.Sequential(conv, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 4))


def _no_fold() -> nn.Module:
    return nn.Sequential(nn.Conv2d(2, 5, 3), nn.Tanh(), nn.Conv2d(5, 4, 3), GlobalMean())


NETS: dict[str, Callable[[], nn.Module]] = {
    "mlp": _mlp, "conv": _conv, "residual": _residual, "pools": _pools, "circular": _circular, "no-fold": _no_fold,
}  # fmt: skip


def net(name: str, dtype: torch.dtype = torch.float64) -> nn.Module:
    return seeded(lambda: wake(NETS[name]()), seed=3).to(dtype).eval()


def points(threat: Ball, x: Tensor) -> list[Tensor]:
    """Perturbations inside the set: random ones, far ones pulled back, corners, ends of single coordinates."""
    found = []
    for seed in range(3):
        normal = stream(len(x), seed).normal(x.shape[1:]).to(x)
        found += [threat.sample(x, stream(len(x), seed)), threat.project(x, 100 * normal)]
        found += [threat.project(x, 100 * normal.sign()), threat.project(x, 100 * threat.steepest(x, normal))]
    return found


def lowest_margin(model: nn.Module, x: Tensor, y: Tensor, threat: Ball, copies: int = 100) -> Tensor:
    """(B,) the smallest margin of 12 * copies points and of PGD on the margin from `copies` // 10 starts."""
    index = torch.arange(len(x)).repeat_interleave(copies)
    many, lowest = take(threat, index), torch.full((len(x),), math.inf, dtype=x.dtype)
    candidates = [many.realize(x[index], z) for z in points(many, x[index])]
    start = torch.arange(len(x)).repeat_interleave(copies // 10)
    attack = pgd(take(threat, start), num_steps=20, objective=margin, keep="highest_loss")
    candidates.append(attack(model, x[start], y[start], noise=stream(len(start))).x_adv)
    for some in candidates:
        rows = index if len(some) == len(index) else start
        with torch.no_grad():
            seen = -margin.score(model(some), y[rows])
        lowest = torch.minimum(lowest, seen.view(len(x), -1).amin(1))
    return lowest


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
def test_no_point_falls_below_the_bound(name: str, norm: str, dtype: torch.dtype) -> None:
    model, x = net(name, dtype), rand(*SHAPE).to(dtype)
    kind, radius = NORMS[norm]
    for scale in (0.01, 1.0, 8.0):
        threat = kind(scale * radius)
        bound = interval_margin(model, x, LABELS, threat)
        assert bound.shape == (3,)
        assert bound.dtype == dtype
        assert bool(bound.isfinite().all())
        assert bool((bound <= lowest_margin(model, x, LABELS, threat, copies=40 if scale == 1 else 10)).all())


BALLS: dict[str, dict[str, Any]] = {
    "no-box": {"low": None, "high": None},
    "wide": {"low": -3.0, "high": 2.0},
    "one-mask": {"mask": rand(1, *SHAPE[1:], seed=5) < 0.5},
    "masks": {"mask": rand(*SHAPE, seed=6) < 0.5},
    "radii": {"radius": torch.tensor([0.05, 0.4, 0.2], dtype=torch.float64)},
    "tensor-box": {"low": rand(7, seed=1) - 1, "high": 1 + rand(2, 5, 7, seed=2)},
    "only-low": {"high": None},
}


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("case", BALLS)
def test_every_kind_of_ball(norm: str, case: str) -> None:
    """Sound, and every example alone gives what it gives in the batch."""
    model, x = net("conv"), rand(*SHAPE)
    threat = NORMS[norm][0](**({"radius": 3 * NORMS[norm][1]} | BALLS[case]))
    bound = interval_margin(model, x, LABELS, threat)
    assert bool((bound <= lowest_margin(model, x, LABELS, threat, copies=20)).all())
    for rows in ([2, 0], [1]):
        some = torch.tensor(rows)
        alone = interval_margin(model, x[some], LABELS[some], take(threat, some))
        torch.testing.assert_close(alone, bound[some], rtol=1e-12, atol=1e-12)


def slack(radius: Any) -> Any:
    """The radius that the bound is about: twice what `inside` forgives."""
    return radius * (1 + 2e-5) + 2e-6


def linear_closed_form(model: nn.Module, x: Tensor, y: Tensor, threat: Ball, order: float) -> Tensor:
    """The least margin of an affine model, without a box: <c, x> + d - radius * ||c||_dual over the free entries."""
    jacobian = torch.autograd.functional.jacobian(lambda v: model(v)[0], x[:1])[:, 0].flatten(1)  # (K, D)
    logits = model(x).detach()
    radius = torch.as_tensor(slack(threat.radius), dtype=x.dtype).expand(len(x))
    least = torch.full_like(logits, math.inf)
    for i, k in itertools.product(range(len(x)), range(logits.shape[1])):
        if k != y[i]:
            row = jacobian[y[i]] - jacobian[k]
            if threat.mask is not None:
                row = row * threat.mask[i % len(threat.mask)].flatten()
            least[i, k] = logits[i, y[i]] - logits[i, k] - radius[i] * torch.linalg.vector_norm(row, ord=order)
    return least.amin(1)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("case", ["no-box", "one-mask", "masks", "radii"])
@pytest.mark.parametrize("classes", [2, 4])
def test_a_linear_model_without_a_box_is_exact(norm: str, case: str, classes: int) -> None:
    def make() -> nn.Module:
        before = (Normalize([0.4, 0.6], [0.3, 0.2]), nn.BatchNorm2d(2))
        return wake(nn.Sequential(*before, nn.Flatten(), nn.Linear(70, classes)))

    model, x, y = seeded(make).double().eval(), rand(*SHAPE), LABELS % classes
    threat = NORMS[norm][0](**({"radius": 0.3, "low": None, "high": None} | BALLS[case]))
    found = interval_margin(model, x, y, threat)
    torch.testing.assert_close(found, linear_closed_form(model, x, y, threat, DUAL[norm]), rtol=1e-10, atol=1e-10)


def test_a_linear_model_in_a_box_is_exact_for_linf() -> None:
    model, x = seeded(lambda: nn.Linear(11, 4)).double(), rand(*FLAT)
    found = interval_margin(model, x, LABELS, Linf(0.4))
    low, high = (x - slack(0.4)).clamp(0, 1), (x + slack(0.4)).clamp(0, 1)
    for i, y in enumerate(LABELS.tolist()):
        rows = model.weight[y] - model.weight
        worst = torch.where(rows > 0, low[i], high[i])
        margins = (rows * worst).sum(1) + model.bias[y] - model.bias
        assert float(found[i]) == pytest.approx(min(m for k, m in enumerate(margins.tolist()) if k != y), abs=1e-12)


@pytest.mark.parametrize("norm", ["l2", "l1"])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    "options",
    [{}, {"stride": 2, "padding": 1}, {"dilation": (1, 2), "groups": 2}, {"padding": "same", "bias": False}],
    ids=["plain", "stride", "groups", "same"],
)
def test_the_first_convolution_is_bounded_on_the_ball_itself(norm: str, masked: bool, options: dict[str, Any]) -> None:
    """Each output of the first layer reaches its bound at one point of the ball: rows of the Jacobian tell where."""
    conv = seeded(lambda: nn.Conv2d(2, 4, 3, **options)).double()
    model, x = nn.Sequential(Normalize([0.4, 0.6], [0.3, 0.2]).double(), conv, nn.Flatten()), rand(*SHAPE)
    mask = BALLS["masks"]["mask"] if masked else torch.ones(SHAPE, dtype=torch.bool)
    threat = NORMS[norm][0](0.3, low=None, high=None, mask=mask)
    rows = torch.autograd.functional.jacobian(lambda v: model(v)[0], x[:1])[:, 0].flatten(1)
    reach = slack(0.3) * torch.stack([torch.linalg.vector_norm(rows * m.flatten(), DUAL[norm], dim=1) for m in mask])
    low, high = model(x).detach() - reach, model(x).detach() + reach
    others = high.scatter(1, LABELS[:, None], -math.inf).amax(1)
    exact = low.gather(1, LABELS[:, None])[:, 0] - others
    torch.testing.assert_close(interval_margin(model, x, LABELS, threat), exact, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("norm", NORMS)
def test_a_smaller_radius_bounds_tighter_and_radius_zero_is_the_clean_margin(name: str, norm: str) -> None:
    model, x = net(name), rand(*SHAPE)
    kind, radius = NORMS[norm]
    bounds = [interval_margin(model, x, LABELS, kind(radius * f)) for f in (0, 0.1, 0.5, 1, 2, 10)]
    clean = -margin.score(model(x), LABELS).detach()
    torch.testing.assert_close(bounds[0], clean, rtol=0, atol=1e-3)
    assert bool((bounds[0] <= clean).all())
    for near, far in itertools.pairwise(bounds):
        assert bool((far <= near).all())
    assert bool((bounds[-1] < clean - 1e-3).all())


@pytest.mark.parametrize("name", ["mlp", "conv", "residual", "pools", "circular"])
def test_the_ball_beats_the_cube_around_it(name: str) -> None:
    """L1 lies in L2 lies in Linf of the same radius; the bounds keep the order, strictly where the ball is used."""
    model, x = net(name), rand(*SHAPE)
    l1, l2, linf = (interval_margin(model, x, LABELS, kind(0.02)) for kind in (L1, L2, Linf))
    assert bool((l1 >= l2 - 1e-9).all())
    assert bool((l2 >= linf - 1e-9).all())
    assert bool((l1 > linf + 1e-3).all()) or name == "circular"


@pytest.mark.parametrize("name", NETS)
def test_the_folded_last_layer_is_never_looser(name: str) -> None:
    model, x, radius = net(name), rand(*SHAPE), slack(0.02)
    with torch.no_grad():
        low, high = propagate(model, (x - radius).clamp(0, 1), (x + radius).clamp(0, 1))
    naive = low.gather(1, LABELS[:, None])[:, 0] - high.scatter(1, LABELS[:, None], -math.inf).amax(1)
    bound = interval_margin(model, x, LABELS, Linf(0.02))
    assert bool((bound >= naive - 1e-9).all())
    if name != "no-fold":
        assert bool((bound > naive + 1e-4).all())


@pytest.mark.parametrize("mode", ["circular", "replicate"])
@pytest.mark.parametrize("norm", ["l2", "l1"])
def test_padding_that_repeats_pixels(mode: str, norm: str) -> None:
    """One pixel meets several weights of a row, so the norm of the row is not that of its weights."""
    conv = seeded(lambda: nn.Conv1d(1, 2, 3, padding=1, padding_mode=mode)).double()
    conv.weight.data.abs_()[1] = 0
    model, x, y = nn.Sequential(conv, nn.Flatten()), rand(1, 1, 1), torch.tensor([0])
    threat = NORMS[norm][0](0.3, low=None, high=None)
    found = interval_margin(model, x, y, threat)
    torch.testing.assert_close(found, linear_closed_form(model, x, y, threat, DUAL[norm]), rtol=1e-10, atol=1e-10)


# Rules, one by one --------------------------------------------------------------------------------------------------

CASES: dict[type[nn.Module], tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    nn.Linear: (lambda: nn.Linear(7, 4), (7,)),
    nn.Conv1d: (lambda: nn.Conv1d(2, 3, 2, stride=2, padding=1), (2, 4)),
    nn.Conv2d: (lambda: nn.Conv2d(2, 3, 2, padding=1), (2, 2, 2)),
    Normalize: (lambda: Normalize([0.2, -0.4], [0.5, 2.0]), (2, 2, 2)),
    nn.BatchNorm1d: (lambda: nn.BatchNorm1d(4), (4,)),
    nn.BatchNorm2d: (lambda: nn.BatchNorm2d(3), (3, 1, 2)),
    nn.Identity: (nn.Identity, (5,)),
    nn.Dropout: (lambda: nn.Dropout(0.5), (5,)),
    nn.Dropout2d: (lambda: nn.Dropout2d(0.5), (2, 2, 2)),
    nn.Flatten: (nn.Flatten, (2, 1, 3)),
    nn.Unflatten: (lambda: nn.Unflatten(1, (2, 3)), (6,)),
    nn.ReLU: (lambda: nn.ReLU(inplace=True), (5,)),
    nn.LeakyReLU: (lambda: nn.LeakyReLU(-0.4, inplace=True), (5,)),
    nn.Sigmoid: (nn.Sigmoid, (5,)),
    nn.Tanh: (nn.Tanh, (5,)),
    nn.MaxPool2d: (lambda: nn.MaxPool2d(2, 1, padding=1), (1, 2, 4)),
    nn.AvgPool2d: (lambda: nn.AvgPool2d(2, 1, padding=1), (2, 2, 2)),
    nn.AdaptiveAvgPool2d: (lambda: nn.AdaptiveAvgPool2d(1), (2, 2, 2)),
    GlobalMean: (GlobalMean, (2, 2, 2)),
    nn.Sequential: (lambda: nn.Sequential(nn.Linear(6, 3), nn.Sigmoid()), (6,)),
    Block: (lambda: Block(2, 2, 1), (2, 2, 2)),
}


def pairs(low: Tensor, high: Tensor) -> list[tuple[float, float]]:
    return list(zip(low.flatten().tolist(), high.flatten().tolist(), strict=True))


@pytest.mark.parametrize("kind", RULES, ids=lambda kind: kind.__name__)
def test_a_rule_alone_gives_the_smallest_box(kind: type[nn.Module]) -> None:
    """Every corner of the input box, and 0 for the kinks: the outputs' extremes are the bounds. Of a residual block,
    whose branches share their input, only soundness holds."""
    make, shape = CASES[kind]
    module = seeded(lambda: wake(make())).double().eval()
    low = 2 * rand(1, *shape, seed=1) - 1.5
    high = low + rand(1, *shape, seed=2)
    ends = [{lo, hi, *([0.0] if lo < 0 < hi and kind is nn.LeakyReLU else [])} for lo, hi in pairs(low, high)]
    given = torch.tensor(list(itertools.product(*ends)), dtype=torch.float64).view(-1, *shape)
    with torch.no_grad():
        outputs = module(given.clone())
        below, above = propagate(module.train(), low.clone(), high.clone())
    assert bool((below <= outputs).all())
    assert bool((above >= outputs).all())
    if kind is not Block:
        torch.testing.assert_close(below[0], outputs.amin(0), rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(above[0], outputs.amax(0), rtol=1e-9, atol=1e-9)
    else:
        near = propagate(module.eval(), low, low)
        torch.testing.assert_close(near[0], module(low).detach(), rtol=1e-9, atol=1e-9)


class Swish(nn.Module):
    """A layer that no rule knows: x + x^2 sign(x), rising."""

    def forward(self, x: Tensor) -> Tensor:
        return x + x * x.abs()


def test_one_function_adds_a_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    model = seeded(
        lambda: nn.Sequential(nn.Flatten(), nn.Linear(70, 5), nn.Sequential(Swish()), nn.Linear(5, 4))
    ).double()
    x = rand(*SHAPE)
    assert supported(model) == "2.0 (Swish)"
    with pytest.raises(ValueError, match=r"no rule for 2\.0 \(Swish\).*RULES\[MyLayer\]"):
        interval_margin(model, x, LABELS, L2(0.1))
    monkeypatch.setitem(RULES, Swish, lambda module, low, high: (module(low), module(high)))
    assert supported(model) is None
    assert bool((interval_margin(model, x, LABELS, L2(0.1)) <= lowest_margin(model, x, LABELS, L2(0.1))).all())


class Shifted(nn.Module):
    """A layer of one's own that acts on each channel."""

    def __init__(self) -> None:
        super().__init__()
        self.shift, self.part = torch.tensor([0.1, -0.2], dtype=torch.float64), nn.GELU()

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.shift.view(-1, 1, 1)) * -2 + 0.3


@pytest.mark.parametrize("kind", [L2, L1])
def test_a_layer_that_acts_on_channels_keeps_the_ball(kind: type[Ball], monkeypatch: pytest.MonkeyPatch) -> None:
    """Registered by its three constants, it is as exact as `Normalize`."""
    model = seeded(lambda: nn.Sequential(Shifted(), nn.Flatten(), nn.Linear(70, 4))).double()
    monkeypatch.setitem(RULES, Shifted, Channelwise(lambda layer: (layer.shift, -2, 0.3)))
    threat = kind(0.3, low=None, high=None)
    exact = linear_closed_form(model, rand(*SHAPE), LABELS, threat, DUAL["l2" if kind is L2 else "l1"])
    torch.testing.assert_close(interval_margin(model, rand(*SHAPE), LABELS, threat), exact, rtol=1e-10, atol=1e-10)
    monkeypatch.setitem(RULES, Shifted, Composed(lambda layer, low, high: (low, high)))
    assert supported(model) == "0.part (GELU)", "of a composed layer every part needs a rule"


class Doubled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Renamed(nn.Sequential):
    """A subclass that computes what its parent computes."""


def test_what_a_rule_does_not_describe_is_not_certified() -> None:
    hooked, patched = nn.Linear(4, 3), nn.Linear(4, 3)
    hooked.register_forward_hook(lambda module, given, out: 3 * out)
    patched.forward = lambda x: -x  # type: ignore[method-assign]
    block = Block(2, 2, 1)
    block.main[2] = nn.SiLU()
    cases = {
        "the model (GELU)": nn.GELU(),
        "1 (Doubled)": Renamed(nn.Flatten(), Doubled(4, 3)),
        "0 (Linear)": nn.Sequential(hooked),
        "the model (Linear)": patched,
        "0 (BatchNorm1d)": nn.Sequential(nn.BatchNorm1d(4, track_running_stats=False)),
        "1.main.2 (SiLU)": nn.Sequential(nn.Identity(), block),
        "the model (function, no nn.Module)": lambda x: x,
    }
    for name, model in cases.items():
        assert supported(model) == name
        with pytest.raises(ValueError, match="interval bounds have no rule for"):
            interval_margin(model, torch.rand(2, 4), torch.tensor([0, 1]), Linf(0.1))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"no rule for the model \(GELU\)"):
        propagate(nn.GELU(), torch.zeros(1), torch.ones(1))


def test_spectrally_normalised_layers_are_covered() -> None:
    """A parametrized weight is read as it is, and its power iteration does not move."""
    layer = seeded(lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(70, 4))).double()
    model = nn.Sequential(nn.Flatten(), layer).train()
    before = [b.clone() for b in model.buffers()]
    bound = interval_margin(model, rand(*SHAPE), LABELS, L2(0.1))
    assert all(torch.equal(a, b) for a, b in zip(before, model.buffers(), strict=True))
    assert bool((bound <= lowest_margin(model.eval(), rand(*SHAPE), LABELS, L2(0.1))).all())


# Rounding -----------------------------------------------------------------------------------------------------------


def test_the_bound_covers_what_a_verdict_forgives() -> None:
    """The worst perturbation that `inside` still accepts, on models whose margin falls fastest."""
    for norm, (kind, _) in NORMS.items():
        for radius in (1e-4, 0.3, 20.0):
            model = seeded(lambda: nn.Linear(11, 2)).double()
            x, threat = rand(*FLAT), kind(radius, low=None, high=None)
            y = torch.zeros(3, dtype=torch.int64)
            down = threat.steepest(x, (model.weight[1] - model.weight[0]).detach().expand(3, 11))
            z = down * (radius * (1 + 1e-5) + 1e-6) * (1 - 1e-9)
            assert bool(inside(threat, x, z).all())
            assert bool((interval_margin(model, x, y, threat) <= -margin.score(model(x + z), y)).all()), norm


def test_rounding_of_the_model_cannot_cross_the_bound() -> None:
    """Nothing may change, so only rounding is left: sums that cancel, in every order of their terms."""
    weight = 1e3 * (2 * rand(2, 400, seed=4) - 1).float()
    x, y = rand(1, 400).float(), torch.tensor([0])
    threat = L2(0.5, mask=torch.zeros(1, 400, dtype=torch.bool))
    seen = []
    for seed in range(200):
        order = torch.randperm(400, generator=torch.Generator().manual_seed(seed))
        seen.append(-margin.score(F.linear(x[:, order], weight[:, order]), y))
    exact = float((x.double() * (weight[0] - weight[1]).double()).sum())
    lowest, highest = float(torch.cat(seen).min()), float(torch.cat(seen).max())
    assert lowest < exact < highest
    model = nn.Sequential(nn.Flatten(), nn.Linear(400, 2, bias=False))
    model[1].weight.data = weight
    for bound in (interval_margin(model, x, y, threat), interval_margin(model, x, y, Linf(0.5, mask=threat.mask))):
        assert exact - 10 < float(bound) < lowest


@pytest.mark.parametrize("kind", [Linf, L2, L1])
def test_rounding_before_the_first_sum_cannot_cross_the_bound(kind: type[Ball]) -> None:
    """A BatchNorm whose large product and large shift cancel: what is left is small, its rounding is not."""
    norm, last = nn.BatchNorm1d(4), seeded(lambda: nn.Linear(4, 2, bias=False))
    norm.running_var.fill_(1e-7)
    norm.bias.data = -0.5 / (norm.running_var + norm.eps).sqrt()
    norm.eval()
    model, y = nn.Sequential(norm, last), torch.zeros(500, dtype=torch.int64)
    x = (0.5 + 1e-4 * (rand(500, 4) - 0.5)).float()
    bound = interval_margin(model, x, y, kind(0.1, mask=torch.zeros(1, 4, dtype=torch.bool)))
    seen = -margin.score(model(x), y).detach()
    exact = -margin.score(copy.deepcopy(model).double()(x.double()), y).detach()
    assert bool((bound <= seen).all())
    assert bool((bound <= exact).all())
    assert float((bound - exact).abs().max()) < 0.02


@pytest.mark.parametrize(("setting", "cut"), [("high", 13), ("medium", 16)])
def test_coarse_products_cannot_cross_the_bound(setting: str, cut: int) -> None:
    """What TensorFloat-32 and bfloat16 do to the factors, done by hand: the last bits are cut off."""

    def coarse(v: Tensor) -> Tensor:
        return ((v.view(torch.int32) >> cut) << cut).view(torch.float32)

    layer, x, y = nn.Linear(300, 2), rand(20, 300).float(), torch.zeros(20, dtype=torch.int64)
    layer.weight.data[1] = 0
    layer.weight.data[0] = coarse(rand(300, seed=1).float() + 0.1).nextafter(torch.tensor(0.0))  # loses the most
    threat = L2(0.5, mask=torch.zeros(1, 300, dtype=torch.bool))
    exact = interval_margin(layer, x, y, threat)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision(setting)
        bound = interval_margin(layer, x, y, threat)
    finally:
        torch.set_float32_matmul_precision(before)
    seen = -margin.score(F.linear(coarse(x), coarse(layer.weight), layer.bias), y).detach()
    assert bool((seen < exact).all()), "without the setting the bound would be crossed"
    assert bool((bound <= seen).all())


def test_a_float32_model_is_bounded_close_to_its_float64_copy() -> None:
    x = rand(*SHAPE)
    for name, (kind, radius) in itertools.product(NETS, NORMS.values()):
        exact = interval_margin(net(name), x, LABELS, kind(radius))
        found = interval_margin(net(name, torch.float32), x.float(), LABELS, kind(radius)).double()
        torch.testing.assert_close(found, exact, rtol=2e-3, atol=2e-3)


# The rest -----------------------------------------------------------------------------------------------------------


def test_the_model_is_judged_in_eval_mode_and_stays_as_it_was(
    stateful: nn.Module, snapshot: Callable[..., Any]
) -> None:
    before, x = snapshot(stateful), rand(*SHAPE)
    kept = x.clone()
    for kind in (Linf, L2, L1):
        bound = interval_margin(stateful, x, LABELS, kind(0.05))
        assert snapshot(stateful) == before
        assert not bound.requires_grad
        stateful_eval = seeded(lambda: stateful).eval()
        assert torch.equal(bound, interval_margin(stateful_eval, x, LABELS, kind(0.05)))
        assert bool((bound <= lowest_margin(stateful_eval, x, LABELS, kind(0.05), copies=20)).all())
        stateful.train()
        stateful[3].eval()
    assert torch.equal(x, kept)
    with pytest.raises(ValueError, match="labels"):
        interval_margin(stateful, x, torch.tensor([0, 1, 4]), Linf(0.1))
    assert snapshot(stateful) == before


def test_unbounded_sets() -> None:
    """An infinite radius in a box is the box; without a box nothing can be said, and that is what is said."""
    model, x = net("conv"), rand(*SHAPE)
    boxed = [interval_margin(model, x, LABELS, kind(math.inf)) for kind in (Linf, L2, L1)]
    far = interval_margin(model, x, LABELS, Linf(5.0))
    for bound in boxed:
        torch.testing.assert_close(bound, far, rtol=1e-9, atol=1e-9)
        assert bool(bound.isfinite().all())
    shut = torch.ones(SHAPE, dtype=torch.bool)
    shut[0] = False  # nothing of the first image may change
    for kind, name in itertools.product((Linf, L2, L1), ("conv", "mlp", "circular")):
        bound = interval_margin(net(name), x, LABELS, kind(math.inf, mask=shut))
        torch.testing.assert_close(bound[0], interval_margin(net(name), x, LABELS, Linf(0.0))[0], rtol=0, atol=1e-3)
        assert bool(bound[1:].isfinite().all())
    for kind in (Linf, L2, L1):
        for some in (model, net("residual"), net("mlp")):
            assert bool((interval_margin(some, x, LABELS, kind(math.inf, low=None, high=None)) == -math.inf).all())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"threat": words_case().threat}, "norm balls"),
        ({"x": torch.rand(3, 4).half()}, "float32 or float64"),
        ({"x": torch.full((3, 4), 1.5)}, "outside the threat's box"),
        ({"x": torch.full((3, 4), math.nan)}, "not finite"),
        ({"y": torch.tensor([0, 1])}, "labels are"),
        ({"y": torch.tensor([0, 1, 5])}, "do not fit 5 classes"),
        ({"y": torch.tensor([0.0, 1.0, 2.0])}, "expected int64"),
        ({"model": nn.Linear(4, 1), "y": torch.tensor([0, 0, 0])}, "do not fit 1 classes"),
        ({"model": nn.Conv1d(1, 3, 2), "x": torch.rand(3, 1, 4)}, "logits"),
    ],
)
def test_errors_say_what_is_wrong(change: dict[str, Any], message: str) -> None:
    given = {"model": nn.Linear(4, 5), "x": torch.rand(3, 4), "y": torch.tensor([0, 1, 2]), "threat": Linf(0.1)}
    with pytest.raises(ValueError, match=message):
        interval_margin(**(given | change))


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("name", NETS)
def test_the_gaps_are_the_margin_by_classes_and_have_gradients(name: str, norm: str) -> None:
    model, x = net(name).train(), rand(*SHAPE)
    threat = NORMS[norm][0](NORMS[norm][1])
    gaps = interval_gaps(model, x, LABELS, threat)
    own = F.one_hot(LABELS, 4).bool()
    assert gaps.shape == (3, 4) and bool((gaps[own] == 0).all())
    judged = interval_margin(model, x, LABELS, threat)
    assert torch.equal(gaps.masked_fill(own, math.inf).amin(1).detach(), judged), "whatever the mode of the model"
    parameters = dict(model.named_parameters())
    grads = torch.autograd.grad(F.cross_entropy(-gaps, LABELS), list(parameters.values()), allow_unused=True)
    for parameter, grad in zip(parameters, grads, strict=True):
        assert grad is not None and bool(grad.isfinite().all()), parameter
    assert any(bool(grad.any()) for grad in grads if grad is not None)


@pytest.mark.parametrize("norm", NORMS)
def test_the_gradient_of_the_gaps_is_their_slope(norm: str) -> None:
    """Against differences, on a linear layer (where the ball meets the folded weights) and on a deep one."""
    for make in (lambda: nn.Sequential(nn.Flatten(), nn.Linear(70, 4)), _conv):
        model, x = seeded(make, seed=2).double(), rand(*SHAPE)
        threat, weight = NORMS[norm][0](NORMS[norm][1]), next(p for p in model.parameters() if p.ndim > 1)
        (grad,) = torch.autograd.grad(interval_gaps(model, x, LABELS, threat).sum(), weight)
        way, h = rand(*weight.shape, seed=3) - 0.5, 1e-6
        ends = []
        for sign in (1, -1):
            with torch.no_grad():
                weight += sign * h * way
                ends.append(float(interval_gaps(model, x, LABELS, threat).sum()))
                weight -= sign * h * way
        assert float((grad * way).sum()) == pytest.approx((ends[0] - ends[1]) / (2 * h), rel=1e-4)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("name", NETS)
def test_one_step_on_the_gaps_raises_the_margin(name: str, norm: str) -> None:
    model, x, threat = net(name), rand(*SHAPE), NORMS[norm][0](NORMS[norm][1])
    before = F.cross_entropy(-interval_gaps(model, x, LABELS, threat), LABELS)
    before.backward()
    torch.optim.SGD(model.parameters(), 1e-4).step()
    after = F.cross_entropy(-interval_gaps(model, x, LABELS, threat), LABELS)
    assert after.item() < before.item()
    for parameter in model.parameters():
        parameter.grad = None
    low = interval_margin(model, x, LABELS, threat)
    own = F.one_hot(LABELS, 4).bool()
    interval_gaps(model, x, LABELS, threat).masked_fill(own, math.inf).amin(1).sum().neg().backward()
    torch.optim.SGD(model.parameters(), 1e-5).step()
    assert interval_margin(model, x, LABELS, threat).sum().item() > low.sum().item()


def test_a_network_trained_for_it_is_certified_and_attacked_on_both_sides() -> None:
    """Interval training (the bounds are differentiable), then the bracket: certified <= attacked <= clean."""
    data, labels = load_digits(return_X_y=True)
    x, y = torch.from_numpy(data[:500]).float() / 16, torch.from_numpy(labels[:500]).long()
    model = seeded(lambda: mlp((64,), 10, (48,)))
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    for step in range(60):
        radius = 0.08 * min(1, step / 30)
        optimizer.zero_grad()
        F.cross_entropy(-interval_gaps(model, x, y, Linf(radius)), y).backward()
        optimizer.step()
    bound = interval_margin(model, x, y, Linf(0.06))
    fallen = pgd(Linf(0.06), num_steps=20, objective=margin)(model, x, y)
    assert fallen.reached is not None
    assert fallen.loss is not None
    certified, attacked = bound > 0, ~fallen.reached
    clean = model(x).argmax(1) == y
    assert 0.6 < float(certified.float().mean()) <= float(attacked.float().mean()) <= float(clean.float().mean())
    assert not bool((certified & ~attacked).any())
    assert bool((bound <= -fallen.loss).all())
