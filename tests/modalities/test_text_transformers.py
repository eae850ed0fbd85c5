"""Classifiers of transformers from disk. The oracle is transformers itself: its tokenizer and its model on strings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_texts import BAD, GOOD, tiny, write
from torch import Tensor

import sparring
from command import call
from sparring.adapters.hugging_face import WordsInPieces, load_classifier
from sparring.core.noise import Noise
from sparring.core.types import take
from sparring.modalities import find
from sparring.modalities.text.data import Texts, read_text

transformers = pytest.importorskip("transformers")
LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789"
PIECES = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *LETTERS, *(f"##{c}" for c in LETTERS), *",<>/&!", "the", "was"]
WHOLE = [*GOOD[:3], *BAD[:2], "film", "plot", "nice", "terrible"]  # other words are several pieces
SIZE = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}


def tokenizer(**options: Any) -> Any:
    return transformers.BertTokenizer(
        vocab={p: i for i, p in enumerate(PIECES + WHOLE)}, model_max_length=128, **options
    )


def saved(folder: Path, *, labels: int = 2, own: Any = None) -> Any:
    """A small BERT whose answers differ from text to text, in a folder."""
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=len(PIECES + WHOLE), num_labels=labels, max_position_embeddings=64, **SIZE
    )
    bert = transformers.BertForSequenceClassification(config)
    with torch.no_grad():
        for weight in bert.parameters():
            weight.mul_(8)
    bert.save_pretrained(folder)
    (own or tokenizer()).save_pretrained(folder)
    return bert.eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT that has learned the tiny corpus, beside its texts."""
    out = tmp_path_factory.mktemp("bert")
    saved(out / "bert")
    data, model = tiny(out), load_classifier(out / "bert")
    threat(data, model)
    optimizer = torch.optim.Adam(model.parameters(), 0.005)
    for _ in range(120):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(data.x_train), data.y_train).backward()
        optimizer.step()
    model.model.save_pretrained(out / "bert")
    return out


def threat(data: Texts, model: Any, text: str = "words:1.0") -> Any:
    return find("text").make_threat(text, data, model)


def theirs(folder: Path, texts: list[str]) -> Tensor:
    """Logits as transformers has them, of strings."""
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder).eval()
    shown = transformers.AutoTokenizer.from_pretrained(folder)(
        texts, return_tensors="pt", padding=True, truncation=True, max_length=64
    )
    with torch.no_grad():
        return model(**shown).logits


def test_words_are_read_as_transformers_reads_strings(folder: Path, tmp_path: Path) -> None:
    data, model = tiny(folder), load_classifier(folder / "bert")
    threat(data, model)
    want = theirs(folder / "bert", list(data.strings["test"]))
    assert want[:, 0].std() > 0.1  # texts that all get one answer would show nothing
    with torch.no_grad():
        torch.testing.assert_close(model(data.x_test), want, rtol=1e-4, atol=1e-4)
    right = (want.argmax(1) == data.y_test).float().mean()
    assert right > 0.9
    # accents, marks in a row, full width, and a text longer than the model reads
    odd = ["Caf\u00e9... (was) LOVELY!?", "\uff26\uff29\uff2c\uff2d film\u2019s", "superb film " * 30, "\u200b the"]
    (tmp_path / "odd.csv").write_text("text,label\n" + "".join(f'"{t}",{i % 2}\n' for i, t in enumerate(odd)))
    file = str(tmp_path / "odd.csv")
    strange = read_text(file, test=file, list=str(folder / "list.tsv"))
    model.unlike = 0.25  # letters of full width are read as their plain form
    threat(strange, model)
    plain = [odd[0], "film film\u2019s", *odd[2:]]
    with torch.no_grad():
        torch.testing.assert_close(model(strange.x_test), theirs(folder / "bert", plain), rtol=1e-4, atol=1e-4)


def test_texts_that_are_read_otherwise_are_counted(folder: Path, tmp_path: Path) -> None:
    rows = [
        '"the film was \u00a39, great",1\n',
        *(f"the film was {word},{i % 2}\n" for i, word in enumerate("abcdefghi")),
    ]
    (tmp_path / "t.csv").write_text("text,label\n" + "".join(rows), encoding="utf-8")
    file = str(tmp_path / "t.csv")
    data = read_text(file, test=file, list=str(folder / "list.tsv"))
    with pytest.raises(ValueError, match=r"1 of 10 texts .* such as 'the film was \u00a39, great'.*unlike=0\.1"):
        threat(data, load_classifier(folder / "bert"))
    threat(data, load_classifier(folder / "bert", unlike=0.1))
    (tmp_path / "t.csv").write_text("text,label\n" + "".join(rows).replace("\u00a3", "\u00a3 "), encoding="utf-8")
    threat(read_text(file, test=file, list=str(folder / "list.tsv")), load_classifier(folder / "bert"))


@pytest.mark.parametrize("text", ["words:1.0", "characters:1.0", "embedding:0.5"])
def test_the_threats_of_texts_hold(text: str, folder: Path) -> None:
    data, model = tiny(folder), load_classifier(folder / "bert")
    own = threat(data, model, text)
    x: Any = take(data.x_test, torch.arange(6))
    z = own.sample(x, Noise.make(0, "test", torch.arange(6)))
    with torch.no_grad():
        torch.testing.assert_close(model(own.apply(x, z)), model(own.realize(x, z)), rtol=1e-4, atol=1e-4)
        longer = {name: torch.nn.functional.pad(tensor, (0, 3)) for name, tensor in x.items()}
        junk = {**longer, "ids": longer["ids"].where(longer["mask"], 7)}
        torch.testing.assert_close(model(junk), model(x), rtol=1e-4, atol=1e-4)
        one = torch.cat([model(take(x, torch.tensor([i]))) for i in range(6)])
        torch.testing.assert_close(one, model(x), rtol=1e-4, atol=1e-4)
    model, z = model.double(), own.null(x).double().requires_grad_()
    grad = torch.autograd.grad(model(own.apply(x, z))[:, 0].sum(), z)[0]
    step = 1e-4 * torch.rand(z.shape, generator=torch.Generator().manual_seed(0)).double()
    step = step * own.open(x) if own.discrete else step
    with torch.no_grad():
        ends = [model(own.apply(x, z + side * step))[:, 0].sum() for side in (-1, 1)]
    assert float((ends[1] - ends[0]) / 2) == pytest.approx(float((grad * step).sum()), rel=0.01)


def test_on_the_command_line_texts_fall_for_transformers_too(folder: Path) -> None:
    data, bert = write(folder), f"transformers:{folder / 'bert'}"
    for name in ("words:1.0", "characters:1.0"):
        asked = ("--model", bert, "--data", data, "--threat", name, "--num-examples", "20")
        code, out, err = call("attack", *asked, "--attacks", "full", "--out", str(folder / "adv.jsonl"))
        assert code == 0, err
        lines = [json.loads(line) for line in (folder / "adv.jsonl").read_text(encoding="utf-8").splitlines()]
        assert lines and f"{len(lines)} adversarial examples" in out
        names = tiny(folder).class_names
        for side, key in (("before", "taken_before"), ("after", "taken_after")):
            taken = theirs(folder / "bert", [line[side] for line in lines]).argmax(1).tolist()
            assert [names[k] for k in taken] == [line[key] for line in lines]
    code, _, err = call(
        "evaluate", "--model", bert, "--data", data, "--threat", "words:1.0", "--num-examples", "12", "--no-checks",
        "--out", str(folder / "found"),
    )  # fmt: skip
    assert code == 0, err
    told = json.loads((folder / "found/results.json").read_text())["model"]
    assert told["weights"] == str(folder / "bert/model.safetensors") and len(told["sha256"]) == 64


def test_it_is_hardened_by_the_command_line_and_read_again(folder: Path) -> None:
    asked = ("--data", write(folder), "--threat", "words:1.0", "--recipe", "substituted", "--epochs", "2")
    rates = ("--set", "learning_rate=0.001", "--set", "batch_size=16")
    model = ("--model", f"transformers:{folder / 'bert'}")
    code, _, err = call("train", *asked, *rates, *model, "--out", str(folder / "run"))
    assert code == 0, err
    code, _, err = call("evaluate", str(folder / "run"), "--num-examples", "12", "--no-checks", "--attacks", "greedy")
    assert code == 0, err
    before, after = load_classifier(folder / "bert"), sparring.load(folder / "run")
    assert isinstance(after, WordsInPieces) and after.state_dict().keys() == before.state_dict().keys()
    assert not torch.equal(after.model.classifier.weight, before.model.classifier.weight)


def test_what_cannot_be_read_is_one_sentence(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no file .*config\.json.*pickled ones may run code"):
        load_classifier(tmp_path)
    bert = saved(tmp_path / "pickled")
    (tmp_path / "pickled/model.safetensors").unlink()
    torch.save(bert.state_dict(), tmp_path / "pickled/pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match=r"no file .*model\.safetensors"):
        load_classifier(tmp_path / "pickled")
    saved(tmp_path / "cased", own=tokenizer(do_lower_case=False))
    with pytest.raises(ValueError, match=r"in capitals .*Served are uncased WordPiece"):
        load_classifier(tmp_path / "cased")
    saved(tmp_path / "bare")
    bert.bert.save_pretrained(tmp_path / "bare")
    with pytest.raises(ValueError, match=r"lacks weights \(classifier.bias, classifier.weight\)"):
        load_classifier(tmp_path / "bare")
    saved(tmp_path / "code")
    config = json.loads((tmp_path / "code/config.json").read_text())
    config |= {"model_type": "own", "auto_map": dict.fromkeys(("AutoConfig", "AutoModel"), "own.Own")}
    (tmp_path / "code/config.json").write_text(json.dumps(config))
    (tmp_path / "code/own.py").write_text("raise SystemExit('code of the folder was run')")
    with pytest.raises(ValueError, match="code cannot be read"):
        load_classifier(tmp_path / "code")
    data = tiny(folder)
    with pytest.raises(ValueError, match="has not been told which words the numbers are: make the threat with"):
        load_classifier(folder / "bert")(data.x_test)
    saved(tmp_path / "three", labels=3)
    model, given = find("text").make_model, {"num_classes": 2, "unit": "words"}
    with pytest.raises(ValueError, match="knows 3 classes; the data have 2"):
        model(f"transformers:{tmp_path / 'three'}", 0, given)
    with pytest.raises(ValueError, match="cuts words by itself; read the data as words, not by tokens=pieces"):
        model(f"transformers:{tmp_path / 'three'}", 0, {**given, "unit": "pieces.json"})
