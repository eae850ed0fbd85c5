"""Generators from the command line: trained without a threat, resumed, sampled, judged, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from command import call
from sparring.app.train_run import load, resume_run, settings_for, start_run


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Two kinds of 8x8 pictures, bright above or below: 300 for training, 260 for testing."""
    path, rng = tmp_path_factory.mktemp("data") / "halves.npz", np.random.default_rng(0)
    arrays = {}
    for part, num in (("train", 300), ("test", 260)):
        y, x = np.arange(num) % 2, rng.integers(0, 90, (num, 8, 8))
        for row, label in zip(x, y, strict=True):
            row[4 * label : 4 * label + 4] += 140
        arrays |= {f"x_{part}": x.astype(np.uint8), f"y_{part}": y}
    np.savez(path, **arrays)
    return str(path)


@pytest.fixture(scope="module")
def run(data: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A generator that learned a little; not to be changed."""
    out = tmp_path_factory.mktemp("runs") / "gan"
    ended = call(
        "train", "--data", data, "--recipe", "gan:gamma=0.5", "--epochs", "2", "--set", "passes=3", "--out", str(out)
    )
    assert ended.code == 0, ended.err
    assert f"sparring quality DATA {out}" in ended.err and "coverage" in ended.err
    return out


def test_a_run_needs_no_threat_and_keeps_what_it_was_judged_by(run: Path) -> None:
    config = json.loads((run / "config.json").read_text(encoding="utf-8"))["settings"]
    assert config["threat"] == "none" and config["model"] is None and config["augment"] == {}
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [line["step"] for line in lines] == [14, 28]
    assert {"fid", "coverage", "floor_fid", "floor_coverage", "entropy", "train_loss_d", "train_gap"} <= set(lines[0])
    assert sorted(p.name for p in (run / "samples").iterdir()) == ["epoch-0001.png", "epoch-0002.png"]
    pair = load(run)
    assert not pair.training and pair(torch.zeros(2, 32), torch.tensor([0, 1])).shape == (2, 1, 8, 8)


def test_killed_it_goes_on_to_the_same_bits(data: str, run: Path, tmp_path: Path) -> None:
    asked = {"data": data, "recipe": "gan:gamma=0.5", "epochs": 2, "passes": 3}
    start_run(settings_for(asked), tmp_path / "again", observe=lambda state: state.step == 17)
    resume_run(tmp_path / "again")
    for name in ("best", "last", "averaged", "features"):
        one, other = (load_file(folder / f"{name}.safetensors") for folder in (run, tmp_path / "again"))
        assert all(torch.equal(one[key], other[key]) for key in one)


def test_minutes_end_a_run_at_the_end_of_an_epoch(data: str, tmp_path: Path) -> None:
    out = tmp_path / "short"
    ended = call(
        "train", "--data", data, "--recipe", "gan", "--minutes", "0.01", "--set", "passes=1", "--out", str(out)
    )
    assert ended.code == 0, ended.err
    record = json.loads((out / "training.json").read_text(encoding="utf-8"))
    assert record["stopped"] is None and record["last"]["step"] % 4 == 0 and record["seconds"] >= 0.6


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("train", "--recipe", "gan", "--threat", "linf:0.1"), "asks for no threat; leave out --threat linf:0.1"),
        (("train", "--recipe", "gan", "--model", "mlp"), "brings its own network"),
        (("train", "--recipe", "gan:loss=wgan"), "is not one of ns-r1, hinge, r3"),
        (("train", "--recipe", "trades"), "--data and --threat are needed"),
    ],
)
def test_what_does_not_fit_is_refused(arguments: tuple[str, ...], words: str, data: str, tmp_path: Path) -> None:
    ended = call(*arguments, "--data", data, "--out", str(tmp_path / "run"))
    assert ended.code == 2 and words in ended.err and not (tmp_path / "run").exists()


def test_a_generator_has_no_robust_accuracy(run: Path) -> None:
    ended = call("evaluate", str(run))
    assert ended.code == 2 and "makes no classifier" in ended.err and "sparring quality" in ended.err
