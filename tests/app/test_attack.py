"""`sparring attack`. Oracles: closed forms of a linear model, the evaluation itself, another reader of PNG."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.image import imread

from command import call
from sparring.modalities.images.files import in_8_bits
from sparring.threats import L1, L2, Linf

NETS = """
import torch
from torch import nn

class Linear(nn.Module):
    # logits [0, s], s = the sum over the left half less that over the right half
    def __init__(self):
        super().__init__()
        self.sign = nn.Buffer(torch.tensor([1.0, 1.0, -1.0, -1.0]).expand(4, 4).clone())
    def forward(self, x):
        s = (x * self.sign).flatten(1).sum(1)
        return torch.stack([0 * s, s], 1)

def linear(): return Linear()
"""
RADIUS = 8 / 255


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("attack")
    (folder / "nets.py").write_text(NETS)
    draw = np.random.default_rng(0)
    x = draw.integers(64, 192, (120, 4, 4), dtype=np.uint8)
    s = (x.astype(float) * ([1, 1, -1, -1])).sum((1, 2))
    y = np.where(draw.random(120) < 0.9, s > 0, s <= 0).astype(np.int64)  # some are wrong before any attack
    np.savez(folder / "gray.npz", x_train=x, y_train=y, x_test=x, y_test=y)
    np.savez(folder / "rows.npz", x_train=x.reshape(120, -1), y_train=y, x_test=x.reshape(120, -1), y_test=y)
    return folder


def attack(
    shop: Path, out: Path, *more: str, threat: str = f"linf:{RADIUS}", data: str = "gray"
) -> tuple[int, str, str]:
    model = f"{shop}/nets.py:linear"
    return call("attack", "--model", model, "--data", f"{shop}/{data}.npz", "--threat", threat, "--attacks", "fgsm",
                "--out", str(out), *more)  # fmt: skip


def s_of(x: np.ndarray) -> np.ndarray:
    return (x.astype(np.float64).reshape(-1, 4, 4) * [1, 1, -1, -1]).sum((1, 2))


def test_exactly_what_the_closed_form_turns_is_written(shop: Path, tmp_path: Path) -> None:
    code, out, err = attack(shop, tmp_path / "adv.npz")
    assert code == 0, err
    whole, found = np.load(shop / "gray.npz"), np.load(tmp_path / "adv.npz", allow_pickle=False)
    s, y = s_of(whole["x_test"]) / 255, whole["y_test"]
    right = (s > 0) == y
    turned = right & (np.abs(s) < 16 * RADIUS)  # no value comes near the box, so every one moves by the radius
    assert 10 < turned.sum() < right.sum() < 120
    assert sorted(found["index"]) == np.flatnonzero(turned).tolist()
    order = found["index"]
    assert (found["y"] == y[order]).all() and (found["prediction_before"] == y[order]).all()
    assert (found["prediction_after"] == 1 - y[order]).all()
    assert np.array_equal(found["x"][:, 0], (whole["x_test"][order] / np.float32(255)).astype(np.float32))
    assert np.abs(found["x_adv"] - found["x"]).max() <= RADIUS * (1 + 1e-5)
    assert found["size"] == pytest.approx(np.full(len(order), RADIUS), rel=1e-5)
    assert ((s_of(found["x_adv"]) > 0) != found["y"].astype(bool)).all()
    after = 1 / (1 + np.exp(-np.abs(s_of(found["x_adv"]))))
    assert found["confidence_after"] == pytest.approx(after, abs=1e-5)
    assert f"{turned.sum()} adversarial examples" in out and f"{right.sum()} were right" in out
    assert (str(found["attacks"]), str(found["split"]), int(found["seed"])) == ("fgsm", "test", 0)


def test_it_holds_what_an_evaluation_turns(shop: Path, tmp_path: Path) -> None:
    plan = ["--attacks", "pgd:num_steps=3", "--num-examples", "50", "--seed", "3"]
    assert attack(shop, tmp_path / "adv.npz", *plan)[0] == 0
    found = np.load(tmp_path / "adv.npz")
    code, _, err = call(
        "evaluate", "--model", f"{shop}/nets.py:linear", "--data", f"{shop}/gray.npz", "--threat", f"linf:{RADIUS}",
        *plan, "--no-checks", "--certify", "none", "--out", str(tmp_path / "e"),
    )  # fmt: skip
    assert code == 0, err
    lines = (tmp_path / "e" / "examples.csv").read_text().splitlines()
    rows = {int(row["index"]): row for row in csv.DictReader(lines)}
    assert sorted(found["index"]) == sorted(index for index, row in rows.items() if row["broken_by"])
    for index, after, size in zip(found["index"], found["prediction_after"], found["size"], strict=True):
        assert int(rows[index]["adversarial_prediction"]) == after
        assert float(rows[index]["size"]) == pytest.approx(size, rel=1e-5)


def test_pictures_are_what_another_reader_sees(shop: Path, tmp_path: Path) -> None:
    code, out, err = attack(shop, tmp_path / "adv.npz", "--png", str(tmp_path / "png"))
    assert code == 0, err
    found = np.load(tmp_path / "adv.npz")
    files = sorted((tmp_path / "png").iterdir())
    assert [int(path.name[:6]) for path in files] == sorted(found["index"])
    seen = {int(path.name[:6]): imread(path) for path in files}
    pixels = np.stack([seen[index] for index in found["index"]])
    assert np.abs(pixels - found["x_adv"][:, 0]).max() < 1e-6  # the radius is whole in 255ths: nothing is lost
    fools = int(((s_of(pixels) > 0) != found["y"].astype(bool)).sum())
    assert f"read from the files again {fools} ({fools / len(files):.1%}) still fool, {fools} of them within" in out
    first = found["index"][0]
    name = f"{first:06d}-{found['y'][0]}-seen-as-{found['prediction_after'][0]}.png"
    assert (tmp_path / "png" / name).exists()
    code, _, err = attack(shop, tmp_path / "adv.npz", "--png", str(tmp_path / "png"))
    assert code == 2 and "is not empty" in err


def test_what_eight_bits_cannot_hold_fools_no_more(shop: Path, tmp_path: Path) -> None:
    """Below half a step of 255ths every picture is the clean one again, and that is told."""
    code, out, err = attack(shop, tmp_path / "adv.npz", "--png", str(tmp_path / "png"), threat=f"linf:{0.49 / 255}")
    assert code == 0, err
    num = len(np.load(tmp_path / "adv.npz")["index"])
    assert num > 0 and f"{num} pictures; read from the files again 0 (0.0%) still fool" in out


@pytest.mark.parametrize("threat", [Linf(2.6 / 255), L2(0.05), L1(0.3), Linf(8 / 255)], ids=str)
def test_rounded_pictures_stay_within_the_ball(threat: Linf | L2 | L1) -> None:
    draw = torch.Generator().manual_seed(0)
    x = torch.randint(0, 256, (200, 3, 3, 3), generator=draw) / 255
    z = threat.project(x, torch.randn(x.shape, generator=draw))
    bits = in_8_bits(x, x + z, threat)
    moved = (bits / 255 - x).flatten(1).double()
    length = {Linf: moved.abs().amax(1), L2: moved.norm(dim=1), L1: moved.abs().sum(1)}[type(threat)]
    assert (length <= float(threat.radius) * (1 + 1e-4) + 1e-6).all()
    assert (bits / 255 - (x + z)).abs().max() <= 1 / 255 + 1e-6  # never further than the next picture
    near = (255 * (x + z)).round()
    alike = (bits == near).flatten(1).all(1)
    out = (near / 255 - x).flatten(1).double()
    outside = {Linf: out.abs().amax(1), L2: out.norm(dim=1), L1: out.abs().sum(1)}[type(threat)]
    assert (alike == (outside <= float(threat.radius) * (1 + 1e-4))).all()  # the nearest one wherever that is permitted


def test_no_example_turned_is_an_empty_file(shop: Path, tmp_path: Path) -> None:
    code, out, err = attack(shop, tmp_path / "adv.npz", "--png", str(tmp_path / "png"), threat="linf:0.0000001")
    assert code == 0, err
    found = np.load(tmp_path / "adv.npz")
    assert found["x"].shape == found["x_adv"].shape == (0, 1, 4, 4) and found["size"].shape == (0,)
    assert "0 adversarial examples" in out and "0 pictures" in out


def test_vectors_go_to_npz_and_are_no_pictures(shop: Path, tmp_path: Path) -> None:
    code, _, err = attack(shop, tmp_path / "adv.npz", data="rows")
    assert code == 2 and "error:" in err  # the model wants images
    (tmp_path / "flat.py").write_text(
        "from torch import nn\nimport torch\n"
        "def make():\n    net = nn.Linear(16, 2)\n    nn.init.constant_(net.bias, 0)\n"
        "    net.weight.data = torch.tensor([0.0, 1.0])[:, None] * torch.tensor([1.0, 1, -1, -1] * 4)\n    return net\n"
    )
    asked = ["--model", f"{tmp_path}/flat.py:make", "--data", f"{shop}/rows.npz", "--threat", "linf:0.03",
             "--attacks", "fgsm", "--out", str(tmp_path / "adv.npz")]  # fmt: skip
    assert call("attack", *asked)[0] == 0
    assert np.load(tmp_path / "adv.npz")["x_adv"].shape[1:] == (16,)
    code, _, err = call("attack", *asked, "--png", str(tmp_path / "png"))
    assert code == 2 and "no images with 1 or 3 channels" in err and not (tmp_path / "png").exists()


def test_bad_requests_are_told_before_any_work(shop: Path, tmp_path: Path) -> None:
    code, _, err = attack(shop, tmp_path / "adv.pt")
    assert code == 2 and "ends in .npz" in err
    code, _, err = call("attack", "--out", str(tmp_path / "adv.npz"), "--data", "digits")
    assert code == 2 and "give a run folder" in err
    assert not list(tmp_path.iterdir())
