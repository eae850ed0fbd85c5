"""The proof of the house: a kind of input that nothing shared has heard of, registered by one line."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import toy_tokens

import sparring
from command import call
from sparring import modalities
from sparring.modalities import find, load_data
from sparring.threats import check_threat

THREAT = "words:0.3"


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(modalities.MODALITIES, "tokens", "toy_tokens")
    modalities._read.cache_clear()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that the command line trained."""
    out = tmp_path_factory.mktemp("toy") / "run"
    modalities.MODALITIES["tokens"] = "toy_tokens"
    try:
        code, _, err = call("train", "--data", "toy", "--threat", THREAT, "--out", str(out), "--set", "num_steps=2")
        assert code == 0, err
        assert "data toy is taken as tokens; tokens:toy would say so" in err
    finally:
        del modalities.MODALITIES["tokens"]
    return out


def test_the_threat_keeps_the_contract() -> None:
    data = load_data("tokens:toy")
    threat = find("tokens").make_threat("words:0.5", data)
    check_threat(threat, {name: value[:6] for name, value in data.x_test.items()})


def test_a_run_resumes_and_loads(run: Path) -> None:
    config = json.loads((run / "config.json").read_text())
    assert config["kind"] == "tokens" and config["given"]["vocabulary"] == 20
    assert config["settings"]["recipe"] == "pgd-at:num_steps=2" and config["settings"]["model"] == "bag"
    weights = (run / "best.safetensors").read_bytes()
    code, _, err = call("train", "--resume", "--out", str(run))
    assert code == 0, err
    assert (run / "best.safetensors").read_bytes() == weights
    model, data = sparring.load(run), load_data("toy")
    right = model(data.x_test).argmax(1) == data.y_test
    assert right.float().mean() > 0.8


def test_an_evaluation_in_memory(run: Path) -> None:
    data, tokens = load_data("toy"), find("tokens")
    found = sparring.evaluate(
        sparring.load(run), data.batches("test", 25, 60), tokens.make_threat(THREAT, data), modality=tokens,
        class_names=data.class_names,
    )  # fmt: skip
    assert found.robust.value < found.clean.value and "hard_to_turn" in found.metrics
    assert [attack.name for attack in found.attacks] == ["gradient-ascent:num_steps=3", "greedy"]
    assert found.verdict in ("TRUSTED", "SUSPECT", "INVALID") and found.attacks[1].broke > 0


def test_lists_show_it() -> None:
    for what, word in (("modalities", "tokens"), ("threats", "words:RADIUS"), ("attacks", "greedy"), ("models", "bag"),
                       ("data", "400 rows")):  # fmt: skip
        code, out, err = call("list", what)
        assert code == 0 and word in out, err


def test_the_grammar_of_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert load_data("tokens:toy,length=6").shape == {"ids": (6,), "mask": (6,)}
    with pytest.raises(ValueError, match="no option 'size'; it takes path, length, vocabulary"):
        load_data("tokens:toy,size=6")
    both = tmp_path / "both.npz"
    both.touch()
    monkeypatch.setattr(toy_tokens, "MODALITY", replace(toy_tokens.MODALITY, reads=lambda path: True))
    with pytest.raises(ValueError, match=rf"images:{both} or tokens:{both}"):
        load_data(str(both))
    code, _, err = call("train", "--data", "toy", "--threat", THREAT, "--out", str(tmp_path / "o"), "--set", "crop=2")
    assert code == 2 and "'crop' is unknown" in err


def test_one_batch_is_as_good_as_many() -> None:
    data, tokens = load_data("tokens:toy"), find("tokens")
    threat, torch_model = tokens.make_threat(THREAT, data), toy_tokens.bag(20, 2)
    whole, parts = (
        sparring.measure(torch_model, data.batches("test", size), threat, tokens.make_plan("fast", threat))
        for size in (100, 33)
    )
    assert torch.equal(whole.table["robust"], parts.table["robust"])


def test_the_command_evaluates_reports_and_gates(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "evaluation"
    code, _, err = call("evaluate", str(run), "--out", str(out), "--num-examples", "60", "--batch-size", "20")
    assert code == 0, err
    results = json.loads((out / "results.json").read_text())
    assert results["data"]["kind"] == "tokens" and results["metrics"]["hard_to_turn"]["higher_is_better"] is False
    assert [attack["name"] for attack in results["attacks"]] == ["gradient-ascent:num_steps=3", "greedy"]
    assert "<ul class='tokens'>" in (out / "report.html").read_text()
    code, _, err = call("report", str(out), "--out", str(tmp_path / "again.html"))
    assert code == 0 and "<ul class='tokens'>" in (tmp_path / "again.html").read_text(), err
    value = results["metrics"]["hard_to_turn"]["value"]
    for side, limit, expected in (("--max", value, 0), ("--min", value + 0.01, 1)):
        code, told, err = call("gate", str(out), side, f"hard_to_turn={limit}", "--allow-suspect")
        assert code == expected and "hard_to_turn" in told, err


def test_adversarial_examples_of_named_inputs(run: Path, tmp_path: Path) -> None:
    code, _, err = call("attack", str(run), "--num-examples", "40", "--out", str(tmp_path / "adv.npz"))
    assert code == 0, err
    found = np.load(tmp_path / "adv.npz", allow_pickle=False)
    model, data = sparring.load(run), load_data("toy")
    assert len(found["index"]) and np.array_equal(found["x/ids"], data.x_test["ids"][found["index"]].numpy())
    adversarial = {name: torch.from_numpy(found[f"x_adv/{name}"]) for name in data.x_test}
    assert (model(adversarial).argmax(1).numpy() == found["prediction_after"]).all()
    assert (found["prediction_after"] != found["y"]).all() and (found["prediction_before"] == found["y"]).all()
    code, _, err = call("attack", str(run), "--png", str(tmp_path / "png"), "--out", str(tmp_path / "b.npz"))
    assert code == 2 and "has no pictures" in err and not (tmp_path / "b.npz").exists()
