"""Generators from the command line: trained without a threat, resumed, sampled, judged, and what is refused."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from command import call
from sparring.app.train_run import load, resume_run, settings_for, start_run
from sparring.core.noise import Noise
from sparring.modalities import load_data
from sparring.modalities.images.generate import gan


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


def test_the_guard_counts_classes_only_where_the_classifier_tells_them_apart(data: str, tmp_path: Path) -> None:
    """One that is right on 65 % finds few classes in the poor images of a healthy start. Training images tell it."""
    found, draw = load_data(data), torch.Generator().manual_seed(0)
    of_training, of_test = (torch.randint(2, (num,), generator=draw) for num in (300, 260))
    counts = {}
    for name, y, y_test in (
        ("true", found.y_train, found.y_test), ("chance", of_training, found.y_test),
        ("test part at chance", found.y_train, of_test),
    ):  # fmt: skip
        _, guard = gan().judge(replace(found, y_test=y_test), (found.x_train, y), tmp_path / name, 0)
        counts[name] = guard.classify is not None and len(guard.real.shares)
    assert counts == {"true": 2, "chance": False, "test part at chance": 2}


def test_samples_are_those_of_the_generator_with_labels_and_origin(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "extra.npz"
    ended = call("sample", str(run), "--per-class", "3", "--seed", "4", "--out", str(out))
    assert ended.code == 0 and "6 images" in ended.out, ended.err
    with np.load(out, allow_pickle=False) as file:
        x, y, told = file["x"], file["y"], json.loads(str(file["provenance"]))
    assert x.dtype == np.uint8 and x.shape == (6, 1, 8, 8) and y.tolist() == [0, 1] * 3 and y.dtype == np.int64
    assert told["recipe"] == "gan:gamma=0.5" and told["seed"] == 4 and told["labels"] == "condition"
    noise = Noise.make(4, "sample", torch.arange(6))
    with torch.no_grad():
        images = load(run)(noise.normal((32,)), torch.from_numpy(y))
    assert np.array_equal(x, (images * 255).round().numpy().astype(np.uint8))
    call("sample", str(run), "--per-class", "3", "--seed", "4", "--out", str(tmp_path / "again.npz"))
    assert (tmp_path / "again.npz").read_bytes() == out.read_bytes()


def test_labels_of_a_classifier_are_its_probabilities(data: str, run: Path, tmp_path: Path) -> None:
    judge, out = tmp_path / "judge", tmp_path / "soft.npz"
    asked = ("--threat", "linf:0.01", "--recipe", "standard", "--model", "mlp", "--epochs", "1")
    assert call("train", "--data", data, *asked, "--out", str(judge)).code == 0
    assert call("sample", str(run), "-n", "5", "--labels", str(judge), "--out", str(out)).code == 0
    with np.load(out, allow_pickle=False) as file:
        y, told = file["y"], json.loads(str(file["provenance"]))
    assert y.shape == (5, 2) and y.sum(1) == pytest.approx(1, abs=1e-6) and told["labels"] == "judge"
    ended = call("sample", str(judge), "--out", str(out))
    assert ended.code == 2 and "holds no generator" in ended.err


def test_quality_of_real_images_is_trusted_and_of_noise_shows(data: str, tmp_path: Path) -> None:
    with np.load(data) as file:
        real = file["x_train"]
    rng = np.random.default_rng(1)
    noise = rng.integers(0, 256, (260, 8, 8)).astype(np.uint8)
    found = {}
    for name, x in (("real", real[:260]), ("noise", noise)):
        np.savez(tmp_path / f"{name}.npz", x=x)
        out = tmp_path / name
        ended = call("quality", data, str(tmp_path / f"{name}.npz"), "--out", str(out))
        assert ended.code == 0, ended.err
        found[name] = json.loads((out / "quality.json").read_text(encoding="utf-8"))
        assert (out / "report.html").read_text(encoding="utf-8").count("data:image/png;base64,") == 2
    rows = found["real"]["rows"]
    assert rows["generated"]["nearest_ratio"] == pytest.approx(0, abs=0.01)  # they are the training images
    assert "copies" in found["real"]["findings"][-1] and found["real"]["verdict"] == "SUSPECT"
    assert rows["floor"]["coverage"] > 0.93 and rows["noise"]["precision"] < 0.05 and rows["blurred"]["precision"] < 0.8
    assert rows["repeated"]["coverage"] < 0.4 and rows["repeated"]["nearest_ratio"] < 0.05
    assert found["noise"]["rows"]["generated"]["coverage"] < 0.1 and found["noise"]["verdict"] == "TRUSTED"
    assert found["noise"]["extractor"]["sha256"] == found["real"]["extractor"]["sha256"]


def test_the_page_on_a_run_shows_what_it_learned(data: str, run: Path, tmp_path: Path) -> None:
    copy = tmp_path / "gan"
    shutil.copytree(run, copy)
    record = json.loads((copy / "training.json").read_text(encoding="utf-8"))
    record["rollbacks"] = [{"step": 20, "back_to": 7, "rate_factor": 0.5, "reason": "collapse <b>"}]
    (copy / "training.json").write_text(json.dumps(record), encoding="utf-8")
    assert call("quality", data, str(copy)).code == 0
    page = (copy / "quality" / "report.html").read_text(encoding="utf-8")
    told = json.loads((copy / "quality" / "quality.json").read_text(encoding="utf-8"))
    shares = [*told["rows"]["generated"]["class_shares"], *told["real_class_shares"]]
    bars = [float(width) for width in re.findall(r'<rect (?:width|x)="([\d.]+)%"', page)]
    scale = [share / max(shares) for share in (shares[0], shares[2], shares[1], shares[3])]  # a bar and a line by class
    assert bars == pytest.approx([100 / 1.1 * part for part in scale], abs=0.06), "all on one scale"
    found = json.loads((copy / "quality" / "quality.json").read_text(encoding="utf-8"))
    assert found["extractor"]["sha256"][:12] in page
    assert "At step 20: collapse &lt;b&gt;; back to step 7." in page and "<svg" in page
    assert page.count("data:image/png;base64,") == 4 and "no Inception FID" in page
    (copy / "quality" / "report.html").unlink()
    ended = call("report", str(copy))
    assert ended.code == 0 and (copy / "quality" / "report.html").read_text(encoding="utf-8") == page


def test_what_cannot_be_judged_is_refused(data: str, run: Path, tmp_path: Path) -> None:
    np.savez(tmp_path / "wide.npz", x=np.full((60, 1, 8, 8), 3.0))
    np.savez(tmp_path / "other.npz", x=np.zeros((60, 1, 9, 9)))
    for fake, words in (("wide", "outside [0, 1]"), ("other", "those of halves are (1, 8, 8)"), ("none", "neither")):
        ended = call("quality", data, str(tmp_path / f"{fake}.npz"), "--out", str(tmp_path / "out"))
        assert ended.code == 2 and words in ended.err
    features = tmp_path / "own.py"
    features.write_text("def embed(x):\n    return x.flatten(1)\n\ndef bad(x):\n    return x\n", encoding="utf-8")
    asked = ("quality", data, str(run), "--out", str(tmp_path / "out"), "--features")
    assert call(*asked, f"{features}:embed").code == 0
    ended = call(*asked, f"{features}:bad")
    assert ended.code == 2 and "expected finite numbers (N, F)" in ended.err
