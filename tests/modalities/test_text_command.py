"""Texts from the command line: train, resume, evaluate, report, gate. Oracles: the files, the strings, a second run."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_texts import write

import sparring
from command import call
from sparring import modalities
from sparring.modalities import load_data
from sparring.modalities.text import data as reading


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on the tiny corpus, and its evaluation."""
    out = tmp_path_factory.mktemp("text")
    settings = ("--data", write(out), "--threat", "words:1.0", "--recipe", "standard", "--epochs", "3")
    rates = ("--set", "learning_rate=0.03", "--set", "batch_size=16")
    code, _, err = call("train", *settings, *rates, "--out", str(out / "run"))
    assert code == 0, err
    code, _, err = call("evaluate", str(out / "run"), "--out", str(out / "run" / "evaluation"), "--num-examples", "24")
    assert code == 0, err
    return out


def test_the_run_keeps_its_vocabulary(folder: Path) -> None:
    run, data = folder / "run", load_data(write(folder))
    kept = (run / "vocabulary.txt").read_text(encoding="utf-8").split("\n")[:-1]
    assert kept == list(data.lexicon.words[2 : data.facts["vocabulary"]])  # type: ignore[attr-defined]
    config = json.loads((run / "config.json").read_text())
    assert config["kept"] == ["vocabulary"] and config["given"]["vocabulary"] == len(kept) + 2
    model = sparring.load(run)
    right = (model(data.x_test).argmax(1) == data.y_test).float().mean()
    assert right > 0.9
    # other texts are read with the run's vocabulary, whatever their own would have been
    (folder / "other.csv").write_text(
        "review,stars\nZebras were charming and witty,pos\nthe awful zebra dull,neg\nfine,pos\nbad zebra,neg\n"
    )
    other = (
        f"text:{folder / 'other.csv'},text=review,label=stars,list={folder / 'list.tsv'},test={folder / 'other.csv'}"
    )
    out = folder / "other"
    code, _, err = call("evaluate", str(run), "--data", other, "--out", str(out), "--no-checks", "--attacks", "greedy")
    results = json.loads((out / "results.json").read_text())
    assert code == 0 and results["data"]["settings"]["vocabulary"] == len(kept) + 2, err
    assert [row.split(",")[2] for row in (out / "examples.csv").read_text().splitlines()[1:3]] == ["1", "0"]


def test_a_resumed_run_reads_what_was_kept(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = folder / "run"
    weights = (run / "best.safetensors").read_bytes()
    modalities._read.cache_clear()
    read, asked = reading._lexicon, []
    monkeypatch.setattr(reading, "_lexicon", lambda *given: (asked.append(given[2]), read(*given))[1])
    code, _, err = call("train", "--resume", "--out", str(run))
    assert code == 0, err
    assert (run / "best.safetensors").read_bytes() == weights and str(run / "vocabulary.txt") in asked


def test_the_report_shows_sentences(folder: Path) -> None:
    evaluation = folder / "run" / "evaluation"
    results = json.loads((evaluation / "results.json").read_text())
    assert results["data"]["kind"] == "text" and results["threat"]["words"].startswith(
        "The opponent may replace all words"
    )
    assert results["metrics"]["robust_accuracy"]["value"] < results["metrics"]["clean_accuracy"]["value"]
    page = (evaluation / "report.html").read_text(encoding="utf-8")
    assert "&lt;b&gt;" in page and "<b>witty" not in page and "<mark>" in page and "of the words of these texts" in page
    gallery = sparring.results.read.read_evaluation(evaluation).gallery
    assert gallery is not None
    pairs = [json.loads(str(told)) for told in gallery["words"]]
    often = Counter(word for text in pairs for word in {before.lower() for before, after in text if before != after})
    shown = re.findall(r"<i>(\w+)</i> \((\d+)\)", page)
    assert shown and [int(count) for _, count in shown] == sorted(often.values(), reverse=True)[: len(shown)]
    assert all(often[word] == int(count) for word, count in shown)
    strings = load_data(write(folder)).strings["test"]  # type: ignore[attr-defined]
    for told, index in zip(gallery["words"], gallery["index"], strict=True):
        assert "".join(before for before, _ in json.loads(str(told))) == strings[int(index)]
    code, _, err = call("report", str(evaluation), "--out", str(folder / "again.html"))
    assert code == 0 and (folder / "again.html").read_text(encoding="utf-8").count("<mark>") == page.count("<mark>"), (
        err
    )


def test_turned_texts_are_written_as_lines_of_json(folder: Path) -> None:
    asked = ("attack", str(folder / "run"), "--num-examples", "24", "--attacks", "greedy", "--out")
    for name in ("adv.jsonl", "adv.npz"):
        code, _, err = call(*asked, str(folder / name))
        assert code == 0, err
    lines = [json.loads(line) for line in (folder / "adv.jsonl").read_text(encoding="utf-8").splitlines()]
    arrays, data = np.load(folder / "adv.npz", allow_pickle=False), load_data(write(folder))
    assert [line["index"] for line in lines] == arrays["index"].tolist() and lines
    for line, y, after in zip(lines, arrays["y"], arrays["prediction_after"], strict=True):
        assert line["before"] == data.strings["test"][line["index"]] != line["after"]  # type: ignore[attr-defined]
        assert [line["label"], line["taken_after"]] == [data.class_names[int(k)] for k in (y, after)]
    code, _, err = call(*asked, str(folder / "adv.csv"))
    assert code == 2 and "text: expected a file that ends in .npz or .jsonl, got .csv" in err


def test_the_gate_judges_it(folder: Path) -> None:
    robust = json.loads((folder / "run/evaluation/results.json").read_text())["metrics"]["robust_accuracy"]["value"]
    for limit, expected in ((robust - 0.01, 0), (robust + 0.01, 1)):
        code, _, err = call(
            "gate", str(folder / "run/evaluation"), "--min", f"robust_accuracy={limit}", "--allow-suspect"
        )
        assert code == expected, err


def test_lists_name_what_there_is() -> None:
    for what, words in (("threats", ("words:SHARE", "embedding:RADIUS")), ("attacks", ("greedy", "full-search")),
                        ("models", ("bag", "cnn-text", "bilstm")), ("data", ("sst2", "thucnews"))):  # fmt: skip
        code, out, err = call("list", what)
        assert code == 0 and all(word in out for word in words), err


def test_what_does_not_fit_is_one_sentence(folder: Path) -> None:
    cases = {"words:1,list=nowhere.tsv": "list 'nowhere.tsv'", "linf:0.1": "changes one tensor", "words:0": "above 0"}
    for threat, message in cases.items():
        code, _, err = call("train", "--data", write(folder), "--threat", threat, "--out", str(folder / "no"))
        assert code == 2 and message in err, err
        assert len(err.strip().splitlines()) <= 2 and not (folder / "no").exists(), err


def test_vectors_that_move_train_and_are_judged_in_their_own_unit(folder: Path) -> None:
    settings = ("--data", write(folder), "--threat", "embedding:0.5", "--recipe", "fgm", "--epochs", "1")
    code, _, err = call("train", *settings, "--out", str(folder / "fgm"))
    assert code == 0, err
    code, _, err = call("evaluate", str(folder / "fgm"), "--num-examples", "20", "--attacks", "fgsm", "--no-checks")
    assert code == 0, err
    results = json.loads((folder / "fgm/evaluation/results.json").read_text())
    unit = float(sparring.load(folder / "fgm").token_norm)
    assert results["threat"]["settings"]["unit"] == pytest.approx(unit) and "bag and" not in results["threat"]["words"]
    page = (folder / "fgm/evaluation/report.html").read_text(encoding="utf-8")
    assert "no text does that" in page and "<mark>" not in page
    code, _, err = call("train", "--data", write(folder), "--threat", "words:1", "--out", str(folder / "no"))
    assert code == 2 and "take --recipe hull" in err and not (folder / "no").exists()


def test_in_memory(folder: Path) -> None:
    data, text = load_data(write(folder)), modalities.find("text")
    found = sparring.evaluate(
        sparring.load(folder / "run"), data.batches("test", 16), text.make_threat("words:0.5", data), modality=text,
        class_names=data.class_names, checks=False,
    )  # fmt: skip
    assert torch.equal(found.table["label"], data.y_test) and found.verdict is None
