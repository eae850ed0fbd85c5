"""Texts as numbers: words or characters with their places in the original string, and a lexicon that numbers them."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import cached_property, lru_cache
from typing import Any, NamedTuple

from sparring.adapters.optional import need

Unit = str
"""`words`, `characters`, or a file of the package `tokenizers`: pieces of words."""

_MARKS = (
    "!-/:-@\\[-`{-~\u00a1-\u00a9\u00ab-\u00b1\u00b4\u00b6-\u00b8\u00bb\u00bf\u00d7\u00f7\u060c\u061b\u061f\u06d4\u0964\u0965\u2010-\u2027\u2030-\u205e\u20a0-\u20c0\u2100-\u214f\u2190-\u2bff"
    "\u3000-\u303f\uff01-\uff0f\uff1a-\uff20\uff3b-\uff40\uff5b-\uff65"
)
_LETTER = f"[^\\s{_MARKS}]"
_WORD = re.compile(f"['\u2019]?{_LETTER}+(?:[-'\u2019.]{_LETTER}+)*|([{_MARKS}])\\1*")
_CHARACTER = re.compile(r"\S[\u0300-\u036f\u200d\ufe00-\ufe0f]*")
_HAN = re.compile("[\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\uac00-\ud7af]")

PADDING, UNKNOWN = 0, 1
SPECIAL = ("", "\N{REPLACEMENT CHARACTER}")
"""What the numbers PADDING and UNKNOWN are written as."""


class Token(NamedTuple):
    """A unit of a text: the key by which lists and lexicon know it, and where it stands in the original string."""

    key: str
    start: int
    end: int


def tokens_of(text: str, unit: Unit = "words") -> list[Token]:
    """The units of a text in order; keys are in lower case and in one Unicode form (NFKC), the text stays as it is.

    Words keep inner hyphens, dots and apostrophes; equal marks in a row are one unit. Characters keep their combining
    marks. The first piece of a word that goes on has "##" behind it, so that no list takes it for a word.

    >>> [token.key for token in tokens_of("Isn't it re-made?!  ＯＫ...")]
    ["isn't", 'it', 're-made', '?', '!', 'ok', '...']
    >>> [token.key for token in tokens_of("你好, Bo", "characters")]
    ['你', '好', ',', 'b', 'o']
    """
    if unit not in ("words", "characters"):
        found = tokenizer_of(unit).encode(text, add_special_tokens=False)
        count, rows = Counter(found.word_ids), zip(found.tokens, found.word_ids, found.offsets, strict=True)
        return [Token(own if own[:2] == "##" or count[word] == 1 else f"{own}##", *place) for own, word, place in rows]
    pattern = _WORD if unit == "words" else _CHARACTER
    return [Token(key_of(found[0]), *found.span()) for found in pattern.finditer(text)]


@lru_cache(maxsize=4)
def tokenizer_of(file: str) -> Any:
    """The tokenizer that a JSON file describes, without padding or cuts. Raises ImportError and ValueError."""
    tokenizers = need("tokenizers", f"tokens={file}", "huggingface")
    try:
        found = tokenizers.Tokenizer.from_file(file)
    except Exception as error:  # the library raises Exception itself
        raise ValueError(f"tokens={file}: expected words, characters, or a tokenizer's JSON file; {error}") from error
    found.no_padding()
    found.no_truncation()
    return found


def key_of(word: str) -> str:
    """The form by which a word is looked up."""
    return "".join(unicodedata.normalize("NFKC", word).lower().split()) or word


def suited_unit(texts: Iterable[str]) -> Unit:
    """Characters where texts are mostly written without blanks between words (Chinese, Japanese, Korean), else words.

    >>> suited_unit(["我喜欢这部电影 OK"]), suited_unit(["good", "电影"])
    ('characters', 'words')
    """
    han = visible = 0
    for text in texts:
        han += len(_HAN.findall(text))
        visible += len(text) - text.count(" ")
    return "characters" if han > 0.3 * max(1, visible) and han > 2 else "words"


class Lexicon:
    """Words by number: PADDING, UNKNOWN, those that a model knows (below `known`), then such as only occur.

    A model reads a number at or above `known` as UNKNOWN, so a word that no model has seen still has its name, and its
    substitutes.

    >>> lexicon = Lexicon(["", "\\N{REPLACEMENT CHARACTER}", "good"]).plus(["bad", "good"])
    >>> lexicon.known, lexicon.numbers(["good", "bad", "odd"])
    (3, [2, 3, 1])
    """

    def __init__(self, words: Sequence[str], known: int | None = None) -> None:
        self.words, self.known = tuple(words), len(words) if known is None else known

    @staticmethod
    def learned(keys: Iterable[Sequence[str]], least: int = 1) -> Lexicon:
        """All words that occur at least so often, the most frequent first."""
        counts = Counter(key for text in keys for key in text)
        ordered = sorted((word for word, count in counts.items() if count >= least), key=lambda w: (-counts[w], w))
        return Lexicon([*SPECIAL, *ordered])

    @cached_property
    def number_of(self) -> dict[str, int]:
        """The number of each word."""
        return {word: number for number, word in enumerate(self.words) if number not in (PADDING, UNKNOWN)}

    def __len__(self) -> int:
        return len(self.words)

    def plus(self, words: Iterable[str], known: bool = False) -> Lexicon:
        """The same with further words at the end, which a model knows or does not."""
        new = [word for word in dict.fromkeys(words) if word not in self.number_of]
        if known and self.known < len(self):
            raise ValueError("words that a model knows must come before those that only occur")
        return Lexicon((*self.words, *new), len(self) + len(new) if known else self.known) if new else self

    def numbers(self, keys: Iterable[str]) -> list[int]:
        """The numbers of words, UNKNOWN for those that are not here."""
        number_of = self.number_of
        return [number_of.get(key, UNKNOWN) for key in keys]

    def text(self) -> str:
        """The known words as the content of a file, one a line."""
        return "".join(f"{word}\n" for word in self.words[len(SPECIAL) : self.known])

    @staticmethod
    def read(text: str, path: object = "the vocabulary") -> Lexicon:
        """What `text` wrote. Raises ValueError for a file that lists a word twice or not one."""
        words = text.removesuffix("\n").split("\n")
        if len(set(words)) < len(words) or "" in words:
            raise ValueError(f"{path} is no vocabulary: expected one word a line, each once, as a run folder keeps it")
        return Lexicon([*SPECIAL, *words])
