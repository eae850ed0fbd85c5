"""Training with more examples from a file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

import command
from contracts import seeded, stream
from sparring.app.settings import TrainingSettings
from sparring.app.train_run import resume_run, start_run
from sparring.core.files import read_json
from sparring.modalities import load_data
from sparring.threats import Linf
from sparring.training.mart import mart
from sparring.training.one_step import free
from sparring.training.recipes import mixed, pgd_at, standard, trades

DATA = load_data("digits")
OWN: dict[str, Any] = {"data": "digits", "threat": "linf:0.1", "model": "mlp", "epochs": 2, "held_out": 50}


def write(path: Path, **arrays: Any) -> Path:
    np.savez(path, **arrays)
    return path


def pixels(num: int = 40) -> np.ndarray:
    return (DATA.x_test[:num] * 255).round().to(torch.uint8).numpy()


def hard(num: int = 40) -> np.ndarray:
    return DATA.y_test[:num].numpy()


def soft(num: int = 40) -> np.ndarray:
    return F.softmax(3 * F.one_hot(DATA.y_test[:num], 10).float(), 1).numpy()


@pytest.mark.parametrize("labels", ["hard", "soft"])
def test_killed_with_extra_examples_it_ends_in_the_same_bits(tmp_path: Path, labels: str) -> None:
    told = json.dumps({"generator": "a test", "seed": 3})
    y = hard() if labels == "hard" else soft()
    file = write(tmp_path / "extra.npz", x=pixels(), y=y, provenance=np.array(told))
    settings = TrainingSettings(**OWN, recipe="pgd-at:num_steps=1", extra=str(file), extra_share=0.3, averaging=0.9)
    start_run(settings, tmp_path / "whole")
    for step in (1, 17, 20):
        out = tmp_path / f"killed{step}"
        assert start_run(settings, out, observe=lambda state, step=step: state.step == step).stopped
        resume_run(out)
        for name in ("last", "averaged"):
            one, two = (load_file(run / f"{name}.safetensors") for run in (tmp_path / "whole", out))
            assert all(torch.equal(one[key], two[key]) for key in one), step
    record = read_json(tmp_path / "whole" / "training.json", "the record")["extra"]
    assert record["provenance"] == json.loads(told) and record["examples"] == 40 and record["share"] == 0.3
    start_run(settings.but(extra=None), tmp_path / "without")
    one, two = (load_file(tmp_path / run / "last.safetensors") for run in ("whole", "without"))
    assert any(not torch.equal(one[key], two[key]) for key in one)


@pytest.mark.parametrize(
    ("arrays", "sentence"),
    [
        ({"x": pixels()}, r"has no labels: expected y beside x, class numbers \(N,\) or probabilities \(N, 10\)"),
        ({"y": hard()}, "expected examples x, found y"),
        ({"x": pixels(), "y": hard(39)}, "x has 40 examples and y 39 labels"),
        ({"x": pixels(), "y": hard() + 5}, "expected class numbers.* from 0 to 9"),
        ({"x": pixels(), "y": soft() * 2}, "rows of 10 probabilities with the sum 1"),
        ({"x": pixels(), "y": soft()[:, :9]}, "rows of 10 probabilities with the sum 1"),
        ({"x": pixels()[:, :, :7], "y": hard()}, r"one of it \(1, 7, 8\); those of digits are \(1, 8, 8\)"),
        ({"x": pixels().astype(np.float32), "y": hard()}, "They look like bytes"),
    ],
)
def test_files_that_do_not_fit_are_refused(tmp_path: Path, arrays: dict[str, Any], sentence: str) -> None:
    file = write(tmp_path / "extra.npz", **arrays)
    with pytest.raises(ValueError, match=sentence):
        start_run(TrainingSettings(**OWN, extra=str(file)), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_soft_labels_and_weights_of_classes_do_not_go_together(tmp_path: Path) -> None:
    file = write(tmp_path / "extra.npz", x=pixels()[:, 0], y=soft())
    with pytest.raises(ValueError, match="class_weights need one class for each example"):
        start_run(TrainingSettings(**OWN, extra=str(file), class_weights="balanced"), tmp_path / "run")
    with pytest.raises(FileNotFoundError, match="there is no file"):
        start_run(TrainingSettings(**OWN, extra=str(tmp_path / "nothing.npz")), tmp_path / "run")


@pytest.mark.parametrize("builder", [standard, pgd_at, mixed, trades, mart, free])
def test_probabilities_that_are_certain_train_like_class_numbers(builder: Any) -> None:
    model = seeded(lambda: nn.Sequential(nn.Flatten(), nn.Linear(6, 4)).double())
    x, y = torch.rand(5, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64), torch.arange(5) % 4
    losses = [builder(Linf(0.1))(model, x, t, noise=stream(5)) for t in (y, F.one_hot(y, 4).double())]
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-9, atol=1e-12)
    mean = F.cross_entropy(model(x), torch.full((5, 4), 0.25).double())
    torch.testing.assert_close(standard()(model, x, torch.full((5, 4), 0.25).double()), mean)
    for wrong in (torch.full((5, 4), 0.5).double(), torch.full((5, 3), 1 / 3).double(), -F.one_hot(y, 4).double()):
        with pytest.raises(ValueError, match=r"soft labels are .*expected probabilities|target has 3 probabilities"):
            builder(Linf(0.1))(model, x, wrong, noise=stream(5))


def test_the_command_takes_them(tmp_path: Path) -> None:
    file = write(tmp_path / "extra.npz", x=pixels(), y=hard())
    done = command.call(
        "train", "--data", "digits", "--threat", "linf:0.1", "--model", "mlp", "--recipe", "standard", "--epochs", "1",
        "--extra", str(file), "--extra-share", "0.25", "--out", str(tmp_path / "run"),
    )  # fmt: skip
    assert done.code in (None, 0), done.err
    assert read_json(tmp_path / "run" / "training.json", "the record")["extra"]["share"] == 0.25
