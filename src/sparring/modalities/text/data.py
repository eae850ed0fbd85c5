"""Labelled texts as a data set: numbers of words or characters, the strings behind them, and what a run must keep.

Shapes: N texts, L units in each (padded), V words in the lexicon, D numbers in a vector.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sparring.adapters.optional import download
from sparring.modalities.base import Dataset
from sparring.modalities.text.lists import Substitutes, counterfitted_there, find_list, read_list, read_vectors
from sparring.modalities.text.sources import TEXT_SUFFIXES, Labelled, read_labelled
from sparring.modalities.text.tokens import Lexicon, Token, Unit, suited_unit, tokenizer_of, tokens_of

NAMED = {"sst2": "validation", "ag_news": None, "sms_spam": None, "thucnews": None}
"""Names of data under $SPARRING_DATA, and the split to judge on where it is not `test`."""

TEXT_DATA = {
    "sst2": "Film reviews, negative or positive, from $SPARRING_DATA/sst2; judged on the 872 validation sentences.",
    "ag_news": "News in four topics, from $SPARRING_DATA/ag_news.",
    "sms_spam": "Short messages, ham or spam, from $SPARRING_DATA/sms_spam; a fifth is set aside.",
    "thucnews": "Chinese headlines in ten topics, from $SPARRING_DATA/thucnews; characters.",
    "hub:OWNER/NAME": "A data set of the Hugging Face hub (or hub:OWNER/NAME/FOLDER), its tables alone.",
    "FILE.csv": "Also .tsv, .jsonl, .parquet, or a folder with train and test: columns text=COLUMN,label=COLUMN.",
}


@dataclass(frozen=True, eq=False)
class Texts(Dataset):
    """Texts as `ids` int64 and `mask` bool (N, L), with the strings (what a model never reads), and their lexicon.

    substitutes: of the list whose words the lexicon knows, by which a threat goes unless it names another.
    """

    strings: Mapping[str, Sequence[str]] = field(default_factory=dict)
    lexicon: Lexicon = field(default_factory=lambda: Lexicon(("", "")))
    unit: Unit = "words"
    substitutes: Substitutes = field(default_factory=dict)

    def tokens(self, split: str, row: int) -> list[Token]:
        """The units of one text, with their places in its string."""
        return tokens_of(self.strings[split][row], self.unit)


def reads_text(path: Path) -> bool:
    """Whether a file or folder looks like texts."""
    files = path.glob("train.*") if path.is_dir() else [path]
    return any(file.suffix in (".csv", ".tsv", ".jsonl") for file in files)


def read_text(
    path: str, *, text: str = "text", label: str = "label", test: str | None = None,
    tokens: str = "auto", length: int = 256, least: int | None = None,
    list: str | None = "auto", vectors: str | None = None, vocabulary: str | None = None, encoding: str = "utf-8",
) -> Texts:  # fmt: skip
    """Labelled texts of a known name, a CSV, TSV, JSONL or parquet file, a folder of such by split, or hub:OWNER/NAME.

    text, label: the columns. test: a split of the folder or a file to judge on; else test, validation, or a fifth of
    the texts. tokens: words, characters, or a tokenizer's JSON file for pieces of words (of a list the words that are
    one piece count); auto takes characters for Chinese, Japanese and Korean. length: longer texts are cut there.
    least: how often a unit must occur in training texts to be known (words 1, characters 2). list: of substitutes,
    whose words become known, too ("counterfitted", a path, none; auto takes counterfitted for words where it is there).
    vectors: "glove" or an .npz file; a new network begins with them. vocabulary: a file of known words, such as a run
    keeps, instead of learning them. Raises ValueError and FileNotFoundError in a sentence.
    """
    home, place = os.environ.get("SPARRING_DATA"), Path(path).expanduser()
    if path in NAMED:
        place, test = Path(home or "", path), test or NAMED[path]
        if not home or not place.is_dir():
            raise FileNotFoundError(
                f"data {path!r}: SPARRING_DATA={home or ''!r} holds no folder {path}; expected one with "
                "parquet, CSV, TSV or JSONL files of text and label in it; or give a file by path"
            )
    if path.startswith("hub:"):
        place = download(path.removeprefix("hub:"), TEXT_SUFFIXES)
    elif not place.exists():
        raise FileNotFoundError(
            f"data {path!r}: there is no such name, folder or file; expected {', '.join(TEXT_DATA)}"
        )
    if length < 1:
        raise ValueError(f"length must be at least 1; got {length}")
    train, judged = read_labelled(place, test, text, label, encoding)
    unit = suited_unit(train.texts[:1000]) if tokens == "auto" else tokens
    keys = [_keys(rows, unit, name) for rows, name in ((train, f"{path}, train"), (judged, f"{path}, test"))]
    y, names = _labels(train, judged, path)
    listed = _substitutes(list, unit)
    lexicon = _lexicon(keys[0], listed, vocabulary, (2 if unit == "characters" else 1) if least is None else least)
    vector_size, start = _vectors(vectors, lexicon)
    width = min(length, max(map(len, keys[0])))
    x = [_numbers(lexicon := _with_all(lexicon, part, listed), part, width) for part in keys]
    facts = {
        "vocabulary": lexicon.known, "vector_size": vector_size, "unit": unit, "list": list, "vectors": vectors,
        "cut": sum(len(text) > width for part in keys for text in part),
    }  # fmt: skip
    return Texts(
        path if path in NAMED else Path(path).stem, "text", x[0], y[0], x[1], y[1], names, facts,
        kept={"vocabulary": lexicon.text()}, start=start,
        strings={"train": train.texts, "test": judged.texts}, lexicon=lexicon, unit=unit, substitutes=listed,
    )  # fmt: skip


def _keys(rows: Labelled, unit: Unit, name: str) -> list[list[str]]:
    keys = []
    for number, text in enumerate(rows.texts, 1):
        keys.append([token.key for token in tokens_of(text, unit)])
        if not keys[-1]:
            raise ValueError(
                f"{name}: text {number} is empty ({text[:20]!r}); a model has nothing to read there: drop it"
            )
    if not keys:
        raise ValueError(f"{name}: there is not one text")
    return keys


def _labels(train: Labelled, judged: Labelled, path: str) -> tuple[list[Tensor], tuple[str, ...]]:
    """int64 labels of both parts, and the names of the classes: those the file tells, else the values in order."""
    names = train.names
    if names is None:
        values = {str(label) for label in train.labels}
        whole = all(value.removeprefix("-").isdecimal() for value in values)
        names = tuple(sorted(values, key=int) if whole else sorted(values))
    number = {str(name): k for k, name in enumerate(range(len(names)) if train.names else names)}
    if len(names) < 2 or len(set(map(str, train.labels))) < 2:
        raise ValueError(
            f"{path}: all training labels are {train.labels[0]!r}; a classifier needs at least two classes"
        )
    if len(names) > max(20, len(train.labels) // 2):
        raise ValueError(
            f"{path}: {len(names)} different labels for {len(train.labels)} texts; is that column a class?"
        )
    for part, rows in (("train", train), ("test", judged)):
        if odd := [label for label in rows.labels if str(label) not in number]:
            raise ValueError(f"{path}, {part}: label {odd[0]!r} is none of the classes {', '.join(names[:20])}")
    return [torch.tensor([number[str(label)] for label in rows.labels]) for rows in (train, judged)], names


def _substitutes(name: str | None, unit: Unit) -> Substitutes:
    if name is None or (name == "auto" and (unit == "characters" or not counterfitted_there())):
        return {}
    listed = read_list(find_list("counterfitted" if name == "auto" else name))
    if unit in ("words", "characters"):
        return listed
    whole = tokenizer_of(unit).get_vocab()  # another word would be other pieces when it is read again
    return {word: kept for word, others in listed.items() if (kept := tuple(o for o in others if o in whole))}


def _lexicon(keys: list[list[str]], listed: Substitutes, vocabulary: str | None, least: int) -> Lexicon:
    """What a model knows: the words of a kept file, or of the training texts with what may stand for them."""
    if vocabulary is not None:
        file = Path(vocabulary).expanduser()
        if not file.is_file():
            raise FileNotFoundError(
                f"vocabulary {vocabulary!r}: there is no such file; a run folder has vocabulary.txt"
            )
        return Lexicon.read(file.read_text(encoding="utf-8"), file)
    learned = Lexicon.learned(keys, least)
    return learned.plus((other for word in learned.words for other in listed.get(word, ())), known=True)


def _with_all(lexicon: Lexicon, keys: list[list[str]], listed: Substitutes) -> Lexicon:
    """The lexicon with words that only occur, and with what may stand for them."""
    lexicon = lexicon.plus(key for text in keys for key in text)
    return lexicon.plus(other for word in lexicon.words for other in listed.get(word, ()))


def _numbers(lexicon: Lexicon, keys: list[list[str]], width: int) -> dict[str, Tensor]:
    """`ids` and `mask`, each text from the left, cut or padded to one width."""
    ids = np.zeros((len(keys), width), np.int64)
    for row, text in zip(ids, keys, strict=True):
        numbers = lexicon.numbers(text[:width])
        row[: len(numbers)] = numbers
    return {"ids": torch.from_numpy(ids), "mask": torch.from_numpy(ids > 0)}


def _vectors(name: str | None, lexicon: Lexicon) -> tuple[int | None, Any]:
    """The length of the vectors, and what puts those of known words into a new network."""
    if name is None:
        return None, None
    rows, vectors = read_vectors(name)
    found = [(number, rows[word]) for number, word in enumerate(lexicon.words[: lexicon.known]) if word in rows]
    if not found:
        raise ValueError(f"vectors {name!r} have none of the {lexicon.known} known words; are they of this language?")
    numbers, chosen = (torch.tensor(column) for column in zip(*found, strict=True))

    def start(model: nn.Module) -> None:
        setter = getattr(model, "set_vectors", None)
        if setter is None:
            raise ValueError(f"vectors={name}: a {type(model).__name__} takes no word vectors (no method set_vectors)")
        setter(numbers, torch.from_numpy(vectors)[chosen])

    return vectors.shape[1], start


def pieces(text: str, tokens: Sequence[Token], changed: Mapping[int, str]) -> list[tuple[str, str]]:
    """(before, after) in order, which make up the text and its changed form: `changed` has a new key by place.

    >>> pieces("A Film!", tokens_of("A Film!"), {1: "movie"})
    [('A ', 'A '), ('Film', 'Movie'), ('!', '!')]
    """
    found, end = [], 0
    for place in sorted(changed):
        token, new = tokens[place], changed[place]
        old = text[token.start : token.end]
        new = new.upper() if old.isupper() and len(old) > 1 else new.capitalize() if old[:1].isupper() else new
        found += [(gap, gap)] if (gap := text[end : token.start]) else []
        found.append((old, new))
        end = token.end
    rest = text[end:]
    return [*found, (rest, rest)] if rest else found


def caption(data: Texts, gallery: Mapping[str, np.ndarray], split: str, threat: Any) -> dict[str, np.ndarray]:
    """`words` (G,) for a gallery: JSON of the `pieces` of each text as it was and as it was attacked."""
    lexicon: Lexicon = getattr(threat, "lexicon", data.lexicon)
    told = []
    for row, ids, new in zip(gallery["index"], gallery["x/ids"], gallery["x_adv/ids"], strict=True):
        tokens = data.tokens(split, int(row))
        length = min(len(tokens), len(ids), len(new))
        changed = {i: lexicon.words[int(new[i])] for i in range(length) if int(ids[i]) != int(new[i])}
        told.append(json.dumps(pieces(data.strings[split][int(row)], tokens, changed), ensure_ascii=False))
    return {"words": np.array(told)}
