"""`normalize=` as a key of any model. Oracle: the same network wrapped by hand, number by number."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import sparring
from command import call
from sparring.adapters.normalize import build_normalized, load_into, read_normalisation
from sparring.modalities import find
from sparring.modalities.images import MODELS

NETS = """
import torch
from torch import nn
import sparring

def bare(): return nn.Sequential(nn.Flatten(), nn.Linear(64, 12), nn.ReLU(), nn.Linear(12, 10))
def by_hand(): return nn.Sequential(sparring.Normalize(0.4, 0.2), bare())
def own(normalize: str = "none"): return nn.Sequential(nn.Flatten(), nn.Linear(64, 10 if normalize == "cifar10" else 7))
def takes(shape, num_classes, normalize: nn.Module | None = None): return nn.Sequential(normalize, bare())
"""
GIVEN = {"shape": (1, 8, 8), "num_classes": 10}
ASKED = ["--data", "digits", "--threat", "linf:0.1", "--attacks", "pgd:num_steps=3", "--num-examples", "60",
         "--no-checks"]  # fmt: skip


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Networks, and weights of the bare one that a loop of the user's own learned on normalised inputs."""
    folder = tmp_path_factory.mktemp("normalize")
    (folder / "nets.py").write_text(NETS)
    data = sparring.load_data("digits")
    x, y = (data.x_train - 0.4) / 0.2, data.y_train
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 12), nn.ReLU(), nn.Linear(12, 10))
    optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
    for _ in range(60):
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x), y).backward()
        optimizer.step()
    torch.save(net.state_dict(), folder / "bare.pt")
    hand = {f"1.{name}": value for name, value in net.state_dict().items()}
    hand |= {"0.mean": torch.tensor([0.4]), "0.std": torch.tensor([0.2])}
    torch.save(hand, folder / "hand.pt")
    return folder


def evaluate(shop: Path, out: Path, model: str, weights: Path) -> str:
    code, _, err = call("evaluate", "--model", f"{shop}/nets.py:{model}", "--weights", str(weights), *ASKED,
                        "--out", str(out))  # fmt: skip
    assert code == 0, err
    return (out / "examples.csv").read_text()


def test_it_measures_what_a_network_wrapped_by_hand_measures(shop: Path, tmp_path: Path) -> None:
    key = evaluate(shop, tmp_path / "a", "bare,normalize=0.4/0.2", shop / "bare.pt")
    assert key == evaluate(shop, tmp_path / "b", "by_hand", shop / "hand.pt")
    assert key != evaluate(shop, tmp_path / "c", "bare", shop / "bare.pt")  # the wrong numbers that the key prevents
    clean = [line.split(",")[4] for line in key.splitlines()[1:]]
    assert clean.count("1") > 50


def test_the_interval_bound_reaches_through_it(shop: Path) -> None:
    model = f"{shop}/nets.py:"
    one = load_into(build_normalized(model + "bare,normalize=0.4/0.2", {}, 0, GIVEN), shop / "bare.pt").eval()
    two = load_into(build_normalized(model + "by_hand", {}, 0, GIVEN), shop / "hand.pt").eval()
    data, threat = sparring.load_data("digits"), sparring.Linf(0.01)
    bounds = [sparring.interval_margin(net, data.x_test[:20], data.y_test[:20], threat) for net in (one, two)]
    assert torch.equal(*bounds) and bool((bounds[0] > 0).any())


def test_a_run_starts_from_bare_weights_and_loads_again(shop: Path, tmp_path: Path) -> None:
    model, run = f"{shop}/nets.py:bare,normalize=0.4/0.2", tmp_path / "run"
    code, _, err = call("train", "--data", "digits", "--threat", "linf:0.05", "--model", model, "--weights",
                        str(shop / "bare.pt"), "--epochs", "1", "--set", "learning_rate=1e-9", "--out", str(run),
                        "--set", "num_steps=1")  # fmt: skip
    assert code == 0, err
    data = sparring.load_data("digits")
    loaded = sparring.load(run, model=model)
    start = load_into(build_normalized(model, {}, 0, GIVEN), shop / "bare.pt").eval()
    assert torch.allclose(loaded(data.x_test), start(data.x_test), atol=1e-3)  # at that rate nothing moves
    assert (start(data.x_test).argmax(1) == data.y_test).float().mean() > 0.85
    with pytest.raises(ValueError, match=r"do not fit the model.*network\.1\.bias"):
        sparring.load(run, model=f"{shop}/nets.py:bare")  # the key is not forgotten in silence

    images, best = find("images"), run / "best.safetensors"
    again = images.make_model(model, 0, GIVEN, best).eval()
    assert torch.equal(again(data.x_test), loaded(data.x_test))
    with pytest.raises(ValueError, match=r"trained with mean \[0.4.*normalize= says \[0.5\]"):
        images.make_model(f"{shop}/nets.py:bare,normalize=0.5/0.2", 0, GIVEN, best)
    np.savez(tmp_path / "other.npz", x=np.zeros(3))
    torch.save({"other": torch.zeros(2)}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match="do not fit the model"):
        images.make_model(model, 0, GIVEN, tmp_path / "other.pt")


def test_builders_that_know_the_word_get_it(shop: Path) -> None:
    known = build_normalized("mlp,normalize=0.4/0.2", MODELS, 0, GIVEN)
    assert list(known.state_dict()) == list(build_normalized("mlp", MODELS, 0, GIVEN).state_dict())
    layers = [module for module in known.modules() if isinstance(module, sparring.Normalize)]
    assert [layer.mean.item() for layer in layers] == [pytest.approx(0.4)]  # instead of its own, not before it
    takes = build_normalized(f"{shop}/nets.py:takes,normalize=mnist", {}, 0, GIVEN)
    assert takes[0].mean.item() == pytest.approx(0.1307) and takes[0].std.item() == pytest.approx(0.3081)
    own = build_normalized(f"{shop}/nets.py:own,normalize=cifar10", {}, 0, GIVEN)
    assert isinstance(own, nn.Sequential) and own[1].out_features == 10  # its own text


@pytest.mark.parametrize(
    ("text", "mean", "std"),
    [
        ("cifar10", [0.4914, 0.4822, 0.4465], [0.2470, 0.2435, 0.2616]),
        ("imagenet", [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
        ("mnist", [0.1307], [0.3081]),
        ("0.1..0.2..0.3/0.5", [0.1, 0.2, 0.3], [0.5]),
        ("0/1e-1", [0.0], [0.1]),
    ],
)
def test_texts(text: str, mean: list[float], std: list[float]) -> None:
    layer, x = read_normalisation(text), torch.rand(2, 3, 4, 4)
    expected = (x - torch.tensor(mean).view(1, -1, 1, 1)) / torch.tensor(std).view(1, -1, 1, 1)
    assert torch.allclose(layer(x), expected)


NONE = ["", "cifar", "0.5", "0.5/0", "0.5/-1", "nan/1", "0.1..0.2/0.3..0.3..0.3", "0.5/inf", "/"]


@pytest.mark.parametrize("text", NONE)
def test_texts_that_are_none(shop: Path, text: str) -> None:
    with pytest.raises(ValueError, match=r"normalize=.*expected cifar10, imagenet, mnist, or MEAN/STD"):
        build_normalized(f'{shop}/nets.py:bare,normalize="{text}"', {}, 0, GIVEN)


def test_channels_that_the_inputs_do_not_have(shop: Path) -> None:
    with pytest.raises(ValueError, match=r"numbers for 3 channels, one input is \(1, 8, 8\)"):
        build_normalized(f"{shop}/nets.py:bare,normalize=cifar10", {}, 0, GIVEN)
    with pytest.raises(ValueError, match="these are ids"):
        build_normalized(f"{shop}/nets.py:bare,normalize=mnist", {}, 0, {"shape": {"ids": (4,)}})
    with pytest.raises(ValueError, match="twice"):
        build_normalized(f"{shop}/nets.py:bare,normalize=mnist,normalize=mnist", {}, 0, GIVEN)
