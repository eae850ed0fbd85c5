"""Training for a certificate: the loss against a closed form, its growth, its small box, a run that is certified."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from command import call
from contracts import stream
from sparring.certify import interval_margin
from sparring.threats import L2, Linf
from sparring.training.certified import ibp

X = torch.tensor([[0.4, 0.5, 0.6], [0.5, 0.3, 0.4]], dtype=torch.float64)
Y = torch.tensor([1, 0])


@pytest.fixture
def linear() -> nn.Module:
    model = nn.Linear(3, 2).double()
    model.load_state_dict({"weight": torch.tensor([[1.0, -2, 0.5], [0, 1, -1]]), "bias": torch.tensor([0.1, 0.2])})
    return model


@pytest.mark.parametrize("reach", [0.5, 1.0])
def test_the_loss_of_a_linear_model_in_closed_form(linear: nn.Module, reach: float) -> None:
    radius, weight = 0.1, 0.4
    loss, figures = ibp(Linf(radius), weight=weight, ramp=(0.0, 1.0)).at(reach)(linear, X, Y)
    logits, rows = linear(X), torch.arange(2)
    # the other class rises by radius times the L1 norm of the difference of the two rows of weights
    worst = logits.detach().clone()
    worst[rows, 1 - Y] += reach * radius * (linear.weight[0] - linear.weight[1]).abs().sum().detach()
    k = weight * reach
    wanted = (1 - k) * F.cross_entropy(logits, Y) + k * F.cross_entropy(worst, Y)
    # the bound covers a little more than the radius, see `interval_margin`
    torch.testing.assert_close(loss, wanted, rtol=1e-4, atol=1e-4)
    assert figures["certified_in_box"] == (worst.argmax(1) == Y).double().mean()


def test_radius_and_weight_grow_over_the_run() -> None:
    recipe = ibp(Linf(0.2), ramp=(0.1, 0.5))
    assert [recipe.at(p).reach for p in (0.0, 0.1, 0.3, 0.5, 1.0)] == pytest.approx([0, 0, 0.5, 1, 1])


def test_before_the_ramp_it_is_plain_training(linear: nn.Module) -> None:
    loss, figures = ibp(Linf(0.2)).at(0.0)(linear, X, Y)
    assert torch.equal(loss, F.cross_entropy(linear(X), Y))
    assert not figures


def test_the_small_box_lies_in_the_set_around_an_attacked_input(linear: nn.Module) -> None:
    whole, part = ibp(Linf(0.2), weight=1.0), ibp(Linf(0.2), weight=1.0, box=0.25, num_steps=12)
    (of_whole, _), (of_part, _) = (recipe(linear, X, Y, noise=stream(2)) for recipe in (whole, part))
    # of a linear model an attack finds the worst corner, so that both are the same (but for the slack of the bound)
    torch.testing.assert_close(of_part, of_whole, rtol=1e-4, atol=1e-4)
    torch.manual_seed(0)
    deep = nn.Sequential(nn.Linear(3, 16), nn.ReLU(), nn.Linear(16, 2)).double()
    (of_whole, _), (of_part, _) = (recipe(deep, X, Y, noise=stream(2)) for recipe in (whole, part))
    assert of_part < of_whole, "a bound of a part is not below that of the whole"


@pytest.mark.parametrize("box", [1.0, 0.5])
def test_a_graph_to_every_weight_and_no_draw_but_from_the_noise(
    network: nn.Module, images: torch.Tensor, box: float
) -> None:
    labels, before = torch.tensor([2, 0, 3]), torch.get_rng_state()
    recipe, x = ibp(Linf(0.01), box=box), images.clone()
    loss, figures = recipe(network, x, labels, noise=stream(3))
    loss.backward()
    assert all(bool((p.grad != 0).any()) for p in network.parameters())
    assert x.grad is None and torch.equal(x, images)
    assert not figures["certified_in_box"].requires_grad
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(recipe(network, images, labels, noise=stream(3))[0], loss)


@pytest.mark.parametrize("options", [{"weight": 0.0}, {"weight": 1.5}, {"box": 0.0}, {"box": 2.0}])
def test_shares_are_shares(options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="expected the share of"):
        ibp(Linf(0.1), **options)


def test_other_norms(linear: nn.Module) -> None:
    loss, _ = ibp(L2(0.1), weight=1.0)(linear, X, Y)
    worst = linear(X).detach()
    worst[torch.arange(2), 1 - Y] += 0.1 * (linear.weight[0] - linear.weight[1]).norm().detach()
    torch.testing.assert_close(loss, F.cross_entropy(worst, Y), rtol=1e-4, atol=1e-4)


def test_a_run_is_chosen_by_what_is_certified(tmp_path: Path) -> None:
    run = str(tmp_path / "run")
    code, _, err = call(
        "train", "--data", "digits", "--threat", "linf:0.03", "--model", "mlp", "--recipe", "ibp:ramp=0.0..0.5",
        "--epochs", "6", "--set", "held_out=100", "--set", "averaging=0", "--out", run,
    )  # fmt: skip
    assert code == 0, err
    history = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    best = json.loads((tmp_path / "run" / "training.json").read_text())["best_epoch"]
    certified = [line["certified_accuracy"] for line in history]
    assert certified[best] == max(certified) > 0.3
    assert f"{certified[best]:.1%} certified (held-out data)" in err
    assert all(line["certified_accuracy"] <= line["robust_accuracy"] for line in history)
    code, out, err = call("evaluate", run, "--num-examples", "100", "--attacks", "pgd:num_steps=5", "--no-checks")
    assert code == 0 and "certified at least" in out, err


def test_networks_and_threats_without_a_bound_are_refused(tmp_path: Path) -> None:
    (tmp_path / "nets.py").write_text(
        "from torch import nn\n\nclass Odd(nn.Module):\n    def __init__(self):\n        super().__init__()\n"
        "        self.layer = nn.Linear(64, 10)\n\n    def forward(self, x):\n        return self.layer(x.flatten(1))\n"
        "\n\ndef make():\n    return Odd()\n"
    )
    options = ["--data", "digits", "--threat", "linf:0.03", "--recipe", "ibp", "--out", str(tmp_path / "run")]
    code, _, err = call("train", "--model", f"{tmp_path}/nets.py:make", *options)
    assert code == 2
    assert "trains for a certificate, and there is none: interval bounds have no rule for the model (Odd)" in err
    assert not (tmp_path / "run").exists()


def test_the_bound_trained_on_is_the_bound_judged_by(linear: nn.Module) -> None:
    _, figures = ibp(Linf(0.15))(linear, X, Y)
    assert figures["certified_in_box"] == (interval_margin(linear, X, Y, Linf(0.15)) > 0).double().mean()
