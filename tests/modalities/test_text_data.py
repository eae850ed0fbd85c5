"""Texts as numbers and back. Oracles: arithmetic by hand, files written here, the original strings themselves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_texts import tiny, write

from sparring.modalities import find, load_data
from sparring.modalities.text.data import caption, pieces, read_text
from sparring.modalities.text.lists import find_list, read_list
from sparring.modalities.text.sources import read_labelled
from sparring.modalities.text.tokens import Lexicon, suited_unit, tokens_of

LETTERS = "aB 'é\u0301\u0928\u093f.,-\u2013!ＡＢ你好\U0001f600\u200d\u0645\u0631\u064e\n\u00a0_½"
ODD = st.text(st.sampled_from(LETTERS), max_size=30)


@given(ODD, st.sampled_from(["words", "characters"]))
@settings(max_examples=120, deadline=None)
def test_tokens_lie_in_the_text_in_order_and_leave_out_blanks_alone(text: str, unit: str) -> None:
    tokens, end = tokens_of(text, unit), 0  # type: ignore[arg-type]
    for token in tokens:
        assert text[end : token.start].strip() == "" and token.end > token.start
        assert token.key and not any(c.isspace() for c in token.key)
        end = token.end
    assert text[end:].strip() == ""


def test_tokens_of_texts_as_people_write_them() -> None:
    def keys(text: str, unit: str = "words") -> list[str]:
        return [token.key for token in tokens_of(text, unit)]  # type: ignore[arg-type]

    assert keys("It's a re-made film ... don't!!") == ["it's", "a", "re-made", "film", "...", "don't", "!!"]
    assert keys("moore 's (best)") == ["moore", "'s", "(", "best", ")"]
    assert keys("Cafe\u0301 \uff26\uff29\uff2c\uff2d") == ["café", "film"]  # one form, however it is written
    assert keys("हिन्दी फ़िल्म") == ["हिन्दी", "फ़िल्म"]  # combining vowels stay with their word
    assert keys("مرحبا، عالم")[0] == "مرحبا" and keys("so 😀 nice") == ["so", "😀", "nice"]
    assert keys("e\u0301a 你", "characters") == ["é", "a", "你"]
    assert suited_unit(["他是一位老师", "ok"]) == "characters" and suited_unit(["words here", "你"]) == "words"


@given(ODD)
@settings(max_examples=100, deadline=None)
def test_pieces_are_the_original_with_only_the_changed_words_changed(text: str) -> None:
    tokens = tokens_of(text)
    changed = dict.fromkeys(range(0, len(tokens), 2), "other")
    found = pieces(text, tokens, changed)
    assert "".join(before for before, _ in found) == text
    assert sum(before != after for before, after in found) == len(changed)
    assert "".join(before for before, after in found if before == after) == "".join(
        text[a:b] for a, b in _outside([tokens[place] for place in changed], len(text))
    )


def _outside(tokens: list, length: int) -> list[tuple[int, int]]:
    edges = [0, *(edge for token in tokens for edge in (token.start, token.end)), length]
    return list(zip(edges[::2], edges[1::2], strict=True))


def test_case_is_kept() -> None:
    text = "FILM Film film I"
    assert [after for _, after in pieces(text, tokens_of(text), dict.fromkeys(range(4), "kino"))][::2] == [
        "KINO", "Kino", "kino", "Kino"
    ]  # fmt: skip


def test_a_lexicon_numbers_words_once() -> None:
    lexicon = Lexicon.learned([["b", "a", "b"], ["c"]]).plus(["d", "a"], known=True).plus(["e"])
    assert lexicon.words[2:] == ("b", "a", "c", "d", "e") and lexicon.known == 6 and len(lexicon) == 7
    assert lexicon.numbers(["e", "b", "z"]) == [6, 2, 1]
    again = Lexicon.read(lexicon.text())
    assert again.words == lexicon.words[:6] and again.known == 6
    with pytest.raises(ValueError, match="one word a line"):
        Lexicon.read("a\na\n")


def test_what_a_file_holds(tmp_path: Path) -> None:
    data = tiny(tmp_path)
    assert data.class_names == ("neg", "pos") and data.kind == "text" and data.unit == "words"
    assert len(data.y_train) + len(data.y_test) == 160 and not set(data.strings["train"]) & set(data.strings["test"])
    assert 12 <= int((data.y_test == 1).sum()) <= 20
    for split, x, y in (("train", data.x_train, data.y_train), ("test", data.x_test, data.y_test)):
        for row in range(0, len(y), 7):
            keys = [token.key for token in data.tokens(split, row)]
            assert [data.lexicon.words[i] for i in x["ids"][row][x["mask"][row]].tolist()] == keys
            assert (x["ids"][row] > 0).equal(x["mask"][row])
            assert y[row] == int(any(word in keys for word in ["lovely", "great", "superb", "charming", "witty"]))
    known = data.lexicon.words[: data.facts["vocabulary"]]
    assert {"terrible", "clever"} <= set(known)  # substitutes of training words are known, too
    assert not any(
        word.isdecimal() and word in known for word in data.lexicon.words if data.strings["train"].count(word)
    )
    assert sum(word.isdecimal() for word in data.lexicon.words) > sum(word.isdecimal() for word in known)


@pytest.mark.parametrize("suffix", [".tsv", ".jsonl", ".parquet"])
def test_other_files_read_alike(suffix: str, tmp_path: Path) -> None:
    rows = [('He said "no",\tso', 0), ("fine \N{GREEK SMALL LETTER ALPHA}", 1), ("bad", 0), ("good", 1)]
    rows = [(text.replace("\t", " ") if suffix == ".tsv" else text, label) for text, label in rows]
    for split in ("train", "validation"):
        file = tmp_path / f"{split}{suffix}"
        if suffix == ".tsv":
            file.write_text("text\tlabel\n" + "".join(f"{text}\t{label}\n" for text, label in rows), encoding="utf-8")
        elif suffix == ".jsonl":
            file.write_text("\n".join(json.dumps({"text": t, "label": k}) for t, k in rows), encoding="utf-8")
        else:
            pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
            table = pa.table({"text": [t for t, _ in rows], "label": [k for _, k in rows]})
            about = {"info": {"features": {"label": {"names": ["no", "yes"]}}}}
            pq.write_table(table.replace_schema_metadata({"huggingface": json.dumps(about)}), file)
    data = load_data(f"text:{tmp_path}")
    assert list(data.strings["train"]) == [text for text, _ in rows] and data.y_test.tolist() == [0, 1, 0, 1]  # type: ignore[attr-defined]
    assert data.class_names == (("no", "yes") if suffix == ".parquet" else ("0", "1"))


def test_data_sets_of_the_hub_are_fetched_as_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub, asked = pytest.importorskip("huggingface_hub"), []

    def fetch(name: str, **options: Any) -> str:
        asked.append((name, options))
        return str(tmp_path)

    monkeypatch.setattr(hub, "snapshot_download", fetch)
    parquet, table = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow").table
    for folder, first in (("data", "fine"), ("other", "dull")):
        for split in ("train", "test"):
            (tmp_path / folder).mkdir(exist_ok=True)
            rows = table({"sentence": [first, "bad", f"good {split}"], "label": [1, 0, 1]})
            parquet.write_table(rows, tmp_path / folder / f"{split}-00000-of-00001.parquet")
    data: Any = load_data("text:hub:somebody/reviews,text=sentence,list=none")
    assert data.strings["train"] == ["fine", "bad", "good train"] and data.strings["test"][2] == "good test"
    assert data.name == "reviews" and data.kind == "text"
    other: Any = load_data("text:hub:somebody/reviews/other,text=sentence,list=none")
    assert other.strings["train"][0] == "dull"
    assert [name for name, _ in asked] == ["somebody/reviews"] * 2 and {o["repo_type"] for _, o in asked} == {"dataset"}
    kinds = ("csv", "tsv", "jsonl", "parquet")  # no scripts
    assert asked[0][1]["allow_patterns"] == [f"*.{kind}" for kind in kinds]
    assert asked[1][1]["allow_patterns"] == [f"other/*.{kind}" for kind in kinds]
    parquet.write_table(rows, tmp_path / "data" / "train-00001-of-00002.parquet")
    with pytest.raises(ValueError, match="several files of one split"):
        load_data("text:hub:somebody/reviews,text=sentence")
    for wrong in ("reviews", "a/..", "/b"):
        with pytest.raises(ValueError, match="names no data set of the hub; expected OWNER/NAME"):
            load_data(f"text:hub:{wrong}")
    with pytest.raises(FileNotFoundError, match=r"somebody/reviews/none on the hub holds no \.csv, "):
        load_data("text:hub:somebody/reviews/none")

    def offline(name: str, **options: Any) -> str:
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(hub, "snapshot_download", offline)
    with pytest.raises(FileNotFoundError, match=r"download of a/b from the hub failed \(ConnectionError: no route\)$"):
        load_data("text:hub:a/b")


BAD = {
    "no column": ("text,stars\na,0\n", "no column 'label'; it has text, stars.*label=COLUMN"),
    "empty file": ("", "no column 'text'; it has no rows"),
    "empty text": ("text,label\na,0\nb,0\n  ,1\nc,1\n", r"text \d is empty"),
    "one class": ("text,label\na,0\nb,0\nc,0\n", "all training labels are '0'.*two classes"),
    "no label": ("text,label\na,0\nb,\n", "row 2 has no label"),
    "too many classes": ("text,label\n" + "".join(f"word {i},{i // 2}\n" for i in range(100)), "50 different labels"),
    "commas": ("text,label\nwell, so,0\n", "more fields than the 2 columns.*double quotes"),
}


@pytest.mark.parametrize("case", BAD)
def test_texts_that_will_not_do(case: str, tmp_path: Path) -> None:
    content, message = BAD[case]
    (tmp_path / "a.csv").write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=message) as error:
        load_data(f"text:{tmp_path / 'a.csv'}")
    assert "\n" not in str(error.value)


def test_files_that_will_not_do(tmp_path: Path) -> None:
    file = tmp_path / "a.csv"
    file.write_bytes("text,label\nna\u00efve,0\nb,1\nc,0\nd,1\n".encode("latin-1"))
    with pytest.raises(ValueError, match=r"byte 13 is no utf-8.*encoding=latin-1"):
        read_text(str(file))
    with pytest.raises(ValueError, match="encoding='nonsense' is unknown"):
        read_text(str(file), encoding="nonsense")
    assert read_text(str(file), encoding="latin-1").num_classes == 2
    (tmp_path / "b.jsonl").write_text('{"text": "a"\n', encoding="utf-8")
    with pytest.raises(ValueError, match="line 1 is not valid JSON"):
        read_text(str(tmp_path / "b.jsonl"))
    (tmp_path / "train.xml").touch()
    with pytest.raises(ValueError, match=r"cannot read a \.xml file"):
        read_labelled(tmp_path / "train.xml", None, "text", "label", "utf-8")
    with pytest.raises(FileNotFoundError, match="test='other'"):
        read_text(str(file), test="other", encoding="latin-1")
    (tmp_path / "other.csv").write_text("text,label\na,7\n", encoding="utf-8")
    with pytest.raises(ValueError, match="label '7' is none of the classes 0, 1"):
        read_text(str(file), test="other.csv", encoding="latin-1")
    with pytest.raises(FileNotFoundError, match="there is no such file; a run folder has"):
        read_text(str(file), vocabulary=str(tmp_path / "v.txt"), encoding="latin-1")


def test_a_very_long_text_is_cut_and_said_so(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(
        f"text,label\n{'word ' * 10_000},0\nshort,1\nshorter,0\nc,1\nd,0\n", encoding="utf-8"
    )
    data = read_text(str(tmp_path / "a.csv"), length=100)
    assert data.shape["ids"] == (100,) and data.facts["cut"] == 1


def test_names_need_a_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SPARRING_DATA", raising=False)
    with pytest.raises(FileNotFoundError, match="SPARRING_DATA='' holds no folder sst2"):
        load_data("sst2")


def test_lists_of_substitutes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.json").write_text('{"Film": ["movie", "film", "the", "motion picture"], "the": ["a"]}')
    assert read_list(tmp_path / "a.json") == {"film": ("movie",)}
    for content, message in (("film\n", "line 1 is 'film'"), ('{"a": "b"}', "a list of words is expected"),
                             ("{", "JSON"), ("the\ta\n", "no substitute for any word")):  # fmt: skip
        (tmp_path / "bad").write_text(content)
        read_list.cache_clear()
        with pytest.raises(ValueError, match=message):
            read_list(tmp_path / "bad")
    monkeypatch.delenv("SPARRING_DATA", raising=False)
    with pytest.raises(FileNotFoundError, match="neighbours of Jia and Liang"):
        find_list("counterfitted")


def test_vectors_begin_a_network(tmp_path: Path) -> None:
    text = write(tmp_path)
    vectors = np.arange(6, dtype=np.float16).reshape(2, 3)
    np.savez(tmp_path / "v.npz", words=np.array(["film", "elsewhere"]), vectors=vectors)
    data, kind = load_data(f"{text},vectors={tmp_path / 'v.npz'}"), find("text")
    assert data.start is not None
    network = kind.models["bag"](data.facts["vocabulary"], 2, data.facts["vector_size"])
    data.start(network)
    row = data.lexicon.number_of["film"]  # type: ignore[attr-defined]
    assert network.words.weight[row].tolist() == [0, 1, 2]
    assert float(network.token_norm) == pytest.approx(network.words.weight[2:].detach().norm(dim=1).mean().item())
    with pytest.raises(ValueError, match="takes no word vectors"):
        data.start(torch.nn.Linear(1, 1))
    np.savez(tmp_path / "v.npz", words=np.array(["elsewhere"]), vectors=vectors[:1])
    with pytest.raises(ValueError, match="none of the"):
        read_text(str(tmp_path / "reviews.csv"), text="review", label="stars", vectors=str(tmp_path / "v.npz"))


def test_a_caption_holds_the_original_and_the_changed_text(tmp_path: Path) -> None:
    data = tiny(tmp_path)
    x = {name: tensor[[5, 2]] for name, tensor in data.x_test.items()}
    x_adv = {**x, "ids": x["ids"].clone()}
    place = [token.key for token in data.tokens("test", 5)].index(
        next(t.key for t in data.tokens("test", 5) if t.key in data.substitutes)
    )
    old = data.lexicon.words[int(x["ids"][0, place])]
    x_adv["ids"][0, place] = data.lexicon.number_of[data.substitutes[old][0]]
    gallery = {"index": np.array([5, 2]), "x/ids": x["ids"].numpy(), "x_adv/ids": x_adv["ids"].numpy()}
    assert find("text").caption is not None
    told = [json.loads(text) for text in find("text").caption(data, gallery, "test", None)["words"]]  # type: ignore[misc]
    assert ["".join(pair[0] for pair in pairs) for pairs in told] == [data.strings["test"][i] for i in (5, 2)]
    assert ["".join(pair[1] for pair in pairs) for pairs in told] == [
        data.strings["test"][5].replace(old, data.substitutes[old][0], 1), data.strings["test"][2]
    ]  # fmt: skip


def test_pieces_of_words_are_replaced_as_they_are_read_again(tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    pieces = ["[UNK]", "play", "##ing", "##er", "film", "movie", "good", "great", "bad", "poor", "!"]
    made = tokenizers.Tokenizer(tokenizers.models.WordPiece({p: i for i, p in enumerate(pieces)}, unk_token="[UNK]"))
    made.normalizer, made.pre_tokenizer = (
        tokenizers.normalizers.Lowercase(), tokenizers.pre_tokenizers.BertPreTokenizer()
    )  # fmt: skip
    made.enable_truncation(2)
    made.save(str(tmp_path / "pieces.json"))
    unit = str(tmp_path / "pieces.json")
    text = "Playing a good FILM!"
    tokens = tokens_of(text, unit)
    assert [token.key for token in tokens] == ["play##", "##ing", "[UNK]", "good", "film", "!"]
    assert [text[token.start : token.end] for token in tokens] == ["Play", "ing", "a", "good", "FILM", "!"]
    rows = [f"{'Playing' if i % 3 else 'Play'} {'good' if i % 2 else 'bad'} film,{i % 2}\n" for i in range(30)]
    (tmp_path / "t.csv").write_text("text,label\n" + "".join(rows), encoding="utf-8")
    (tmp_path / "list.tsv").write_text("good\tsuperb great\nfilm\tmovie\nbad\tpoor\nplay\tgame good\n")
    file, listed = str(tmp_path / "t.csv"), str(tmp_path / "list.tsv")
    data = read_text(file, test=file, tokens=unit, list=listed)
    assert data.substitutes == {"good": ("great",), "film": ("movie",), "bad": ("poor",), "play": ("good",)}
    threat = find("text").make_threat("words:1.0", data)
    x: Any = data.x_test
    x_adv: Any = threat.realize(x, threat.corner(x, torch.ones_like(threat.null(x))))
    gallery = {"index": np.arange(30), "x/ids": x["ids"].numpy(), "x_adv/ids": x_adv["ids"].numpy()}
    for told, ids in zip(caption(data, gallery, "test", threat)["words"], x_adv["ids"], strict=True):
        after = "".join(new for _, new in json.loads(str(told)))
        again = data.lexicon.numbers(token.key for token in tokens_of(after, unit))
        assert again == ids[ids > 0].tolist() and after.startswith(("Playing ", "Good ")) and " movie" in after
    with pytest.raises(ValueError, match="expected words, characters, or a tokenizer's JSON file"):
        read_text(file, tokens=listed)
