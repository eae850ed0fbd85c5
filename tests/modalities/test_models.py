"""Reference networks, users' files and weights. Oracles: counting by hooks, arithmetic by hand."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from sparring.adapters.files import build_model, load_weights
from sparring.modalities.images import MODELS, Normalize, build, cnn_mnist, default_for, mlp

SHAPES = {
    "mlp": (7,),
    "cnn-small": (1, 8, 8),
    "cnn-mnist": (1, 28, 28),
    "cnn-mnist-wide": (1, 28, 28),
    "resnet-small": (3, 32, 32),
    "cnn-patches": (3, 8, 8),
    "cnn-ibp": (1, 28, 28),
    "preact-resnet18": (3, 8, 8),
    "wide-resnet": (3, 8, 8),
}


@pytest.mark.parametrize("name", MODELS)
def test_every_model_gives_logits_with_a_gradient_and_keeps_the_global_generator(name: str) -> None:
    state = torch.get_rng_state()
    model = build(name, SHAPES[name], 5, seed=1)
    assert torch.equal(state, torch.get_rng_state())
    x = torch.rand(4, *SHAPES[name], requires_grad=True)
    logits = model(x)
    assert logits.shape == (4, 5)
    (grad,) = torch.autograd.grad(logits.pow(2).sum(), x)
    assert bool((grad.flatten(1).abs().sum(1) > 0).all())
    assert isinstance(next(iter(model.children())), Normalize)


def test_weights_are_those_of_the_seed() -> None:
    a, b, c = (build("cnn-small", (1, 8, 8), 10, seed).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(a[k], b[k]) for k in a) and any(not torch.equal(a[k], c[k]) for k in a)


def test_cnn_mnist_is_the_published_net() -> None:
    layers = [m for m in cnn_mnist((1, 28, 28), 10) if not isinstance(m, Normalize)]
    published = nn.Sequential(
        nn.Conv2d(1, 16, 4, stride=2, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 4, stride=2, padding=1), nn.ReLU(),
        nn.Flatten(), nn.Linear(32 * 7 * 7, 100), nn.ReLU(), nn.Linear(100, 10),
    )  # fmt: skip
    assert [repr(m) for m in layers] == [repr(m) for m in published]
    x = torch.rand(2, 1, 28, 28)
    model = build("cnn-mnist", (1, 28, 28), 10, seed=0)
    published.load_state_dict({f"{int(k[0]) - 1}{k[1:]}": v for k, v in model.state_dict().items() if k[0] != "0"})
    assert torch.equal(model(x), published(x))


def test_resnet_small_is_small() -> None:
    macs = 0

    def count(module: nn.Module, _: object, out: torch.Tensor) -> None:
        nonlocal macs
        macs += out[0].numel() * (module.weight[0].numel())  # type: ignore[index, operator, union-attr]

    model = build("resnet-small", (3, 32, 32), 10, seed=0).eval()
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            module.register_forward_hook(count)
    model(torch.rand(1, 3, 32, 32))
    assert 12.4e6 < macs < 12.6e6


@pytest.mark.parametrize(
    ("asked", "weights"),
    [
        (("preact-resnet18", {}), 11_172_170),  # kuangliu's 11,171,146, and the last norm
        (("wide-resnet", {}), 36_479_194),
        (("wide-resnet", {"depth": 34, "activation": "silu"}), 46_160_474),
    ],
)
def test_published_networks_have_the_published_size(asked: tuple[str, dict[str, Any]], weights: int) -> None:
    name, options = asked
    with torch.device("meta"):
        model = MODELS[name]((3, 32, 32), 10, normalize=nn.Identity(), **options)
    assert sum(p.numel() for p in model.parameters()) == weights


def test_depth_and_activation_are_those_there_are() -> None:
    with pytest.raises(ValueError, match="6 n \\+ 4 layers"):
        build("wide-resnet:depth=30", (3, 32, 32), 10, seed=0)
    with pytest.raises(ValueError, match="not one of relu, silu"):
        build("preact-resnet18:activation=gelu", (3, 32, 32), 10, seed=0)


@pytest.mark.parametrize("side", [8, 9, 11, 13, 28, 33])
def test_convolutions_take_other_sizes(side: int) -> None:
    for name in ("cnn-small", "resnet-small"):
        assert build(name, (2, side, side + 3), 3, seed=0)(torch.rand(2, 2, side, side + 3)).shape == (2, 3)


def test_default_for() -> None:
    found = [default_for(s) for s in ((41,), (1, 8, 8), (1, 28, 28), (3, 32, 32), (1, 112, 92), (5, 6))]
    assert found == ["mlp", "cnn-small", "cnn-mnist", "resnet-small", "cnn-small", "mlp"]


def test_normalize() -> None:
    x = torch.rand(2, 3, 4, 5)
    mean, std = (0.1, 0.2, 0.3), (1.0, 2.0, 4.0)
    expected = torch.stack([(x[:, c] - mean[c]) / std[c] for c in range(3)], 1)
    assert torch.allclose(Normalize(mean, std)(x), expected)
    for shape in ((2, 7), (2, 1, 4, 4), (2, 3, 5)):
        assert torch.allclose(Normalize(0.5, 0.25)(torch.ones(shape)), torch.full(shape, 2.0))
    assert set(Normalize(0.5, 0.25).state_dict()) == {"mean", "std"}
    with pytest.raises(ValueError, match="std > 0"):
        Normalize(0.0, 0.0)


def test_build_refuses() -> None:
    for arguments, message in (
        (("resnet", (3, 32, 32), 10), "is unknown; there are mlp"),
        (("mlp", (3,), 1), "at least 2 classes"),
        (("cnn-mnist", (1, 32, 32), 10), "28x28 pixels, got 32x32"),
        (("cnn-small", (7,), 10), r"got inputs \(7,\)"),
        (("resnet-small", (3, 4, 32), 10), "use mlp"),
    ):
        with pytest.raises(ValueError, match=message):
            build(*arguments, seed=0)


USER_FILE = """
from __future__ import annotations
import dataclasses
import torch

@dataclasses.dataclass
class Width:
    value: int = 3

def make():
    return torch.nn.Linear(4, Width().value)

def needs(argument):
    return make()

def wrong():
    return "a model"

def fails():
    raise RuntimeError("no weights here")

made = torch.nn.Linear(4, 3)

def sized(num_classes, shape, *, bias: bool = True):
    return torch.nn.Linear(shape[0], num_classes, bias=bias)
"""


GIVEN = {"shape": (4,), "num_classes": 3}


def test_models_from_files(tmp_path: Path) -> None:
    path = tmp_path / "nets.py"
    path.write_text(USER_FILE)
    assert build_model(f"{path}:make", {}, 0, GIVEN)(torch.rand(2, 4)).shape == (2, 3)
    sized = build_model(f"{path}:sized,bias=false", {}, 0, GIVEN)
    assert sized(torch.rand(2, 4)).shape == (2, 3) and sized.bias is None
    for name, kind, message in (
        ("absent", ValueError, "has no function 'absent'; it has .*make"),
        ("needs", ValueError, "lacks its argument.*shape, num_classes"),
        ("fails", ValueError, "RuntimeError: no weights here"),
        ("wrong", TypeError, r"returned a str; expected a torch\.nn\.Module"),
        ("made", TypeError, "lacks|is a Linear|expected"),
        ("torch", TypeError, "is a module"),
    ):
        with pytest.raises(kind, match=message):
            build_model(f"{path}:{name}", {}, 0, GIVEN)
    with pytest.raises(FileNotFoundError, match="no file"):
        build_model(f"{tmp_path / 'other.py'}:make", {}, 0, GIVEN)
    path.write_text("import no_such_package_at_all\n")
    with pytest.raises(ValueError, match=r"does not run: ModuleNotFoundError.*PYTHONPATH"):
        build_model(f"{path}:make", {}, 0, GIVEN)


def _net(seed: int) -> nn.Module:
    return build("mlp", (4,), 3, seed)


WRAPPED = {
    "net": lambda s: {"net": {f"module.{k}": v for k, v in s.items()}, "acc": 91.2, "epoch": 3},
    "tutorial": lambda s: {"model_state_dict": s, "optimizer_state_dict": {"state": {}, "groups": []}, "loss": 0.1},
    "compiled in lightning": lambda s: {"state_dict": {f"model._orig_mod.{k}": v for k, v in s.items()}, "epoch": 1},
    "deep": lambda s: {"run": {"weights": {"ema": s}}},
    "beside another": lambda s: {"generator": {"a": torch.ones(2)}, "net": s},
}  # fmt: skip


@pytest.mark.parametrize("kind", WRAPPED)
def test_weights_are_found_under_any_key_and_prefix(kind: str, tmp_path: Path) -> None:
    source, target, x = _net(0), _net(1), torch.rand(2, 4)
    torch.save(WRAPPED[kind](source.state_dict()), tmp_path / "w.pt")
    assert torch.equal(load_weights(target, tmp_path / "w.pt")(x), source(x))


def test_of_several_state_dicts_the_key_says_which(tmp_path: Path) -> None:
    one, two, path, x = _net(0), _net(1), tmp_path / "w.pt", torch.rand(2, 4)
    torch.save({"model": one.state_dict(), "ema": two.state_dict()}, path)
    with pytest.raises(ValueError, match=r"several state dicts that fit: model, ema.*w\.pt:model"):
        load_weights(_net(2), path)
    for key, source in (("model", one), ("ema", two)):
        assert torch.equal(load_weights(_net(2), f"{path}:{key}")(x), source(x))
    with pytest.raises(ValueError, match=r"no state dict under 'net'; there are model, ema"):
        load_weights(_net(2), f"{path}:net")


def test_weights_saved_before_batch_norm_counted_its_batches(tmp_path: Path) -> None:
    old, new = (nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8)) for _ in range(2))
    torch.save({k: v for k, v in old.state_dict().items() if not k.endswith("num_batches_tracked")}, tmp_path / "w.pt")
    x = torch.rand(4, 6)
    assert torch.equal(load_weights(new, tmp_path / "w.pt").eval()(x), old.eval()(x))


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64])
def test_weights_that_are_no_floats_are_refused(tmp_path: Path, dtype: torch.dtype) -> None:
    net = nn.Linear(4, 3)
    before = net.weight.clone()
    torch.save({"weight": torch.ones(3, 4, dtype=dtype), "bias": torch.ones(3)}, tmp_path / "w.pt")
    with pytest.raises(ValueError, match=rf"not floating point.*weight {dtype}"):
        load_weights(net, tmp_path / "w.pt")
    assert torch.equal(net.weight, before)


@pytest.mark.parametrize("kind", ["safetensors", "plain", "state_dict", "model", "module."])
def test_load_weights(kind: str, tmp_path: Path) -> None:
    source, target = _net(0), _net(1)
    state = dict(source.state_dict())
    path = tmp_path / ("w.safetensors" if kind == "safetensors" else "w.pt")
    if kind == "safetensors":
        save_file(state, path)
    elif kind == "plain":
        torch.save(state, path)
    elif kind == "module.":
        torch.save({"state_dict": {f"module.{k}": v for k, v in state.items()}, "epoch": 3}, path)
    else:
        torch.save({kind: state}, path)
    assert load_weights(target, path) is target
    x = torch.rand(2, 4)
    assert torch.equal(source(x), target(x))


def test_weights_that_do_not_fit_leave_the_model_alone(tmp_path: Path) -> None:
    target, path = _net(1), tmp_path / "w.pt"
    before = {k: v.clone() for k, v in target.state_dict().items()}
    torch.save(mlp((4,), 3, hidden=(128, 64, 9)).state_dict(), path)
    with pytest.raises(ValueError, match=r"2 unknown to the model: .*; 4 of another shape: .*\(64, 128\) in the file"):
        load_weights(target, path)
    torch.save({"a": torch.ones(1)}, path)
    with pytest.raises(ValueError, match=r"8 missing in the file: 0\.mean, 0\.std, 2\.weight, \.\.\."):
        load_weights(target, path)
    assert all(torch.equal(v, before[k]) for k, v in target.state_dict().items())


def test_unsafe_or_foreign_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "w.pt"
    torch.save(_net(0), path)  # a whole pickled model
    with pytest.raises(ValueError, match="cannot be read as plain tensors"):
        load_weights(_net(0), path)
    torch.save({"epoch": 3, "loss": math.pi}, path)
    with pytest.raises(ValueError, match="expected a state dict"):
        load_weights(_net(0), path)
    with pytest.raises(FileNotFoundError, match="no file"):
        load_weights(_net(0), tmp_path / "absent.pt")
    (tmp_path / "w.safetensors").write_text("text")
    with pytest.raises(ValueError, match="cannot be read"):
        load_weights(_net(0), tmp_path / "w.safetensors")


def test_a_file_that_changes_the_working_folder_changes_it_for_itself_alone(tmp_path: Path) -> None:
    (tmp_path / "nets.py").write_text(
        "import os\nfrom torch import nn\nos.chdir('/')\ndef make():\n    os.chdir('/')\n    return nn.Linear(4, 3)\n"
    )
    before = Path.cwd()
    build_model(f"{tmp_path / 'nets.py'}:make", {}, 0, GIVEN)
    assert Path.cwd() == before
