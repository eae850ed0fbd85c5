"""Exported models predict what they predicted, in programs of their own."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import sparring
from command import call
from sparring.app.export import export_model


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "run"
    asked = ["--data", "digits", "--threat", "linf:0.1", "--recipe", "standard", "--epochs", "1"]
    assert call("train", "--model", "cnn-small", *asked, "--out", str(folder)).code == 0
    return folder


def test_torch_export_runs_where_sparring_is_not_loaded(run: Path, tmp_path: Path) -> None:
    code, out, err = call("export", str(run), "--out", f"{tmp_path}/m.pt2")
    assert code == 0 and "of 100 examples 100 are taken for the same class" in out, err
    x = sparring.load_data("digits").x_test[:7]
    torch.save(x, tmp_path / "x.pt")
    script = (
        "import sys, torch; x = torch.load('x.pt'); y = torch.export.load('m.pt2').module()(x).detach();"
        "torch.save(y, 'y.pt'); print('sparring' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False"]
    torch.testing.assert_close(torch.load(tmp_path / "y.pt"), sparring.load(run)(x).detach())


@pytest.mark.filterwarnings("ignore:::onnx")
def test_onnx_has_the_same_predictions(run: Path) -> None:
    onnx = pytest.importorskip("onnx")
    from onnx.reference import ReferenceEvaluator

    code, out, err = call("export", str(run), "--to", "onnx")
    assert code == 0 and str(run / "model.onnx") in out, err
    x = sparring.load_data("digits").x_test[5:8]
    found = ReferenceEvaluator(onnx.load(run / "model.onnx")).run(None, {"x": x.numpy()})[0]
    torch.testing.assert_close(torch.from_numpy(found), sparring.load(run)(x).detach(), atol=1e-5, rtol=1e-5)


class Decides(nn.Module):
    """What it computes depends on values, in Python."""

    def forward(self, x: Tensor) -> Tensor:
        return x if float(x.sum()) > 1 else -x


class Another(nn.Module):
    """Computes otherwise when it is exported."""

    def forward(self, x: Tensor) -> Tensor:
        return x + 1 if torch.compiler.is_exporting() else x


def test_what_cannot_be_exported_or_changes_is_refused_and_leaves_no_file(tmp_path: Path) -> None:
    x, out = torch.rand(5, 3), tmp_path / "m.pt2"
    with pytest.raises(ValueError, match=r"cannot hold this model \(.*depends on values in Python"):
        export_model(Decides(), x, out, "torch.export")
    with pytest.raises(ValueError, match="predicts otherwise than the model: logits differ by 1;"):
        export_model(Another(), x, out, "torch.export")
    with pytest.raises(ValueError, match="models of one tensor"):
        export_model(nn.Identity(), {"a": x}, out, "torch.export")
    assert list(tmp_path.iterdir()) == []
    assert export_model(nn.Linear(3, 2), x, out, "torch.export") == (5, 0.0) and out.exists()
    assert torch.export.load(io.BytesIO(out.read_bytes())).module()(x[:1]).shape == (1, 2)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("nowhere", "no run folder"), ("{run} --out m.onnx", "ends in .pt2"), ("{run} --to keras", "keras"),
        ("{run} --checkpoint middle", "middle"),
    ],
)  # fmt: skip
def test_refusals(run: Path, words: str, told: str) -> None:
    code, _, err = call("export", *words.format(run=run).split())
    assert code == 2 and told in err
